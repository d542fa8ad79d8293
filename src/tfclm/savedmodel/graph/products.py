"""Matrix products of the decoding loop, in the operand order that is fast for a few rows.

Each step multiplies large matrices by one row per prompt, so most of its time goes into reading the matrices.
TensorFlow's kernels for two or more rows are fastest with a matrix [in, out] on the right, with and without oneDNN;
XLA's kernel for one row is fastest with a transposed matrix [out, in] on the left.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfclm.compat import xla_optimization_barrier

__all__ = ["product"]

Tensor = Any


def product(rows: Tensor, matrix: Tensor, *, transposed: bool, small_batch: bool, compiled: bool) -> Tensor:
    """Rows [N, in] times a matrix [in, out], or [out, in] if `transposed`, cast to the type of the rows; [N, out]."""
    smaller = matrix.dtype != rows.dtype
    matrix = tf.cast(matrix, rows.dtype)
    if not transposed:
        return tf.matmul(rows, matrix)
    if not small_batch:
        return tf.matmul(rows, matrix, transpose_b=True)
    if compiled and smaller:
        # XLA casts the matrix inside the product's loop and would fuse the computation of the rows into it too,
        # repeating it for each output. It does not move a division into such a loop, and the barrier hides that this
        # one divides by 1.
        flat, one = xla_optimization_barrier(input=[tf.reshape(rows, [-1]), tf.constant(1, rows.dtype)])
        rows = tf.reshape(flat / one, tf.shape(rows))
    columns = tf.matmul(matrix, rows, transpose_b=True)
    if compiled:
        # Without the barrier, XLA folds the transposition into the product and swaps the operands back.
        (columns,) = xla_optimization_barrier(input=[columns])
    return tf.transpose(columns)

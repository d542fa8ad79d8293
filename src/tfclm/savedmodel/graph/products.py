"""Matrix products of the decoding loop, in the operand order that is fast for a few rows.

Each step multiplies large matrices by one row per prompt, so most of its time goes into reading the matrices.
TensorFlow's kernels for two or more rows are fastest with a matrix [in, out] on the right, with and without oneDNN;
XLA's kernel for one row is fastest with a transposed matrix [out, in] on the left.
"""

# No postponed annotations here: TensorFlow's dispatch reads the real ones.

from typing import Any

import tensorflow as tf

from tfclm.compat import xla_optimization_barrier

__all__ = ["Kernel", "product"]

Tensor = Any


class Kernel(tf.experimental.ExtensionType):
    """A dense layer's kernel, which the layer sees as [in, out], stored as the transposed `matrix` [out, in].

    `small_batch`: it is multiplied by a few rows. `compiled`: XLA compiles the product.
    """

    small_batch: bool
    compiled: bool
    matrix: tf.Tensor

    @property
    def shape(self) -> tf.TensorShape:
        """The shape that the layer sees."""
        return tf.TensorShape(self.matrix.shape[::-1])


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


@tf.experimental.dispatch_for_api(tf.matmul, {"b": Kernel})
def _matmul(
    a: Any,
    b: Any,
    transpose_a: bool = False,
    transpose_b: bool = False,
    adjoint_a: bool = False,
    adjoint_b: bool = False,
    a_is_sparse: bool = False,
    b_is_sparse: bool = False,
    output_type: Any = None,
    grad_a: bool = False,
    grad_b: bool = False,
    name: str | None = None,
) -> Tensor:
    if transpose_a or transpose_b or adjoint_a or adjoint_b or output_type is not None:
        raise ValueError("a dense layer multiplies by its kernel in an unsupported way")
    return _dense(a, b)


@tf.experimental.dispatch_for_api(tf.tensordot, {"b": Kernel})
def _tensordot(a: Any, b: Any, axes: Any, name: str | None = None) -> Tensor:
    if axes != [[len(a.shape) - 1], [0]]:
        raise ValueError("a dense layer multiplies by its kernel in an unsupported way")
    return _dense(a, b)


def _dense(inputs: Tensor, kernel: Kernel) -> Tensor:
    rows = tf.reshape(inputs, [-1, inputs.shape[-1]])
    outputs = product(rows, kernel.matrix, transposed=True, small_batch=kernel.small_batch, compiled=kernel.compiled)
    result = tf.reshape(outputs, tf.concat([tf.shape(inputs)[:-1], [kernel.matrix.shape[0]]], 0))
    result.set_shape([*inputs.shape[:-1], kernel.matrix.shape[0]])
    return result

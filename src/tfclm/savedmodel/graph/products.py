"""The matrix products of a decoding, in the order that is fast for few rows.

A step multiplies a large matrix with a row for each prompt, so that most of its time goes into reading the matrix.
TensorFlow's kernels of two rows and more are fastest with a matrix [in, out] on the right, with oneDNN and without it;
XLA's, for one row, with a matrix that is turned, [out, in], on the left.
"""

# No postponed annotations here: the dispatch of TensorFlow reads the real ones.

from typing import Any

import tensorflow as tf

from tfclm.compat import xla_optimization_barrier

__all__ = ["Kernel", "product"]

Tensor = Any


class Kernel(tf.experimental.ExtensionType):
    """A dense layer's kernel as the layer expects it, [in, out], around the turned `matrix` [out, in] that is kept.

    `few`: its products are of few rows. `compiled`: they are to be compiled.
    """

    few: bool
    compiled: bool
    matrix: tf.Tensor

    @property
    def shape(self) -> tf.TensorShape:
        """The shape that a layer sees."""
        return tf.TensorShape(self.matrix.shape[::-1])


def product(rows: Tensor, matrix: Tensor, *, turned: bool, few: bool, compiled: bool) -> Tensor:
    """Rows [N, in] times a matrix [in, out], or one that is turned, [out, in], cast to their type; [N, out]."""
    smaller = matrix.dtype != rows.dtype
    matrix = tf.cast(matrix, rows.dtype)
    if not turned:
        return tf.matmul(rows, matrix)
    if not few:
        return tf.matmul(rows, matrix, transpose_b=True)
    if compiled and smaller:
        # XLA casts the matrix within the product's loop, and would compute the rows there too, anew for each output.
        # It leaves a division out of a loop that repeats it; that this one is by 1 it does not see.
        flat, one = xla_optimization_barrier(input=[tf.reshape(rows, [-1]), tf.constant(1, rows.dtype)])
        rows = tf.reshape(flat / one, tf.shape(rows))
    columns = tf.matmul(matrix, rows, transpose_b=True)
    if compiled:
        # XLA would take the transposition into the product, and with it the other order.
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
        raise ValueError("a dense layer takes its kernel in an unknown way")
    return _dense(a, b)


@tf.experimental.dispatch_for_api(tf.tensordot, {"b": Kernel})
def _tensordot(a: Any, b: Any, axes: Any, name: str | None = None) -> Tensor:
    if axes != [[len(a.shape) - 1], [0]]:
        raise ValueError("a dense layer takes its kernel in an unknown way")
    return _dense(a, b)


def _dense(inputs: Tensor, kernel: Kernel) -> Tensor:
    rows = tf.reshape(inputs, [-1, inputs.shape[-1]])
    outputs = product(rows, kernel.matrix, turned=True, few=kernel.few, compiled=kernel.compiled)
    result = tf.reshape(outputs, tf.concat([tf.shape(inputs)[:-1], [kernel.matrix.shape[0]]], 0))
    result.set_shape([*inputs.shape[:-1], kernel.matrix.shape[0]])
    return result

"""Matrix products with int8 weights, by an op that every x86-64 Linux build of TensorFlow contains.

The weights have one scale per output. Each row of the inputs is quantized with its own scale when it is multiplied, so
that a row's result depends on that row alone: the sums are integers, which no kernel may round or saturate.

The inputs are quantized to 14 bits, because with 8, a few channels that are much larger than the others would leave too
few steps for the rest. The op takes 8 bits, so the two digits of each row are two rows of the product. For a few
rows, whose product takes as long as reading the weights, the second digit costs little.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfclm.errors import InputError

__all__ = ["OP", "Matrix", "check_available", "dequantize", "product", "quantize"]

Tensor = Any
AttrValue = tf.compat.v1.AttrValue

OP = "_QuantizedMatMul"
LARGEST = 127  # of the weights
# Processors without VNNI add two products in 16 bits, which saturate: 2 * 127 * 128 < 2**15. So a digit has 7 bits.
BASE = 128
ZERO = 64  # where the first digit begins: the op's kernels for signed rows are slower
STEPS = 63.5  # of the first digit on either side


class Matrix(NamedTuple):
    """An int8 matrix as the product reads it.

    Attributes:
        values: int8 [out, in].
        largest: float32 [out]; `values` times `largest` / 127 is the matrix.
        offset: float32 [out], what the zero point of the rows adds to a product, negated; None if it is only read by
            `dequantize`.
    """

    values: Tensor
    largest: Tensor
    offset: Tensor | None


def quantize(matrix: np.ndarray[Any, Any]) -> Matrix:
    """Rounds a matrix float32 [out, in] to int8, with one scale per output.

    Example:
        >>> quantize(np.array([[0.5, 0.0, -1.0, 0.0]], np.float32)).values
        array([[  64,    0, -127,    0]], dtype=int8)
    """
    largest = np.maximum(np.abs(matrix).max(1), 1e-30).astype(np.float32)  # not 0, and its inverse not infinite
    scale = largest / LARGEST
    values = np.rint(matrix / scale[:, None]).astype(np.int8)
    # It is added to the products of both digits.
    zero = ZERO / (1 + 1 / BASE) * values.sum(1, dtype=np.int64)
    return Matrix(values, largest, (-zero * scale / STEPS).astype(np.float32))


def dequantize(matrix: Matrix, ids: Tensor) -> Tensor:
    """The rows `ids` [...] of a matrix as float32 [..., in]."""
    return tf.cast(tf.gather(matrix.values, ids), tf.float32) * (tf.gather(matrix.largest, ids) / LARGEST)[..., None]


def product(rows: Tensor, matrix: Matrix) -> Tensor:
    """Rows float32 [N, in] times an int8 matrix [out, in]: float32 [N, out]."""
    return (_traced if tf.executing_eagerly() else _product)(rows, *map(tf.convert_to_tensor, matrix))


def check_available() -> None:
    """Raises `InputError` if this build of TensorFlow cannot compute the product."""
    try:
        matrix = Matrix(*map(tf.constant, quantize(np.ones([1, 4], np.float32))))
        product(tf.ones([1, 4]), matrix)
    except (ValueError, tf.errors.OpError) as error:
        raise InputError(
            f"`weights` int8: this build of TensorFlow lacks the op {OP}; builds for Linux on x86-64 have it"
        ) from error


def _product(rows: Tensor, values: Tensor, largest: Tensor, offset: Tensor) -> Tensor:
    unit = tf.maximum(tf.reduce_max(tf.abs(rows), 1, keepdims=True), 1e-30)
    # Casts truncate, so that adding half of a step rounds.
    first = rows * (STEPS / unit) + (ZERO + 0.5 / BASE)
    digits = tf.cast(tf.concat([first, (first - tf.floor(first)) * BASE], 0), tf.uint8)
    inputs = {
        "rows": tf.bitcast(digits, tf.quint8),
        "matrix": tf.bitcast(values, tf.qint8),
        # import_graph_def takes no tensors from outside of a loop, but the results of ops on them.
        "offset": tf.identity(offset),
        # The sums of integers are multiplied by max_rows / 255 and max_matrix / 127.
        "min_rows": tf.zeros([]),
        "max_rows": tf.constant(255 / STEPS),
        "min_matrix": -largest,
        "max_matrix": tf.identity(largest),
    }
    (result,) = tf.import_graph_def(_GRAPH, input_map=inputs, return_elements=["product:0"], name="int8")
    result.set_shape([None, values.shape[0]])
    high, low = tf.split(result, 2)
    product = (high + low * (1 / BASE)) * unit
    product.set_shape([rows.shape[0], values.shape[0]])
    return product


_traced = tf.function(_product, autograph=False, reduce_retracing=True)


def _graph() -> Any:
    """A graph of the op, which has no function in Python."""
    types = {
        "rows": tf.quint8,
        "matrix": tf.qint8,
        **dict.fromkeys(("offset", "min_rows", "max_rows", "min_matrix", "max_matrix"), tf.float32),
    }

    def one(value: tf.DType) -> Any:
        return AttrValue(type=value.as_datatype_enum)

    def several(*values: tf.DType) -> Any:
        return AttrValue(list=AttrValue.ListValue(type=[value.as_datatype_enum for value in values]))

    graph = tf.compat.v1.GraphDef()
    graph.versions.producer = tf.version.GRAPH_DEF_VERSION
    for name, kind in types.items():
        graph.node.add(name=name, op="Placeholder").attr["dtype"].CopyFrom(one(kind))
    node = graph.node.add(name="product", op=OP, input=list(types))
    attributes = {
        "T1": one(tf.quint8),
        "T2": one(tf.qint8),
        "Tbias": one(tf.float32),
        "U": one(tf.float32),
        "Tout": one(tf.float32),
        "Tdevice_inputs": several(tf.quint8, tf.qint8, tf.float32),
        "Thost_inputs": several(*[tf.float32] * 4),
        "Tdevice_outputs": several(tf.float32),
        "Thost_outputs": several(),
        # Dequantize needs BiasAdd before it.
        "fused_ops": AttrValue(list=AttrValue.ListValue(s=[b"BiasAdd", b"Dequantize"])),
        "input_quant_mode": AttrValue(s=b"SCALED"),
        "output_quant_mode": AttrValue(s=b"SCALED"),
        # If constant, each node of the graph would keep a second copy of the weights in the kernel's own layout.
        "is_weight_const": AttrValue(b=False),
        "transpose_a": AttrValue(b=False),
        "transpose_b": AttrValue(b=True),
    }
    for name, value in attributes.items():
        node.attr[name].CopyFrom(value)
    return graph


_GRAPH = _graph()

"""Matrix products with int8 weights, by ops that every x86-64 Linux build of TensorFlow contains.

The weights have one scale per output. Each row of the inputs is quantized with its own scale when it is multiplied, so
that a row's result depends on that row alone: the sums are integers, which no kernel may round or saturate.

The inputs are quantized to 14 bits, because with 8, a few channels that are much larger than the others would leave too
few steps for the rest. The ops take 8 bits, so the two digits of each row are two rows of the product. For a few
rows, whose product takes as long as reading the weights, the second digit costs little.

There are two kernels. That of convolutions reads the weights in a layout of its own, and keeps a copy of them in that
layout; it takes about half of the time for a few rows. That of matrix products rearranges the weights at each call,
which many rows make up for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfclm.errors import InputError
from tfclm.models.shapes import sizes

__all__ = ["OPS", "Matrix", "check_available", "dequantize", "product", "quantize"]

Tensor = Any
AttrValue = tf.compat.v1.AttrValue

OPS = ("_QuantizedMatMul", "_FusedQuantizedConv2D")
LARGEST = 127  # of the weights
# Processors without VNNI add two products in 16 bits, which saturate: 2 * 127 * 127 < 2**15. So a digit has 7 bits.
BASE = 128
ZERO = 64  # the digit that stands for 0: the kernels for signed rows are slower or less exact
STEPS = 63  # of the first digit on either side


class Matrix(NamedTuple):
    """An int8 matrix as the product reads it.

    Attributes:
        values: int8 [in, out].
        scale: float32 [out]; `values` times `scale` is the matrix.
        offset: int32 [out], what the zero points of a row's digits add to its sums, negated; None if the matrix is
            only read by `dequantize`.
    """

    values: Tensor
    scale: Tensor
    offset: Tensor | None


def quantize(matrix: np.ndarray[Any, Any]) -> Matrix:
    """Rounds a matrix float32 [in, out] to int8, with one scale per output.

    Example:
        >>> quantize(np.array([[0.5], [-1.0]], np.float32)).values
        array([[  64],
               [-127]], dtype=int8)
    """
    scale = (np.maximum(np.abs(matrix).max(0), 1e-30) / LARGEST).astype(np.float32)  # its inverse is not infinite
    values = np.rint(matrix / scale).astype(np.int8)
    return Matrix(values, scale, -ZERO * values.sum(0, dtype=np.int32))


def dequantize(matrix: Matrix, ids: Tensor) -> Tensor:
    """The columns `ids` [...] of a matrix as float32 [..., in]."""
    columns = tf.gather(matrix.values, ids, axis=1)
    columns = tf.transpose(columns, [*range(1, columns.shape.rank), 0])
    return tf.cast(columns, tf.float32) * tf.gather(matrix.scale, ids)[..., None]


def product(rows: Tensor, matrix: Matrix, *, small_batch: bool = False) -> Tensor:
    """Rows float32 [N, in] times an int8 matrix [in, out]: float32 [N, out].

    `small_batch`: for a few rows, within a `tf.function`. Its kernel keeps a copy of the first matrix that it is
    called with, so the matrix must be the same at each call of the function.
    """
    if small_batch:
        return _small_product(rows, matrix)
    return (_traced if tf.executing_eagerly() else _product)(rows, *map(tf.convert_to_tensor, matrix))


def check_available() -> None:
    """Raises `InputError` if this build of TensorFlow cannot compute the products."""
    matrix = Matrix(*map(tf.constant, quantize(np.ones([8, 8], np.float32))))

    @tf.function(autograph=False)
    def products() -> list[Tensor]:
        return [product(tf.ones([1, 8]), matrix, small_batch=small_batch) for small_batch in (False, True)]

    try:
        products()
    except (ValueError, tf.errors.OpError) as error:
        raise InputError(
            f"`weights` int8: this build of TensorFlow lacks the op {' or '.join(OPS)}; builds for Linux on x86-64 "
            "have both"
        ) from error


def _product(rows: Tensor, values: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    digits, units = _digits(rows)
    inputs = {
        "rows": tf.bitcast(tf.reshape(digits, [-1, sizes(rows)[1]]), tf.quint8),
        "matrix": tf.bitcast(values, tf.qint8),
        "bias": tf.cast(offset, tf.float32) * scale,
        # The sums are multiplied by max_rows / 255 and max_matrix / 127.
        "min_rows": tf.zeros([]),
        "max_rows": tf.constant(255.0),
        "min_matrix": scale * -LARGEST,
        "max_matrix": scale * LARGEST,
    }
    return _joined(_call(_MATMUL, inputs), units, rows, values)


def _small_product(rows: Tensor, matrix: Matrix) -> Tensor:
    width, outputs = matrix.values.shape
    digits, units = _digits(rows)
    inputs = {
        # As the pixels of one line of an image: the kernel reads the weights once for several of them.
        "rows": tf.bitcast(tf.reshape(digits, [1, 1, -1, width]), tf.quint8),
        "matrix": tf.bitcast(tf.reshape(matrix.values, [1, 1, width, outputs]), tf.qint8),
        "bias": tf.bitcast(matrix.offset, tf.qint32),
        # Only the ranges of the results, which are not used, depend on these.
        "min_rows": tf.zeros([]),
        "max_rows": tf.ones([]),
        "min_matrix": -tf.ones([]),
        "max_matrix": tf.ones([]),
    }
    sums = tf.cast(tf.bitcast(_call(_CONVOLUTION, inputs), tf.int32), tf.float32)
    return _joined(sums, units, rows, matrix.values) * matrix.scale


_traced = tf.function(_product, autograph=False, reduce_retracing=True)


def _digits(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The digits uint8 [2, N, in] of rows [N, in], and what a step of each is worth, float32 [2, N, 1]."""
    largest = tf.maximum(tf.reduce_max(tf.abs(rows), 1, keepdims=True), 1e-30)
    steps = tf.constant([STEPS, STEPS * BASE], tf.float32, [2, 1, 1])
    # Row * steps / largest + zero, as a number of one digit or of two; a cast rounds down, so half of a step is added.
    zero = ZERO * BASE + ZERO + 0.5
    numbers = rows * (steps / largest) + tf.constant([zero / BASE, zero], tf.float32, [2, 1, 1])
    return tf.cast(tf.bitwise.bitwise_and(tf.cast(numbers, tf.int32), BASE - 1), tf.uint8), largest / steps


def _joined(sums: Tensor, units: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """The product [N, out] of rows and values from the sums of their digits, 2 * N * out."""
    high, low = tf.unstack(tf.reshape(sums, [2, -1, sizes(values)[1]]) * units)
    product = high + low
    product.set_shape([rows.shape[0], values.shape[1]])
    return product


def _call(graph: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    # import_graph_def takes no tensors from outside of a loop, but the results of ops on them.
    inputs = {name: tf.identity(value) for name, value in inputs.items()}
    return tf.import_graph_def(graph, input_map=inputs, return_elements=["product:0"], name="int8")[0]


def _graph(op: str, bias: tf.DType, attributes: Mapping[str, Any]) -> Any:
    """A graph of an op that has no function in Python."""
    types = {"rows": tf.quint8, "matrix": tf.qint8, "bias": bias}
    types |= dict.fromkeys(("min_rows", "max_rows", "min_matrix", "max_matrix"), tf.float32)
    graph = tf.compat.v1.GraphDef()
    graph.versions.producer = tf.version.GRAPH_DEF_VERSION
    for name, kind in types.items():
        graph.node.add(name=name, op="Placeholder").attr["dtype"].type = kind.as_datatype_enum
    node = graph.node.add(name="product", op=op, input=list(types))
    for name, value in attributes.items():
        node.attr[name].CopyFrom(_attribute(value))
    return graph


def _attribute(value: Any) -> Any:
    if isinstance(value, list):
        parts = AttrValue.ListValue()
        for part in value:
            if isinstance(part, tf.DType):
                parts.type.append(part.as_datatype_enum)
            elif isinstance(part, int):
                parts.i.append(part)
            else:
                parts.s.append(part.encode())
        return AttrValue(list=parts)
    if isinstance(value, tf.DType):
        return AttrValue(type=value.as_datatype_enum)
    return AttrValue(b=value) if isinstance(value, bool) else AttrValue(s=value.encode())


_MATMUL = _graph(
    "_QuantizedMatMul",
    tf.float32,
    {
        "T1": tf.quint8,
        "T2": tf.qint8,
        "Tbias": tf.float32,
        "U": tf.float32,
        "Tout": tf.float32,
        "Tdevice_inputs": [tf.quint8, tf.qint8, tf.float32],
        "Thost_inputs": [tf.float32] * 4,
        "Tdevice_outputs": [tf.float32],
        "Thost_outputs": [],
        # Dequantize needs BiasAdd before it.
        "fused_ops": ["BiasAdd", "Dequantize"],
        "input_quant_mode": "SCALED",
        "output_quant_mode": "SCALED",
        # If constant, the kernel might keep a copy of the weights too.
        "is_weight_const": False,
        "is_bias_const": False,
        "transpose_a": False,
        "transpose_b": False,
    },
)
_CONVOLUTION = _graph(
    "_FusedQuantizedConv2D",
    tf.qint32,
    {
        "Tinput": tf.quint8,
        "Tfilter": tf.qint8,
        "Tbias": tf.qint32,
        "Tsummand": tf.qint32,
        "out_type": tf.qint32,
        "Tdevice_inputs": [],
        "Thost_inputs": [tf.quint8, tf.qint8, tf.qint32] + [tf.float32] * 4,
        "Tdevice_outputs": [],
        "Thost_outputs": [tf.qint32, tf.float32, tf.float32],
        "fused_ops": ["BiasAdd"],
        # The kernel takes no other weights. It would convert the bias at each call.
        "is_filter_const": True,
        "is_bias_const": True,
        "strides": [1, 1, 1, 1],
        "padding": "VALID",
        "data_format": "NHWC",
    },
)

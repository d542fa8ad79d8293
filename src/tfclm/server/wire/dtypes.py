"""TensorFlow's types and ranks on the wire: names in messages, ranges of integers, the largest rank."""

from __future__ import annotations

import tensorflow as tf

MAX_RANK = 32  # TensorFlow's Python interface crashes above it; TensorFlow itself goes up to 254

_INT32 = (-(2**31), 2**31 - 1)
INTEGER_RANGES = {
    tf.int32: _INT32,
    tf.int16: _INT32,
    tf.int8: _INT32,
    tf.uint8: _INT32,
    tf.int64: (-(2**63), 2**63 - 1),
    tf.uint32: (0, 2**32 - 1),
    tf.uint64: (0, 2**64 - 1),
}


def type_string(dtype: tf.DType) -> str:
    """A type's name in TensorFlow's messages, where floating-point types have their C++ names."""
    name: str = dtype.name
    return {"float32": "float", "float64": "double", "float16": "half"}.get(name, name)

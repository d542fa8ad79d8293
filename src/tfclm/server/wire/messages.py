"""Converts between arrays and messages of the API: TensorProtos, and the results of Classify and Regress."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import classification_pb2, regression_pb2

from tfclm.compat import types_pb2
from tfclm.server.status import invalid
from tfclm.server.wire.dtypes import MAX_RANK

__all__ = ["classifications", "read_tensors", "regressions", "write_tensor"]

_CHUNK = 2**16
MAX_REPEATED_BYTES = 16 * 2**20  # memory per request for values that the request implies but does not hold


def read_tensors(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of TensorProtos.

    A TensorProto may omit the last values of a tensor if they are all equal. A few bytes could claim all memory that
    way, so all tensors together may omit at most `MAX_REPEATED_BYTES`.

    Raises:
        StatusError: INVALID_ARGUMENT, for a tensor that is not well-formed, or for more omitted values.
    """
    arrays = {}
    repeated = 0
    for name, proto in inputs.items():
        try:
            repeated += _repeated_bytes(proto)
            if repeated <= MAX_REPEATED_BYTES:
                arrays[name] = tf.make_ndarray(proto)
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            # KeyError: a type without values, such as DT_RESOURCE.
            raise invalid(f"tensor parsing error: {name}") from error
        if repeated > MAX_REPEATED_BYTES:
            raise invalid(
                f"tensor parsing error: {name}: its shape has more values than are sent; the omitted ones "
                f"may take at most {MAX_REPEATED_BYTES} bytes per request"
            )
    return arrays


def _repeated_bytes(proto: Any) -> int:
    """The memory of the values that a TensorProto omits, in bytes; raises ValueError for an invalid shape."""
    shape = [dim.size for dim in proto.tensor_shape.dim[: MAX_RANK + 1]]
    if proto.tensor_shape.unknown_rank or len(shape) > MAX_RANK or min(shape, default=0) < 0:
        raise ValueError(shape)
    if proto.tensor_content:
        # It holds every value.
        return 0
    dtype = tf.as_dtype(proto.dtype)
    field, parts = _VALUES.get(dtype, ("int_val", 1))
    values = getattr(proto, field)
    # A string object takes 24 bytes, which hold up to 22 characters; longer strings take further memory.
    size = 24 + len(values[-1] if values else b"") if dtype == tf.string else dtype.size
    return int(max(math.prod(shape) - len(values) // parts, 0) * size)


def write_tensor(array: Any, proto: Any) -> None:
    """Fills a TensorProto with one field entry per value, which clients without TensorFlow can read."""
    array = np.asarray(array)
    dtype = tf.as_dtype(array.dtype)
    proto.dtype = dtype.as_datatype_enum
    proto.tensor_shape.CopyFrom(tf.TensorShape(array.shape).as_proto())
    field = _FIELDS.get(dtype)
    if field is None:
        proto.CopyFrom(tf.make_tensor_proto(array))
    else:
        values, entries = array.ravel(), getattr(proto, field)
        # In pieces, because as Python objects the values take ten times the memory of the array.
        for start in range(0, len(values), _CHUNK):
            entries.extend(values[start : start + _CHUNK].tolist())


_FIELDS = {
    tf.float32: "float_val",
    tf.float64: "double_val",
    tf.int8: "int_val",
    tf.uint8: "int_val",
    tf.int16: "int_val",
    tf.uint16: "int_val",
    tf.int32: "int_val",
    tf.int64: "int64_val",
    tf.uint32: "uint32_val",
    tf.uint64: "uint64_val",
    tf.bool: "bool_val",
    tf.string: "string_val",
}

# The field that holds a type's values, and the number of entries per value; other types use int_val.
_VALUES = {dtype: (field, 1) for dtype, field in _FIELDS.items()} | {
    tf.float16: ("half_val", 1),
    tf.bfloat16: ("half_val", 1),
    tf.complex64: ("scomplex_val", 2),
    tf.complex128: ("dcomplex_val", 2),
}


def classifications(signature: Any, count: int, outputs: Mapping[str, Any]) -> classification_pb2.ClassificationResult:
    """The result of Classify for `count` examples, from the outputs by tensor name.

    Raises:
        StatusError: INVALID_ARGUMENT, if the outputs are not classes or scores for each example.
    """
    found = {}
    for output, dtype in (("classes", tf.string), ("scores", tf.float32)):
        if output not in signature.outputs:
            continue
        array = found[output] = np.asarray(outputs[signature.outputs[output].name])
        actual = tf.as_dtype(array.dtype)
        if array.ndim != 2:
            raise invalid(f"Expected Tensor shape: [batch_size num_classes] but got {_shape_string(array)}")
        if actual != dtype:
            raise invalid(f"Expected {output} Tensor of {_type_enum(dtype)}. Got: {_type_enum(actual)}")
        if len(array) != count:
            raise invalid(f"Expected {output} output batch size of {count}. Got: {len(array)}")
    classes, scores = found.get("classes"), found.get("scores")
    if classes is not None and scores is not None and classes.shape[1] != scores.shape[1]:
        raise invalid(
            f"Tensors class and score should match in dim_size(1). Got {classes.shape[1]} vs. {scores.shape[1]}"
        )
    result = classification_pb2.ClassificationResult()
    for row in range(count):
        added = result.classifications.add()
        for column in range(next(iter(found.values())).shape[1]):
            each = added.classes.add()
            if classes is not None:
                # The label is a protobuf string, which must be valid UTF-8.
                each.label = classes[row, column].decode("utf-8", "replace")
            if scores is not None:
                each.score = scores[row, column]
    return result


def regressions(signature: Any, count: int, outputs: Mapping[str, Any]) -> regression_pb2.RegressionResult:
    """The result of Regress for `count` examples, from the outputs by tensor name.

    Raises:
        StatusError: INVALID_ARGUMENT, if the output is not one number per example.
    """
    array = np.asarray(outputs[signature.outputs["outputs"].name])
    if array.ndim != 1 and not (array.ndim == 2 and array.shape[1] == 1):
        raise invalid(
            f"Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got {_shape_string(array)}"
        )
    if len(array) != count:
        raise invalid(f"Input batch size did not match output batch size: {count} vs. {len(array)}")
    if array.dtype != np.float32:
        raise invalid(f"Expected output Tensor of DT_FLOAT.  Got: {_type_enum(tf.as_dtype(array.dtype))}")
    return regression_pb2.RegressionResult(
        regressions=[regression_pb2.Regression(value=value) for value in array.ravel().tolist()]
    )


def _shape_string(array: Any) -> str:
    return f"[{','.join(map(str, array.shape))}]"


def _type_enum(dtype: tf.DType) -> str:
    return str(types_pb2.DataType.Name(dtype.as_datatype_enum))

"""The messages of TensorFlow Serving's gRPC API that a client needs, without TensorFlow.

The modules of tensorflow-serving-api import TensorFlow. Here the same messages are described from their public
definitions (tensorflow/core/framework/*.proto, tensorflow_serving/apis/*.proto), in a descriptor pool of their own, so
that both can be loaded in one process. Fields that the client does not read are omitted: protobuf skips unknown fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory, wrappers_pb2

__all__ = ["DTYPES", "STATES", "from_tensor", "message", "tensor_size", "to_tensor"]

# Package -> message -> field -> number and type: the name of a scalar or message; in [] if repeated, in {} for a map.
_MESSAGES: dict[str, dict[str, dict[str, tuple[int, Any]]]] = {
    "tensorflow": {
        "Dim": {"size": (1, "int64")},
        "TensorShapeProto": {"dim": (2, ["tensorflow.Dim"]), "unknown_rank": (3, "bool")},
        "TensorProto": {
            "dtype": (1, "tensorflow.DataType"),
            "tensor_shape": (2, "tensorflow.TensorShapeProto"),
            "tensor_content": (4, "bytes"),
            "float_val": (5, ["float"]),
            "double_val": (6, ["double"]),
            "int_val": (7, ["int32"]),
            "string_val": (8, ["bytes"]),
            "int64_val": (10, ["int64"]),
            "bool_val": (11, ["bool"]),
        },
        "TensorInfo": {"dtype": (2, "tensorflow.DataType")},
        "SignatureDef": {
            "inputs": (1, {"tensorflow.TensorInfo"}),
            "outputs": (2, {"tensorflow.TensorInfo"}),
            "defaults": (4, {"tensorflow.TensorProto"}),
        },
    },
    "tensorflow.serving": {
        "ModelSpec": {
            "name": (1, "string"),
            "version": (2, "google.protobuf.Int64Value"),
            "signature_name": (3, "string"),
            "version_label": (4, "string"),
        },
        "PredictRequest": {
            "model_spec": (1, "tensorflow.serving.ModelSpec"),
            "inputs": (2, {"tensorflow.TensorProto"}),
        },
        "PredictResponse": {"outputs": (1, {"tensorflow.TensorProto"})},
        "SignatureDefMap": {"signature_def": (1, {"tensorflow.SignatureDef"})},
        "GetModelMetadataRequest": {
            "model_spec": (1, "tensorflow.serving.ModelSpec"),
            "metadata_field": (2, ["string"]),
        },
        "GetModelMetadataResponse": {"metadata": (2, {"google.protobuf.Any"})},
        "ModelVersionStatus": {"version": (1, "int64"), "state": (2, "tensorflow.serving.State")},
        "GetModelStatusRequest": {"model_spec": (1, "tensorflow.serving.ModelSpec")},
        "GetModelStatusResponse": {"model_version_status": (1, ["tensorflow.serving.ModelVersionStatus"])},
    },
}

# The tensor types of a text model's inputs and outputs.
DTYPES = {"DT_FLOAT": 1, "DT_DOUBLE": 2, "DT_INT32": 3, "DT_STRING": 7, "DT_INT64": 9, "DT_BOOL": 10}
STATES = {"START": 10, "LOADING": 20, "AVAILABLE": 30, "UNLOADING": 40, "END": 50}
_ENUMS = {
    "tensorflow": {"DataType": {"DT_INVALID": 0, **DTYPES}},
    "tensorflow.serving": {"State": {"UNKNOWN": 0, **STATES}},
}

# The field of TensorProto that holds the values of each type.
_VALUES: dict[int, tuple[str, Any]] = {
    1: ("float_val", np.float32),
    2: ("double_val", np.float64),
    3: ("int_val", np.int32),
    7: ("string_val", object),
    9: ("int64_val", np.int64),
    10: ("bool_val", np.bool_),
}

_MAX_DIMENSIONS = 32  # TensorFlow's own limit is 254
_MAX_REPEATED = 2**20  # values of a tensor that may be filled with its last one

_Field = descriptor_pb2.FieldDescriptorProto


def _describe(target: Any, package: str, name: str, fields: Mapping[str, tuple[int, Any]]) -> None:
    message = target.add(name=name)
    for field, (number, kind) in fields.items():
        repeated = not isinstance(kind, str)
        (inner,) = kind if repeated else (kind,)
        if isinstance(kind, set):
            entry = "".join(part.capitalize() for part in field.split("_")) + "Entry"
            _describe(message.nested_type, f"{package}.{name}", entry, {"key": (1, "string"), "value": (2, inner)})
            message.nested_type[-1].options.map_entry = True
            inner = f"{package}.{name}.{entry}"
        added = message.field.add(name=field, number=number)
        added.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
        if "." in inner:
            scope, _, last = inner.rpartition(".")
            added.type = _Field.TYPE_ENUM if last in _ENUMS.get(scope, {}) else _Field.TYPE_MESSAGE
            added.type_name = f".{inner}"
        else:
            added.type = getattr(_Field, f"TYPE_{inner.upper()}")


def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    needed = []
    for known in (any_pb2, wrappers_pb2):
        file = descriptor_pb2.FileDescriptorProto()
        known.DESCRIPTOR.CopyToProto(file)
        pool.Add(file)
        needed.append(file.name)
    for package, messages in _MESSAGES.items():
        file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
        file.dependency.extend(needed)
        for name, values in _ENUMS[package].items():
            enum = file.enum_type.add(name=name)
            for value, number in values.items():
                enum.value.add(name=value, number=number)
        for name, fields in messages.items():
            _describe(file.message_type, package, name, fields)
        pool.Add(file)
        needed.append(file.name)
    return pool


_POOL = _pool()


def message(name: str) -> Any:
    """The class of a message, by its full name, such as tensorflow.serving.PredictRequest.

    Source: https://github.com/tensorflow/serving/tree/master/tensorflow_serving/apis
    """
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(name))


def to_tensor(values: Sequence[Any], dtype: str) -> Any:
    """A TensorProto of values, all of one shape (`[B]`, or `[B, L]` for lists of them), bytes for DT_STRING.

    Raises:
        ValueError: the values are not of one shape.
    """
    number = DTYPES[dtype]
    field, kind = _VALUES[number]
    array = np.array(values, kind)
    if kind is object and any(isinstance(value, list) for value in array.ravel()):
        raise ValueError("lists of different lengths")  # NumPy would keep them as objects
    tensor = message("tensorflow.TensorProto")(dtype=number)
    for size in array.shape:
        tensor.tensor_shape.dim.add(size=size)
    getattr(tensor, field).extend(array.ravel().tolist())
    return tensor


def tensor_size(tensor: Any) -> int:
    """The number of values according to a TensorProto's shape.

    Raises:
        ValueError: the shape is not valid.
    """
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    if tensor.tensor_shape.unknown_rank or len(shape) > _MAX_DIMENSIONS or min(shape, default=0) < 0:
        raise ValueError("a tensor without a valid shape")
    return math.prod(shape)


def from_tensor(tensor: Any) -> Any:
    """The values of a TensorProto as (nested) Python lists, or one value for a scalar; strings are bytes.

    Raises:
        ValueError: the type is not one of `DTYPES`, or the values do not fit the shape.
    """
    if tensor.dtype not in _VALUES:
        raise ValueError(f"a tensor of type {tensor.dtype}: only {', '.join(DTYPES)} are read")
    field, kind = _VALUES[tensor.dtype]
    size = tensor_size(tensor)
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    if tensor.tensor_content:
        if kind is object:
            raise ValueError("strings in tensor_content")
        array = np.frombuffer(tensor.tensor_content, kind)
    else:
        array = np.array(list(getattr(tensor, field)), kind)
    # A few bytes must not create a large value: even a shape with a 0 makes as many lists as the sizes before it.
    lists = size or math.prod(shape[: shape.index(0)])
    if array.size < lists and lists > _MAX_REPEATED:
        raise ValueError(f"a tensor of shape {shape} with {array.size} values")
    if 0 < array.size < size and not tensor.tensor_content:
        # The last value is repeated.
        array = np.concatenate([array, np.repeat(array[-1:], size - array.size)])
    elif not array.size:
        array = np.array([b"" if kind is object else 0] * size, kind)
    if array.size != size:
        raise ValueError(f"a tensor of shape {shape} with {array.size} values")
    return array.reshape(shape).tolist()

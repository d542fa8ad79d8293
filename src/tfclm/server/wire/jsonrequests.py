"""Requests of the REST API: JSON values to arrays, under the rules of TensorFlow Serving.

A request in row format ("instances") holds one value, or one object of named values, per example; a request in columnar
format ("inputs") holds whole tensors. The reply has the same format.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import input_pb2

from tfclm.server.deadline import Deadline
from tfclm.server.status import Code, StatusError, invalid
from tfclm.server.wire.dtypes import INTEGER_RANGES, MAX_RANK, type_string
from tfclm.server.wire.jsonreader import parse
from tfclm.server.wire.jsontext import MAX_QUOTED, debug_string, type_name

Inputs = Mapping[str, Any]  # name -> TensorInfo, of a signature


@dataclass(frozen=True)
class PredictBody:
    """The body of a predict request: `inputs` are the arrays by name; `row` is True for row format."""

    signature_name: str
    inputs: dict[str, Any]
    row: bool


def read_predict(
    body: bytes,
    inputs_of: Callable[[str], Inputs],
    deadline: Deadline | None = None,
    max_values: int | None = None,
) -> PredictBody:
    """Reads a predict request; `inputs_of` returns the inputs of a signature by its name, "" for the default one.

    Raises:
        StatusError: the body is not a valid request to that signature, or `parse` refuses it.
    """
    deadline = deadline or Deadline()
    document = parse(body, deadline, max_values)
    name = _signature_name(document)
    # Unlike a dict, protobuf's map fails when it is asked for a name that is not valid UTF-8.
    known = dict(inputs_of(name))
    if not known:
        raise invalid(f"Failed to get input map for signature: {name or 'DEFAULT'}")
    if "instances" in document and "inputs" in document:
        raise _format_error(
            document, "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist "
        )
    if "instances" in document:
        instances = document["instances"]
        if not isinstance(instances, list):
            raise _format_error(document, "Expecting 'instances' to be an list/array")
        if not instances:
            raise _format_error(document, "No values in 'instances' array")
        return PredictBody(name, _from_instances(instances, known, deadline), row=True)
    if "inputs" in document:
        return PredictBody(name, _from_inputs(document["inputs"], known, deadline), row=False)
    raise invalid("Missing 'inputs' or 'instances' key")


def read_examples(
    body: bytes, deadline: Deadline | None = None, max_values: int | None = None
) -> tuple[str, input_pb2.Input]:
    """Reads a classify or regress request: the signature's name and the examples."""
    deadline = deadline or Deadline()
    document = parse(body, deadline, max_values)
    name = _signature_name(document)
    request = input_pb2.Input()
    context = "context" in document
    if context:
        _fill_example(document["context"], request.example_list_with_context.context, deadline)
    if "examples" not in document:
        raise _format_error(document, "When method is classify, key 'examples' is expected and was not found")
    examples = document["examples"]
    if not isinstance(examples, list):
        raise _format_error(document, "Expecting 'examples' value to be an list/array")
    if not examples:
        raise _format_error(document, "'examples' value is an empty array")
    target = request.example_list_with_context if context else request.example_list
    for example in examples:
        _fill_example(example, target.examples.add(), deadline)
    return name, request


def _format_error(value: Any, message: str) -> StatusError:
    return invalid(f"JSON Value: {debug_string(value)} {message}")


def _signature_name(document: dict[str, Any]) -> str:
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise _format_error(document, "not formatted correctly. 'signature_name' key must be a string value.")
    return name


def _from_instances(instances: list[Any], known: Inputs, deadline: Deadline) -> dict[str, Any]:
    if not isinstance(instances[0], dict) and len(known) > 1:
        raise invalid(
            "instances is a plain list, but expecting list of objects as multiple input tensors required "
            "as per tensorinfo_map"
        )
    named = _is_named(instances[0])
    columns: dict[str, _Column] = {}
    for index, instance in enumerate(instances):
        if index % 1024 == 0:
            deadline.check()
        if named and not _is_named(instance):
            raise invalid(f"Expecting object but got list at item {index} of input list")
        if not named and _is_named(instance):
            raise invalid(f"Expecting value/list but got object at item {index} of input list")
        values = instance.items() if named else [(next(iter(known)), instance)]
        for name, value in values:
            try:
                if name not in known:
                    raise invalid(f"JSON object: does not have named input: {name[:MAX_QUOTED]}")
                if name not in columns:
                    columns[name] = _Column(name, tf.as_dtype(known[name].dtype), deadline)
                columns[name].add(value)
            except StatusError as error:
                if error.code is Code.DEADLINE_EXCEEDED:
                    raise
                key = f" key: {name[:MAX_QUOTED]}" if named else ""
                raise invalid(f"Failed to process element: {index}{key} of 'instances' list. Error: {error}") from error
        if named and instance.keys() != known.keys():
            raise invalid(
                f"Failed to process element: {index} of 'instances' list. JSON object: {debug_string(instance)} "
                f"keys must be equal to: {','.join(sorted(known))}"
            )
    return {name: column.array(batch=len(instances)) for name, column in columns.items()}


def _from_inputs(value: Any, known: Inputs, deadline: Deadline) -> dict[str, Any]:
    if not _is_named(value):
        if len(known) > 1:
            raise invalid(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required "
                "as per tensorinfo_map"
            )
        value = {next(iter(known)): value}
    arrays = {}
    for name, info in known.items():
        if name not in value:
            raise invalid(f"Missing named input: {name} in 'inputs' object.")
        column = _Column(name, tf.as_dtype(info.dtype), deadline)
        column.add(value[name])
        arrays[name] = column.array()
    return arrays


def _is_base64(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1 and isinstance(value.get("b64"), str)


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and not _is_base64(value)


class _Column:
    """The values of one input; all items have the same shape."""

    def __init__(self, name: str, dtype: tf.DType, deadline: Deadline) -> None:
        self._name, self._dtype, self._deadline = name, dtype, deadline
        self._steps = 0
        self._values: list[Any] = []
        self._shape: list[int] | None = None
        self._size = 0

    def add(self, item: Any) -> None:
        """Adds an item; the first one sets the shape for the rest."""
        shape: list[int] = []
        inner = item
        while isinstance(inner, list):
            shape.append(len(inner))
            if len(shape) > MAX_RANK:
                raise invalid(f"tensor parsing error: {self._name}")
            if not inner:
                break
            inner = inner[0]
        before = len(self._values)
        self._fill(item, 0, shape)
        size = len(self._values) - before
        if self._shape is None:
            self._shape, self._size = shape, size
        elif size != self._size:
            raise invalid(f"Expecting tensor size: {self._size} but got: {size}")
        elif shape != self._shape:
            raise invalid(f"Expecting shape {_shape(self._shape)} but got: {_shape(shape)}")

    def array(self, batch: int | None = None) -> Any:
        """All items as one array, with a leading dimension of `batch` if that is given."""
        shape = ([] if batch is None else [batch]) + (self._shape or [])
        if len(shape) > MAX_RANK:
            raise invalid(f"tensor parsing error: {self._name}")
        if self._dtype == tf.string:
            flat = np.empty(len(self._values), object)
            flat[:] = self._values
        else:
            # As in C++, a number too large for its float type is infinite, one too large for a small integer truncated.
            wide = np.int64 if self._dtype in INTEGER_RANGES and self._dtype.size < 8 else self._dtype.as_numpy_dtype
            with np.errstate(over="ignore"):
                flat = np.array(self._values, wide).astype(self._dtype.as_numpy_dtype)
        return flat.reshape(shape)

    def _fill(self, value: Any, level: int, shape: list[int]) -> None:
        self._steps += 1
        if self._steps % 4096 == 0:
            self._deadline.check()
        if not isinstance(value, list):
            if level != len(shape):
                raise invalid(
                    f"JSON Value: {debug_string(value)} found at incorrect level: {level + 1} in the JSON DOM. "
                    f"Expected at level: {len(shape)}"
                )
            self._values.append(_scalar(value, self._dtype))
            return
        if level >= len(shape):
            raise invalid(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
        if len(value) != shape[level]:
            raise invalid(
                f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: {shape[level]}"
            )
        for item in value:
            self._fill(item, level + 1, shape)


def _shape(sizes: list[int]) -> str:
    return f"[{','.join(map(str, sizes))}]"


def _scalar(value: Any, dtype: tf.DType) -> Any:
    if isinstance(value, dict) and dtype == tf.string:
        return _decode_base64(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if dtype in INTEGER_RANGES:
        low, high = INTEGER_RANGES[dtype]
        fits = isinstance(value, int) and number and low <= value <= high
    elif dtype in (tf.float32, tf.float64):
        fits = number
    elif dtype == tf.bool:
        fits = isinstance(value, bool)
    elif dtype == tf.string:
        fits = isinstance(value, str)
    elif isinstance(value, dict):
        fits = False
    else:
        raise StatusError(
            Code.UNIMPLEMENTED, f"Conversion of JSON Value: {debug_string(value)} to type: {type_string(dtype)}"
        )
    if not fits:
        raise invalid(
            f"JSON Value: {debug_string(value)} Type: {type_name(value)} is not of expected type: {type_string(dtype)}"
        )
    return _bytes(value) if dtype == tf.string else value


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _decode_base64(value: Any) -> bytes:
    if not _is_base64(value):
        raise invalid(f"JSON Value: {debug_string(value)} not formatted correctly for base64 data")
    # White space is ignored, and padding may be missing, but only all of it.
    text = _bytes(value["b64"]).translate(None, b" \t\n\v\f\r")
    parts = _BASE64.fullmatch(text)
    missing = -len(parts[1]) % 4 if parts else 3
    if not parts or missing == 3 or len(parts[2]) not in (0, missing):
        raise invalid("Unable to base64 decode")
    return base64.b64decode(parts[1] + b"=" * missing)


_BASE64 = re.compile(rb"([A-Za-z0-9+/]*)([=.]*)")


def _fill_example(value: Any, example: Any, deadline: Deadline) -> None:
    deadline.check()
    if not isinstance(value, dict):
        raise invalid(f"Example must be JSON object but got JSON {type_name(value)}")
    for name, content in value.items():
        try:
            feature = example.features.feature[name]
        except UnicodeEncodeError:
            raise invalid(f"Feature: {name} is not valid UTF-8") from None
        for index, item in enumerate(content if isinstance(content, list) else [content]):
            if index % 1024 == 0:
                deadline.check()
            _add_to_feature(item, name, feature)


def _add_to_feature(value: Any, name: str, feature: Any) -> None:
    if value is None or isinstance(value, list) or (isinstance(value, dict) and not _is_base64(value)):
        raise invalid(f"Feature: {name} has element with unexpected JSON type: {type_name(value)}")
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        value = float(value)
    kind = {float: "float_list", str: "bytes_list", dict: "bytes_list"}.get(type(value), "int64_list")
    present = feature.WhichOneof("kind") or kind
    if present != kind:
        raise invalid(f"Unexpected element type in feature: {name} expecting type: {present.removesuffix('_list')}")
    if isinstance(value, dict):
        value = _decode_base64(value)
    elif isinstance(value, str):
        value = _bytes(value)
    elif isinstance(value, float):
        with np.errstate(over="ignore"):
            value = float(np.float32(value))
    elif value >= 2**63:
        raise invalid(f"Feature: {name} has uint64_t element. Only int64_t is supported.")
    getattr(feature, kind).value.append(value)

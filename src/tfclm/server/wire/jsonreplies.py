"""Replies of the REST API: arrays to JSON, formatted as TensorFlow Serving does."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import classification_pb2, regression_pb2

from tfclm.server.deadline import Deadline
from tfclm.server.status import invalid
from tfclm.server.wire.dtypes import INTEGER_RANGES, type_string
from tfclm.server.wire.jsontext import MAX_QUOTED, decimal, quote


def write_predict(outputs: Mapping[str, Any], *, row: bool, deadline: Deadline | None = None) -> bytes:
    """The reply to a predict request: arrays by name, as "predictions" (`row`) or "outputs"."""
    if not outputs:
        raise invalid("Cannot convert empty tensor map to JSON")
    deadline = deadline or Deadline()
    return _encode(_rows(outputs, deadline) if row else _columns(outputs, deadline))


def write_classifications(result: classification_pb2.ClassificationResult) -> bytes:
    """The reply to a classify request: a list of [label, score] per example."""
    if not result.classifications:
        raise invalid("Cannot convert empty ClassificationResults to JSON")
    rows = (
        "[" + ", ".join(f"[{quote(each.label)}, {decimal(each.score, single=True)}]" for each in row.classes) + "]"
        for row in result.classifications
    )
    return _encode('{\n    "results": [' + ", ".join(rows) + "\n    ]\n}")


def write_regressions(result: regression_pb2.RegressionResult) -> bytes:
    """The reply to a regress request: one number per example."""
    if not result.regressions:
        raise invalid("Cannot convert empty RegressionResults to JSON")
    values = ", ".join(decimal(each.value, single=True) for each in result.regressions)
    return _encode('{\n    "results": [' + values + "]\n}")


def write_error(message: str) -> bytes:
    """The reply with an error message."""
    return _encode('{\n    "error": ' + quote(message[:MAX_QUOTED]) + "\n}")


def _encode(text: str) -> bytes:
    # Bytes of a string that are not UTF-8 are written as they are.
    return text.encode("utf-8", "surrogateescape")


def _rows(outputs: Mapping[str, Any], deadline: Deadline) -> str:
    batch = None
    for name, array in outputs.items():
        if np.ndim(array) == 0:
            raise invalid(f"Tensor name: {name} has no shape information ")
        if batch is not None and len(array) != batch:
            raise invalid(f"Tensor name: {name} has inconsistent batch size: {len(array)} expecting: {batch}")
        batch = len(array)
    if not batch:
        return '{\n    "predictions": []\n}'
    columns = {name: _values(name, array, deadline) for name, array in outputs.items()}
    if len(columns) == 1:
        (column,) = columns.values()
        return '{\n    "predictions": [' + ", ".join(map(_compact, column)) + "\n    ]\n}"
    rows = (
        "        {\n"
        + ",\n".join(f"            {quote(name)}: {_compact(column[row])}" for name, column in columns.items())
        + "\n        }"
        for row in range(batch)
    )
    return '{\n    "predictions": [\n' + ",\n".join(rows) + "\n    ]\n}"


def _columns(outputs: Mapping[str, Any], deadline: Deadline) -> str:
    if len(outputs) == 1:
        ((name, array),) = outputs.items()
        return '{\n    "outputs": ' + _indented(_values(name, array, deadline), 1) + "\n}"
    members = (
        f"        {quote(name)}: {_indented(_values(name, array, deadline), 2)}" for name, array in outputs.items()
    )
    return '{\n    "outputs": {\n' + ",\n".join(members) + "\n    }\n}"


def _values(name: str, array: Any, deadline: Deadline) -> Any:
    """An array as nested lists whose leaves are JSON text."""
    array = np.asarray(array)
    dtype = tf.as_dtype(array.dtype)
    render: Callable[[Any], Any]
    if dtype == tf.string:
        render = _base64_json if name.endswith("_bytes") else _string_json
    elif dtype in (tf.float32, tf.float64):
        render = partial(decimal, single=dtype == tf.float32)
    elif dtype in INTEGER_RANGES:
        render = str
    elif dtype == tf.bool:
        render = _bool_json
    else:
        raise invalid(f"Failed to write JSON value for tensor type: {type_string(dtype)}")
    flat, values = np.empty(array.size, object), array.ravel()
    for start in range(0, array.size, 4096):
        deadline.check()
        flat[start : start + 4096] = [render(value) for value in values[start : start + 4096].tolist()]
    return flat.reshape(array.shape).tolist()


def _string_json(value: bytes | str) -> str:
    return quote(value if isinstance(value, str) else value.decode("utf-8", "surrogateescape"))


def _base64_json(value: bytes | str) -> dict[str, str]:
    return {"b64": f'"{base64.b64encode(_encode(value) if isinstance(value, str) else value).decode()}"'}


def _bool_json(value: bool) -> str:
    return "true" if value else "false"


def _compact(value: Any) -> str:
    """A value in row format, with its lists on one line."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_compact, value)) + "]"
    return f'{{"b64": {value["b64"]}}}' if isinstance(value, dict) else str(value)


def _indented(value: Any, level: int) -> str:
    """A value in columnar format, with one item per line, indented by `level` levels."""
    inner, outer = "\n" + "    " * (level + 1), "\n" + "    " * level
    if isinstance(value, list):
        return "[" + ",".join(inner + _indented(item, level + 1) for item in value) + (outer if value else "") + "]"
    return f'{{{inner}"b64": {value["b64"]}{outer}}}' if isinstance(value, dict) else str(value)

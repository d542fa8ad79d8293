"""Reads and checks what a server sent, before anything else uses it.

Whatever is wrong with a reply becomes a ServerError with a message of one line.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from google.protobuf import json_format
from google.protobuf import message as protobuf

from tfclm.client.messages import DTYPES, from_tensor, message, tensor_size
from tfclm.client.transport import ServerError, Signature, one_line

# Raised by Python and protobuf for unexpected values.
_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    json_format.Error,
    protobuf.Error,
)
_TYPE_NAMES = {number: name for name, number in DTYPES.items()}
_OTHER = "another type"
_BITS = {"DT_INT32": 31, "DT_INT64": 63}


@contextmanager
def reading(address: str, what: str) -> Iterator[None]:
    """Turns errors while a part of a reply is read into ServerError, because the server caused them."""
    try:
        yield
    except _UNREADABLE as error:
        message = one_line(str(error)) or type(error).__name__
        raise ServerError(f"{address} sent {what} that cannot be read: {message}") from error


def from_json(content: bytes) -> Any:
    """The value of a JSON document; raises ValueError or RecursionError.

    TensorFlow Serving sends NaN and Infinity, which Python reads. It also sends the bytes of strings unchecked: bytes
    that are not UTF-8 are kept as surrogates, which `_leaf` converts back.
    """
    return json.loads(content.decode("utf-8", "surrogateescape"))


def read_signatures(signatures: Any) -> dict[str, Signature]:
    """The signatures of a SignatureDefMap."""
    for name, signature in signatures.signature_def.items():
        # These names appear in messages.
        for key in (name, *signature.inputs, *signature.outputs):
            if not key.isprintable():
                raise ValueError(f"a name that cannot be printed: {key!a}")
    return {
        name: Signature(
            {key: _TYPE_NAMES.get(info.dtype, _OTHER) for key, info in signature.inputs.items()},
            {key: _TYPE_NAMES.get(info.dtype, _OTHER) for key, info in signature.outputs.items()},
            {key: _default(key, value) for key, value in signature.defaults.items() if key in signature.inputs},
        )
        for name, signature in signatures.signature_def.items()
        if name != "__saved_model_init_op"
    }


def read_metadata(metadata: Any) -> dict[str, Signature]:
    """The signatures in the metadata, as REST returns it."""
    return read_signatures(_parsed(metadata["metadata"]["signature_def"], "SignatureDefMap"))


def read_status(status: Any) -> dict[int, int]:
    """Number -> state of the versions in a model's status, as REST returns it."""
    response = _parsed(status, "GetModelStatusResponse")
    return {version.version: version.state for version in response.model_version_status}


def read_rows(predictions: Any, outputs: Mapping[str, str], size: int) -> dict[str, list[Any]]:
    """The predictions of a row request as outputs name -> `size` values."""
    if not isinstance(predictions, list) or len(predictions) != size:
        raise ValueError(f"no prediction for each of {size} rows")
    names = set(outputs)
    # If a signature has one output, REST omits its name.
    if len(names) == 1 and not all(isinstance(row, dict) and set(row) == names for row in predictions):
        predictions = [{name: row} for row in predictions for name in names]
    for row in predictions:
        if not isinstance(row, dict) or set(row) != names:
            raise ValueError(f"a row without the outputs {', '.join(sorted(names))}")
    columns = {}
    for name, dtype in outputs.items():
        columns[name], _ = _values([row[name] for row in predictions], dtype, name)
    return columns


def read_tensors(tensors: Mapping[str, Any], outputs: Mapping[str, str], size: int) -> dict[str, list[Any]]:
    """The tensors of a PredictResponse as outputs name -> `size` values."""
    if set(tensors) != set(outputs):
        raise ValueError(f"other outputs than {', '.join(sorted(outputs))}")
    columns = {}
    for name, dtype in outputs.items():
        if _TYPE_NAMES.get(tensors[name].dtype, _OTHER) != dtype:
            raise ValueError(f"{name} is not of type {dtype}")
        columns[name] = from_tensor(tensors[name])
        if not isinstance(columns[name], list) or len(columns[name]) != size:
            raise ValueError(f"{name} has no value for each of {size} rows")
    return columns


def as_rows(outputs: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Outputs name -> B values as B rows."""
    return [Row(zip(outputs, row, strict=True)) for row in zip(*outputs.values(), strict=True)]


class Row(dict[str, Any]):
    """One row of a signature's outputs; each method returns a value of its type or raises ValueError."""

    def raw(self, name: str) -> bytes:
        """The bytes of a string."""
        return bytes(self._one(name, bytes))

    def text(self, name: str) -> str:
        """A UTF-8 string."""
        return self.raw(name).decode()

    def count(self, name: str) -> int:
        """A whole number, 0 or more."""
        value = int(self._one(name, int))
        if value < 0:
            raise ValueError(f"{name} is {value}")
        return value

    def number(self, name: str) -> float:
        """A number."""
        return float(self._one(name, float))

    def list_of(self, name: str, kind: type, count: int) -> tuple[Any, ...]:
        """The first `count` values of a list."""
        values = self._one(name, list)[:count]
        if len(values) < count or not all(isinstance(value, kind) for value in values):
            raise ValueError(f"{name} has no {count} values")
        return tuple(values)

    def _one(self, name: str, kind: type) -> Any:
        if not isinstance(self.get(name), kind):
            raise ValueError(f"{name} is missing, or of another type or rank")
        return self[name]


def _parsed(value: Any, name: str) -> Any:
    """A JSON value as a message."""
    # Raises ValueError for lone surrogates, for which protobuf raises SystemError.
    json.dumps(value, ensure_ascii=False).encode()
    return json_format.ParseDict(value, message(f"tensorflow.serving.{name}")(), ignore_unknown_fields=True)


def _default(name: str, tensor: Any) -> Any:
    """The value of a default, which applies to every row."""
    # Checked before the tensor is expanded, because a few bytes can claim a large shape.
    if tensor_size(tensor) != 1:
        raise ValueError(f"the default of {name} is not one value")
    value = from_tensor(tensor)
    while isinstance(value, list):
        (value,) = value
    return value


def _values(value: Any, dtype: str, name: str) -> tuple[Any, tuple[int, ...]]:
    """A JSON value converted to its type, and its shape, which must be the same for all rows."""
    if not isinstance(value, list):
        return _leaf(value, dtype, name), ()
    items = [_values(item, dtype, name) for item in value]
    shapes = {shape for _, shape in items}
    if len(shapes) > 1:
        raise ValueError(f"{name} has rows of different shapes")
    return [item for item, _ in items], (len(items), *(shapes.pop() if shapes else ()))


def _leaf(value: Any, dtype: str, name: str) -> Any:
    if dtype == "DT_STRING":
        if isinstance(value, str):
            return value.encode("utf-8", "surrogateescape")
        if isinstance(value, dict) and list(value) == ["b64"] and isinstance(value["b64"], str):
            return base64.b64decode(value["b64"], validate=True)
    elif dtype == "DT_BOOL":
        if isinstance(value, bool):
            return value
    elif isinstance(value, bool):
        pass
    elif dtype in _BITS:
        if isinstance(value, int) and -(2 ** _BITS[dtype]) <= value < 2 ** _BITS[dtype]:
            return value
    elif dtype in ("DT_FLOAT", "DT_DOUBLE"):
        if isinstance(value, int | float):
            return float(value)
    elif dtype == _OTHER and isinstance(value, str | int | float):
        return value
    raise ValueError(f"{name} has a value that is not of type {dtype}")

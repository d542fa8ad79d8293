"""The inputs of a request, from the values that a caller gives."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from tfclm.errors import InputError

__all__ = ["broadcast", "check_value", "is_list", "rows_of_lists"]

# The bits of their values, without the sign.
_INTEGERS = {"DT_INT32": 31, "DT_INT64": 63}


def rows_of_lists(params: Mapping[str, Any], size: int) -> dict[str, list[list[Any]]]:
    """The parameters that are lists in each of `size` rows, as `generate_tokens` takes them, padded to one length."""
    lists: dict[str, list[list[Any]]] = {}
    if "logit_bias" in params:
        given = params["logit_bias"]
        every = [given] * size if isinstance(given, Mapping) else given
        if not is_list(every) or not all(isinstance(biases, Mapping) for biases in every):
            raise InputError(f"`logit_bias` is {given!r}: give a mapping from token ids to numbers")
        lists["logit_bias_ids"] = _padded([list(biases) for biases in every], -1)
        lists["logit_bias"] = _padded([list(biases.values()) for biases in every], 0.0)
    if "stop" in params:
        stops = [params["stop"]] * size if not is_list(params["stop"]) else params["stop"]
        lists["stop"] = _padded([list(each) if is_list(each) else [each] for each in stops], "")
    return lists


def _padded(rows: list[list[Any]], value: Any) -> list[list[Any]]:
    width = max([1, *map(len, rows)])
    return [row + [value] * (width - len(row)) for row in rows]


def is_list(value: Any) -> bool:
    """Whether a value is a sequence other than a text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def broadcast(value: Any, size: int) -> Sequence[Any]:
    """The value of each of `size` rows: one of a sequence, or the same for all."""
    return value if is_list(value) else [value] * size


def check_value(value: Any, dtype: str, name: str) -> Any:
    """A value of a row, converted to its type; its rank and range are checked by the model."""
    if is_list(value):
        return [check_value(item, dtype, name) for item in value]
    if dtype == "DT_STRING":
        if isinstance(value, bytes):
            value = value.decode("utf-8", "surrogateescape")
        if not isinstance(value, str):
            raise InputError(f"`{name}` is {value!r}: give a text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"`{name}` is not UTF-8: give the text as UTF-8") from error
        return value
    if dtype in _INTEGERS:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise InputError(f"`{name}` is {value!r}: give a whole number")
        limit = 2 ** _INTEGERS[dtype]
        if not -limit <= value < limit:
            raise InputError(f"`{name}` is {value}: give a number that fits {_INTEGERS[dtype] + 1} bits")
        return int(value)
    if dtype in ("DT_FLOAT", "DT_DOUBLE"):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise InputError(f"`{name}` is {value!r}: give a number")
        return float(value)
    if dtype == "DT_BOOL" and isinstance(value, bool):
        return value
    raise InputError(f"`{name}` is {value!r}: the signature takes {dtype}")

"""Writes JSON as TensorFlow Serving writes it: strings, numbers, and values that an error message quotes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

DEBUG_BYTES = 256  # a value that an error message quotes is cut at about this length
MAX_QUOTED = 2**16  # characters of a string that a message quotes


def quote(text: str) -> str:
    """A text as a JSON string, in which only characters that must be escaped are."""
    return '"' + _ESCAPED.sub(_escaped, text) + '"'


_ESCAPED = re.compile(r'["\\\x00-\x1f]')
_SHORT_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _escaped(match: re.Match[str]) -> str:
    return _SHORT_ESCAPES.get(match[0]) or f"\\u{ord(match[0]):04X}"


def type_name(value: Any) -> str:
    """The name of a value's JSON type in error messages."""
    if value is None:
        return "Null"
    if isinstance(value, bool):
        return "True" if value else "False"
    if isinstance(value, str):
        return "String"
    if isinstance(value, list):
        return "Array"
    return "Object" if isinstance(value, dict) else "Number"


def debug_string(value: Any) -> str:
    """A value as an error message quotes it: an array on one line, an object with one member per line; cut if long."""
    text = ""
    for token in _tokens(value, 0):
        if len(text.encode("utf-8", "surrogateescape")) >= DEBUG_BYTES:
            break
        text += token
    return text


def _tokens(value: Any, level: int, lead: str = "") -> Iterator[str]:
    # Each level adds a byte, so the caller stops reading before Python's recursion limit.
    if isinstance(value, list):
        yield lead + "["
        for index, item in enumerate(value):
            yield from _tokens(item, level + 1, ", " if index else "")
        yield "]"
    elif isinstance(value, dict):
        yield lead + "{"
        for index, (key, item) in enumerate(value.items()):
            yield (",\n" if index else "\n") + "    " * (level + 1) + quote(key[:MAX_QUOTED])
            yield from _tokens(item, level + 1, ": ")
        yield ("\n" + "    " * level if value else "") + "}"
    elif isinstance(value, str):
        yield lead + quote(value[:MAX_QUOTED])
    elif isinstance(value, float):
        yield lead + decimal(value, shortest=True)
    else:
        yield lead + json.dumps(value)


def decimal(value: float, *, single: bool = False, shortest: bool = False) -> str:
    """A number with a decimal point or exponent: six digits if they give the exact value, else as many as it may need.

    Args:
        value: the number.
        single: the value is a float32.
        shortest: use the fewest digits that give the exact value.
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    if shortest:
        text = repr(value).replace("e+", "e").replace("e-0", "e-")
    else:
        text = f"{value:g}"
        if (_single(float(text)) if single else float(text)) != value:
            text = f"{value:.{9 if single else 17}g}"
    return text if "." in text or "e" in text else text + ".0"


def _single(value: float) -> float:
    import numpy as np

    with np.errstate(over="ignore"):
        return float(np.float32(value))

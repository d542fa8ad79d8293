"""JSON text in and out, as TensorFlow Serving reads and writes it.

Reading keeps what a JSON library for Python would lose: NaN and Infinity are numbers, bytes that are no UTF-8 pass
through (as lone surrogates in a `str`), whatever follows the document is ignored, nesting has no limit, and an error
names its byte. Values are None, bool, int, float, str, list and dict.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from tfclm.server.status import StatusError, invalid

DEBUG_BYTES = 256  # a value that an error message quotes is cut about here


def parse(body: bytes) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        StatusError: INVALID_ARGUMENT, for what is no JSON or no object.
    """
    if not body:
        raise _error("The document is empty")
    body = body.removeprefix(b"\xef\xbb\xbf")
    try:
        value = _parse_fast(body.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        # Invalid, nested too deeply for the interpreter's parser, or one of the few texts on which the two differ.
        value = _Parser(body).parse()
    if not isinstance(value, dict):
        raise invalid(f"JSON Value: {debug_string(value)} Is not object")
    return value


def _parse_fast(text: str) -> Any:
    """Reads with the interpreter's own parser what both read alike; ValueError for the rest."""
    escapes = len(_SURROGATE.findall(text))
    if escapes and escapes != 2 * len(_SURROGATE_PAIR.findall(text)):
        raise ValueError("a surrogate that may be alone")
    if _LONG_NUMBER.search(text):
        raise ValueError("an integer that may be too large for 64 bits, and is a float then")
    blank = _SPACE.match(text)
    return _DECODER.raw_decode(text, blank.end() if blank else 0)[0]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of a key that is given twice the first counts.
    value = dict(pairs)
    return value if len(value) == len(pairs) else dict(reversed(pairs))


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("too big")
    return value


_SPACE = re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE_PAIR = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_LONG_NUMBER = re.compile(r"\d{19}")
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite)


def _error(reason: str, offset: int | None = None) -> StatusError:
    return invalid(f"JSON Parse error: {reason}" + ("" if offset is None else f" at offset: {offset}"))


_BLANK = re.compile(rb"[ \t\n\r]*")
_NUMBER = re.compile(rb"-?(?:NaN|Inf(?:inity)?)|(-?(?:0|[1-9][0-9]*))(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_PLAIN = re.compile(rb'[^"\\\x00-\x1f]*')
_HEX = re.compile(rb"[0-9a-fA-F]{4}")
_LITERALS = {ord("n"): (b"null", None), ord("t"): (b"true", True), ord("f"): (b"false", False)}
_ESCAPES = dict(zip(b'"\\/bfnrt', b'"\\/\b\f\n\r\t', strict=True))


class _Parser:
    """An iterative parser: its stack is a list, so that no depth of nesting ends the process."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def parse(self) -> Any:
        # A container that is open, and for an object the key that waits for its value.
        stack: list[tuple[list[Any] | dict[str, Any], str]] = []
        self._skip_blank()
        if self._peek() in b"\0]},:":
            raise _error("The document is empty.", self._at)
        while True:
            first = self._peek()
            value: Any
            if first == ord("["):
                self._at += 1
                self._skip_blank()
                if self._peek() != ord("]"):
                    stack.append(([], ""))
                    continue
                self._at += 1
                value = []
            elif first == ord("{"):
                self._at += 1
                self._skip_blank()
                if self._peek() != ord("}"):
                    stack.append(({}, self._key()))
                    continue
                self._at += 1
                value = {}
            else:
                value = self._scalar(first)
            # The value is whole: put it where it belongs, and close what it closes.
            while stack:
                container, key = stack[-1]
                self._skip_blank()
                mark = self._peek()
                if isinstance(container, list):
                    container.append(value)
                    end, reason = ord("]"), "Missing a comma or ']' after an array element."
                else:
                    container.setdefault(key, value)
                    end, reason = ord("}"), "Missing a comma or '}' after an object member."
                if mark == ord(","):
                    self._at += 1
                    self._skip_blank()
                    if isinstance(container, dict):
                        stack[-1] = (container, self._key())
                    break
                if mark != end:
                    raise _error(reason, self._at)
                self._at += 1
                value = container
                stack.pop()
            if not stack:
                return value

    def _peek(self) -> int:
        return self._body[self._at] if self._at < len(self._body) else 0

    def _skip_blank(self) -> None:
        blank = _BLANK.match(self._body, self._at)
        self._at = blank.end() if blank else self._at

    def _key(self) -> str:
        if self._peek() != ord('"'):
            raise _error("Missing a name for object member.", self._at)
        key = self._string()
        self._skip_blank()
        if self._peek() != ord(":"):
            raise _error("Missing a colon after a name of object member.", self._at)
        self._at += 1
        self._skip_blank()
        return key

    def _scalar(self, first: int) -> Any:
        if first == ord('"'):
            return self._string()
        if first in _LITERALS:
            literal, value = _LITERALS[first]
            for offset, character in enumerate(literal):
                if self._body[self._at + offset : self._at + offset + 1] != bytes([character]):
                    raise _error("Invalid value.", self._at + offset)
            self._at += len(literal)
            return value
        return self._number()

    def _number(self) -> int | float:
        match = _NUMBER.match(self._body, self._at)
        if not match:
            raise _error("Invalid value.", self._at + (self._peek() == ord("-")))
        start, self._at = self._at, match.end()
        text = match[0].decode()
        whole, fraction, exponent = match.groups()
        if whole is None:
            return float(text)
        rest = self._body[self._at : self._at + 1]
        if rest == b"." and not fraction:
            raise _error("Miss fraction part in number.", self._at + 1)
        if rest in (b"e", b"E") and not exponent:
            signed = self._body[self._at + 1 : self._at + 2] in (b"+", b"-")
            raise _error("Miss exponent in number.", self._at + 1 + signed)
        if not fraction and not exponent and len(text) <= 20 and -(2**63) <= int(text) < 2**64:
            return int(text)
        value = float(text)
        if math.isinf(value):
            raise _error("Number too big to be stored in double.", start)
        return value

    def _string(self) -> str:
        self._at += 1
        pieces: list[bytes] = []
        while True:
            if plain := _PLAIN.match(self._body, self._at):
                pieces.append(plain[0])
                self._at = plain.end()
            mark = self._peek()
            if mark == ord('"'):
                self._at += 1
                return b"".join(pieces).decode("utf-8", "surrogateescape")
            if mark == 0:
                raise _error("Missing a closing quotation mark in string.", self._at)
            if mark != ord("\\"):
                raise _error("Invalid encoding in string.", self._at)
            pieces.append(self._escape())

    def _escape(self) -> bytes:
        start = self._at
        self._at += 1
        mark = self._peek()
        if mark in _ESCAPES:
            self._at += 1
            return bytes([_ESCAPES[mark]])
        if mark != ord("u"):
            raise _error("Invalid escape character in string.", start)
        unit = self._hex(start)
        if 0xD800 <= unit <= 0xDFFF:
            if unit > 0xDBFF or self._body[self._at : self._at + 2] != b"\\u":
                raise _error("The surrogate pair in string is invalid.", start)
            self._at += 1
            low = self._hex(start)
            if not 0xDC00 <= low <= 0xDFFF:
                raise _error("The surrogate pair in string is invalid.", start)
            unit = 0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00)
        return chr(unit).encode()

    def _hex(self, start: int) -> int:
        match = _HEX.match(self._body, self._at + 1)
        if not match:
            raise _error("Incorrect hex digit after \\u escape in string.", start)
        self._at = match.end()
        return int(match[0], 16)


def quote(text: str) -> str:
    """A JSON string of text, in which only what must be escaped is."""
    return '"' + _ESCAPED.sub(_escaped, text) + '"'


_ESCAPED = re.compile(r'["\\\x00-\x1f]')
_SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _escaped(match: re.Match[str]) -> str:
    return _SHORT.get(match[0]) or f"\\u{ord(match[0]):04X}"


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
    """A value as an error message quotes it: an array on one line, an object's members one a line, cut when long."""
    text = ""
    for token in _tokens(value, 0):
        if len(text.encode("utf-8", "surrogateescape")) >= DEBUG_BYTES:
            break
        text += token
    return text


def _tokens(value: Any, level: int, lead: str = "") -> Iterator[str]:
    # Each level adds a byte, so that whoever reads stops before the interpreter's recursion limit.
    if isinstance(value, list):
        yield lead + "["
        for place, item in enumerate(value):
            yield from _tokens(item, level + 1, ", " if place else "")
        yield "]"
    elif isinstance(value, dict):
        yield lead + "{"
        for place, (key, item) in enumerate(value.items()):
            yield (",\n" if place else "\n") + "    " * (level + 1) + quote(key)
            yield from _tokens(item, level + 1, ": ")
        yield ("\n" + "    " * level if value else "") + "}"
    elif isinstance(value, str):
        yield lead + quote(value)
    elif isinstance(value, float):
        yield lead + decimal(value, shortest=True)
    else:
        yield lead + json.dumps(value)


def decimal(value: float, *, single: bool = False, shortest: bool = False) -> str:
    """A number that reads as a decimal one: six digits if those are the number, else as many as it may need.

    `single` says that the value is a float32, `shortest` that the fewest digits are wanted that are the number.
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

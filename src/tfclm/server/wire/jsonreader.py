"""Reads JSON as TensorFlow Serving reads it.

It keeps what Python's JSON parser would lose or refuse: NaN and Infinity are numbers, bytes that are not UTF-8 are kept
(as lone surrogates in a `str`), anything after the document is ignored, nesting has no limit, and an error gives the
offset of its byte. Values are None, bool, int, float, str, list and dict.

Everything that Python's parser reads in the same way is left to it, because it is written in C. No other thread runs
during that time, so it gets a small document as a whole, but a large one in pieces.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from json import decoder
from typing import Any

from tfclm.server.deadline import Deadline
from tfclm.server.status import StatusError, TooLarge, invalid
from tfclm.server.wire.jsontext import debug_string

LARGE_BYTES = 2**18  # Python's parser takes some ten milliseconds for the worst document of this size
_PIECE_BYTES = 2**16


def parse(body: bytes, deadline: Deadline | None = None, max_values: int | None = None) -> dict[str, Any]:
    """Reads a JSON object of at most `max_values` values.

    Raises:
        StatusError: INVALID_ARGUMENT if it is not JSON or not an object; DEADLINE_EXCEEDED; `TooLarge`.
    """
    if not body:
        raise _error("The document is empty")
    body = body.removeprefix(b"\xef\xbb\xbf")
    try:
        if len(body) > LARGE_BYTES:
            raise ValueError("too long to keep other threads waiting")
        value = _parse_whole(body.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        # Invalid, too deeply nested for Python's parser, or one of the few texts on which the two differ.
        value = _Reader(body, deadline or Deadline(), max_values).parse()
    if not isinstance(value, dict):
        raise invalid(f"JSON Value: {debug_string(value)} Is not object")
    return value


def _parse_whole(text: str) -> Any:
    """Reads a text with Python's parser; raises ValueError if that reads it differently."""
    space = _LEADING_SPACE.match(text)
    return _decoder(text).raw_decode(text, space.end() if space else 0)[0]


def _decoder(text: str) -> json.JSONDecoder:
    """Python's parser, configured to read the text as this module does; raises ValueError if it cannot."""
    escapes = len(_SURROGATE.findall(text))
    if escapes and escapes != 2 * len(_SURROGATE_PAIR.findall(text)):
        raise ValueError("possibly a lone surrogate")
    return _STRICT_DECODER if _EXTREME.search(text) else _PLAIN_DECODER


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # The first of duplicate keys counts.
    value = dict(pairs)
    return value if len(value) == len(pairs) else dict(reversed(pairs))


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("too big")
    return value


def _integer(text: str) -> int | float:
    """An integer, or a float if it does not fit into 64 bits."""
    if len(text) <= 20 and -(2**63) <= int(text) < 2**64:
        return int(text)
    return _finite(text)


_LEADING_SPACE = re.compile(r"[ \t\n\r]*")
# Python's parser of a string, called with the index after the opening quotation mark: the string, and its end.
_scan_string: Callable[[str, int], tuple[str, int]] = vars(decoder)["scanstring"]
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE_PAIR = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
# May be a number that Python's parser reads differently.
_EXTREME = re.compile(r"\d{19}|[eE]\+?\d{3}")
_PLAIN_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_STRICT_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_int=_integer)


def _error(reason: str, offset: int | None = None) -> StatusError:
    return invalid(f"JSON Parse error: {reason}" + ("" if offset is None else f" at offset: {offset}"))


# Each match is bounded in length, because no other thread runs while it is searched for.
_WHITESPACE = re.compile(rb"[ \t\n\r]{1,65536}")
_NUMBER = re.compile(rb"-?(?:NaN|Inf(?:inity)?)|(-?(?:0|[1-9][0-9]*))(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_PLAIN = re.compile(rb'[^"\\\x00-\x1f]{1,65536}')
_KEY = re.compile(rb'"([^"\\\x00-\x1f]{0,64})":(?![ \t\n\r])')
_HEX = re.compile(rb"[0-9a-fA-F]{4}")
_LITERALS = {ord("n"): (b"null", None), ord("t"): (b"true", True), ord("f"): (b"false", False)}
_ESCAPES = dict(zip(b'"\\/bfnrt', b'"\\/\b\f\n\r\t', strict=True))


class _Reader:
    """An iterative parser: its stack is a list, so deep nesting cannot overflow the process's stack.

    Python's parser reads ahead for it, one piece of the body at a time.
    """

    def __init__(self, body: bytes, deadline: Deadline, max_values: int | None) -> None:
        self._body, self._deadline, self._max_values = body, deadline, max_values
        self._position = 0
        self._values = 0
        self._steps = 0
        # After a piece could not be read ahead, no further one is tried for a number of bytes that doubles each time.
        self._no_pieces_until = self._pause = 0

    def parse(self) -> Any:
        # The open containers, each with the key of the next value if it is an object.
        stack: list[tuple[list[Any] | dict[str, Any], str]] = []
        self._skip_whitespace()
        if self._peek() in b"\0]},:":
            raise _error("The document is empty.", self._position)
        while True:
            self._count(1)
            first = self._peek()
            value: Any
            if first == ord("[") or first == ord("{"):
                self._position += 1
                self._skip_whitespace()
                value = [] if first == ord("[") else {}
                if self._peek() != first + 2 and not self._read_ahead(value):  # "]" or "}"
                    stack.append((value, "" if first == ord("[") else self._key()))
                    continue
                self._position += 1
            else:
                value = self._scalar(first)
            # The value is complete: add it to its container, and close the containers that end here.
            while stack:
                container, key = stack[-1]
                self._skip_whitespace()
                mark = self._peek()
                if isinstance(container, list):
                    container.append(value)
                    end, reason = ord("]"), "Missing a comma or ']' after an array element."
                else:
                    container.setdefault(key, value)
                    end, reason = ord("}"), "Missing a comma or '}' after an object member."
                if mark == ord(","):
                    self._position += 1
                    self._skip_whitespace()
                    if not self._read_ahead(container):
                        if isinstance(container, dict):
                            stack[-1] = (container, self._key())
                        break
                elif mark != end:
                    raise _error(reason, self._position)
                self._position += 1
                value = container
                stack.pop()
            if not stack:
                return value

    def _read_ahead(self, container: list[Any] | dict[str, Any]) -> bool:
        """Adds to a container all items or members that the next piece of the body holds.

        The position is at the start of an item or member before and after this; returns True if it is at the
        container's end instead.
        """
        if self._position < self._no_pieces_until:
            return False
        self._deadline.check()
        text = self._body[self._position : self._position + _PIECE_BYTES].decode("utf-8", "surrogateescape")
        index, ended, values = 0, False, 0
        try:
            scan = vars(_decoder(text))["scan_once"]
            while not ended:
                key, start = "", index
                if isinstance(container, dict):
                    if text[index] != '"':
                        break
                    key, start = _scan_string(text, index + 1)
                    between = _COLON.match(text, start)
                    if not between:
                        break
                    start = between.end()
                value, end = scan(text, start)
                # The end of the piece may have cut the value, such as a number, so it must hold the next character too.
                if text[end] in " \t\n\r":
                    end = _skip_space(text, end)
                if text[end] == ",":
                    index = end + 1
                    if text[index : index + 1] in " \t\n\r":
                        index = _skip_space(text, index)
                elif text[end] == ("}" if isinstance(container, dict) else "]"):
                    index, ended = end, True
                else:
                    break
                if isinstance(container, dict):
                    container.setdefault(key, value)
                else:
                    container.append(value)
                values += _size(value) if value and value.__class__ in _CONTAINERS else 1
        except (StopIteration, IndexError, ValueError, RecursionError):
            # Cut by the end of the piece, longer than it, too deep, or invalid: the next step finds out.
            pass
        self._count(values)
        self._adapt(index)
        self._position += _byte_length(text, index)
        self._skip_whitespace()
        return ended

    def _adapt(self, read: int) -> None:
        """Stops reading ahead for a while if nothing was read, and for longer each time."""
        self._pause = 0 if read else min(max(2 * self._pause, 64), _PIECE_BYTES)
        self._no_pieces_until = self._position + self._pause

    def _step(self) -> None:
        self._steps += 1
        if not self._steps & 4095:
            self._deadline.check()

    def _count(self, values: int) -> None:
        self._step()
        self._values += values
        if self._max_values is not None and self._values > self._max_values:
            raise TooLarge(f"The request holds more than {self._max_values} JSON values")

    def _peek(self) -> int:
        return self._body[self._position] if self._position < len(self._body) else 0

    def _skip_whitespace(self) -> None:
        while self._peek() in b" \t\n\r" and (space := _WHITESPACE.match(self._body, self._position)):
            self._position = space.end()

    def _key(self) -> str:
        if common := _KEY.match(self._body, self._position):
            self._position = common.end()
            return common[1].decode("utf-8", "surrogateescape")
        if self._peek() != ord('"'):
            raise _error("Missing a name for object member.", self._position)
        key = self._string()
        self._skip_whitespace()
        if self._peek() != ord(":"):
            raise _error("Missing a colon after a name of object member.", self._position)
        self._position += 1
        self._skip_whitespace()
        return key

    def _scalar(self, first: int) -> Any:
        if first == ord('"'):
            return self._string()
        if first in _LITERALS:
            literal, value = _LITERALS[first]
            for offset, character in enumerate(literal):
                if self._body[self._position + offset : self._position + offset + 1] != bytes([character]):
                    raise _error("Invalid value.", self._position + offset)
            self._position += len(literal)
            return value
        return self._number()

    def _number(self) -> int | float:
        match = _NUMBER.match(self._body, self._position)
        if not match:
            raise _error("Invalid value.", self._position + (self._peek() == ord("-")))
        start, self._position = self._position, match.end()
        text = match[0].decode()
        whole, fraction, exponent = match.groups()
        if whole is None:
            return float(text)
        rest = self._body[self._position : self._position + 1]
        if rest == b"." and not fraction:
            raise _error("Miss fraction part in number.", self._position + 1)
        if rest in (b"e", b"E") and not exponent:
            signed = self._body[self._position + 1 : self._position + 2] in (b"+", b"-")
            raise _error("Miss exponent in number.", self._position + 1 + signed)
        if not fraction and not exponent and len(text) <= 20 and -(2**63) <= int(text) < 2**64:
            return int(text)
        value = float(text)
        if math.isinf(value):
            raise _error("Number too big to be stored in double.", start)
        return value

    def _string(self) -> str:
        self._position += 1
        text = bytearray()
        while True:
            self._step()
            if plain := _PLAIN.match(self._body, self._position):
                text += plain[0]
                self._position = plain.end()
                continue
            mark = self._peek()
            if mark == ord('"'):
                self._position += 1
                return text.decode("utf-8", "surrogateescape")
            if mark == 0:
                raise _error("Missing a closing quotation mark in string.", self._position)
            if mark != ord("\\"):
                raise _error("Invalid encoding in string.", self._position)
            text += self._escapes()

    def _escapes(self) -> bytes:
        """The decoded escape, and the decoded text after it as far as a piece of the body reaches."""
        if self._position >= self._no_pieces_until:
            self._deadline.check()
            piece = self._body[self._position : self._position + _PIECE_BYTES].decode("utf-8", "surrogateescape")
            cut = piece.find("\\", max(len(piece) - 12, 1))  # the end may have cut an escape in two
            piece = piece if cut < 0 else piece[:cut]
            try:
                _decoder(piece)
                read, end = _scan_string(piece + '"', 0)
                self._position += _byte_length(piece, min(end - (end <= len(piece)), len(piece)))
                self._adapt(1)
                return read.encode("utf-8", "surrogateescape")
            except ValueError:
                self._adapt(0)
        return self._escape()

    def _escape(self) -> bytes:
        start = self._position
        self._position += 1
        mark = self._peek()
        if mark in _ESCAPES:
            self._position += 1
            return bytes([_ESCAPES[mark]])
        if mark != ord("u"):
            raise _error("Invalid escape character in string.", start)
        unit = self._hex(start)
        # A low surrogate without a high one before it is accepted.
        if 0xD800 <= unit <= 0xDBFF:
            if self._body[self._position : self._position + 2] != b"\\u":
                raise _error("The surrogate pair in string is invalid.", start)
            self._position += 1
            low = self._hex(start)
            if not 0xDC00 <= low <= 0xDFFF:
                raise _error("The surrogate pair in string is invalid.", start)
            unit = 0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00)
        return chr(unit).encode("utf-8", "surrogatepass")

    def _hex(self, start: int) -> int:
        match = _HEX.match(self._body, self._position + 1)
        if not match:
            raise _error("Incorrect hex digit after \\u escape in string.", start)
        self._position = match.end()
        return int(match[0], 16)


_CONTAINERS = (list, dict)


def _skip_space(text: str, index: int) -> int:
    """The index of the next character that is not white space."""
    space = _LEADING_SPACE.match(text, index)
    return space.end() if space else index


def _byte_length(text: str, end: int) -> int:
    """The length in bytes of the text up to an index."""
    return end if text.isascii() else len(text[:end].encode("utf-8", "surrogateescape"))


def _size(value: list[Any] | dict[str, Any]) -> int:
    """The number of values in a container, counting the container itself."""
    size, pending = 1, [value]
    while pending:
        container = pending.pop()
        items = container.values() if isinstance(container, dict) else container
        size += len(items)
        pending += [item for item in items if item.__class__ in _CONTAINERS]
    return size

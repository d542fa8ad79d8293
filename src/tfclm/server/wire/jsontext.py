"""JSON text in and out, as TensorFlow Serving reads and writes it.

Reading keeps what a JSON library for Python would lose: NaN and Infinity are numbers, bytes that are no UTF-8 pass
through (as lone surrogates in a `str`), whatever follows the document is ignored, nesting has no limit, and an error
names its byte. Values are None, bool, int, float, str, list and dict.

The interpreter's own parser, which is written in C, reads what both read alike. It keeps all other threads from running
while it reads, so it is given a small document as a whole, but a large one in pieces.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from json import decoder
from typing import Any

from tfclm.server.deadline import Deadline
from tfclm.server.status import StatusError, TooLarge, invalid

DEBUG_BYTES = 256  # a value that an error message quotes is cut about here
MAX_QUOTED = 2**16  # characters of a string that a message quotes
LARGE_BYTES = 2**18  # the interpreter's parser takes some ten milliseconds for the worst document of this size
_PIECE_BYTES = 2**16


def parse(body: bytes, deadline: Deadline | None = None, max_values: int | None = None) -> dict[str, Any]:
    """Reads a JSON object of at most `max_values` values.

    Raises:
        StatusError: INVALID_ARGUMENT, for what is no JSON or no object; DEADLINE_EXCEEDED; `TooLarge`.
    """
    if not body:
        raise _error("The document is empty")
    body = body.removeprefix(b"\xef\xbb\xbf")
    try:
        if len(body) > LARGE_BYTES:
            raise ValueError("too long to keep other threads waiting")
        value = _parse_whole(body.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        # Invalid, nested too deeply for the interpreter's parser, or one of the few texts on which the two differ.
        value = _Parser(body, deadline or Deadline(), max_values).parse()
    if not isinstance(value, dict):
        raise invalid(f"JSON Value: {debug_string(value)} Is not object")
    return value


def _parse_whole(text: str) -> Any:
    """Reads with the interpreter's own parser what both read alike; ValueError for the rest."""
    blank = _SPACE.match(text)
    return _decoder(text).raw_decode(text, blank.end() if blank else 0)[0]


def _decoder(text: str) -> json.JSONDecoder:
    """The interpreter's parser, set up to read the text as this module does; ValueError where it cannot."""
    escapes = len(_SURROGATE.findall(text))
    if escapes and escapes != 2 * len(_SURROGATE_PAIR.findall(text)):
        raise ValueError("a surrogate that may be alone")
    return _CAREFUL if _EXTREME.search(text) else _PLAIN_DECODER


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of a key that is given twice the first counts.
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


_SPACE = re.compile(r"[ \t\n\r]*")
# The interpreter's parser of a string from behind its first quotation mark: the string, and where it ends.
_scan_string: Callable[[str, int], tuple[str, int]] = vars(decoder)["scanstring"]
_BETWEEN = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE_PAIR = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
# What may be a number that the interpreter's parser reads otherwise.
_EXTREME = re.compile(r"\d{19}|[eE]\+?\d{3}")
_PLAIN_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_CAREFUL = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_int=_integer)


def _error(reason: str, offset: int | None = None) -> StatusError:
    return invalid(f"JSON Parse error: {reason}" + ("" if offset is None else f" at offset: {offset}"))


# Each search is bounded, because other threads wait meanwhile.
_BLANK = re.compile(rb"[ \t\n\r]{1,65536}")
_NUMBER = re.compile(rb"-?(?:NaN|Inf(?:inity)?)|(-?(?:0|[1-9][0-9]*))(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_PLAIN = re.compile(rb'[^"\\\x00-\x1f]{1,65536}')
_KEY = re.compile(rb'"([^"\\\x00-\x1f]{0,64})":(?![ \t\n\r])')
_HEX = re.compile(rb"[0-9a-fA-F]{4}")
_LITERALS = {ord("n"): (b"null", None), ord("t"): (b"true", True), ord("f"): (b"false", False)}
_ESCAPES = dict(zip(b'"\\/bfnrt', b'"\\/\b\f\n\r\t', strict=True))


class _Parser:
    """An iterative parser: its stack is a list, so that no depth of nesting ends the process.

    The interpreter's parser reads ahead for it, a piece of the body at a time.
    """

    def __init__(self, body: bytes, deadline: Deadline, max_values: int | None) -> None:
        self._body, self._deadline, self._max_values = body, deadline, max_values
        self._at = 0
        self._values = 0
        self._steps = 0
        # Where pieces did not help they are left alone for a while, which doubles with each failure.
        self._alone_until = self._pause = 0

    def parse(self) -> Any:
        # A container that is open, and for an object the key that waits for its value.
        stack: list[tuple[list[Any] | dict[str, Any], str]] = []
        self._skip_blank()
        if self._peek() in b"\0]},:":
            raise _error("The document is empty.", self._at)
        while True:
            self._count(1)
            first = self._peek()
            value: Any
            if first == ord("[") or first == ord("{"):
                self._at += 1
                self._skip_blank()
                value = [] if first == ord("[") else {}
                if self._peek() != first + 2 and not self._read_ahead(value):  # "]" or "}"
                    stack.append((value, "" if first == ord("[") else self._key()))
                    continue
                self._at += 1
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
                    if not self._read_ahead(container):
                        if isinstance(container, dict):
                            stack[-1] = (container, self._key())
                        break
                elif mark != end:
                    raise _error(reason, self._at)
                self._at += 1
                value = container
                stack.pop()
            if not stack:
                return value

    def _read_ahead(self, container: list[Any] | dict[str, Any]) -> bool:
        """Adds to a container, from the start of an item or member, as many of them as a piece of the body holds.

        What is left begins with another one, or with the end of the container; gives whether it is the end.
        """
        if self._at < self._alone_until:
            return False
        self._deadline.check()
        text = self._body[self._at : self._at + _PIECE_BYTES].decode("utf-8", "surrogateescape")
        place, ended, values = 0, False, 0
        try:
            scan = vars(_decoder(text))["scan_once"]
            while not ended:
                key, start = "", place
                if isinstance(container, dict):
                    if text[place] != '"':
                        break
                    key, start = _scan_string(text, place + 1)
                    between = _BETWEEN.match(text, start)
                    if not between:
                        break
                    start = between.end()
                value, end = scan(text, start)
                # The end of the piece may have cut the value, as it can a number: what follows must be in it too.
                if text[end] in " \t\n\r":
                    end = _space_end(text, end)
                if text[end] == ",":
                    place = end + 1
                    if text[place : place + 1] in " \t\n\r":
                        place = _space_end(text, place)
                elif text[end] == ("}" if isinstance(container, dict) else "]"):
                    place, ended = end, True
                else:
                    break
                if isinstance(container, dict):
                    container.setdefault(key, value)
                else:
                    container.append(value)
                values += _size(value) if value and value.__class__ in _CONTAINERS else 1
        except (StopIteration, IndexError, ValueError, RecursionError):
            # Cut by the end of the piece, longer than it, too deep, or wrong: the next step tells.
            pass
        self._count(values)
        self._wait(place)
        self._at += _byte_length(text, place)
        self._skip_blank()
        return ended

    def _wait(self, read: int) -> None:
        """Leaves pieces alone for a while if nothing was read ahead, for longer with each time."""
        self._pause = 0 if read else min(max(2 * self._pause, 64), _PIECE_BYTES)
        self._alone_until = self._at + self._pause

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
        return self._body[self._at] if self._at < len(self._body) else 0

    def _skip_blank(self) -> None:
        while self._peek() in b" \t\n\r" and (blank := _BLANK.match(self._body, self._at)):
            self._at = blank.end()

    def _key(self) -> str:
        if common := _KEY.match(self._body, self._at):
            self._at = common.end()
            return common[1].decode("utf-8", "surrogateescape")
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
        text = bytearray()
        while True:
            self._step()
            if plain := _PLAIN.match(self._body, self._at):
                text += plain[0]
                self._at = plain.end()
                continue
            mark = self._peek()
            if mark == ord('"'):
                self._at += 1
                return text.decode("utf-8", "surrogateescape")
            if mark == 0:
                raise _error("Missing a closing quotation mark in string.", self._at)
            if mark != ord("\\"):
                raise _error("Invalid encoding in string.", self._at)
            text += self._escapes()

    def _escapes(self) -> bytes:
        """What an escape stands for, and as much of what follows as a piece of the body holds."""
        if self._at >= self._alone_until:
            self._deadline.check()
            piece = self._body[self._at : self._at + _PIECE_BYTES].decode("utf-8", "surrogateescape")
            cut = piece.find("\\", max(len(piece) - 12, 1))  # the end may have cut an escape
            piece = piece if cut < 0 else piece[:cut]
            try:
                _decoder(piece)
                read, end = _scan_string(piece + '"', 0)
                self._at += _byte_length(piece, min(end - (end <= len(piece)), len(piece)))
                self._wait(1)
                return read.encode("utf-8", "surrogateescape")
            except ValueError:
                self._wait(0)
        return self._escape()

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
        # A low surrogate without a high one before it passes.
        if 0xD800 <= unit <= 0xDBFF:
            if self._body[self._at : self._at + 2] != b"\\u":
                raise _error("The surrogate pair in string is invalid.", start)
            self._at += 1
            low = self._hex(start)
            if not 0xDC00 <= low <= 0xDFFF:
                raise _error("The surrogate pair in string is invalid.", start)
            unit = 0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00)
        return chr(unit).encode("utf-8", "surrogatepass")

    def _hex(self, start: int) -> int:
        match = _HEX.match(self._body, self._at + 1)
        if not match:
            raise _error("Incorrect hex digit after \\u escape in string.", start)
        self._at = match.end()
        return int(match[0], 16)


_CONTAINERS = (list, dict)


def _space_end(text: str, place: int) -> int:
    """The place of the next character that is no white space."""
    blank = _SPACE.match(text, place)
    return blank.end() if blank else place


def _byte_length(text: str, end: int) -> int:
    """The bytes of the text up to a place."""
    return end if text.isascii() else len(text[:end].encode("utf-8", "surrogateescape"))


def _size(value: list[Any] | dict[str, Any]) -> int:
    """The number of values in a container, with the container itself."""
    size, waiting = 1, [value]
    while waiting:
        container = waiting.pop()
        items = container.values() if isinstance(container, dict) else container
        size += len(items)
        waiting += [item for item in items if item.__class__ in _CONTAINERS]
    return size


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
            yield (",\n" if place else "\n") + "    " * (level + 1) + quote(key[:MAX_QUOTED])
            yield from _tokens(item, level + 1, ": ")
        yield ("\n" + "    " * level if value else "") + "}"
    elif isinstance(value, str):
        yield lead + quote(value[:MAX_QUOTED])
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

"""The rows of .jsonl and .json files, read one at a time; errors name the file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from tfclm.corpus.columns import extract_text
from tfclm.corpus.lines import read_lines
from tfclm.corpus.parts import FilePart
from tfclm.errors import InputError

_SPACE = re.compile(r"\s*")
_ARRAY_START = re.compile(r"\s*\[")
_ARRAY_END = re.compile(r"\]")
_BETWEEN_VALUES = re.compile(r"[\s,]*")


def read_json_lines(part: FilePart, column: str) -> Iterator[str | None]:
    """Yields the texts of a .jsonl file, one object per line."""

    def rows() -> Iterator[tuple[int, object]]:
        for number, line in read_lines(part):
            if line.isspace():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _not_json(part, number, error, "each line must be an object") from error

    return _extract_json_texts(part, column, rows())


def read_json_values(part: FilePart, column: str) -> Iterator[str | None]:
    """Yields the texts of a .json file, an array of objects or concatenated objects, decoded one at a time."""

    def rows() -> Iterator[tuple[int, object]]:
        decoder = json.JSONDecoder()
        buffer = _JsonBuffer(part)
        in_array = buffer.skip(_ARRAY_START)
        while True:
            buffer.skip(_BETWEEN_VALUES)
            if buffer.is_exhausted():
                if in_array:
                    raise InputError(f"{part} ends inside its array: the file is incomplete")
                return
            if in_array and buffer.skip(_ARRAY_END):
                break
            try:
                value, end = decoder.raw_decode(buffer.text, buffer.position)
            except (ValueError, RecursionError) as error:
                if not buffer.ended and isinstance(error, ValueError):
                    buffer.fill()
                    continue
                number = buffer.line_at(getattr(error, "pos", buffer.position))
                raise _not_json(part, number, error, "the file must hold an array of objects, or objects") from error
            yield buffer.line(), value
            buffer.position = end
        buffer.skip(_SPACE)
        while buffer.position == len(buffer.text) and not buffer.ended:
            buffer.fill()
            buffer.skip(_SPACE)
        if not buffer.is_exhausted():
            raise InputError(
                f"{part}, line {buffer.line()} has content after the end of the array: give one array per file"
            )

    return _extract_json_texts(part, column, rows())


class _JsonBuffer:
    """The part of a .json file that is being decoded; knows the line number of each position."""

    def __init__(self, part: FilePart) -> None:
        self._pieces = read_lines(part, 1 << 20)
        self._line, self._counted = 1, 0  # the line number of text[_counted]
        self.text, self.position, self.ended = "", 0, False
        self.fill()

    def fill(self) -> None:
        """Drops the text before the position and reads more."""
        self.line()
        # At least double what is left, so that decoding a large object again and again takes linear time overall.
        wanted = max(2 * (len(self.text) - self.position), 1 << 20)
        pieces = [self.text[self.position :]]
        size = len(pieces[0])
        while size < wanted:
            piece = next(self._pieces, None)
            if piece is None:
                self.ended = True
                break
            pieces.append(piece[1])
            size += len(piece[1])
        self.text, self.position, self._counted = "".join(pieces), 0, 0

    def skip(self, pattern: re.Pattern[str]) -> bool:
        """Moves past a match at the position; False if there is none."""
        match = pattern.match(self.text, self.position)
        self.position = match.end() if match else self.position
        return match is not None

    def is_exhausted(self) -> bool:
        """Whether the position is at the end of the file."""
        return self.ended and self.position == len(self.text)

    def line_at(self, position: int) -> int:
        """The line number of a position at or after the last one that `line` was asked for."""
        return self._line + self.text.count("\n", self._counted, position)

    def line(self) -> int:
        """The line number of the position."""
        self._line, self._counted = self.line_at(self.position), self.position
        return self._line


def _extract_json_texts(part: FilePart, column: str, rows: Iterator[tuple[int, object]]) -> Iterator[str | None]:
    """Yields the text of each row, None where it lacks the column; `rows` come with their line numbers."""
    found = False
    columns: dict[str, None] = {}
    for number, row in rows:
        if not isinstance(row, dict):
            raise InputError(f'{part}, line {number} is not an object: each row must look like {{"{column}": "…"}}')
        try:
            text = extract_text(row, column)
            (text or "").encode()  # JSON can hold half of a surrogate pair, UTF-8 cannot
        except KeyError:
            # Rows may lack the column; only if all do is it an error.
            if not found and len(columns) < 100:
                columns |= dict.fromkeys(_value_paths(row))
            yield None
            continue
        except RecursionError as error:
            raise _not_json(part, number, error, "") from error
        except UnicodeEncodeError as error:
            raise InputError(
                f"{part}, line {number}: column {column} has half of a surrogate pair, "
                f"{error.object[error.start]!a}: write both halves, or the character itself"
            ) from error
        except TypeError as error:
            raise InputError(
                f"{part}, line {number}: column {column} is {error}, not text: give a column of strings"
            ) from error
        found = True
        yield text
    # Other parts of the file may have it.
    if columns and not found and part.is_whole:
        raise InputError(f"{part} has no column {column}: it has {', '.join(columns)}")


def _value_paths(value: object, prefix: str = "") -> Iterator[str]:
    """Yields the dotted paths of the leaves of a JSON value."""
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        value = value[0]
    if isinstance(value, dict) and value and prefix.count(".") < 10:
        for name, inner in value.items():
            yield from _value_paths(inner, f"{prefix}.{name}" if prefix else str(name))
    elif prefix:
        yield prefix


def _not_json(part: FilePart, line: int, error: Exception, expected: str) -> InputError:
    if isinstance(error, RecursionError):
        return InputError(f"{part}, line {line} is nested too deeply: move the text to a higher level")
    return InputError(f"{part}, line {line} is not JSON ({error}): {expected}")

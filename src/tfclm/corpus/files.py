"""Reads documents from local text, JSON, CSV and Parquet files; errors name the file and line."""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from tfclm.corpus.cache import stored
from tfclm.corpus.columns import extract_text, extract_texts, find_column, is_blank
from tfclm.errors import InputError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

EXTENSIONS = ".txt, .jsonl, .json, .csv (each also with .gz) or .parquet"
# Maximum length of a document of a .txt file: longer paragraphs are cut.
DOCUMENT_CHARACTERS = 1 << 16
BATCH_CHARACTERS = 1 << 22  # characters per Arrow record batch


@dataclass(frozen=True)
class Split:
    """The documents of one split.

    Attributes:
        texts: a dataset with one column, "text".
        description: the source, the split, and the numbers of rows and of dropped (null or blank) rows; JSON types.
    """

    texts: datasets.Dataset
    description: dict[str, Any]


def resolve_paths(patterns: Sequence[str], field: str) -> list[Path]:
    """The files that match paths and globs, in the order given; the matches of one glob are sorted.

    A symbolic link keeps its own name, because the extension says how to read the file.

    Args:
        patterns: paths and globs.
        field: the setting that they come from, for messages.

    Raises:
        InputError: a pattern matches no file, or something that is not a data file.
    """
    paths: list[Path] = []
    seen: set[Path] = set()
    for pattern in patterns:
        try:
            found = _matches(Path(pattern).expanduser(), f"`{field}` {pattern}")
        except InputError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"`{field}` {pattern}: {getattr(error, 'strerror', None) or error}") from error
        for name in found:
            if _extension(name) not in _READERS:
                raise InputError(f"{name} has an unknown file type: give {EXTENSIONS}")
            if name.resolve() in seen:
                raise InputError(f"`{field}` names {name} twice: give each file once")
            seen.add(name.resolve())
            paths.append(name.parent.resolve() / name.name)
    return paths


def _matches(path: Path, given: str) -> list[Path]:
    """The regular files that a path or glob matches; other matches are errors, except that globs skip directories."""
    if path.is_dir():
        raise InputError(f"{given} is a directory: give its files, for example '{path}/*.txt'")
    found = [path] if _exists(path) else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    # A glob also matches subdirectories, which are skipped; a directory named like a data file is an error below.
    found = [name for name in found if not name.is_dir() or _extension(name) in _READERS]
    if not found:
        problem = "no file matches" if glob.has_magic(str(path)) else "no such file:"
        raise InputError(f"{problem} {given}: give an existing file or a quoted glob")
    for name in found:
        if name.is_dir():
            raise InputError(f"{name} is a directory: give its files, for example '{name}/*.txt'")
        if not name.exists():
            raise InputError(f"{name} links to {os.readlink(name)}, which does not exist: give an existing file")
        if not name.is_file():
            raise InputError(f"{name} is a pipe, socket or device: save its content to a file and give that")
    return found


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _extension(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        return "".join(suffixes[-2:-1]) if suffixes[-2:-1] != [".parquet"] else ""
    return "".join(suffixes[-1:])


def read_files(paths: list[Path], column: str) -> Split:
    """Reads all documents of some files into one Arrow file in the cache; blank ones are dropped and counted."""
    import pyarrow as pa

    schema = pa.schema({"text": pa.string()})
    # Hashed, because copies, archives and reproducible builds can give different content the same size and mtime.
    states = [_file_state(path) for path in paths]
    key = [column, *([_extension(path), _is_gzip(path), hash_files([path])] for path in paths)]

    def write(append: Callable[[pa.RecordBatch], None]) -> dict[str, Any]:
        dropped = 0
        batch: list[str] = []
        size = 0
        for path, state in zip(paths, states, strict=True):
            rows = kept = 0
            for text in _read_documents(path, column):
                rows += 1
                if text is None or is_blank(text):
                    continue
                kept += 1
                batch.append(text)
                size += len(text)
                if size >= BATCH_CHARACTERS:
                    append(pa.record_batch([pa.array(batch, pa.string())], schema=schema))
                    batch, size = [], 0
            if not kept:
                raise InputError(f"{path} has no text" + (f": its {rows} rows are empty" if rows else ": it is empty"))
            dropped += rows - kept
            if _file_state(path) != state:
                raise InputError(f"{path} changed while it was read: run the same command again")
        if batch:
            append(pa.record_batch([pa.array(batch, pa.string())], schema=schema))
        return {"dropped_rows": dropped}

    texts, facts = stored("texts", key, schema, write)
    source = [str(path) for path in paths]
    return Split(texts, {"source": source, "split": None, "rows": len(texts), "dropped_rows": facts["dropped_rows"]})


def _read_documents(path: Path, column: str) -> Iterator[str | None]:
    try:
        yield from _READERS[_extension(path)](path, column)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a complete gzip file ({error}): compress it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def hash_files(paths: Iterable[Path]) -> str:
    """The SHA-256 digest of the content of some files.

    Raises:
        InputError: one of them cannot be read.
    """
    content = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    content.update(piece)
                # The size, so that the digest depends on where one file ends and the next begins.
                content.update(b"%d." % file.tell())
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return content.hexdigest()


def _file_state(path: Path) -> tuple[int, int, int]:
    """Inode, size and modification time, which show that a file was changed."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _is_gzip(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _open_binary(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if _is_gzip(path) else path.open("rb"))


def _not_utf8(path: Path, line: int) -> InputError:
    return InputError(f"{path}, line {line} is not UTF-8: save the file as UTF-8 (iconv -t UTF-8 converts it)")


def _not_json(path: Path, line: int, error: Exception, expected: str) -> InputError:
    if isinstance(error, RecursionError):
        return InputError(f"{path}, line {line} is nested too deeply: move the text to a higher level")
    return InputError(f"{path}, line {line} is not JSON ({error}): {expected}")


def _read_lines(path: Path, limit: int = -1) -> Iterator[tuple[int, str]]:
    """Yields the numbered lines of a UTF-8 file; \\r\\n becomes \\n. Lines over `limit` bytes come in pieces."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    carriage_return = ""
    with _open_binary(path) as file:
        while True:
            piece = file.readline(limit)
            try:
                text = carriage_return + decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                if line == 1 and piece.startswith(b"\x1f\x8b"):
                    raise InputError(f"{path} is compressed with gzip: rename it so that it ends in .gz") from error
                raise _not_utf8(path, line) from error
            # The limit can fall between \r and \n.
            carriage_return = "\r" if piece and text.endswith("\r") else ""
            if text.endswith("\r\n"):
                text = text[:-2] + "\n"
            if text := text[: len(text) - len(carriage_return)]:
                yield line, text
            if not piece:
                return
            line += piece.endswith(b"\n")


def _read_text(path: Path, column: str) -> Iterator[str]:
    """Yields the paragraphs of a plain text file, each with the blank lines that follow it."""
    paragraph: list[str] = []
    size = 0
    has_text = after_blank = False
    for _, line in _read_lines(path, DOCUMENT_CHARACTERS):
        blank = line.isspace()
        if paragraph and ((has_text and after_blank and not blank) or size + len(line) > DOCUMENT_CHARACTERS):
            yield "".join(paragraph)
            paragraph, size, has_text = [], 0, False
        paragraph.append(line)
        size += len(line)
        has_text = has_text or not blank
        after_blank = blank
    if paragraph:
        yield "".join(paragraph)


def _read_json_lines(path: Path, column: str) -> Iterator[str | None]:
    def rows() -> Iterator[tuple[int, object]]:
        for number, line in _read_lines(path):
            if line.isspace():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _not_json(path, number, error, "each line must be an object") from error

    return _extract_json_texts(path, column, rows())


def _read_json_values(path: Path, column: str) -> Iterator[str | None]:
    """Yields the texts of a .json file, an array of objects or concatenated objects, decoded one at a time."""

    def rows() -> Iterator[tuple[int, object]]:
        decoder = json.JSONDecoder()
        buffer = _JsonBuffer(path)
        in_array = buffer.skip(_ARRAY_START)
        while True:
            buffer.skip(_BETWEEN_VALUES)
            if buffer.is_exhausted():
                if in_array:
                    raise InputError(f"{path} ends inside its array: the file is incomplete")
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
                raise _not_json(path, number, error, "the file must hold an array of objects, or objects") from error
            yield buffer.line(), value
            buffer.position = end
        buffer.skip(_SPACE)
        while buffer.position == len(buffer.text) and not buffer.ended:
            buffer.fill()
            buffer.skip(_SPACE)
        if not buffer.is_exhausted():
            raise InputError(
                f"{path}, line {buffer.line()} has content after the end of the array: give one array per file"
            )

    return _extract_json_texts(path, column, rows())


_SPACE = re.compile(r"\s*")
_ARRAY_START = re.compile(r"\s*\[")
_ARRAY_END = re.compile(r"\]")
_BETWEEN_VALUES = re.compile(r"[\s,]*")


class _JsonBuffer:
    """The part of a .json file that is being decoded; knows the line number of each position."""

    def __init__(self, path: Path) -> None:
        self._pieces = _read_lines(path, 1 << 20)
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


def _extract_json_texts(path: Path, column: str, rows: Iterator[tuple[int, object]]) -> Iterator[str | None]:
    """Yields the text of each row, None where it lacks the column; `rows` come with their line numbers."""
    found = False
    columns: dict[str, None] = {}
    for number, row in rows:
        if not isinstance(row, dict):
            raise InputError(f'{path}, line {number} is not an object: each row must look like {{"{column}": "…"}}')
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
            raise _not_json(path, number, error, "") from error
        except UnicodeEncodeError as error:
            raise InputError(
                f"{path}, line {number}: column {column} has half of a surrogate pair, "
                f"{error.object[error.start]!a}: write both halves, or the character itself"
            ) from error
        except TypeError as error:
            raise InputError(
                f"{path}, line {number}: column {column} is {error}, not text: give a column of strings"
            ) from error
        found = True
        yield text
    if columns and not found:
        raise InputError(f"{path} has no column {column}: it has {', '.join(columns)}")


def _value_paths(value: object, prefix: str = "") -> Iterator[str]:
    """Yields the dotted paths of the leaves of a JSON value."""
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        value = value[0]
    if isinstance(value, dict) and value and prefix.count(".") < 10:
        for name, inner in value.items():
            yield from _value_paths(inner, f"{prefix}.{name}" if prefix else str(name))
    elif prefix:
        yield prefix


def _read_csv(path: Path, column: str) -> Iterator[str | None]:
    # By default a field may have 128 KiB.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line for _, line in _read_lines(path)), strict=True)
    try:
        header = next((row for row in reader if row), None)
        if header is None:
            return
        if column not in header:
            raise InputError(f"{path} has no column {column}: it has {', '.join(header)}")
        if header.count(column) > 1:
            raise InputError(f"{path} has column {column} twice: give each column its own name")
        index = header.index(column)
        for row in reader:
            if row and len(row) != len(header):
                raise InputError(
                    f"{path}, line {reader.line_num} has {len(row)} fields where the header has {len(header)}: "
                    "quote fields that contain a comma or a newline"
                )
            if row:
                yield row[index]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num} is not CSV ({error}): check its quotes") from error


def _read_parquet(path: Path, column: str) -> Iterator[str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            head, rest = find_column(file.schema_arrow, column, str(path))
            for batch in file.iter_batches(batch_size=1000, columns=[head]):
                yield from extract_texts(batch.column(0), rest)
    except (pa.ArrowInvalid, UnicodeDecodeError, OSError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"{path} is not a readable parquet file ({message}): write it again") from error


_READERS: dict[str, Callable[[Path, str], Iterator[str | None]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".json": _read_json_values,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

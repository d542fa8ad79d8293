"""Local files: text, JSON, CSV and Parquet to documents, every fault with its file and line."""

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
from tfclm.corpus.columns import is_blank, locate, text_at, texts_of
from tfclm.errors import InputError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

EXTENSIONS = ".txt, .jsonl, .json, .csv (each also with .gz) or .parquet"
# The longest document of a .txt file, in characters: what a file without blank lines is cut into.
DOCUMENT_CHARACTERS = 1 << 16
BATCH_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class Split:
    """The documents of one split: `texts` has one column, "text"; `description` says where they came from."""

    texts: datasets.Dataset
    description: dict[str, Any]


def resolve(patterns: Sequence[str], flag: str) -> list[Path]:
    """The files that paths and globs name, in the order given; the matches of one glob are sorted.

    A file keeps the name that it is given by, also where that is a link to another: the name says how to read it.
    """
    paths: list[Path] = []
    seen: set[Path] = set()
    for pattern in patterns:
        try:
            found = _matches(Path(pattern).expanduser(), f"{flag} {pattern}")
        except InputError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"{flag} {pattern}: {getattr(error, 'strerror', None) or error}") from error
        for name in found:
            if _extension(name) not in _READERS:
                raise InputError(f"{name} is of no known kind: give {EXTENSIONS}")
            if name.resolve() in seen:
                raise InputError(f"{flag} names {name} twice: give each file once")
            seen.add(name.resolve())
            paths.append(name.parent.resolve() / name.name)
    return paths


def _matches(path: Path, given: str) -> list[Path]:
    """The regular files that a path or glob names; what cannot be read is refused rather than left out."""
    if path.is_dir():
        raise InputError(f"{given} is a folder: give its files, for example '{path}/*.txt'")
    found = [path] if _is_there(path) else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    # A glob also finds subfolders; a folder that is named as a file of data is not one to be passed over.
    found = [name for name in found if not name.is_dir() or _extension(name) in _READERS]
    if not found:
        kind = "file matches" if glob.has_magic(str(path)) else "such file:"
        raise InputError(f"no {kind} {given}: give an existing file or a quoted glob")
    for name in found:
        if name.is_dir():
            raise InputError(f"{name} is a folder: give its files, for example '{name}/*.txt'")
        if not name.exists():
            raise InputError(f"{name} links to {os.readlink(name)}, which is not there: give an existing file")
        if not name.is_file():
            raise InputError(f"{name} is a pipe, socket or device: save its content to a file, and give that")
    return found


def _is_there(path: Path) -> bool:
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
    """All documents of some files, through one Arrow file in the cache."""
    import pyarrow as pa

    schema = pa.schema({"text": pa.string()})
    # By content: copies, archives and reproducible builds give another text the same size and time of change.
    states = [_state(path) for path in paths]
    key = [column, *([_extension(path), _is_gzip(path), digest([path])] for path in paths)]

    def write(append: Callable[[pa.RecordBatch], None]) -> dict[str, Any]:
        dropped = 0
        batch: list[str] = []
        size = 0
        for path, state in zip(paths, states, strict=True):
            rows = kept = 0
            for text in _documents(path, column):
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
            if _state(path) != state:
                raise InputError(f"{path} was changed while it was read: give the same command again")
        if batch:
            append(pa.record_batch([pa.array(batch, pa.string())], schema=schema))
        return {"dropped_rows": dropped}

    texts, facts = stored("texts", key, schema, write)
    source = [str(path) for path in paths]
    return Split(texts, {"source": source, "split": None, "rows": len(texts), "dropped_rows": facts["dropped_rows"]})


def _documents(path: Path, column: str) -> Iterator[str | None]:
    try:
        yield from _READERS[_extension(path)](path, column)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a whole gzip file ({error}): compress it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def digest(paths: Iterable[Path]) -> str:
    """A digest of the content of some files; a gigabyte takes about a second.

    Raises:
        InputError: one of them cannot be read.
    """
    content = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    content.update(piece)
                content.update(b"%d." % file.tell())  # else one file could end where the next begins
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return content.hexdigest()


def _state(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _is_gzip(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if _is_gzip(path) else path.open("rb"))


def _not_utf8(path: Path, line: int) -> InputError:
    return InputError(f"{path}, line {line} is not UTF-8: save the file as UTF-8 (iconv -t UTF-8 converts it)")


def _not_json(path: Path, line: int, error: Exception, shape: str) -> InputError:
    if isinstance(error, RecursionError):
        return InputError(f"{path}, line {line} is nested too deeply: put the text nearer to the top")
    return InputError(f"{path}, line {line} is not JSON ({error}): {shape}")


def _lines(path: Path, limit: int = -1) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers; \\r\\n becomes \\n. Lines beyond `limit` bytes come in pieces."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    carriage_return = ""
    with _open(path) as file:
        while True:
            piece = file.readline(limit)
            try:
                text = carriage_return + decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                if line == 1 and piece.startswith(b"\x1f\x8b"):
                    raise InputError(f"{path} is compressed by gzip: give it a name that ends in .gz") from error
                raise _not_utf8(path, line) from error
            # A limit can fall between \r and \n.
            carriage_return = "\r" if piece and text.endswith("\r") else ""
            if text.endswith("\r\n"):
                text = text[:-2] + "\n"
            if text := text[: len(text) - len(carriage_return)]:
                yield line, text
            if not piece:
                return
            line += piece.endswith(b"\n")


def _text(path: Path, column: str) -> Iterator[str]:
    """The paragraphs of a plain text file, each with the blank lines that follow it."""
    held: list[str] = []
    size = 0
    has_text = after_blank = False
    for _, line in _lines(path, DOCUMENT_CHARACTERS):
        blank = line.isspace()
        if held and ((has_text and after_blank and not blank) or size + len(line) > DOCUMENT_CHARACTERS):
            yield "".join(held)
            held, size, has_text = [], 0, False
        held.append(line)
        size += len(line)
        has_text = has_text or not blank
        after_blank = blank
    if held:
        yield "".join(held)


def _json_lines(path: Path, column: str) -> Iterator[str | None]:
    def rows() -> Iterator[tuple[int, object]]:
        for number, line in _lines(path):
            if line.isspace():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _not_json(path, number, error, "each line must be an object") from error

    return _json_texts(path, column, rows())


def _json_values(path: Path, column: str) -> Iterator[str | None]:
    """The objects of a .json file, an array or one after the other, decoded one at a time."""

    def rows() -> Iterator[tuple[int, object]]:
        decoder = json.JSONDecoder()
        lines = _lines(path, 1 << 20)
        buffer, position, ended = "", 0, False
        line, counted = 1, 0  # the line of buffer[counted]

        def fill() -> None:
            nonlocal buffer, position, counted, ended, line
            line += buffer.count("\n", counted, position)
            # At least doubles what is left: decoding a large object again stays linear on the whole.
            wanted = max(2 * (len(buffer) - position), 1 << 20)
            pieces = [buffer[position:]]
            size = len(pieces[0])
            while size < wanted:
                piece = next(lines, None)
                if piece is None:
                    ended = True
                    break
                pieces.append(piece[1])
                size += len(piece[1])
            buffer, position, counted = "".join(pieces), 0, 0

        between = re.compile(r"[\s,]*")
        space = re.compile(r"\s*")
        outer = re.compile(r"\s*\[")
        fill()
        array = outer.match(buffer)
        position = array.end() if array else 0
        while True:
            position = cast("re.Match[str]", between.match(buffer, position)).end()
            if position == len(buffer) and ended:
                if array:
                    raise InputError(f"{path} ends inside its array: the file is cut off")
                return
            if array and buffer.startswith("]", position):
                break
            try:
                value, end = decoder.raw_decode(buffer, position)
            except (ValueError, RecursionError) as error:
                if not ended and isinstance(error, ValueError):
                    fill()
                    continue
                number = line + buffer.count("\n", counted, getattr(error, "pos", position))
                raise _not_json(path, number, error, "the file must hold an array of objects, or objects") from error
            line += buffer.count("\n", counted, position)
            counted = position
            yield line, value
            position = end
        position += 1
        while (position := cast("re.Match[str]", space.match(buffer, position)).end()) == len(buffer) and not ended:
            fill()
        if position < len(buffer):
            number = line + buffer.count("\n", counted, position)
            raise InputError(f"{path}, line {number} goes on after the end of its array: give one array a file")

    return _json_texts(path, column, rows())


def _json_texts(path: Path, column: str, rows: Iterator[tuple[int, object]]) -> Iterator[str | None]:
    found = False
    columns: dict[str, None] = {}
    for number, row in rows:
        if not isinstance(row, dict):
            raise InputError(f'{path}, line {number} is no object: each row must be like {{"{column}": "…"}}')
        try:
            text = text_at(row, column)
            (text or "").encode()  # JSON can write half of a surrogate pair, UTF-8 cannot
        except KeyError:
            # Rows need not all have the same columns; that none has this one shows at the end.
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
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        value = value[0]
    if isinstance(value, dict) and value and prefix.count(".") < 10:
        for name, inner in value.items():
            yield from _value_paths(inner, f"{prefix}.{name}" if prefix else str(name))
    elif prefix:
        yield prefix


def _csv(path: Path, column: str) -> Iterator[str | None]:
    # The default limit of a field is 128 KiB.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = next((row for row in reader if row), None)
        if header is None:
            return
        if column not in header:
            raise InputError(f"{path} has no column {column}: it has {', '.join(header)}")
        if header.count(column) > 1:
            raise InputError(f"{path} has column {column} twice: give each column a name of its own")
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


def _parquet(path: Path, column: str) -> Iterator[str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            head, rest = locate(file.schema_arrow, column, str(path))
            for batch in file.iter_batches(batch_size=1000, columns=[head]):
                yield from texts_of(batch.column(0), rest)
    except (pa.ArrowInvalid, UnicodeDecodeError, OSError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"{path} is not a readable parquet file ({message}): write it again") from error


_READERS: dict[str, Callable[[Path, str], Iterator[str | None]]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".json": _json_values,
    ".csv": _csv,
    ".parquet": _parquet,
}

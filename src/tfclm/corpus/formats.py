"""Documents of one file, by its format: text, JSON, CSV or Parquet; errors name the file and line."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tfclm.corpus.columns import extract_texts, find_column
from tfclm.corpus.json_rows import read_json_lines, read_json_values
from tfclm.corpus.lines import read_lines
from tfclm.errors import InputError

# Maximum length of a document of a .txt file: longer paragraphs are cut.
DOCUMENT_CHARACTERS = 1 << 16


def extension(path: Path) -> str:
    """The extension that says how to read a file, in lower case and without .gz; "" if there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        return "".join(suffixes[-2:-1]) if suffixes[-2:-1] != [".parquet"] else ""
    return "".join(suffixes[-1:])


def read_documents(path: Path, column: str) -> Iterator[str | None]:
    """Yields the documents of a file; None for a row without text.

    Raises:
        InputError: the file cannot be read as what its extension says.
    """
    try:
        yield from READERS[extension(path)](path, column)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a complete gzip file ({error}): compress it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_text(path: Path, column: str) -> Iterator[str]:
    """Yields the paragraphs of a plain text file, each with the blank lines that follow it."""
    paragraph: list[str] = []
    size = 0
    has_text = after_blank = False
    for _, line in read_lines(path, DOCUMENT_CHARACTERS):
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


def _read_csv(path: Path, column: str) -> Iterator[str | None]:
    # By default a field may have 128 KiB.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line for _, line in read_lines(path)), strict=True)
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


READERS: dict[str, Callable[[Path, str], Iterator[str | None]]] = {
    ".txt": _read_text,
    ".jsonl": read_json_lines,
    ".json": read_json_values,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

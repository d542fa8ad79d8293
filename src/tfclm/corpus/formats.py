"""Documents of one file, by its format: text, JSON, CSV or Parquet; errors name the file and line."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from tfclm.corpus.columns import extract_texts, find_column
from tfclm.corpus.json_rows import read_json_lines, read_json_values
from tfclm.corpus.lines import read_lines
from tfclm.corpus.parts import FilePart
from tfclm.errors import InputError

# Maximum length of a document of a .txt file: longer paragraphs are cut.
DOCUMENT_CHARACTERS = 1 << 16
CHECKED_ROWS = 10_000


def read_documents(file: Path | FilePart, column: str) -> Iterator[str | None]:
    """Yields the documents of a file, or of a part of one; None for a row without text.

    Raises:
        InputError: the file cannot be read as what its extension says.
    """
    part = file if isinstance(file, FilePart) else FilePart(str(file))
    try:
        yield from READERS[part.extension](part, column)
    except InputError:
        if part.start and part.extension != ".parquet":
            # Again, for an error with the number of the line within the file.
            for _ in READERS[part.extension](part.with_line_number(), column):
                pass
        raise
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{part} is not a complete gzip file ({error}): compress it again") from error
    except OSError as error:
        raise InputError(f"{part} cannot be read: {error.strerror or error}") from error


def check_column(part: FilePart, column: str) -> None:
    """Raises `InputError` if the beginning of a file cannot be read, or if none of its first rows has the column."""
    empty = True
    for text in islice(read_documents(part, column), CHECKED_ROWS):
        if text is not None:
            return
        empty = False
    if not empty:
        raise InputError(f"{part}: none of its first {CHECKED_ROWS} rows has text in column {column}: give another")


def _read_text(part: FilePart, column: str) -> Iterator[str]:
    """Yields the paragraphs of a plain text file, each with the blank lines that follow it."""
    paragraph: list[str] = []
    size = 0
    has_text = after_blank = False
    for _, line in read_lines(part, DOCUMENT_CHARACTERS):
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


def _read_csv(part: FilePart, column: str) -> Iterator[str | None]:
    # By default a field may have 128 KiB.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line for _, line in read_lines(part)), strict=True)
    try:
        header = next((row for row in reader if row), None)
        if header is None:
            return
        if column not in header:
            raise InputError(f"{part} has no column {column}: it has {', '.join(header)}")
        if header.count(column) > 1:
            raise InputError(f"{part} has column {column} twice: give each column its own name")
        index = header.index(column)
        for row in reader:
            if row and len(row) != len(header):
                raise InputError(
                    f"{part}, line {reader.line_num} has {len(row)} fields where the header has {len(header)}: "
                    "quote fields that contain a comma or a newline"
                )
            if row:
                yield row[index]
    except csv.Error as error:
        raise InputError(f"{part}, line {reader.line_num} is not CSV ({error}): check its quotes") from error


def _read_parquet(part: FilePart, column: str) -> Iterator[str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with part.open_file() as stream, pq.ParquetFile(stream) as file:
            head, rest = find_column(file.schema_arrow, column, str(part))
            groups = range(part.start, file.num_row_groups if part.end is None else part.end)
            for batch in file.iter_batches(batch_size=1000, row_groups=groups, columns=[head]):
                yield from extract_texts(batch.column(0), rest)
    except (pa.ArrowInvalid, UnicodeDecodeError, OSError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"{part} is not a readable parquet file ({message}): write it again") from error


READERS: dict[str, Callable[[FilePart, str], Iterator[str | None]]] = {
    ".txt": _read_text,
    ".jsonl": read_json_lines,
    ".json": read_json_values,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

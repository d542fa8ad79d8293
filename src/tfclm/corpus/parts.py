"""Parts of input files: fixed ranges that can be read independently of each other, wherever the file is."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

# How far after the beginning of a part a paragraph is looked for: longer ones are cut anyway.
PARAGRAPH_BYTES = 1 << 20
_NEXT_PARAGRAPH = re.compile(rb"\n(?:[^\S\n]*\n)+(?=[^\S\n]*\S)")


@dataclass(frozen=True)
class FilePart:
    """A part of an input file, or the whole file.

    The parts of a file hold each of its documents once: a document belongs to the part in which it begins.

    Attributes:
        path: local path, or URL of a file system that fsspec knows.
        start: where the part begins: bytes of a .txt or .jsonl file, row groups of a .parquet file.
        end: where the next part begins; None for the end of the file.
        first_line: the number of the part's first line, for messages.
    """

    path: str
    start: int = 0
    end: int | None = None
    first_line: int = 1

    def __str__(self) -> str:
        return self.path

    @property
    def is_whole(self) -> bool:
        """Whether the part is the whole file."""
        return self.start == 0 and self.end is None

    @property
    def extension(self) -> str:
        """The extension that says how to read the file, in lower case and without .gz."""
        return extension(Path(self.path))

    @property
    def is_gzip(self) -> bool:
        """Whether the file is compressed with gzip, going by its name."""
        return self.path.lower().endswith(".gz")

    def open_file(self) -> BinaryIO:
        """Opens the whole file."""
        if "://" not in self.path:
            return open(self.path, "rb")
        import fsspec

        return cast(BinaryIO, fsspec.open(self.path, "rb").open())

    def open(self) -> BinaryIO:
        """Opens the documents that begin within the part, as one stream."""
        file = self.open_file()
        if self.is_whole:
            return file
        begin, end = (None if at is None else self._next_document(file, at) for at in (self.start, self.end))
        file.seek(begin or 0)
        return cast(BinaryIO, io.BufferedReader(_Limited(file, None if end is None else end - (begin or 0)), 1 << 20))

    def with_line_number(self) -> FilePart:
        """The part with the number of its first line, for which the file is read up to there."""
        with self.open_file() as file:
            left = self._next_document(file, self.start)
            file.seek(0)
            lines = 1
            while left and (piece := file.read(min(left, 1 << 20))):
                lines += piece.count(b"\n")
                left -= len(piece)
        return dataclasses.replace(self, first_line=lines)

    def _next_document(self, file: BinaryIO, position: int) -> int:
        """Where the first document begins that begins at a position or after it."""
        if position == 0:
            return 0
        file.seek(position - 1)
        if self.extension == ".txt":
            window = file.read(PARAGRAPH_BYTES)
            if found := _NEXT_PARAGRAPH.search(window):
                return position - 1 + found.end()
            if len(window) < PARAGRAPH_BYTES:
                return position - 1 + len(window)
            # A long paragraph is cut: after a line, or where a character begins.
            if (line := window.find(b"\n")) >= 0:
                return position + line
            return position + next((at for at, byte in enumerate(window[1:5]) if byte & 0xC0 != 0x80), 0)
        at = position
        while piece := file.readline(1 << 20):
            at += len(piece)
            if piece.endswith(b"\n"):
                break
        return at - 1


class _Limited(io.RawIOBase):
    """The next `size` bytes of a file; all that are left if None."""

    def __init__(self, file: BinaryIO, size: int | None) -> None:
        self._file, self._left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        size = len(buffer) if self._left is None else min(len(buffer), max(self._left, 0))
        piece = self._file.read(size)
        buffer[: len(piece)] = piece
        if self._left is not None:
            self._left -= len(piece)
        return len(piece)

    def close(self) -> None:
        self._file.close()
        super().close()


def extension(path: Path) -> str:
    """The extension that says how to read a file, in lower case and without .gz; "" if there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        return "".join(suffixes[-2:-1]) if suffixes[-2:-1] != [".parquet"] else ""
    return "".join(suffixes[-1:])


def split_file(path: str, size: int, part_bytes: int) -> Iterator[FilePart]:
    """Splits a file into parts of about `part_bytes` bytes.

    A .csv, .json or compressed file is one part: its rows cannot be found without reading it from its beginning.

    Args:
        path: local path or URL.
        size: bytes of the file.
        part_bytes: bytes per part.
    """
    whole = FilePart(path)
    if whole.extension == ".parquet":
        yield from _split_parquet(whole, part_bytes)
    elif whole.is_gzip or whole.extension not in (".txt", ".jsonl") or size <= part_bytes:
        yield whole
    else:
        for start in range(0, size, part_bytes):
            yield FilePart(path, start, start + part_bytes if start + part_bytes < size else None)


def _split_parquet(whole: FilePart, part_bytes: int) -> Iterator[FilePart]:
    import pyarrow.parquet as pq

    with whole.open_file() as file:
        metadata = pq.read_metadata(file)
        sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    start, size = 0, 0
    for group, bytes_here in enumerate(sizes):
        if size and size + bytes_here > part_bytes:
            yield FilePart(whole.path, start, group)
            start, size = group, 0
        size += bytes_here
    yield FilePart(whole.path, start)

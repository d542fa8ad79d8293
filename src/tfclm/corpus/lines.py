"""The lines of a UTF-8 file, which may be compressed with gzip; errors name the file and line."""

from __future__ import annotations

import codecs
import gzip
from collections.abc import Iterator
from contextlib import ExitStack
from typing import BinaryIO, cast

from tfclm.corpus.parts import FilePart
from tfclm.errors import InputError


def read_lines(part: FilePart, limit: int = -1) -> Iterator[tuple[int, str]]:
    """Yields the numbered lines of a UTF-8 file; \\r\\n becomes \\n. Lines over `limit` bytes come in pieces."""
    decoder = codecs.getincrementaldecoder("utf-8" if part.start else "utf-8-sig")()
    line = part.first_line
    carriage_return = ""
    with ExitStack() as stack:
        file = stack.enter_context(part.open())
        if part.is_gzip:
            file = cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=file)))
        while True:
            piece = file.readline(limit)
            try:
                text = carriage_return + decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                if line == 1 and piece.startswith(b"\x1f\x8b"):
                    raise InputError(f"{part} is compressed with gzip: rename it so that it ends in .gz") from error
                raise _not_utf8(part, line) from error
            # The limit can fall between \r and \n.
            carriage_return = "\r" if piece and text.endswith("\r") else ""
            if text.endswith("\r\n"):
                text = text[:-2] + "\n"
            if text := text[: len(text) - len(carriage_return)]:
                yield line, text
            if not piece:
                return
            line += piece.endswith(b"\n")


def _not_utf8(part: FilePart, line: int) -> InputError:
    return InputError(f"{part}, line {line} is not UTF-8: save the file as UTF-8 (iconv -t UTF-8 converts it)")

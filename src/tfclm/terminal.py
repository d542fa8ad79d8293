"""Prints results and messages: escapes control characters on terminals, and handles closed and full streams."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Callable
from typing import TextIO

from tfclm.errors import InputError

# The control characters of ASCII and Latin-1, escaped as in JSON; newlines and tabs stay.
_ESCAPED = {code: f"\\u{code:04x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}

_rewrite: Callable[[str], str] = str
_closed: set[int] = set()  # descriptors of streams that were closed when this process started


def prepare_streams() -> None:
    """Opens standard streams that are closed, and makes stdout UTF-8."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Closed (`2>&-`): the next file that is opened would get this number, and the output with it.
            os.open(os.devnull, os.O_RDWR)
            _closed.add(number)
    # A closed stdin stays None, so that commands that read it can report that.
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Prompts are read as UTF-8, and texts have characters that ASCII or Latin-1 cannot encode.
        if not codecs.lookup(sys.stdout.encoding).name.startswith("utf"):
            sys.stdout.reconfigure(encoding="utf-8")
        if sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")


def printable(text: str, stream: TextIO) -> str:
    """The text to print to a stream: with control characters escaped if the stream is a terminal."""
    return text.translate(_ESCAPED) if stream.isatty() else text


def print_result(text: str) -> None:
    """Prints a result to stdout.

    Raises:
        InputError: stdout is closed.
        OSError: the result cannot be written: the disk is full, or the reader has closed the pipe.
    """
    if 1 in _closed:
        raise InputError("standard output is closed")
    print(printable(text, sys.stdout), flush=True)


def rewrite_lines(rewrite: Callable[[str], str]) -> None:
    """Sets the function that `log` applies to each line; a command uses it to show fields as flags."""
    global _rewrite
    _rewrite = rewrite


def log(line: str) -> None:
    """Prints a line of progress or an error to stderr."""
    stream: TextIO | None = sys.stderr
    # None if it was closed when Python started; print would use stdout then.
    if stream is not None:
        print(printable(_rewrite(line), stream), file=stream, flush=True)


def abandon_stdout() -> None:
    """Discards pending output, so that Python does not report the same error again at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(devnull, 1)

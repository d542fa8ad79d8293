"""What a command prints: text from elsewhere must not steer the terminal, and a stream may be closed or full."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import TextIO

from tfclm.errors import InputError

# The control characters of ASCII and of Latin-1, as JSON escapes them; a text has lines and tabs.
_ESCAPED = {code: f"\\u{code:04x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}

_closed: set[int] = set()  # descriptors of the streams that this process was started without


def mend_streams() -> None:
    """Gives the process the streams that all code expects, where it was started with others."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Closed (`2>&-`): the next file that is opened would have its number, and get what is printed.
            os.open(os.devnull, os.O_RDWR)
            _closed.add(number)
    # A closed standard input stays None: who wants to read from it can say so.
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Prompts are read as UTF-8, and texts have characters that an ASCII or Latin-1 terminal's encoding has not.
        if not codecs.lookup(sys.stdout.encoding).name.startswith("utf"):
            sys.stdout.reconfigure(encoding="utf-8")
        if sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")


def printable(text: str, stream: TextIO) -> str:
    """A text as a stream may have it: with its control characters escaped if that is a terminal."""
    return text.translate(_ESCAPED) if stream.isatty() else text


def print_result(text: str) -> None:
    """Prints a result to stdout.

    Raises:
        InputError: stdout is closed, so that the result would be lost.
        OSError: it cannot be written, for the disk is full or nobody reads it any more.
    """
    if 1 in _closed:
        raise InputError("standard output is closed")
    print(printable(text, sys.stdout), flush=True)


def log(line: str) -> None:
    """Progress and errors go to stderr."""
    stream: TextIO | None = sys.stderr
    # Python has None for what was closed before it started, which print would take for stdout.
    if stream is not None:
        print(printable(line, stream), file=stream, flush=True)


def abandon_stdout() -> None:
    """Gives up what is still to be printed, so that Python does not complain about it again while it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(nowhere, 1)

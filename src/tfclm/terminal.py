"""What a command prints: text from elsewhere must not steer the terminal, and a stream may be closed or full."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from tfclm.errors import InputError

# The control characters of ASCII and of Latin-1, as JSON escapes them; a text has lines and tabs.
_ESCAPED = {code: f"\\u{code:04x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def printable(text: str, stream: TextIO) -> str:
    """A text as a stream may have it: with its control characters escaped if that is a terminal."""
    return text.translate(_ESCAPED) if stream.isatty() else text


def print_result(text: str) -> None:
    """Prints a result to stdout.

    Raises:
        InputError: stdout is closed, full, or has an encoding that cannot hold the text.
        BrokenPipeError: nobody reads it any more.
    """
    stream: TextIO | None = sys.stdout
    if stream is None:
        raise InputError("standard output is closed")
    try:
        print(printable(text, stream), file=stream, flush=True)
    except UnicodeEncodeError as error:
        raise InputError(
            f"standard output has the encoding {stream.encoding}, which has no {text[error.start]!a}: "
            "set PYTHONIOENCODING=utf-8"
        ) from error
    except BrokenPipeError:
        raise
    except OSError as error:
        abandon_stdout()
        raise InputError(f"standard output: {error.strerror or error}") from error


def say(line: str) -> None:
    """Progress and errors go to stderr."""
    stream: TextIO | None = sys.stderr
    # Python has None for what was closed before it started, which print would take for stdout.
    if stream is not None:
        print(printable(line, stream), file=stream, flush=True)


def abandon_stdout() -> None:
    """Lets go of a stdout that fails, so that Python does not complain about it once more while it exits."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

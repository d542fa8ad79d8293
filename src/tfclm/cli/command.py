"""Running a command: its arguments, its errors in one line, its exit code."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn, TypeVar

from tfclm.cli.arguments import flag, parse
from tfclm.compat import import_tensorflow
from tfclm.errors import InputError, replace_names
from tfclm.settings import fields_of
from tfclm.terminal import abandon_stdout, log, prepare_streams, rewrite_lines

T = TypeVar("T")

# A full or failing disk, which a traceback would not explain.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def command(
    settings: type[T],
    run: Callable[[T], int | None],
    *,
    verb: str,
    description: str,
    preset: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: {},
    tensorflow: bool = True,
    flag: Callable[[str], str] = flag,
) -> NoReturn:
    """Runs a command as `python -m tfclm.VERB` does and exits: 0 done, 2 for bad input, 1 for any other failure.

    Args:
        settings: the dataclass whose fields are the command's flags.
        run: the command; it returns an exit code, or None for 0.
        verb: the command's name.
        description: the first lines of its help.
        preset: values for fields that are not given; see `parse`.
        tensorflow: import TensorFlow before `run`.
        flag: a field's flag, for messages.
    """
    prog = f"python -m tfclm.{verb}"
    prepare_streams()
    rewrite_lines(functools.partial(name_flags, settings=settings, flag=flag))
    try:
        try:
            values = parse(settings, sys.argv[1:], prog=prog, description=description, preset=preset)
            if tensorflow:
                import_tensorflow()
            code: Any = run(values) or 0
        except SystemExit as end:  # --help
            code = end.code
        # Flush here, where a failure to print can still be reported.
        sys.stdout.flush()
        sys.exit(code)
    except InputError as error:
        log(_scrubbed(f"tfclm.{verb}: {' '.join(str(error).split())}"))
        sys.exit(2)
    except KeyboardInterrupt:
        log(f"tfclm.{verb}: interrupted")
        sys.exit(1)
    except BrokenPipeError:
        abandon_stdout()  # the reader has exited (`| head`)
        sys.exit(1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            abandon_stdout()
            where = f": {error.filename}" if error.filename else ""
            log(_scrubbed(f"tfclm.{verb}: {error.strerror}{where}"))
            sys.exit(1)
        log(_scrubbed(traceback.format_exc().rstrip()))
        sys.exit(1)
    finally:
        rewrite_lines(str)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Lets SIGTERM interrupt this process as Ctrl-C does, so that a command ends with code 1 and a line."""
    owner, previous = os.getpid(), signal.getsignal(signal.SIGTERM)

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            raise KeyboardInterrupt
        # A process that was forked from this one, such as a worker of datasets, is ended by its pool in this way.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def name_flags(message: str, settings: type, flag: Callable[[str], str] = flag) -> str:
    """A message of the library with a command's fields, which stand in backquotes there, as flags.

    Example:
        >>> name_flags("`block_size` 1: give 2 or more", FitSettings)
        '--block-size 1: give 2 or more'
    """
    return replace_names(message, (field.name for field, _ in fields_of(settings)), flag)


def _scrubbed(text: str) -> str:
    """A message without the Hub's token, which a proxy's reply or a misused flag may put into it.

    Never fails: it is the last step before an error is printed.
    """
    from tfclm.hub.repository import scrubbed

    return scrubbed(text)

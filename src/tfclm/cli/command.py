"""Running a command: its arguments, its errors in one line, its exit code."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from tfclm.cli.arguments import parse
from tfclm.compat import import_tensorflow
from tfclm.errors import InputError
from tfclm.terminal import abandon_stdout, log, mend_streams

T = TypeVar("T")

# What a disk says that is full or broken: nothing that a traceback would explain.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def command(
    settings: type[T],
    run: Callable[[T], int | None],
    *,
    verb: str,
    description: str,
    preset: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: {},
    tensorflow: bool = True,
) -> NoReturn:
    """Runs a command as `python -m tfclm.VERB` does and exits: 0 done, 2 for what the user gave, 1 for the rest."""
    prog = f"python -m tfclm.{verb}"
    mend_streams()
    try:
        try:
            values = parse(settings, sys.argv[1:], prog=prog, description=description, preset=preset)
            if tensorflow:
                import_tensorflow()
            code: Any = run(values) or 0
        except SystemExit as end:  # --help
            code = end.code
        # Here, where it can still be told that what was printed has not arrived.
        sys.stdout.flush()
        sys.exit(code)
    except InputError as error:
        log(_scrubbed(f"tfclm.{verb}: {' '.join(str(error).split())}"))
        sys.exit(2)
    except KeyboardInterrupt:
        log(f"tfclm.{verb}: interrupted")
        sys.exit(1)
    except BrokenPipeError:
        abandon_stdout()  # its reader has gone (`| head`)
        sys.exit(1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            abandon_stdout()
            where = f": {error.filename}" if error.filename else ""
            log(_scrubbed(f"tfclm.{verb}: {error.strerror}{where}"))
            sys.exit(1)
        log(_scrubbed(traceback.format_exc().rstrip()))
        sys.exit(1)


def _scrubbed(text: str) -> str:
    """Without the Hub's token, which a message may quote: a proxy's, or about a flag that it was given to.

    Never fails: it is the last step between an error and its line.
    """
    from tfclm.hub.repository import scrubbed

    return scrubbed(text)

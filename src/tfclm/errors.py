"""The error for bad input, which commands print as one line with exit code 2."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

_NAME = re.compile(r"`([a-z][a-z0-9_]*)`")


class InputError(ValueError):
    """Input that cannot be used; the message says what is wrong (file, line, column, field) and what would be right.

    The message names fields of settings and parameters of functions in backquotes: `block_size`. The command line
    shows them as flags: --block-size.
    """

    def renamed(self, **names: str) -> InputError:
        """The error for a caller whose fields have other names.

        Example:
            >>> InputError("`serving_dir` is missing").renamed(serving_dir="export_to")
            InputError('`export_to` is missing')
        """
        return InputError(replace_names(str(self), names, lambda name: f"`{names[name]}`"))


def replace_names(message: str, names: Iterable[str], write: Callable[[str], str]) -> str:
    """Rewrites those names in backquotes in a message that are among `names`.

    Example:
        >>> replace_names("`block_size` 1: give 2 or more", ["block_size"], str.upper)
        'BLOCK_SIZE 1: give 2 or more'
    """
    known = set(names)
    return _NAME.sub(lambda match: write(match[1]) if match[1] in known else match[0], message)


def root_cause(error: BaseException) -> BaseException:
    """The error that led to an error: of a failed request, what the network layer said."""
    seen = {id(error)}
    # As in a traceback, which leaves out what was raised `from None`.
    while before := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        if id(before) in seen:
            break
        error = before
        seen.add(id(error))
    return error


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

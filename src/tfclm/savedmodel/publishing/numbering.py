"""Version numbers: which directory names servers read as a version, and which number comes next."""

from __future__ import annotations

from collections.abc import Iterable

from tfclm.errors import InputError

__all__ = ["LARGEST", "check_number", "find_versions", "next_number", "taken_error"]

LARGEST = 2**63 - 1  # servers read a directory's name as an int64


def find_versions(names: Iterable[str]) -> dict[int, list[str]]:
    """The names that servers read as versions, by number, ascending.

    Example:
        >>> find_versions(["notes", "10", "007"])
        {7: ['007'], 10: ['10']}
    """
    found: dict[int, list[str]] = {}
    for name in sorted(names):
        if name.isascii() and name.isdigit() and int(name) <= LARGEST:
            found.setdefault(int(name), []).append(name)
    return dict(sorted(found.items()))


def check_number(version: int) -> None:
    """Raises InputError for a number that servers do not read as a version."""
    if not 1 <= version <= LARGEST:
        raise InputError(f"`version` {version}: {'give 1 or more' if version < 1 else f'give at most {LARGEST}'}")


def next_number(where: str, numbers: Iterable[int]) -> int:
    """The highest of the numbers plus 1; 1 if there is none.

    Args:
        where: the model directory, for the message.
        numbers: those of its versions.

    Raises:
        InputError: servers read no higher number.
    """
    number = max(numbers, default=0) + 1
    if number > LARGEST:
        raise InputError(
            f"`serving_dir` {where}: version {LARGEST} exists, and servers take no higher number; give a free `version`"
        )
    return number


def taken_error(where: str, version: int) -> InputError:
    """The error for a version whose number is taken."""
    return InputError(f"`version` {version} already exists in {where}: give another, or leave it out")

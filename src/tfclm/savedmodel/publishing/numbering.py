"""The numbers of versions: which names servers take for one, and which number comes next."""

from __future__ import annotations

from collections.abc import Iterable

from tfclm.errors import InputError

__all__ = ["LARGEST", "check_number", "following", "numbered", "taken"]

LARGEST = 2**63 - 1  # a server reads a folder's name as an int64


def numbered(names: Iterable[str]) -> dict[int, list[str]]:
    """Those of the names that are versions, by number, ascending; 007 is 7, as servers read it."""
    found: dict[int, list[str]] = {}
    for name in sorted(names):
        if name.isascii() and name.isdigit() and int(name) <= LARGEST:
            found.setdefault(int(name), []).append(name)
    return dict(sorted(found.items()))


def check_number(version: int) -> None:
    """Raises InputError for a number that no server takes."""
    if not 1 <= version <= LARGEST:
        raise InputError(f"--version {version}: give 1 or more" + (f", {LARGEST} at most" if version > 0 else ""))


def following(where: str, numbers: Iterable[int]) -> int:
    """The highest number plus 1; raises InputError if servers have none beyond it."""
    number = max(numbers, default=0) + 1
    if number > LARGEST:
        raise InputError(
            f"--serving-dir {where}: version {LARGEST} is there, and servers take no higher one; give a free --version"
        )
    return number


def taken(where: str, version: int) -> InputError:
    """What is said of a number that was asked for in vain."""
    return InputError(f"--version {version} is in {where} already: give another, or leave it out")

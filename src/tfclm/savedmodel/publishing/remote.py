"""Versions on stores without rename, such as gs:// and s3://: claim a number first, upload saved_model.pb last.

A directory is a version there once it holds saved_model.pb. Such stores only promise that a listing shows what was
written before. So an export that wants a number writes an object with a unique name to `.claims` and then lists the
claims: of two exports at once, the one that lists last sees the other's claim and gives way. That may skip a number.
"""

from __future__ import annotations

import contextlib
import random
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import tensorflow as tf

from tfclm.errors import InputError, first_line
from tfclm.savedmodel.publishing.numbering import find_versions, next_number, taken_error

__all__ = ["ABANDONED", "CLAIMS", "clean", "folders", "named_errors", "remove", "upload"]

CLAIMS = ".claims"  # servers ignore it: its name is not a number
ABANDONED = 24 * 3600  # seconds after which an upload counts as killed
GRAPH = "saved_model.pb"

files = tf.io.gfile


class _Claim(NamedTuple):
    """A claim to a number: an object in `.claims` whose name holds these fields, separated by dots."""

    number: int
    since: int  # seconds since 1970
    owner: str


@contextmanager
def named_errors(where: str) -> Iterator[None]:
    """Names the model directory in which TensorFlow's filesystem refuses an operation."""
    try:
        yield
    except tf.errors.OpError as error:
        problem = first_line(error)
        raise InputError(f"`serving_dir` {where}: {problem}; give an address that can be read and written") from error


def folders(where: str) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Names of the version directories by number, ascending: those with saved_model.pb, and those without."""
    # Not isdir, which is False for a store that cannot be reached.
    names = [name.rstrip("/") for name in files.listdir(where)] if files.exists(where) else []
    complete: dict[int, list[str]] = {}
    incomplete: dict[int, list[str]] = {}
    for number, candidates in find_versions(names).items():
        whole = [name for name in candidates if files.exists(f"{where}/{name}/{GRAPH}")]
        (complete if whole else incomplete)[number] = whole or candidates
    return complete, incomplete


def upload(folder: Path, where: str, version: int | None) -> int:
    """Uploads a finished version; returns its number: `version`, or the next free one if that is None.

    Raises:
        InputError: the number is taken, or a file cannot be written; the files written before are removed again.
    """
    claim = _claim(where, version)
    target = f"{where}/{claim.number}"
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    try:
        with named_errors(where):
            for name in sorted(names, key=lambda name: (name == GRAPH, name)):
                files.makedirs(f"{target}/{name}".rpartition("/")[0])
                files.copy(str(folder / name), f"{target}/{name}")
    except BaseException:
        with contextlib.suppress(tf.errors.OpError):
            if files.exists(target):
                files.rmtree(target)
            _withdraw(where, claim)  # last: nobody else takes the number while it is claimed
        raise
    with contextlib.suppress(tf.errors.OpError):  # the version is complete; a claim that stays does no harm
        _withdraw(where, claim)
    return claim.number


def remove(where: str, version: int, names: list[str]) -> None:
    """Removes the directories of a version: hidden from servers at once, then deleted."""
    # Dated 0, so that the next export finishes the removal if this process is killed.
    claim = _write(where, _Claim(version, 0, uuid.uuid4().hex))
    for name in names:
        with contextlib.suppress(tf.errors.NotFoundError):  # another process is removing it
            files.remove(f"{where}/{name}/{GRAPH}")
            files.rmtree(f"{where}/{name}")
    _withdraw(where, claim)


def clean(where: str) -> list[int]:
    """Removes what killed exports left; returns the numbers of the incomplete versions that stay, ascending.

    There is no way to ask whether an upload is still running. It counts as killed once its claim is older than a day.
    """
    claims = _claims(where)
    complete, incomplete = folders(where)
    for claim in claims:
        if time.time() - claim.since <= ABANDONED:
            continue
        with contextlib.suppress(tf.errors.NotFoundError):  # another export is removing it
            for name in incomplete.pop(claim.number, []):
                files.rmtree(f"{where}/{name}")
        # Only once the number cannot be the next one: another export that cleans up would remove a new version.
        if max(complete, default=0) >= claim.number:
            _withdraw(where, claim)
    return list(incomplete)


def _claim(where: str, version: int | None) -> _Claim:
    """Claims a number: `version`, or the next free one."""
    wait = 0.01
    while True:
        with named_errors(where):
            claims = {claim.number for claim in _claims(where)}
            there = claims.union(*folders(where))
            if version in there:
                raise taken_error(where, version)
            number = next_number(where, there) if version is None else version
            mine = _write(where, _Claim(number, int(time.time()), uuid.uuid4().hex))
            # In this order: a claim that was withdrawn in between has left a directory.
            others = [claim for claim in _claims(where) if claim.number == number and claim != mine]
            if not others and all(number not in each for each in folders(where)):
                return mine
            _withdraw(where, mine)
        time.sleep(random.uniform(0, wait))
        wait = min(2.0, 2 * wait)


def _claims(where: str) -> list[_Claim]:
    folder = f"{where}/{CLAIMS}"
    names = files.listdir(folder) if files.exists(folder) else []
    parts = [name.split(".") for name in names]
    known = [each for each in parts if len(each) == 3 and all(part.isdecimal() for part in each[:2])]
    return [_Claim(int(number), int(since), owner) for number, since, owner in known]


def _write(where: str, claim: _Claim) -> _Claim:
    files.makedirs(f"{where}/{CLAIMS}")
    with files.GFile(_path(where, claim), "w") as file:
        file.write("a version with this number is being written or removed\n")
    return claim


def _withdraw(where: str, claim: _Claim) -> None:
    with contextlib.suppress(tf.errors.NotFoundError):
        files.remove(_path(where, claim))


def _path(where: str, claim: _Claim) -> str:
    return f"{where}/{CLAIMS}/{'.'.join(map(str, claim))}"

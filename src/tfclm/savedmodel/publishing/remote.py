"""Versions where nothing can be renamed, as on gs:// and s3://: a number is claimed first, saved_model.pb comes last.

A folder is a version there if it holds saved_model.pb. All that such stores promise is that a listing shows what was
written before it. So who wants a number writes an object with a name of its own into `.claims`, and then looks whose
others are there: of two at once, the one that looks last sees the other's, and steps back. That may skip a number.
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
from tfclm.savedmodel.publishing.numbering import following, numbered, taken

__all__ = ["ABANDONED", "CLAIMS", "clean", "folders", "reached", "remove", "upload"]

CLAIMS = ".claims"  # hidden from servers, which take folders with a number for a name
ABANDONED = 24 * 3600  # seconds after which the claim of an upload is taken for that of one that was killed
GRAPH = "saved_model.pb"

files = tf.io.gfile


class _Claim(NamedTuple):
    """Who has a number: what the name of an object in `.claims` says, with dots between."""

    number: int
    since: int  # seconds since 1970
    owner: str


@contextmanager
def reached(where: str) -> Iterator[None]:
    """Names the serving directory where TensorFlow's filesystem refuses something in it."""
    try:
        yield
    except tf.errors.OpError as error:
        problem = first_line(error)
        raise InputError(f"--serving-dir {where}: {problem}; give an address that can be read and written") from error


def folders(where: str) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Names of the folders by version, ascending: of the complete ones, and of those without saved_model.pb."""
    # Not isdir, which takes a store that cannot be reached for an empty one.
    names = [name.rstrip("/") for name in files.listdir(where)] if files.exists(where) else []
    complete: dict[int, list[str]] = {}
    incomplete: dict[int, list[str]] = {}
    for number, those in numbered(names).items():
        whole = [name for name in those if files.exists(f"{where}/{name}/{GRAPH}")]
        (complete if whole else incomplete)[number] = whole or those
    return complete, incomplete


def upload(folder: Path, where: str, version: int | None) -> int:
    """Copies a finished version; its number, `version` or the next that nobody has.

    Raises:
        InputError: the number is taken, or something cannot be written; what was written is removed again.
    """
    claim = _claim(where, version)
    target = f"{where}/{claim.number}"
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    try:
        with reached(where):
            for name in sorted(names, key=lambda name: (name == GRAPH, name)):
                files.makedirs(f"{target}/{name}".rpartition("/")[0])
                files.copy(str(folder / name), f"{target}/{name}")
    except BaseException:
        with contextlib.suppress(tf.errors.OpError):
            if files.exists(target):
                files.rmtree(target)
            _withdraw(where, claim)  # last: while the claim is there, the number is nobody else's
        raise
    with contextlib.suppress(tf.errors.OpError):  # the version is there, and the claim does not hurt
        _withdraw(where, claim)
    return claim.number


def remove(where: str, version: int, names: list[str]) -> None:
    """Takes the folders of a version away: out of a server's sight at once, then from the store."""
    # If this is killed, the next export goes on with it.
    claim = _write(where, _Claim(version, 0, uuid.uuid4().hex))
    for name in names:
        with contextlib.suppress(tf.errors.NotFoundError):  # another process removes it just now
            files.remove(f"{where}/{name}/{GRAPH}")
            files.rmtree(f"{where}/{name}")
    _withdraw(where, claim)


def clean(where: str) -> list[int]:
    """Removes what exports have left that were killed; the numbers of incomplete versions that stay, ascending.

    An upload cannot be asked whether it is still alive. It counts as killed when its claim is older than a day.
    """
    claims = _claims(where)
    complete, incomplete = folders(where)
    for claim in claims:
        if time.time() - claim.since <= ABANDONED:
            continue
        with contextlib.suppress(tf.errors.NotFoundError):  # another export removes it just now
            for name in incomplete.pop(claim.number, []):
                files.rmtree(f"{where}/{name}")
        # Only when the number cannot be the next one any more: who else removes it would remove what is new.
        if max(complete, default=0) >= claim.number:
            _withdraw(where, claim)
    return list(incomplete)


def _claim(where: str, version: int | None) -> _Claim:
    """The claim to a number, `version` or the next, that nobody else has."""
    wait = 0.01
    while True:
        with reached(where):
            claims = {claim.number for claim in _claims(where)}
            there = claims.union(*folders(where))
            if version in there:
                raise taken(where, version)
            number = following(where, there) if version is None else version
            mine = _write(where, _Claim(number, int(time.time()), uuid.uuid4().hex))
            # In this order: a claim that is gone by now has left a folder.
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
        file.write("the number of a version that is being written or removed\n")
    return claim


def _withdraw(where: str, claim: _Claim) -> None:
    with contextlib.suppress(tf.errors.NotFoundError):
        files.remove(_path(where, claim))


def _path(where: str, claim: _Claim) -> str:
    return f"{where}/{CLAIMS}/{'.'.join(map(str, claim))}"

"""Version directories of a servable: staged beside under a hidden name, complete, then renamed into place.

A server takes any child whose name is a whole number, at any moment; so nothing that is not finished has such a name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tfclm.errors import InputError

STAGING = ".staging-"
LARGEST = 2**63 - 1  # a server reads a folder's name as an int64


def versions(serving_dir: str | os.PathLike[str]) -> list[int]:
    """The version numbers in a serving directory, ascending; none if there is no such directory.

    Args:
        serving_dir: a folder, or an address that TensorFlow's filesystems know, such as gs://bucket/name.
    """
    where = os.fspath(serving_dir)
    if is_remote(where):
        import tensorflow as tf

        names = tf.io.gfile.listdir(where) if tf.io.gfile.isdir(where) else []
    else:
        names = [entry.name for entry in os.scandir(where) if entry.is_dir()] if os.path.isdir(where) else []
    return sorted(int(name) for name in (each.rstrip("/") for each in names) if name.isascii() and name.isdigit())


def check_place(serving_dir: str | os.PathLike[str], version: int | None = None) -> None:
    """Refuses, before the work of an export, what would be refused behind it.

    Args:
        serving_dir: where the version is to be published; it need not be there.
        version: its number, if that is given.

    Raises:
        InputError: the directory cannot be made or written, or the number is out of range or taken.
    """
    where = os.fspath(serving_dir)
    if version is not None:
        if not 1 <= version <= LARGEST:
            raise InputError(f"--version {version}: give 1 or more" + (f", {LARGEST} at most" if version > 0 else ""))
        if version in versions(where) or (not is_remote(where) and os.path.lexists(Path(where) / str(version))):
            raise _taken(where, version)
    if is_remote(where):
        return
    place = Path(where).absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise InputError(f"--serving-dir {where}: {place} is no folder; give a folder that can be written")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"--serving-dir {where}: {place} cannot be written; give a folder that can be written")


@contextmanager
def staged(serving_dir: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder to write a version into; removed at the end unless it was published.

    What an export that was killed has left under the serving directory is removed first.

    Raises:
        InputError: the serving directory cannot be written, or the disk is full.
    """
    where = os.fspath(serving_dir)
    if is_remote(where):
        with tempfile.TemporaryDirectory(prefix="tfclm-") as folder:
            yield Path(folder)
        return
    with contextlib.ExitStack() as held:
        with _writable(where):
            os.makedirs(where, exist_ok=True)
            # Between the making of a folder and its lock it looks like one that was left behind.
            with _locked(Path(where), wait=True):
                for entry in Path(where).glob(f"{STAGING}*"):
                    # In use, or just renamed into a version.
                    with contextlib.suppress(BlockingIOError, FileNotFoundError), _locked(entry):
                        shutil.rmtree(entry)
                folder = tempfile.mkdtemp(prefix=STAGING, dir=where)
                held.callback(shutil.rmtree, folder, ignore_errors=True)
                held.enter_context(_locked(Path(folder)))
            os.chmod(folder, 0o755)  # a server is often another user
        try:
            yield Path(folder)
        except Exception as error:
            # TensorFlow's writers have errors of their own, with the system's words in them.
            if not any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
                raise
            raise InputError(f"--serving-dir {where}: the disk is full, nothing was published; make room") from error


def publish(folder: Path, serving_dir: str | os.PathLike[str], version: int | None = None) -> int:
    """Makes a staged folder a version; the number that it got.

    Args:
        folder: what `staged` gave, complete.
        serving_dir: where it was staged for.
        version: its number; the highest there plus 1 if not given. Of two exports at once each gets one of its own.

    Raises:
        InputError: there is such a version already, or its number is out of range.
    """
    where = os.fspath(serving_dir)
    check_place(where, version)
    if is_remote(where):
        return _upload(folder, where, version)
    for file in folder.rglob("*"):
        _sync(file)
    _sync(folder)
    taken = 0
    while True:
        number = version if version is not None else max([taken, *versions(where)]) + 1
        target = Path(where) / str(number)
        try:
            # Onto a folder with content a rename fails, so the first of two that want one number gets it.
            os.rename(folder, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if version is not None:
                raise _taken(where, version) from error
            taken = number  # by another export, or by a file
            continue
        _sync(Path(where))
        return number


def _upload(folder: Path, where: str, version: int | None) -> int:
    """Copies a version to a filesystem without rename; saved_model.pb comes last, a server loads nothing before it."""
    import tensorflow as tf

    number = version if version is not None else max(versions(where), default=0) + 1
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in sorted(files, key=lambda name: name == "saved_model.pb"):
        target = f"{where.rstrip('/')}/{number}/{name}"
        tf.io.gfile.makedirs(target.rsplit("/", 1)[0])
        tf.io.gfile.copy(str(folder / name), target)
    return number


def remove(serving_dir: str | os.PathLike[str], version: int) -> None:
    """Takes a version away: out of a server's sight at once, then from the disk."""
    where = os.fspath(serving_dir)
    if is_remote(where):
        import tensorflow as tf

        folder = f"{where.rstrip('/')}/{version}"
        tf.io.gfile.remove(f"{folder}/saved_model.pb")
        tf.io.gfile.rmtree(folder)
        return
    with _writable(where), _locked(Path(where), wait=True):
        hidden = tempfile.mkdtemp(prefix=STAGING, dir=where)
        with contextlib.suppress(FileNotFoundError):  # another process has removed it just now
            os.rename(Path(where) / str(version), Path(hidden) / "removed")
        shutil.rmtree(hidden)


def keep(serving_dir: str | os.PathLike[str], count: int, spare: int | None = None) -> list[int]:
    """Removes all but the newest `count` versions and `spare`; the numbers that were removed, ascending."""
    if count < 1:
        raise InputError(f"--keep-versions {count}: give 1 or more")
    gone = [number for number in versions(serving_dir)[:-count] if number != spare]
    for number in gone:
        remove(serving_dir, number)
    return gone


def rollback(serving_dir: str | os.PathLike[str]) -> tuple[int, int]:
    """Removes the newest version, whereupon a server goes back to the one before; both numbers, removed and served.

    Raises:
        InputError: there is no version to go back to.
    """
    there = versions(serving_dir)
    if len(there) < 2:
        count = "one version" if there else "no version"
        raise InputError(f"--rollback: {os.fspath(serving_dir)} has {count}, and nothing to go back to")
    remove(serving_dir, there[-1])
    return there[-1], there[-2]


def is_remote(where: str) -> bool:
    """Whether an address is one of TensorFlow's own filesystems, such as gs:// or s3://."""
    return "://" in where


def _taken(where: str, version: int) -> InputError:
    return InputError(f"--version {version} is in {where} already: give another, or leave it out")


@contextmanager
def _writable(where: str) -> Iterator[None]:
    """Names the serving directory where the system refuses something in it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"--serving-dir {where}: {error.strerror}; give a folder that can be written") from error


@contextmanager
def _locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Holds a folder against other processes, until this one's end at most; BlockingIOError if one of them has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

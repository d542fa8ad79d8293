"""Version directories of a servable: staged beside under a hidden name, complete, then renamed into place.

A server takes any child whose name is a whole number, at any moment; so nothing that is not finished has such a name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tfclm import disk
from tfclm.errors import InputError
from tfclm.savedmodel.publishing.numbering import check_number, following, numbered, taken

STAGING = ".staging-"


def address(serving_dir: str | os.PathLike[str]) -> str:
    """A folder's path, that of file:// too, or an address that TensorFlow's filesystems know, such as gs://bucket/name.

    Raises:
        InputError: it is empty.
    """
    where = os.fspath(serving_dir)
    if not where:
        raise InputError("--serving-dir is empty: give the servable's folder, such as serving_models/eli5")
    if where.startswith("file://"):
        # Behind a host's name, as TensorFlow reads it.
        where = "/" + where.removeprefix("file://").partition("/")[2]
    return where.rstrip("/") or where[:1]


def is_remote(where: str) -> bool:
    """Whether an address is one of TensorFlow's own filesystems, such as gs:// or s3://."""
    return "://" in where


def folders(serving_dir: str | os.PathLike[str]) -> dict[int, list[str]]:
    """The versions in a serving directory, ascending, with the names of their folders: that of 7 may be 007.

    Raises:
        InputError: it cannot be read.
    """
    where = address(serving_dir)
    if is_remote(where):
        from tfclm.savedmodel.publishing import remote

        with remote.reached(where):
            return remote.folders(where)[0]
    with _usable(f"--serving-dir {where}", "give a folder that can be read"):
        return numbered(entry.name for entry in os.scandir(where) if entry.is_dir()) if os.path.isdir(where) else {}


def versions(serving_dir: str | os.PathLike[str]) -> list[int]:
    """The version numbers in a serving directory, ascending; none if there is no such directory.

    Args:
        serving_dir: a folder, or an address that TensorFlow's filesystems know, such as gs://bucket/name.
    """
    return list(folders(serving_dir))


def incomplete(serving_dir: str | os.PathLike[str]) -> list[int]:
    """The numbers in a remote serving directory that look like versions and are none, ascending."""
    where = address(serving_dir)
    if not is_remote(where):
        return []
    from tfclm.savedmodel.publishing import remote

    with remote.reached(where):
        return list(remote.folders(where)[1])


def check_place(serving_dir: str | os.PathLike[str], version: int | None = None) -> None:
    """Refuses, before the work of an export, what would be refused behind it.

    Args:
        serving_dir: where the version is to be published; it need not be there.
        version: its number, if that is given.

    Raises:
        InputError: the directory cannot be made or written, or the number is out of range or taken.
    """
    where = address(serving_dir)
    there = [*versions(where), *incomplete(where)]
    if version is None:
        following(where, there)
    else:
        check_number(version)
        if version in there or (not is_remote(where) and os.path.lexists(Path(where) / str(version))):
            raise taken(where, version)
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
def staged(serving_dir: str | os.PathLike[str], log: Callable[[str], None] = lambda line: None) -> Iterator[Path]:
    """An empty folder to write a version into; removed at the end unless it was published.

    What an export that was killed has left is removed first: at once under a local serving directory and among the
    temporary files, from which a version is uploaded; after a day in a remote one.

    Args:
        serving_dir: where the version is to be published.
        log: gets a line on each leftover that stays: an incomplete version in a remote serving directory, or what this
            user may not remove.

    Raises:
        InputError: the serving directory cannot be written, or the disk is full.
    """
    where = address(serving_dir)
    place, named, hint = Path(where), f"--serving-dir {where}", "give a folder that can be written"
    if is_remote(where):
        from tfclm.savedmodel.publishing import remote

        with remote.reached(where):
            for number in remote.clean(where):
                log(explain_incomplete(where, number))
        hint = "make room, or set TMPDIR to a folder of yours"
        with _usable("the temporary folder", hint):
            # One for each user, whose leftovers can be told from others' files.
            place = Path(tempfile.gettempdir()) / f"tfclm-{os.getuid()}"
        named = f"the temporary folder {place}"
    with contextlib.ExitStack() as held:
        with _usable(named, hint):
            os.makedirs(place, mode=0o700 if is_remote(where) else 0o777, exist_ok=True)
            if is_remote(where) and os.lstat(place).st_uid != os.getuid():
                raise PermissionError(errno.EPERM, "another user has made it")
            folder = held.enter_context(disk.staging(place, STAGING, log))
        try:
            yield folder
        except InputError:
            raise
        except Exception as error:
            # TensorFlow's writers have errors of their own, with the system's words in them.
            if not any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
                raise
            hint = hint if is_remote(where) else "make room"
            raise InputError(f"{named}: the disk is full, nothing was published; {hint}") from error


def publish(folder: Path, serving_dir: str | os.PathLike[str], version: int | None = None) -> int:
    """Makes a staged folder a version; the number that it got.

    Args:
        folder: what `staged` gave, complete.
        serving_dir: where it was staged for.
        version: its number; the highest there plus 1 if not given. Of two exports at once each gets one of its own.

    Raises:
        InputError: there is such a version already, its number is out of range, or a remote place cannot be written.
    """
    where = address(serving_dir)
    check_place(where, version)
    if is_remote(where):
        from tfclm.savedmodel.publishing import remote

        return remote.upload(folder, where, version)
    disk.sync_folder(folder)
    others = 0
    while True:
        number = version if version is not None else following(where, [others, *versions(where)])
        target = Path(where) / str(number)
        try:
            # Onto a folder with content a rename fails, so the first of two that want one number gets it.
            os.rename(folder, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if version is not None:
                raise taken(where, version) from error
            others = number  # by another export, or by a file
            continue
        disk.sync(Path(where))
        return number


def remove(serving_dir: str | os.PathLike[str], version: int) -> None:
    """Takes a version away, whatever its folders are called: out of a server's sight at once, then from the disk."""
    where = address(serving_dir)
    names = folders(where).get(version, [])
    if is_remote(where):
        from tfclm.savedmodel.publishing import remote

        with remote.reached(where):
            remote.remove(where, version, names)
        return
    with (
        _usable(f"--serving-dir {where}", "give a folder that can be written"),
        disk.FolderLock(Path(where), disk.LOCK_PATIENCE),
    ):
        hidden = tempfile.mkdtemp(prefix=STAGING, dir=where)
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # another process has removed it just now
                _hide(Path(where) / name, Path(hidden) / name)
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


def explain_incomplete(serving_dir: str, number: int) -> str:
    """A line on what looks like a version and is none."""
    problem = "has no saved_model.pb and counts as no version"
    return f"{serving_dir}/{number} {problem}: it is being uploaded, or was left behind by an export that was killed"


def _hide(folder: Path, hidden: Path) -> None:
    try:
        os.rename(folder, hidden)
    except OSError as error:
        # Within one folder too, where it shows several file systems: overlays, as containers have them, and mounts.
        if error.errno != errno.EXDEV:
            raise
        shutil.rmtree(folder)


@contextmanager
def _usable(named: str, hint: str) -> Iterator[None]:
    """Names the folder where the system refuses something in it."""
    try:
        yield
    except BlockingIOError as error:
        raise InputError(f"{named} is in use by another process: give the command again when that has ended") from error
    except OSError as error:
        raise InputError(f"{named}: {disk.reason(error)}; {hint}") from error

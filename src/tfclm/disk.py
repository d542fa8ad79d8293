"""Writing files and folders whole, and what a mount may refuse without harm.

Network and FUSE mounts refuse to flush a folder, to change a mode, or to lock. None of that loses what was written, so
it is a line on stderr, once a process. A full disk, a failing one and everything else stays an error.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

__all__ = [
    "LOCK_PATIENCE",
    "FolderLock",
    "copy_folder",
    "reason",
    "set_mode",
    "staging",
    "sync",
    "sync_folder",
    "write",
]

# How file systems say that they have no such operation. EBADF: of a handle that is open, but not for writing.
_UNSUPPORTED = frozenset(
    getattr(errno, name)
    for name in ("EINVAL", "EPERM", "EACCES", "EROFS", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "ENOTTY", "EBADF")
)
_UNLOCKABLE = _UNSUPPORTED | {errno.ENOLCK}
_LOCK_POLL = 0.05  # seconds between two attempts to lock
LOCK_PATIENCE = 600.0  # seconds; a lock is held while the leftovers of killed processes are removed

_noted: set[str] = set()


def reason(error: OSError) -> str:
    """What the system said, in words; an error that Python made may have no `strerror`."""
    return error.strerror or str(error) or type(error).__name__


def write(path: Path, text: str) -> None:
    """Writes a text file whole or not at all, and onto the disk."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            _flush(file.fileno(), path)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Flushes a file or a folder onto the disk, so that a rename after it never outlives the content.

    Raises:
        OSError: the data could not be written; not where the file system cannot flush.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno not in (*_UNSUPPORTED, errno.EISDIR):
            raise
        return
    try:
        _flush(handle, path)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Flushes everything in a folder, and the folder itself."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def set_mode(path: Path, mode: int) -> None:
    """Sets the permissions of a file or folder, where the file system has any to set."""
    try:
        os.chmod(path, mode)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _note("mode", f"{path}: permissions cannot be set here ({reason(error)}); other users may not be able to read")


def copy_folder(source: Path, target: Path) -> None:
    """Copies the files of a folder, with those behind links, into a new or existing one.

    Without modes and times, which `shutil.copytree` sets and some mounts refuse.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            shutil.copyfile(path, place)


class FolderLock:
    """Holds a folder against other processes; the lock ends with this process, however that ends.

    Args:
        folder: is locked itself: a lock file would be one file too many in a result.
        patience: seconds to wait for another process.

    Attributes:
        exclusive: whether it is held; False where the file system has no locks.

    Raises:
        BlockingIOError: another process holds it.
    """

    def __init__(self, folder: Path, patience: float = 0.0) -> None:
        self.exclusive = False
        deadline = time.monotonic() + patience
        self._handle = os.open(folder, os.O_RDONLY)
        try:
            while not self.exclusive:
                try:
                    fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self.exclusive = True
                except BlockingIOError:
                    # Not a lock that waits by itself: a process that is stopped may hold the folder for ever.
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(_LOCK_POLL)
        except OSError as error:
            if isinstance(error, BlockingIOError) or error.errno not in _UNLOCKABLE:
                os.close(self._handle)
                raise
            line = f"{folder}: no locks here ({reason(error)}); do not let two commands write there at once"
            _note("lock", line)

    def release(self) -> None:
        """Lets the folder go."""
        os.close(self._handle)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.release()


@contextmanager
def staging(place: Path, prefix: str, log: Callable[[str], None] | None = None) -> Iterator[Path]:
    """An empty folder in `place` to write into; removed at the end unless it was renamed.

    What killed processes have left there is removed first.

    Args:
        place: a folder that is there.
        prefix: how the names of such folders begin, and no others.
        log: gets a line on what was left there and cannot be removed; stderr if not given.

    Raises:
        OSError: nothing can be written there, or another process holds the place for too long.
    """
    with ExitStack() as held:
        # Between the making of a folder and its lock it looks like one that was left behind.
        with FolderLock(place, LOCK_PATIENCE):
            for entry in place.glob(f"{prefix}*"):
                _remove_leftover(entry, log or _print)
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
            held.callback(shutil.rmtree, folder, ignore_errors=True)
            held.enter_context(FolderLock(folder))
        set_mode(folder, 0o755)  # who reads it is often another user
        yield folder


def _remove_leftover(entry: Path, log: Callable[[str], None]) -> None:
    problem = "the file system has no locks, so it may be in use"
    try:
        with FolderLock(entry) as lock:
            if lock.exclusive:
                shutil.rmtree(entry)
                return
    except (BlockingIOError, FileNotFoundError):
        return  # in use, or just renamed
    except OSError as error:
        problem = reason(error)
    log(f"{entry} was left behind and is not removed: {problem}; remove it yourself")


def _flush(handle: int, path: Path) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _note("sync", f"{path}: this file system cannot flush ({reason(error)}); a power cut may lose the newest files")


def _note(kind: str, line: str) -> None:
    """A warning, the first one of its kind alone."""
    if kind not in _noted:
        _noted.add(kind)
        _print(line)


def _print(line: str) -> None:
    print(f"tfclm: {line}", file=sys.stderr, flush=True)

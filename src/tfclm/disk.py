"""Writes files atomically, and tolerates file systems without some operations.

Network and FUSE mounts may not support flushing a directory, changing a mode, or locking. No data is lost by that, so
it is a warning on stderr, once per process. All other errors, such as a full disk, are raised.
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
    "LOCK_TIMEOUT",
    "FolderLock",
    "copy_folder",
    "reason",
    "set_mode",
    "staging",
    "sync",
    "sync_folder",
    "warned",
    "write",
]

# Errors by which file systems reject an operation that they do not support. EBADF: the handle is not open for writing.
_UNSUPPORTED = frozenset(
    getattr(errno, name)
    for name in ("EINVAL", "EPERM", "EACCES", "EROFS", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "ENOTTY", "EBADF")
)
_UNLOCKABLE = _UNSUPPORTED | {errno.ENOLCK}
_LOCK_POLL = 0.05  # seconds between two attempts to lock
LOCK_TIMEOUT = 600.0  # seconds; a lock is held while leftovers of killed processes are removed

warned: set[str] = set()  # the kinds of warnings that this process has printed


def reason(error: OSError) -> str:
    """The message of a system error; errors that Python raises itself may have no `strerror`."""
    return error.strerror or str(error) or type(error).__name__


def write(path: Path, text: str) -> None:
    """Writes a text file completely or not at all, and flushes it to the disk."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            _flush(file.fileno(), path)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Flushes a file or directory to the disk, so that a power cut after a later rename does not lose the content.

    Raises:
        OSError: the data could not be written. If the file system cannot flush, that is a warning only.
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
    """Flushes everything in a directory and the directory itself."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def set_mode(path: Path, mode: int) -> None:
    """Sets the permissions of a file or directory, if the file system supports that."""
    try:
        os.chmod(path, mode)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _warn_once(
            "mode", f"{path}: permissions cannot be set here ({reason(error)}); other users may not be able to read"
        )


def copy_folder(source: Path, target: Path) -> None:
    """Copies the files of a directory into a new or existing one, following links.

    Unlike `shutil.copytree` it leaves out modes and times, which some mounts cannot set.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
        else:
            shutil.copyfile(path, copy)


class FolderLock:
    """Locks a directory against other processes; the lock is released when this process ends, at the latest.

    Args:
        folder: the directory, which is locked itself, without a lock file.
        timeout: seconds to wait for another process.

    Attributes:
        exclusive: whether the lock is held; False if the file system has no locks.

    Raises:
        BlockingIOError: another process holds the lock.
    """

    def __init__(self, folder: Path, timeout: float = 0.0) -> None:
        self.exclusive = False
        deadline = time.monotonic() + timeout
        self._handle = os.open(folder, os.O_RDONLY)
        try:
            while not self.exclusive:
                try:
                    fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self.exclusive = True
                except BlockingIOError:
                    # Not a blocking lock: a stopped process may hold it forever.
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(_LOCK_POLL)
        except OSError as error:
            if isinstance(error, BlockingIOError) or error.errno not in _UNLOCKABLE:
                os.close(self._handle)
                raise
            line = f"{folder}: no locks here ({reason(error)}); do not let two commands write there at once"
            _warn_once("lock", line)

    def release(self) -> None:
        """Releases the lock."""
        os.close(self._handle)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.release()


@contextmanager
def staging(place: Path, prefix: str, log: Callable[[str], None] | None = None) -> Iterator[Path]:
    """Creates an empty directory to write into, which is removed at the end unless it was renamed.

    Directories that killed processes left are removed first.

    Args:
        place: the existing directory to create it in.
        prefix: prefix of the names of these directories; no other name in `place` has it.
        log: gets a line for each leftover that cannot be removed; stderr if not given.

    Raises:
        OSError: `place` cannot be written, or another process locks it for too long.
    """
    with ExitStack() as stack:
        # Under a lock: until a new directory is locked itself, it looks like a leftover.
        with FolderLock(place, LOCK_TIMEOUT):
            for entry in place.glob(f"{prefix}*"):
                _remove_leftover(entry, log or _print)
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.enter_context(FolderLock(folder))
        set_mode(folder, 0o755)  # often read by another user
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
    log(f"{entry} is a leftover that was not removed ({problem}): remove it yourself")


def _flush(handle: int, path: Path) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _warn_once(
            "sync", f"{path}: this file system cannot flush ({reason(error)}); a power cut may lose the newest files"
        )


def _warn_once(kind: str, line: str) -> None:
    """Prints a warning, once per kind."""
    if kind not in warned:
        warned.add(kind)
        _print(line)


def _print(line: str) -> None:
    print(f"tfclm: {line}", file=sys.stderr, flush=True)

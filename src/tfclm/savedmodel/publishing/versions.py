"""A model directory and its versions, which are staged under a hidden name, complete, then renamed into place.

A server may load any subdirectory whose name is a whole number, at any moment. So an unfinished version never has such
a name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tfclm import disk
from tfclm.errors import InputError
from tfclm.savedmodel.publishing.numbering import check_number, find_versions, next_number, taken_error

__all__ = [
    "STAGING",
    "ServingDirectory",
    "address",
    "explain_incomplete",
    "is_remote",
]

STAGING = ".staging-"
WRITABLE = "give a directory that can be written"


def address(serving_dir: str | os.PathLike[str]) -> str:
    """The path of a model directory, also of a file:// address, or its address in one of TensorFlow's filesystems.

    Raises:
        InputError: it is empty.

    Example:
        >>> address("file:///models/eli5/"), address("gs://bucket/eli5/")
        ('/models/eli5', 'gs://bucket/eli5')
    """
    where = os.fspath(serving_dir)
    if not where:
        raise InputError("`serving_dir` is empty: give the model directory, such as serving_models/eli5")
    if where.startswith("file://"):
        # TensorFlow ignores the host name of such an address, too.
        where = "/" + where.removeprefix("file://").partition("/")[2]
    return where.rstrip("/") or where[:1]


def is_remote(where: str) -> bool:
    """Whether an address belongs to one of TensorFlow's own filesystems, such as gs:// or s3://."""
    return "://" in where


@dataclass(frozen=True)
class ServingDirectory:
    """A model directory as TensorFlow Serving watches it, with one numbered subdirectory per version.

    `open` gives one to publish to, `at` one to read from.

    Attributes:
        address: a path, or an address that TensorFlow's filesystems know, such as gs://bucket/name.
        version: number of the version to publish; the highest there plus 1 if None.

    Example:
        >>> directory = ServingDirectory.open("serving_models/eli5")
        >>> with directory.staged() as folder:
        ...     tf.saved_model.save(model, str(folder))
        ...     number = directory.publish(folder)
    """

    address: str
    version: int | None = None

    @classmethod
    def at(cls, serving_dir: str | os.PathLike[str] | ServingDirectory) -> ServingDirectory:
        """A model directory to read from; it need not exist.

        Raises:
            InputError: the path is empty.
        """
        return serving_dir if isinstance(serving_dir, ServingDirectory) else cls(address(serving_dir))

    @classmethod
    def open(
        cls, serving_dir: str | os.PathLike[str] | ServingDirectory, version: int | None = None
    ) -> ServingDirectory:
        """A model directory to publish to, checked before the work of an export.

        Args:
            serving_dir: its path or address; it need not exist. One that is open already is not checked again.
            version: number of the version to publish; the highest there plus 1 if None.

        Raises:
            InputError: it cannot be created or written, or the number is out of range or taken.
        """
        if isinstance(serving_dir, ServingDirectory) and version in (None, serving_dir.version):
            return serving_dir
        directory = cls(cls.at(serving_dir).address, version)
        directory._check_number()
        directory._check_writable()
        return directory

    def __str__(self) -> str:
        return self.address

    @property
    def is_remote(self) -> bool:
        """Whether TensorFlow's filesystems reach it, and not the operating system."""
        return is_remote(self.address)

    def folders(self) -> dict[int, list[str]]:
        """The version numbers, ascending, with the names of their subdirectories: version 7 may be called 007.

        Raises:
            InputError: the directory cannot be read.
        """
        where = self.address
        if self.is_remote:
            from tfclm.savedmodel.publishing import remote

            with remote.named_errors(where):
                return remote.folders(where)[0]
        with self._named_errors("give a directory that can be read"):
            if not os.path.isdir(where):
                return {}
            return find_versions(entry.name for entry in os.scandir(where) if entry.is_dir())

    def versions(self) -> list[int]:
        """The version numbers, ascending; none if the directory does not exist."""
        return list(self.folders())

    def served(self) -> str | None:
        """The path or address of the newest version, which a server loads by default; None if there is none."""
        names = list(self.folders().values())
        return f"{self.address}/{names[-1][-1]}" if names else None

    def incomplete(self) -> list[int]:
        """The numbers of a remote directory's subdirectories without saved_model.pb, ascending."""
        if not self.is_remote:
            return []
        from tfclm.savedmodel.publishing import remote

        with remote.named_errors(self.address):
            return list(remote.folders(self.address)[1])

    @contextmanager
    def staged(self, log: Callable[[str], None] = lambda line: None) -> Iterator[Path]:
        """An empty local directory to write a version to; removed at the end unless it was published.

        What a killed export left is removed first: at once from a local model directory and from the temporary
        directory that uploads are staged in, after a day from a remote model directory.

        Args:
            log: gets a line per leftover that stays: an incomplete version in a remote model directory, or a
                directory that this user may not remove.

        Raises:
            InputError: the model directory cannot be written, or the disk is full.
        """
        if self.is_remote:
            from tfclm.savedmodel.publishing import remote

            with remote.named_errors(self.address):
                for number in remote.clean(self.address):
                    log(explain_incomplete(self.address, number))
            hint = "free some space, or set TMPDIR to your own directory"
            with _named_errors("the temporary directory", hint):
                # One per user, so that its leftovers are known to be this user's.
                place = Path(tempfile.gettempdir()) / f"tfclm-{os.getuid()}"
            with _stage(place, f"the temporary directory {place}", hint, hint, log, private=True) as folder:
                yield folder
        else:
            named = f"`serving_dir` {self.address}"
            with _stage(Path(self.address), named, WRITABLE, "free some space", log) as folder:
                yield folder

    def publish(self, folder: Path) -> int:
        """Makes a complete staged directory a version; returns its number.

        Two exports that publish at once get different numbers.

        Args:
            folder: what `staged` gave.

        Raises:
            InputError: the number was taken since the directory was opened, or a remote directory cannot be written.
        """
        if self.is_remote:
            from tfclm.savedmodel.publishing import remote

            return remote.upload(folder, self.address, self.version)
        if self.version is not None:
            self._check_number()
        disk.sync_folder(folder)
        highest_taken = 0
        while True:
            number = self.version or next_number(self.address, [highest_taken, *self.versions()])
            try:
                # Renaming onto a directory with content fails, so the first of two with one number gets it.
                os.rename(folder, Path(self.address) / str(number))
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                if self.version is not None:
                    raise taken_error(self.address, number) from error
                highest_taken = number  # by another export, or by a file
                continue
            disk.sync(Path(self.address))
            return number

    def remove(self, version: int) -> None:
        """Removes a version, whatever its subdirectories are called: hidden from servers at once, then deleted."""
        names = self.folders().get(version, [])
        if self.is_remote:
            from tfclm.savedmodel.publishing import remote

            with remote.named_errors(self.address):
                remote.remove(self.address, version, names)
            return
        place = Path(self.address)
        with self._named_errors(WRITABLE), disk.FolderLock(place, disk.LOCK_TIMEOUT):
            hidden = tempfile.mkdtemp(prefix=STAGING, dir=place)
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                    _hide(place / name, Path(hidden) / name)
            shutil.rmtree(hidden)

    def keep(self, count: int, spare: int | None = None) -> list[int]:
        """Removes all versions except the newest `count` and `spare`; returns the removed numbers, ascending.

        Raises:
            InputError: `count` is below 1, or the directory cannot be written.
        """
        if count < 1:
            raise InputError(f"`keep_versions` {count}: give 1 or more")
        removed = [number for number in self.versions()[:-count] if number != spare]
        for number in removed:
            self.remove(number)
        return removed

    def rollback(self) -> tuple[int, int]:
        """Removes the newest version, so that servers return to the previous one; returns (removed, served).

        Raises:
            InputError: there is no previous version.
        """
        numbers = self.versions()
        if len(numbers) < 2:
            count = "one version" if numbers else "no version"
            raise InputError(f"`rollback`: {self.address} has {count}, and no earlier version to return to")
        self.remove(numbers[-1])
        return numbers[-1], numbers[-2]

    def _check_number(self) -> None:
        """Raises InputError if the version's number is out of range or taken, or there is no next number."""
        numbers = [*self.versions(), *self.incomplete()]
        if self.version is None:
            next_number(self.address, numbers)
            return
        check_number(self.version)
        # A file of that name is in the way, too.
        path = Path(self.address) / str(self.version)
        if self.version in numbers or (not self.is_remote and os.path.lexists(path)):
            raise taken_error(self.address, self.version)

    def _check_writable(self) -> None:
        """Raises InputError if a local directory cannot be created or written."""
        if self.is_remote:
            return
        place = Path(self.address).absolute()
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            raise InputError(f"`serving_dir` {self.address}: {place} is not a directory; {WRITABLE}")
        if not os.access(place, os.W_OK | os.X_OK):
            raise InputError(f"`serving_dir` {self.address}: {place} cannot be written; {WRITABLE}")

    def _named_errors(self, hint: str) -> contextlib.AbstractContextManager[None]:
        return _named_errors(f"`serving_dir` {self.address}", hint)


def explain_incomplete(serving_dir: str, number: int) -> str:
    """A line about a subdirectory that has a version's number but no saved_model.pb."""
    problem = "has no saved_model.pb and does not count as a version"
    return f"{serving_dir}/{number} {problem}: it is being uploaded, or was left by an export that was killed"


@contextmanager
def _stage(
    place: Path, named: str, hint: str, space_hint: str, log: Callable[[str], None], *, private: bool = False
) -> Iterator[Path]:
    """An empty directory in `place`, with errors that name it.

    Args:
        place: created if it does not exist; `private` to this user, or with the usual permissions.
        named: what messages call it.
        hint: what to do if it cannot be written.
        space_hint: what to do if the disk is full.
        log: gets a line per leftover that stays.
        private: refuse a directory that another user has created.
    """
    with contextlib.ExitStack() as held:
        with _named_errors(named, hint):
            os.makedirs(place, mode=0o700 if private else 0o777, exist_ok=True)
            if private and os.lstat(place).st_uid != os.getuid():
                raise PermissionError(errno.EPERM, "another user has created it")
            folder = held.enter_context(disk.staging(place, STAGING, log))
        try:
            yield folder
        except InputError:
            raise
        except Exception as error:
            # TensorFlow's writers raise their own errors, which quote the system's message.
            if not any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
                raise
            raise InputError(f"{named}: the disk is full, nothing was published; {space_hint}") from error


def _hide(folder: Path, hidden: Path) -> None:
    try:
        os.rename(folder, hidden)
    except OSError as error:
        # Overlays, as in containers, and mounts put several file systems into one directory.
        if error.errno != errno.EXDEV:
            raise
        shutil.rmtree(folder)


@contextmanager
def _named_errors(named: str, hint: str) -> Iterator[None]:
    """Names the directory in which the system refuses an operation."""
    try:
        yield
    except BlockingIOError as error:
        raise InputError(f"{named} is in use by another process: run the command again when that has ended") from error
    except OSError as error:
        raise InputError(f"{named}: {disk.reason(error)}; {hint}") from error

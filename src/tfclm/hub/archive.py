"""An exported model as one file of a repository: a zip that holds the directory of one version.

Anybody may have made an archive on the Hub. So nothing is unpacked before all its entries have been checked: their
names, types and number, and the size that they unpack to.
"""

from __future__ import annotations

import errno
import shutil
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tfclm import disk
from tfclm.errors import InputError, first_line
from tfclm.savedmodel.publishing.numbering import find_versions

__all__ = ["SERVABLE", "newest_version", "unpack", "zip_servable"]

SERVABLE = "saved_model.zip"  # its name in a repository

# Weights hardly compress, and `zip_servable` does not compress them; other exporters' graphs shrink to a twentieth.
MAX_RATIO = 20
ALLOWANCE = 64 * 2**20  # bytes that an archive of any size may unpack to
MAX_ENTRIES = 10_000
MAX_NAME_BYTES = 1024  # of an entry's path
CHUNK_BYTES = 1 << 20  # copied at a time


def newest_version(folder: Path) -> Path:
    """The directory of a version: the given one, or the newest version in a given model directory.

    Raises:
        InputError: there is no exported version.

    Example:
        >>> newest_version(Path("serving_models/eli5")).name
        '3'
    """
    below = find_versions(each.name for each in folder.iterdir()) if folder.is_dir() else {}
    newest = [folder / names[-1] for names in list(below.values())[-1:]]
    for version in (folder, *newest):
        if (version / "saved_model.pb").is_file() and find_versions([version.resolve().name]):
            return version.resolve()
    raise InputError(
        f"{folder} is not an exported model: give a directory that tfclm.export has written, or a version in it"
    )


def zip_servable(version: Path, target: Path) -> Path:
    """Packs a version of an exported model into the file `target`; returns `target`.

    The same version gives the same bytes.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as packed:  # weights hardly compress
        for path in sorted(version.rglob("*")):
            if path.is_file():
                # Without the files' times, so that an unchanged version is not uploaded again.
                entry = zipfile.ZipInfo(f"{version.name}/{path.relative_to(version).as_posix()}")
                with open(path, "rb") as source, packed.open(entry, "w", force_zip64=True) as sink:
                    shutil.copyfileobj(source, sink, CHUNK_BYTES)
    return target


def unpack(packed: Path, target: Path, name: str) -> None:
    """Unpacks an archive of `zip_servable` into a new directory.

    Args:
        packed: the archive.
        target: the directory, which then holds the directory of one version; removed if this fails.
        name: the archive's repository, for messages.

    Raises:
        InputError: the archive is damaged, unsafe or not an exported model, or the disk is full.
    """
    what = f"{name}: {SERVABLE}"
    try:
        with _named_errors(what), zipfile.ZipFile(packed) as file:
            files = _check_entries(file, what, packed.stat().st_size)
            _check_disk_space(target, sum(entry.file_size for entry in files), what)
            for entry in files:
                place = target / entry.filename
                place.parent.mkdir(parents=True, exist_ok=True)
                # Not extract(), which would change unsafe names. "x" fails if the file system takes two names for one.
                # ZipFile reads no more than the checked size and compares the checksum.
                with file.open(entry) as source, open(place, "xb") as sink:
                    shutil.copyfileobj(source, sink, CHUNK_BYTES)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _check_entries(file: zipfile.ZipFile, what: str, size: int) -> list[zipfile.ZipInfo]:
    """The files of an archive of `size` bytes.

    Raises:
        InputError: it is anything but one version of an exported model.
    """
    entries = file.infolist()
    if len(entries) > MAX_ENTRIES:
        raise InputError(f"{what} has {len(entries)} entries: an exported model has {MAX_ENTRIES} at most")
    for entry in entries:
        problem = _problem(entry)
        if problem is not None:
            raise InputError(f"{what} has an entry {_quote(entry.filename)} that {problem}: nothing was unpacked")
    files = [entry for entry in entries if not entry.is_dir()]
    names = [entry.filename for entry in files]
    roots = {name.split("/")[0] for name in names}
    if len(roots) != 1 or not find_versions(roots) or any("/" not in name for name in names):
        raise InputError(f"{what} does not hold one version of an exported model")
    if f"{min(roots)}/saved_model.pb" not in names:
        raise InputError(f"{what} has no saved_model.pb")
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    folders |= {entry.filename.rstrip("/") for entry in entries if entry.is_dir()}
    seen: set[str] = set()
    for name in names:
        if name in seen or name in folders:
            problem = "occurs twice" if name in seen else "is both a file and a directory"
            raise InputError(f"{what} has an entry {_quote(name)} that {problem}: nothing was unpacked")
        seen.add(name)
    unpacked = sum(entry.file_size for entry in files)
    if unpacked > MAX_RATIO * size + ALLOWANCE:
        raise InputError(
            f"{what} is {_format_bytes(size)} and would unpack to {_format_bytes(unpacked)}: no exported model does"
        )
    return files


def _problem(entry: zipfile.ZipInfo) -> str | None:
    """What is wrong with an entry; None if nothing is."""
    name = entry.filename
    parts = (name[:-1] if entry.is_dir() else name).split("/")
    # The upper 16 bits are the file mode, if the archive was made on Unix.
    kind = stat.S_IFMT(entry.external_attr >> 16)
    # zipfile cuts a name at its first NUL.
    whole = getattr(entry, "orig_filename", name)
    if name.startswith("/") or "\\" in whole or ":" in parts[0] or any(part in ("", ".", "..") for part in parts):
        return "leads out of its directory"
    if not whole.isprintable() or len(name.encode(errors="replace")) > MAX_NAME_BYTES:
        return "has an unusable name"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if entry.flag_bits & 0x1:
        return "is encrypted"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is compressed by an unsupported method"
    return None


def _check_disk_space(target: Path, needed: int, what: str) -> None:
    place = target.absolute()
    while not place.exists():
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return  # not every mount reports it
    if needed > free:
        sizes = f"unpacks to {_format_bytes(needed)}, and {place} has {_format_bytes(free)} left"
        raise InputError(f"{what} {sizes}: free some space there")


@contextmanager
def _named_errors(what: str) -> Iterator[None]:
    """Raises every error of reading and writing as an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{what} cannot be unpacked: the disk is full; free some space") from error
        if error.errno == errno.EINVAL:
            raise InputError(f"{what} is damaged: its entries are not where its directory says") from error
        raise InputError(f"{what} cannot be unpacked: {disk.reason(error)}") from error
    except Exception as error:  # of many types: zipfile's, zlib's, and what damaged numbers cause in them
        raise InputError(f"{what} is damaged: {first_line(error)}") from error


def _quote(name: str) -> str:
    return ascii(name if len(name) <= 80 else f"{name[:77]}...")


def _format_bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"

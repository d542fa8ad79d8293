"""An exported model as one file of a repository: a zip with one version's folder in it.

What comes from a repository may be anybody's, so nothing of it is written before all its entries are known to be
harmless: their names, their kinds, their number, and how much they unpack to.
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
from tfclm.savedmodel.publishing.numbering import numbered

__all__ = ["SERVABLE", "newest_version", "unpack", "zip_servable"]

SERVABLE = "saved_model.zip"  # its name in a repository; it holds one folder, named by the version's number

# Weights hardly get smaller, and `zip_servable` does not try; graphs of other exporters may, to a twentieth.
MOST_RATIO = 20
ALLOWANCE = 64 * 2**20  # bytes that an archive of any size may unpack to
MOST_ENTRIES = 10_000
LONGEST_NAME = 1024  # bytes of an entry's path
BLOCK = 1 << 20  # bytes that are copied at a time


def newest_version(folder: Path) -> Path:
    """The folder of a version: the one given, or the newest below the one given.

    Raises:
        InputError: there is no exported version.
    """
    below = numbered(each.name for each in folder.iterdir()) if folder.is_dir() else {}
    newest = [folder / names[-1] for names in list(below.values())[-1:]]
    for version in (folder, *newest):
        if (version / "saved_model.pb").is_file() and numbered([version.resolve().name]):
            return version.resolve()
    raise InputError(f"{folder} is no exported model: give a folder that tfclm.export has written, or a version in it")


def zip_servable(version: Path, target: Path) -> Path:
    """Packs a version of an exported model into the file `target`; the same bytes for the same version."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as packed:  # weights do not get smaller
        for path in sorted(version.rglob("*")):
            if path.is_file():
                # Without the times of the files, so that a version that is there already is not sent again.
                entry = zipfile.ZipInfo(f"{version.name}/{path.relative_to(version).as_posix()}")
                with open(path, "rb") as source, packed.open(entry, "w", force_zip64=True) as sink:
                    shutil.copyfileobj(source, sink, BLOCK)
    return target


def unpack(packed: Path, target: Path, name: str) -> None:
    """Unpacks a servable that `zip_servable` packed into a new folder.

    Args:
        packed: the archive.
        target: the folder, which holds one version's folder afterwards; nothing is left of it if this fails.
        name: what messages call the archive's repository.

    Raises:
        InputError: it is something else, damaged, or would unpack to what no exported model is; or the disk is full.
    """
    what = f"{name}: {SERVABLE}"
    try:
        with _named(what), zipfile.ZipFile(packed) as file:
            files = _checked(file, what, packed.stat().st_size)
            _check_room(target, sum(entry.file_size for entry in files), what)
            for entry in files:
                place = target / entry.filename
                place.parent.mkdir(parents=True, exist_ok=True)
                # Not extract(), which would mend names; "x", for two names may be one to the file system. What is read
                # ends after the size that was checked, and its checksum is compared.
                with file.open(entry) as source, open(place, "xb") as sink:
                    shutil.copyfileobj(source, sink, BLOCK)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _checked(file: zipfile.ZipFile, what: str, size: int) -> list[zipfile.ZipInfo]:
    """The files of an archive of `size` bytes, if it is one version of an exported model and nothing else."""
    entries = file.infolist()
    if len(entries) > MOST_ENTRIES:
        raise InputError(f"{what} has {len(entries)} entries: an exported model has {MOST_ENTRIES} at most")
    for entry in entries:
        problem = _problem(entry)
        if problem is not None:
            raise InputError(f"{what} has an entry {_shown(entry.filename)} that {problem}: nothing was unpacked")
    files = [entry for entry in entries if not entry.is_dir()]
    names = [entry.filename for entry in files]
    roots = {name.split("/")[0] for name in names}
    if len(roots) != 1 or not numbered(roots) or any("/" not in name for name in names):
        raise InputError(f"{what} does not hold one version of an exported model")
    if f"{min(roots)}/saved_model.pb" not in names:
        raise InputError(f"{what} holds no saved_model.pb")
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    folders |= {entry.filename.rstrip("/") for entry in entries if entry.is_dir()}
    seen: set[str] = set()
    for name in names:
        if name in seen or name in folders:
            problem = "is there twice" if name in seen else "is a file and a folder"
            raise InputError(f"{what} has an entry {_shown(name)} that {problem}: nothing was unpacked")
        seen.add(name)
    unpacked = sum(entry.file_size for entry in files)
    if unpacked > MOST_RATIO * size + ALLOWANCE:
        raise InputError(f"{what} has {_size(size)} and would unpack to {_size(unpacked)}: no exported model does")
    return files


def _problem(entry: zipfile.ZipInfo) -> str | None:
    """What is wrong with an entry by itself."""
    name = entry.filename
    parts = (name[:-1] if entry.is_dir() else name).split("/")
    # The first two bytes are the mode, where the archive was made on Unix.
    kind = stat.S_IFMT(entry.external_attr >> 16)
    # zipfile cuts a name at its first NUL.
    whole = getattr(entry, "orig_filename", name)
    if name.startswith("/") or "\\" in whole or ":" in parts[0] or any(part in ("", ".", "..") for part in parts):
        return "leads out of its folder"
    if not whole.isprintable() or len(name.encode(errors="replace")) > LONGEST_NAME:
        return "has no usable name"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if entry.flag_bits & 0x1:
        return "is encrypted"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is compressed in an unknown way"
    return None


def _check_room(target: Path, needed: int, what: str) -> None:
    place = target.absolute()
    while not place.exists():
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return  # some mounts do not tell
    if needed > free:
        raise InputError(f"{what} unpacks to {_size(needed)}, and {place} has {_size(free)} left: make room there")


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Every way in which reading and writing may fail, in one line."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{what} cannot be unpacked: the disk is full; make room") from error
        if error.errno == errno.EINVAL:
            raise InputError(f"{what} is damaged: its entries are not where its list says") from error
        raise InputError(f"{what} cannot be unpacked: {disk.reason(error)}") from error
    except Exception as error:  # of a dozen types: zipfile's, zlib's, and what odd numbers provoke in them
        raise InputError(f"{what} is damaged: {first_line(error)}") from error


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 80 else f"{name[:77]}...")


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"

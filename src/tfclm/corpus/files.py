"""Local files: finds those that are named, and reads all their documents into one Arrow file in the cache."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm.corpus.cache import stored
from tfclm.corpus.columns import is_blank
from tfclm.corpus.formats import READERS, read_documents
from tfclm.corpus.parts import FilePart, extension
from tfclm.errors import InputError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

EXTENSIONS = ".txt, .jsonl, .json, .csv (each also with .gz) or .parquet"
BATCH_CHARACTERS = 1 << 22  # characters per Arrow record batch


@dataclass(frozen=True)
class Split:
    """The documents of one split.

    Attributes:
        texts: a dataset with one column, "text".
        description: the source, the split, and the numbers of rows and of dropped (null or blank) rows; JSON types.
    """

    texts: datasets.Dataset
    description: dict[str, Any]


def resolve_paths(patterns: Sequence[str], field: str) -> list[Path]:
    """The files that match paths and globs, in the order given; the matches of one glob are sorted.

    A symbolic link keeps its own name, because the extension says how to read the file.

    Args:
        patterns: paths and globs.
        field: the setting that they come from, for messages.

    Raises:
        InputError: a pattern matches no file, or something that is not a data file.
    """
    paths: list[Path] = []
    seen: set[Path] = set()
    for pattern in patterns:
        try:
            found = _matches(Path(pattern).expanduser(), f"`{field}` {pattern}")
        except InputError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"`{field}` {pattern}: {getattr(error, 'strerror', None) or error}") from error
        for name in found:
            if extension(name) not in READERS:
                raise InputError(f"{name} has an unknown file type: give {EXTENSIONS}")
            if name.resolve() in seen:
                raise InputError(f"`{field}` names {name} twice: give each file once")
            seen.add(name.resolve())
            paths.append(name.parent.resolve() / name.name)
    return paths


def _matches(path: Path, given: str) -> list[Path]:
    """The regular files that a path or glob matches; other matches are errors, except that globs skip directories."""
    if path.is_dir():
        raise InputError(f"{given} is a directory: give its files, for example '{path}/*.txt'")
    found = [path] if _exists(path) else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    # A glob also matches subdirectories, which are skipped; a directory named like a data file is an error below.
    found = [name for name in found if not name.is_dir() or extension(name) in READERS]
    if not found:
        problem = "no file matches" if glob.has_magic(str(path)) else "no such file:"
        raise InputError(f"{problem} {given}: give an existing file or a quoted glob")
    for name in found:
        if name.is_dir():
            raise InputError(f"{name} is a directory: give its files, for example '{name}/*.txt'")
        if not name.exists():
            raise InputError(f"{name} links to {os.readlink(name)}, which does not exist: give an existing file")
        if not name.is_file():
            raise InputError(f"{name} is a pipe, socket or device: save its content to a file and give that")
    return found


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read_files(paths: list[Path], column: str) -> Split:
    """Reads all documents of some files into one Arrow file in the cache; blank ones are dropped and counted."""
    import pyarrow as pa

    schema = pa.schema({"text": pa.string()})
    # Hashed, because copies, archives and reproducible builds can give different content the same size and mtime.
    states = [_file_state(path) for path in paths]
    key = [column, *([extension(path), FilePart(str(path)).is_gzip, hash_files([path])] for path in paths)]

    def write(append: Callable[[pa.RecordBatch], None]) -> dict[str, Any]:
        dropped = 0
        batch: list[str] = []
        size = 0
        for path, state in zip(paths, states, strict=True):
            rows = kept = 0
            for text in read_documents(path, column):
                rows += 1
                if text is None or is_blank(text):
                    continue
                kept += 1
                batch.append(text)
                size += len(text)
                if size >= BATCH_CHARACTERS:
                    append(pa.record_batch([pa.array(batch, pa.string())], schema=schema))
                    batch, size = [], 0
            if not kept:
                raise InputError(f"{path} has no text" + (f": its {rows} rows are empty" if rows else ": it is empty"))
            dropped += rows - kept
            if _file_state(path) != state:
                raise InputError(f"{path} changed while it was read: run the same command again")
        if batch:
            append(pa.record_batch([pa.array(batch, pa.string())], schema=schema))
        return {"dropped_rows": dropped}

    texts, facts = stored("texts", key, schema, write)
    source = [str(path) for path in paths]
    return Split(texts, {"source": source, "split": None, "rows": len(texts), "dropped_rows": facts["dropped_rows"]})


def hash_files(paths: Iterable[Path]) -> str:
    """The SHA-256 digest of the content of some files.

    Raises:
        InputError: one of them cannot be read.
    """
    content = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    content.update(piece)
                # The size, so that the digest depends on where one file ends and the next begins.
                content.update(b"%d." % file.tell())
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return content.hexdigest()


def _file_state(path: Path) -> tuple[int, int, int]:
    """Inode, size and modification time, which show that a file was changed."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns

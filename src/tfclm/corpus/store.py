"""A directory for shards: local, or of any file system that fsspec knows."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from tfclm.errors import InputError, first_line


class Store:
    """A directory whose files appear when they are complete.

    Args:
        url: local path, or URL of a file system that fsspec knows, such as gs://bucket/blocks.

    Raises:
        InputError: what the URL needs is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") or url
        self.is_local = "://" not in url
        import fsspec

        try:
            self._files, self._root = fsspec.core.url_to_fs(str(Path(url).expanduser()) if self.is_local else self.url)
        except (ImportError, ValueError) as error:
            raise InputError(f"{url} cannot be used: {first_line(error)}") from error

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.url,)  # each worker opens its own connections

    def path(self, name: str) -> str:
        """The path of a file within its file system."""
        return f"{self._root}/{name}"

    def create(self, folder: str) -> None:
        """Creates the directory and a folder in it, and removes what killed or failed processes left there."""
        self._files.makedirs(self.path(folder), exist_ok=True)
        names = [*self.names(), *(f"{folder}/{name}" for name in self.names(folder))]
        self.remove(name for name in names if name.endswith((".part", ".error")))

    def names(self, folder: str = "") -> list[str]:
        """The names in the directory, or in a folder of it; none if it does not exist."""
        path = self.path(folder) if folder else self._root
        self._files.invalidate_cache()  # other processes write there, too
        if not self._files.exists(path):
            return []
        return [Path(found).name for found in self._files.ls(path, detail=False)]

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return bool(self._files.exists(self.path(name)))

    def size(self, name: str) -> int:
        """The bytes of a file."""
        return int(self._files.size(self.path(name)))

    def open(self, name: str) -> BinaryIO:
        """Opens a file for reading."""
        return cast(BinaryIO, self._files.open(self.path(name), "rb"))

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A file to write, which gets its name when the block ends without an error."""
        part = self.path(f"{name}.{uuid.uuid4().hex}.part")
        try:
            with self._files.open(part, "wb") as file:
                yield file
            self._files.mv(part, self.path(name))
        except BaseException:
            if self._files.exists(part):
                self._files.rm(part)
            raise

    def remove(self, names: Iterable[str]) -> None:
        """Removes files."""
        if paths := [self.path(name) for name in names]:
            self._files.rm(paths)

    def read_json(self, names: Sequence[str]) -> list[Any]:
        """The content of JSON files, which are read at the same time where the file system can do that."""
        contents = self._files.cat([self.path(name) for name in names]) if names else {}
        by_name = {Path(path).name: content for path, content in contents.items()}
        return [json.loads(by_name[Path(name).name]) for name in names]

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file."""
        with self.writing(name) as file:
            file.write(f"{json.dumps(value, indent=1, ensure_ascii=False)}\n".encode())

    def check(self, shard: Mapping[str, Any], copy: Path | None = None) -> None:
        """Raises `InputError` unless a shard, or a local copy of it, has the SHA-256 that its record names."""
        content = hashlib.sha256()
        with self.open(shard["file"]) if copy is None else copy.open("rb") as file:
            while piece := file.read(1 << 20):
                content.update(piece)
        if content.hexdigest() != shard["sha256"]:
            raise InputError(
                f"{self}/{shard['file']} does not match its SHA-256: it was changed or damaged; "
                "remove it and run the same prepare again"
            )

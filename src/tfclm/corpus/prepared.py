"""Opens blocks that `tfclm.prepare` has written, memory-mapped, without reading them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm.compat import fingerprint, set_fingerprint
from tfclm.corpus.cache import cache_folder
from tfclm.corpus.packing import Packed
from tfclm.corpus.shards import read_manifest
from tfclm.corpus.store import Store
from tfclm.errors import InputError

if TYPE_CHECKING:
    import datasets

# The beginning of the fingerprint of prepared blocks, which goes on with a digest of their content.
PREPARED = "prepared-"


@dataclass(frozen=True)
class PreparedBlocks:
    """A directory of prepared blocks.

    Attributes:
        store: the directory.
        manifest: the content of its manifest.
    """

    store: Store
    manifest: Mapping[str, Any]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that the blocks were made with."""
        found: Mapping[str, Any] = self.manifest["plan"]["settings"]
        return found

    @property
    def tokenizer(self) -> str:
        """The digest of the tokenizer that the blocks were made with, as `tokenizer_digest` gives it."""
        return str(self.manifest["plan"]["tokenizer"])

    @property
    def description(self) -> dict[str, Any]:
        """Where the documents come from, in the terms of `Texts.description`."""
        plan, splits = self.manifest["plan"], self.manifest["splits"]
        fraction, seed = self.settings["validation_fraction"], self.settings["seed"]
        paths = [file["path"] for file in plan["inputs"]]
        return {
            "source": paths if len(paths) <= 10 else str(self.store),
            "split": None,
            "dropped_rows": self.manifest["dropped_rows"],
            "text_column": self.settings["text_column"],
            "validation": f"{fraction:g} of the documents, drawn with seed {seed}",
            "train_rows": splits["train"]["documents"],
            "validation_rows": splits["validation"]["documents"],
        }

    def split(self, name: str) -> Packed | None:
        """The blocks of `train` or `validation`; None if there are none.

        Raises:
            InputError: a shard is missing or does not have its size.
        """
        split = self.manifest["splits"][name]
        if not split["blocks"]:
            return None
        block_size, prefix = self.settings["block_size"], tuple(self.settings["prefix"])
        blocks = _open_shards(self.store, split["shards"])
        content = [block_size, list(prefix), [shard["sha256"] for shard in split["shards"]]]
        set_fingerprint(blocks, PREPARED + hashlib.sha256(json.dumps(content).encode()).hexdigest()[:48])
        numbers = (split["dropped_tokens"], split["tokens"], split["largest_id"])
        return Packed(blocks, block_size, *numbers, tuple(self.settings["separator"]), prefix)


def open_prepared(url: str) -> PreparedBlocks:
    """Opens a directory that `tfclm.prepare` has written.

    Args:
        url: local path, or URL of a file system that fsspec knows; its shards are copied into the datasets cache.

    Raises:
        InputError: there is no such directory, it is not complete, or its manifest cannot be read.

    Example:
        >>> blocks = open_prepared("blocks/wiki").split("train").blocks
    """
    store = Store(url)
    return PreparedBlocks(store, read_manifest(store))


def content_digest(blocks: datasets.Dataset) -> str | None:
    """A name for the content of prepared blocks, from their manifest; None for any other rows, also a part of them."""
    name = fingerprint(blocks)
    return name if name.startswith(PREPARED) else None


def _open_shards(store: Store, shards: list[Mapping[str, Any]]) -> datasets.Dataset:
    import datasets
    import pyarrow as pa

    opened = []
    for shard in shards:
        path = Path(store.path(shard["file"])) if store.is_local else _copied(store, shard)
        try:
            size = os.stat(path).st_size
            if size != shard["bytes"]:
                raise InputError(
                    f"{path} has {size} bytes, not the {shard['bytes']} of its manifest: remove it, and run the same "
                    "prepare again"
                )
            opened.append(datasets.Dataset.from_file(str(path)))
        except FileNotFoundError as error:
            raise InputError(f"{path} is missing: run the same prepare again") from error
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
    return datasets.concatenate_datasets(opened)


def _copied(store: Store, shard: Mapping[str, Any]) -> Path:
    """A copy of a remote shard in the datasets cache, checked against its SHA-256 when it is copied."""
    path = cache_folder() / f"{shard['sha256']}.arrow"
    if not path.exists():
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with store.open(shard["file"]) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            store.check(shard, part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return path

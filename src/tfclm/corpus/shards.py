"""Writes the blocks of large texts part by part: Arrow shards, a record per part, and a manifest of all.

A part is a fixed range of the input, so the shards do not depend on what runs the parts, or on how many at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from tfclm.corpus.columns import is_blank
from tfclm.corpus.formats import read_documents
from tfclm.corpus.packing import BATCH_BYTES, BlockPacker
from tfclm.corpus.parts import FilePart
from tfclm.corpus.store import Store
from tfclm.corpus.tokenizing import GROUP_CHARACTERS, encoder_arguments, fast_encoder, prefix_ids
from tfclm.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

FORMAT = 1  # of the directory; increase it when older versions cannot read what is written
PLAN, MANIFEST, PARTS = "plan.json", "manifest.json", "parts"
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Recipe:
    """All that the blocks of a text depend on.

    Attributes:
        text_column: dotted path of the text column.
        block_size: tokens per block.
        separator: token ids after each document.
        prefix: token ids at the beginning of each document and block.
        encoder: arguments of `FastEncoder`.
        validation_fraction: fraction of the documents to hold out; 0 for none.
        seed: decides which documents these are.
    """

    text_column: str
    block_size: int
    separator: tuple[int, ...]
    prefix: tuple[int, ...]
    encoder: Mapping[str, Any]
    validation_fraction: float
    seed: int

    def split_of(self, text: str) -> str:
        """The split of a document; the same for documents that differ only in surrounding white space."""
        if not self.validation_fraction:
            return "train"
        digest = hashlib.blake2b(text.strip().encode(), digest_size=8, salt=self.seed.to_bytes(8, "big")).digest()
        return "validation" if int.from_bytes(digest, "big") < self.validation_fraction * 2**64 else "train"

    def packer(self) -> BlockPacker:
        """A packer for the documents of one split."""
        return BlockPacker(self.block_size, self.separator, self.prefix)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The SHA-256 of all that the ids of a fast tokenizer depend on."""
    arguments = encoder_arguments(tokenizer)
    known = [json.loads(arguments["backend"]), arguments["split_special_tokens"], prefix_ids(tokenizer)]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def prepare_part(index: int, part: FilePart, recipe: Recipe, store: Store) -> None:
    """Writes the shards of one part, and then its record; if these are there already, checks the shards.

    An error in the input or in a shard is written down for `finish` to raise: what runs the parts may show an error of
    a worker in hundreds of lines.
    """
    name = _record_name(index)
    try:
        shards = list(_shards(store.read_json([name])[0])) if store.exists(name) else None
        if shards is not None and all(store.exists(shard["file"]) for shard in shards):
            for shard in shards:
                store.check(shard)
        else:
            store.write_json(name, _write_part(index, part, recipe, store))
    except InputError as error:
        store.write_json(f"{name}.error", str(error))


def _record_name(index: int) -> str:
    return f"{PARTS}/{index:05d}.json"


def _shards(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for split in record["splits"].values():
        yield from split["shards"]


def _write_part(index: int, part: FilePart, recipe: Recipe, store: Store) -> dict[str, Any]:
    """Writes the shards of one part; returns its record."""
    encoder = fast_encoder(**recipe.encoder)
    rows = 0
    texts: list[str] = []
    size = 0
    with _Splits(f"{index:05d}", recipe, store) as splits:
        for text in read_documents(part, recipe.text_column):
            rows += 1
            if text is None or is_blank(text):
                continue
            texts.append(text)
            size += len(text)
            if size >= GROUP_CHARACTERS:
                splits.add(texts, encoder.encode(texts))
                texts, size = [], 0
        splits.add(texts, encoder.encode(texts))
        found = splits.finish()
    source = {"path": part.path, "start": part.start, "end": part.end}
    return {"source": source, "rows": rows, "splits": found}


class _Splits:
    """Packs the documents of a part and writes the blocks of each split to its shard."""

    def __init__(self, name: str, recipe: Recipe, store: Store) -> None:
        self._recipe = recipe
        self._packers = {split: recipe.packer() for split in SPLITS}
        self._writers = {
            split: ShardWriter(store, f"{split}-{name}.arrow", packer.schema) for split, packer in self._packers.items()
        }
        self._waiting: dict[str, list[Any]] = {split: [] for split in SPLITS}
        self._documents = dict.fromkeys(SPLITS, 0)

    def __enter__(self) -> _Splits:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for writer in self._writers.values():
            writer.__exit__(kind, error, traceback)

    def add(self, texts: Sequence[str], ids: Sequence[Any]) -> None:
        """Appends documents, each to its split."""
        for text, row in zip(texts, ids, strict=True):
            self._waiting[self._recipe.split_of(text)].append(row)
        for split, rows in self._waiting.items():
            if sum(row.nbytes for row in rows) >= BATCH_BYTES:
                self._pack(split)

    def _pack(self, split: str) -> None:
        import numpy as np

        rows, self._waiting[split] = self._waiting[split], []
        self._documents[split] += len(rows)
        values = np.concatenate([np.empty(0, np.int32), *rows])
        if batch := self._packers[split].add(values, np.asarray([len(row) for row in rows], np.int64)):
            self._writers[split].append(batch)

    def finish(self) -> dict[str, Any]:
        """Packs what is left; returns the record of each split."""
        for split in SPLITS:
            self._pack(split)
        return {
            split: {
                "documents": self._documents[split],
                "tokens": packer.tokens,
                "largest_id": packer.largest_id,
                "shards": self._writers[split].finish(),
                "rest": [packer.rest[0].tolist(), packer.rest[1].astype(int).tolist()],
            }
            for split, packer in self._packers.items()
        }


class ShardWriter:
    """Writes record batches to a shard, whose file is created with the first of them.

    Args:
        store: the directory.
        name: the shard's name.
        schema: the schema of the batches.
    """

    def __init__(self, store: Store, name: str, schema: pa.Schema) -> None:
        self._store, self._name, self._schema = store, name, schema
        self._context: Any = None
        self._blocks = 0

    def append(self, batch: pa.RecordBatch) -> None:
        """Appends a record batch."""
        import pyarrow as pa

        if self._context is None:
            self._context = self._store.writing(self._name)
            self._sink = _Hashed(self._context.__enter__())
            self._writer = pa.ipc.new_stream(pa.PythonFile(self._sink, "w"), self._schema)
        self._writer.write_batch(batch)
        self._blocks += len(batch)

    def finish(self) -> list[dict[str, Any]]:
        """Completes the file; returns the shard's record, or nothing if the shard would be empty."""
        if self._context is None:
            return []
        self._writer.close()
        context, self._context = self._context, None
        context.__exit__(None, None, None)
        sha256 = self._sink.content.hexdigest()
        return [{"file": self._name, "blocks": self._blocks, "bytes": self._sink.size, "sha256": sha256}]

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Discards a file that is not complete."""
        if self._context is not None:
            self._context.__exit__(kind, error, traceback)


class _Hashed:
    """A file to write to, with the SHA-256 and the size of what was written."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.content, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.content.update(data)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def begin(store: Store, plan: Mapping[str, Any]) -> None:
    """Creates the directory for a plan, or continues it.

    Args:
        store: the directory.
        plan: what `plan_of` gives.

    Raises:
        InputError: the directory holds something else.
    """
    names = [name for name in store.names() if not name.endswith(".part")]
    if PLAN not in names:
        if others := sorted(set(names) - {PARTS}):
            raise InputError(f"`output` {store} holds other files ({others[0]}): give a new or empty directory")
        store.create(PARTS)
        store.write_json(PLAN, plan)
        return
    (former,) = store.read_json([PLAN])
    for name, value in plan.items():
        if former.get(name) != value:
            raise InputError(
                f"`output` {store} was begun with {_difference(name, former.get(name), value)}: "
                "give another directory, or remove this one"
            )
    store.create(PARTS)


def _difference(name: str, former: Any, value: Any) -> str:
    """Names the first difference between two entries of a plan."""
    if isinstance(former, dict) and isinstance(value, dict):
        key = next(key for key in {**former, **value} if former.get(key) != value.get(key))
        return f"`{key}` {former.get(key)}, not {value.get(key)}"
    if name == "inputs" and isinstance(former, list):
        changed = [file["path"] for file in [*value, *former] if file not in former or file not in value]
        return f"other input files ({changed[0]} is new, missing or has changed)"
    return f"another {name}"


def finish(store: Store, plan: Mapping[str, Any], parts: int, recipe: Recipe) -> dict[str, Any]:
    """Packs the rests of all parts in order and writes the manifest; returns the manifest.

    Args:
        store: the directory, after `prepare_part` of every part.
        plan: what `plan_of` gives.
        parts: number of parts.
        recipe: the recipe of the blocks.

    Raises:
        InputError: a part could not be read, a shard was damaged, or no part has text.
    """
    if failed := sorted(name for name in store.names(PARTS) if name.endswith(".error")):
        raise InputError(store.read_json([f"{PARTS}/{failed[0]}"])[0])
    records = store.read_json([_record_name(index) for index in range(parts)])
    splits = {split: _join([record["splits"][split] for record in records], split, recipe, store) for split in SPLITS}
    if not any(split["documents"] for split in splits.values()):
        raise InputError(f"the files have no text: none of their rows has text in column {recipe.text_column}")
    rows = sum(record["rows"] for record in records)
    dropped = rows - sum(split["documents"] for split in splits.values())
    manifest = {"format": FORMAT, "plan": dict(plan), "rows": rows, "dropped_rows": dropped, "splits": splits}
    store.write_json(MANIFEST, manifest)
    return manifest


def _join(records: Sequence[Mapping[str, Any]], split: str, recipe: Recipe, store: Store) -> dict[str, Any]:
    """The manifest's entry for a split, from its entries in the records of all parts."""
    import numpy as np

    packer = recipe.packer()
    writer = ShardWriter(store, f"{split}-rest.arrow", packer.schema)
    for record in records:
        ids, is_text = record["rest"]
        if batch := packer.add_rest(np.asarray(ids, np.int32), np.asarray(is_text, bool)):
            writer.append(batch)
    shards = [shard for record in records for shard in record["shards"]] + writer.finish()
    return {
        "documents": sum(record["documents"] for record in records),
        "blocks": sum(shard["blocks"] for shard in shards),
        "tokens": sum(record["tokens"] for record in records),
        "dropped_tokens": int(np.count_nonzero(packer.rest[1])),
        "largest_id": max([packer.largest_id, *(record["largest_id"] for record in records)]),
        "shards": shards,
    }


def read_manifest(store: Store) -> dict[str, Any]:
    """Reads the manifest of a directory.

    Raises:
        InputError: there is none, or it was written by a later version.
    """
    try:
        if not store.exists(MANIFEST):
            begun = ": prepare has not finished there; run it again" if store.exists(PLAN) else ""
            raise InputError(f"{store} holds no {MANIFEST}{begun or ': give a directory that prepare has written'}")
        (manifest,) = store.read_json([MANIFEST])
        if manifest["format"] != FORMAT:
            raise InputError(f"{store} has format {manifest['format']}, not {FORMAT}: prepare it again")
        _ = manifest["plan"]["settings"], manifest["splits"]["train"]["shards"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{store}/{MANIFEST} cannot be read: prepare the directory again") from error
    return dict(manifest)


def plan_of(recipe: Recipe, inputs: Sequence[Mapping[str, Any]], digest: str, **settings: Any) -> dict[str, Any]:
    """The plan of a directory: what its content depends on, as JSON types."""
    values = {name: value for name, value in asdict(recipe).items() if name != "encoder"}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {"tokenizer": digest, "settings": {**values, **settings}, "inputs": [dict(file) for file in inputs]}

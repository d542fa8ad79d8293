"""Token ids to blocks of equal length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tfclm.compat import fingerprint
from tfclm.corpus.cache import stored
from tfclm.errors import InputError

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import pyarrow as pa

BATCH_BYTES = 1 << 24


@dataclass(frozen=True)
class Packed:
    """The blocks of one split.

    `blocks` has one column `input_ids`, int32 lists of exactly `block_size`. `tokens` counts all ids of the split,
    separators included; the last `dropped_tokens` of them, fewer than `block_size`, filled no block:
    `tokens == len(blocks) * block_size + dropped_tokens`. `largest_id` is for `check_vocabulary`.
    """

    blocks: datasets.Dataset
    block_size: int
    dropped_tokens: int
    tokens: int
    largest_id: int

    @property
    def predicted_tokens(self) -> int:
        """The tokens that a model predicts: all but the first of each block."""
        return len(self.blocks) * (self.block_size - 1)


def pack(tokens: datasets.Dataset, block_size: int, separator: Sequence[int] = ()) -> Packed:
    """Concatenate the documents of a split, `separator` after each, and cut the result into blocks of `block_size` ids.

    `tokens` has a column `input_ids`, a list of integers a row, as `tokenize` gives; a selection or a shuffle of it
    counts as it reads. The blocks do not depend on how the rows lie in record batches. Streams, and keeps the result
    in the datasets cache. Raises `InputError` for a block size below 2 or a text that does not fill one block.
    """
    import pyarrow as pa

    check_ids(tokens, "tokens")
    if block_size < 2:
        raise InputError(f"--block-size {block_size} leaves no token to predict: give 2 or more, for example 128")
    schema = pa.schema({"input_ids": pa.list_(pa.int32(), block_size)})

    def write(append: Callable[[pa.RecordBatch], None]) -> dict[str, Any]:
        return _write_blocks(tokens, block_size, list(separator), append, schema)

    key = [fingerprint(tokens), block_size, list(separator)]
    blocks, facts = stored("blocks", key, schema, write)
    return Packed(blocks, block_size, facts["dropped_tokens"], facts["tokens"], facts["largest_id"])


def _write_blocks(
    tokens: datasets.Dataset,
    block_size: int,
    separator: list[int],
    append: Callable[[pa.RecordBatch], None],
    schema: pa.Schema,
) -> dict[str, Any]:
    import numpy as np
    import pyarrow as pa

    rest = np.empty(0, np.int32)
    count, largest = 0, -1
    for ids in _streams(tokens, np.asarray(separator, np.int32)):
        if not len(ids):
            continue
        count += len(ids)
        largest = max(largest, int(ids.max()))
        ids = np.concatenate([rest, ids])
        whole = len(ids) // block_size * block_size
        if whole:
            rows = pa.FixedSizeListArray.from_arrays(pa.array(ids[:whole]), block_size)
            append(pa.record_batch([rows], schema=schema))
        rest = ids[whole:]
    if count < block_size:
        way_out = f"give --block-size {count} or less, or more text" if count > 1 else "give more text"
        raise InputError(f"the text has {count} tokens, less than one block of {block_size}: {way_out}")
    return {"dropped_tokens": len(rest), "tokens": count, "largest_id": largest}


def _streams(tokens: datasets.Dataset, separator: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """The ids of the split in order, some rows at a time, each row followed by the separator."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    column = tokens.select_columns(["input_ids"]).with_format("arrow")
    row_bytes = column.data.nbytes / max(column.data.num_rows, 1)
    for table in column.iter(batch_size=int(min(max(BATCH_BYTES / max(row_bytes, 1), 1), 1 << 17))):
        rows = table["input_ids"]
        # flatten() of a list column heeds its offsets; the lengths do not know of them.
        values = rows.combine_chunks().flatten().cast(pa.int32()).to_numpy(zero_copy_only=False)
        if not len(separator):
            yield values
            continue
        lengths = pc.fill_null(pc.list_value_length(rows), 0).to_numpy()
        ends = np.cumsum(lengths + len(separator))
        places = ends[:, None] + np.arange(-len(separator), 0)
        joined = np.empty(len(values) + places.size, np.int32)
        of_documents = np.ones(len(joined), dtype=bool)
        of_documents[places.ravel()] = False
        joined[of_documents] = values
        joined[places] = separator
        yield joined


def check_ids(rows: Any, name: str) -> None:
    """Raise `InputError` unless `rows` is a dataset with a column `input_ids`; `name` is what the message calls it."""
    import datasets

    if isinstance(rows, datasets.Dataset) and "input_ids" in rows.column_names:
        return
    found = f"columns {', '.join(rows.column_names)}" if isinstance(rows, datasets.Dataset) else type(rows).__name__
    raise InputError(
        f"{name} has no token ids ({found}): give a dataset with a column input_ids, as tfclm.corpus.tokenize makes it "
        "of texts and tfclm.pack of those"
    )


def check_block_size(block_size: int, context: int | None) -> None:
    """Raise `InputError` if blocks of `block_size` ids are beyond the model's `context` (None: it has no limit)."""
    if context is not None and block_size > context:
        raise InputError(
            f"--block-size {block_size} is beyond the model's context of {context} tokens: give {context} or less"
        )


def check_vocabulary(largest_id: int, vocab_size: int) -> None:
    """Raise `InputError` if the text has an id that the model's embedding of `vocab_size` rows does not."""
    if largest_id >= vocab_size:
        raise InputError(
            f"the text has token id {largest_id}, but the model's vocabulary has {vocab_size} entries "
            f"(ids 0 to {vocab_size - 1}): use the tokenizer that belongs to the model"
        )

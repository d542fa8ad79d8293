"""Packs token ids into blocks of equal length."""

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

BATCH_BYTES = 1 << 24  # of token ids per record batch


@dataclass(frozen=True)
class Packed:
    """The blocks of one split; `tokens == len(blocks) * block_size + dropped_tokens`.

    Attributes:
        blocks: a memory-mapped dataset with one column `input_ids`, int32 lists of `block_size` ids.
        block_size: number of tokens per block.
        dropped_tokens: number of tokens at the end of the split that did not fill a block.
        tokens: number of all tokens of the split, separators included.
        largest_id: the largest token id, for `check_vocabulary`.
    """

    blocks: datasets.Dataset
    block_size: int
    dropped_tokens: int
    tokens: int
    largest_id: int

    @property
    def predicted_tokens(self) -> int:
        """Number of tokens that a model predicts: all but the first of each block."""
        return len(self.blocks) * (self.block_size - 1)


def pack(tokens: datasets.Dataset, block_size: int, separator: Sequence[int] = ()) -> Packed:
    """Concatenates tokenized documents and cuts the result into blocks of `block_size` tokens.

    The rest that does not fill a block is dropped. Rows are read in the dataset's order, also after `select` or
    `shuffle`. Memory stays bounded, and the blocks are kept in the datasets cache.

    Args:
        tokens: a dataset with a column `input_ids`, one list of integers per document, as `tfclm.corpus.tokenize`
            returns it.
        block_size: number of tokens per block, 2 or more.
        separator: token ids put after each document, such as `[tokenizer.eos_token_id]`. Without a separator, a model
            does not learn where documents end.

    Returns:
        A `Packed`: the blocks with the numbers of tokens.

    Raises:
        InputError: `tokens` has no token ids, `block_size` is below 2, or the text does not fill one block.

    Source:
        The `group_texts` step of Hugging Face's causal language modeling guide.

    Example:
        >>> tokens = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]]})
        >>> packed = tfclm.pack(tokens, block_size=3, separator=[0])
        >>> list(packed.blocks["input_ids"])
        [[5, 6, 7], [0, 8, 9]]
        >>> packed.dropped_tokens, packed.predicted_tokens
        (1, 4)
    """
    import pyarrow as pa

    check_ids(tokens, "tokens")
    if block_size < 2:
        raise InputError(f"`block_size` {block_size} leaves no token to predict: give 2 or more, for example 128")
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
    for ids in _concatenate(tokens, np.asarray(separator, np.int32)):
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
        remedy = f"give `block_size` {count} or less, or more text" if count > 1 else "give more text"
        raise InputError(f"the text has {count} tokens, less than one block of {block_size}: {remedy}")
    return {"dropped_tokens": len(rest), "tokens": count, "largest_id": largest}


def _concatenate(tokens: datasets.Dataset, separator: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """Yields the ids of the split in order, a batch of rows at a time, with the separator after each row."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    column = tokens.select_columns(["input_ids"]).with_format("arrow")
    row_bytes = column.data.nbytes / max(column.data.num_rows, 1)
    for table in column.iter(batch_size=int(min(max(BATCH_BYTES / max(row_bytes, 1), 1), 1 << 17))):
        rows = table["input_ids"]
        # flatten(), unlike .values, leaves out what lies outside of the column's slice.
        values = rows.combine_chunks().flatten().cast(pa.int32()).to_numpy(zero_copy_only=False)
        if not len(separator):
            yield values
            continue
        lengths = pc.fill_null(pc.list_value_length(rows), 0).to_numpy()
        ends = np.cumsum(lengths + len(separator))
        separator_places = ends[:, None] + np.arange(-len(separator), 0)
        joined = np.empty(len(values) + separator_places.size, np.int32)
        is_document = np.ones(len(joined), dtype=bool)
        is_document[separator_places.ravel()] = False
        joined[is_document] = values
        joined[separator_places] = separator
        yield joined


def check_ids(rows: Any, name: str) -> None:
    """Raises `InputError` unless `rows` is a dataset with a column `input_ids`; `name` is its name in the message."""
    import datasets

    if isinstance(rows, datasets.Dataset) and "input_ids" in rows.column_names:
        return
    found = f"columns {', '.join(rows.column_names)}" if isinstance(rows, datasets.Dataset) else type(rows).__name__
    raise InputError(
        f"`{name}` has no token ids ({found}): give a dataset with a column input_ids: "
        "tfclm.corpus.tokenize makes it from texts, tfclm.pack makes blocks from that"
    )


def check_block_size(block_size: int, context: int | None) -> None:
    """Raises `InputError` if `block_size` tokens exceed the model's context length (None: no limit)."""
    if context is not None and block_size > context:
        raise InputError(
            f"`block_size` {block_size} exceeds the model's context of {context} tokens: give {context} or less"
        )


def check_vocabulary(largest_id: int, vocab_size: int) -> None:
    """Raises `InputError` if the text has a token id beyond the model's vocabulary."""
    if largest_id >= vocab_size:
        raise InputError(
            f"the text has token id {largest_id}, but the model's vocabulary has {vocab_size} entries "
            f"(ids 0 to {vocab_size - 1}): use the tokenizer that belongs to the model"
        )

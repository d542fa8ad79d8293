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
IGNORED = -100  # the label of a token that is only context, as in transformers


@dataclass(frozen=True)
class Packed:
    """The blocks of one split.

    Attributes:
        blocks: a memory-mapped dataset with a column `input_ids`, int32 lists of `block_size` ids. With a prefix also
            `labels`: the ids, or -100 for the prefix's tokens.
        block_size: number of tokens per block.
        dropped_tokens: number of tokens at the end of the split that did not fill a block.
        tokens: number of all tokens of the split, with separators and without prefixes.
        largest_id: the largest token id, for `check_vocabulary`.
        separator: the ids after each document.
        prefix: the ids at the beginning of each block and document.
    """

    blocks: datasets.Dataset
    block_size: int
    dropped_tokens: int
    tokens: int
    largest_id: int
    separator: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()

    @property
    def predicted_tokens(self) -> int:
        """Number of tokens that a model predicts: all but prefixes; without a prefix, all but the first per block."""
        return self.tokens - self.dropped_tokens - (0 if self.prefix else len(self.blocks))


def pack(
    tokens: datasets.Dataset, block_size: int, separator: Sequence[int] = (), prefix: Sequence[int] = ()
) -> Packed:
    """Concatenates tokenized documents and cuts the result into blocks of `block_size` tokens.

    Each document begins with the prefix, and so does each block, within its `block_size` tokens; where a document
    begins with a block, the prefix is there once. The rest that does not fill a block is dropped. Rows are read in the
    dataset's order, also after `select` or `shuffle`. Memory stays bounded, and the blocks are kept in the datasets
    cache.

    Args:
        tokens: a dataset with a column `input_ids`, one list of integers per document, as `tfclm.corpus.tokenize`
            returns it.
        block_size: number of tokens per block, 2 or more.
        separator: token ids put after each document, such as `[tokenizer.eos_token_id]`. Without a separator, a model
            does not learn where documents end.
        prefix: token ids at the beginning of each document and block, as `tfclm.corpus.prefix_ids(tokenizer)` gives
            them. They are only context: their labels are -100. After a separator that ends with the same ids, they are
            not repeated.

    Returns:
        A `Packed`: the blocks with the numbers of tokens.

    Raises:
        InputError: `tokens` has no token ids, `block_size` leaves no token to predict, or the text does not fill one
            block.

    Source:
        The `group_texts` step of Hugging Face's causal language modeling guide.

    Example:
        >>> tokens = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]]})
        >>> packed = tfclm.pack(tokens, block_size=3, separator=[0])
        >>> list(packed.blocks["input_ids"])
        [[5, 6, 7], [0, 8, 9]]
        >>> packed.dropped_tokens, packed.predicted_tokens
        (1, 4)
        >>> packed = tfclm.pack(tokens, block_size=4, separator=[0], prefix=[1])
        >>> list(packed.blocks["input_ids"]), list(packed.blocks["labels"])
        ([[1, 5, 6, 7], [1, 0, 1, 8]], [[-100, 5, 6, 7], [-100, 0, -100, 8]])
    """
    import numpy as np

    check_ids(tokens, "tokens")
    packer = BlockPacker(block_size, separator, prefix)

    def write(append: Callable[[pa.RecordBatch], None]) -> dict[str, Any]:
        for values, lengths in _documents(tokens):
            if batch := packer.add(values, lengths):
                append(batch)
        if not packer.blocks:
            raise InputError(packer.too_little())
        dropped = int(np.count_nonzero(packer.rest[1]))
        return {"dropped_tokens": dropped, "tokens": packer.tokens, "largest_id": packer.largest_id}

    key = [fingerprint(tokens), block_size, list(separator), *([list(prefix)] if prefix else [])]
    blocks, facts = stored("blocks", key, packer.schema, write)
    numbers = (facts["dropped_tokens"], facts["tokens"], facts["largest_id"])
    return Packed(blocks, block_size, *numbers, tuple(separator), tuple(prefix))


class BlockPacker:
    """Cuts a stream of documents into blocks, as `pack` describes it.

    Args:
        block_size: number of tokens per block.
        separator: token ids after each document.
        prefix: token ids at the beginning of each document and block.

    Attributes:
        schema: the Arrow schema of the blocks.
        blocks: number of blocks so far.
        tokens: number of tokens so far, with separators and without prefixes.
        largest_id: the largest token id so far.
        rest: the ids int32 [T] that do not fill a block yet, and which of them are not of a prefix, bool [T].

    Raises:
        InputError: `block_size` leaves no token to predict.
    """

    def __init__(self, block_size: int, separator: Sequence[int] = (), prefix: Sequence[int] = ()) -> None:
        import numpy as np
        import pyarrow as pa

        smallest = max(len(prefix), 1) + 1
        if block_size < smallest:
            raise InputError(
                f"`block_size` {block_size} leaves no token to predict: give {smallest} or more, for example 128"
            )
        self._block_size, self._separator, self._prefix = block_size, list(separator), list(prefix)
        # After a separator that ends with the prefix, a document begins with it already.
        repeated = self._separator[len(separator) - len(prefix) :] == self._prefix
        self._before = [] if repeated else self._prefix
        row = pa.list_(pa.int32(), block_size)
        self.schema = pa.schema({"input_ids": row} | ({"labels": row} if prefix else {}))
        self.blocks, self.tokens, self.largest_id = 0, 0, max(prefix, default=-1)
        self.rest = np.empty(0, np.int32), np.empty(0, dtype=bool)

    def add(self, values: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> pa.RecordBatch | None:
        """Appends documents; returns the blocks that are full now, None if there are none.

        Args:
            values: the token ids of the documents, int32 [T].
            lengths: number of tokens of each document, int64 [N], which sum to T.
        """
        return self._add(*_surround(values, lengths, self._before, self._separator))

    def add_rest(self, ids: np.ndarray[Any, Any], is_text: np.ndarray[Any, Any]) -> pa.RecordBatch | None:
        """Appends the `rest` of another packer: it begins with the prefix, as a document or a block does."""
        import numpy as np

        before = self._before if len(ids) else []
        return self._add(
            np.concatenate([np.asarray(before, np.int32), ids]),
            np.concatenate([np.zeros(len(before), dtype=bool), is_text]),
        )

    def _add(self, ids: np.ndarray[Any, Any], is_text: np.ndarray[Any, Any]) -> pa.RecordBatch | None:
        import numpy as np
        import pyarrow as pa

        if not len(ids):
            return None
        self.tokens += int(np.count_nonzero(is_text))
        self.largest_id = max(self.largest_id, int(ids.max()))
        ids, is_text = np.concatenate([self.rest[0], ids]), np.concatenate([self.rest[1], is_text])
        begins, end = _cut(is_text, self._block_size - len(self._prefix))
        self.rest = ids[end:].copy(), is_text[end:].copy()
        self.blocks += len(begins)
        if not len(begins):
            return None
        columns = [_rows(ids, begins, self._block_size, self._prefix)]
        if self._prefix:
            labels = np.where(is_text, ids, np.int32(IGNORED))
            columns.append(_rows(labels, begins, self._block_size, [IGNORED] * len(self._prefix)))
        arrays = [pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), self._block_size) for rows in columns]
        return pa.record_batch(arrays, schema=self.schema)

    def too_little(self) -> str:
        """The message for text that does not fill one block."""
        most = len(self._prefix) + len(self.rest[0])
        enough = most > max(len(self._prefix), 1)
        remedy = f"give `block_size` {most} or less, or more text" if enough else "give more text"
        return f"the text has {self.tokens} tokens, less than one block of {self._block_size}: {remedy}"


def _cut(is_text: np.ndarray[Any, Any], size: int) -> tuple[np.ndarray[Any, Any], int]:
    """Where blocks of `size` tokens begin, none with a document's prefix, and where the rest after them begins."""
    import numpy as np

    text = np.flatnonzero(is_text)
    if len(text) == len(is_text):
        whole = len(is_text) // size * size
        return np.arange(0, whole, size), whole
    begins = []
    begin = int(text[0]) if len(text) else len(is_text)
    while begin + size <= len(is_text):
        begins.append(begin)
        following = int(np.searchsorted(text, begin + size))
        begin = int(text[following]) if following < len(text) else len(is_text)
    return np.asarray(begins, np.int64), begin


def _rows(
    values: np.ndarray[Any, Any], begins: np.ndarray[Any, Any], size: int, prefix: list[int]
) -> np.ndarray[Any, Any]:
    """Rows int32 [N, size]: the prefix, and the values [T] from each beginning [N] on."""
    import numpy as np

    rows = np.empty((len(begins), size), np.int32)
    rows[:, : len(prefix)] = prefix
    rows[:, len(prefix) :] = np.lib.stride_tricks.sliding_window_view(values, size - len(prefix))[begins]
    return rows


def _documents(tokens: datasets.Dataset) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """The ids of a dataset in order, int32 [T], and the length of each row [N], a batch of rows at a time."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = tokens.select_columns(["input_ids"]).with_format("arrow")
    row_bytes = column.data.nbytes / max(column.data.num_rows, 1)
    for table in column.iter(batch_size=int(min(max(BATCH_BYTES / max(row_bytes, 1), 1), 1 << 17))):
        rows = table["input_ids"]
        # flatten(), unlike .values, leaves out what lies outside of the column's slice.
        values = rows.combine_chunks().flatten().cast(pa.int32()).to_numpy(zero_copy_only=False)
        yield values, pc.fill_null(pc.list_value_length(rows), 0).to_numpy()


def _surround(
    values: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], prefix: list[int], separator: list[int]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The documents with prefix and separator around each, int32 [T], and which ids are not of a prefix, bool [T]."""
    import numpy as np

    around = len(prefix) + len(separator)
    if not around:
        return values, np.ones(len(values), dtype=bool)
    ends = np.cumsum(lengths + around)
    joined = np.empty(len(values) + around * len(lengths), np.int32)
    is_document = np.ones(len(joined), dtype=bool)
    is_text = np.ones(len(joined), dtype=bool)
    for added, begins in ((prefix, ends - lengths - around), (separator, ends - len(separator))):
        places = begins[:, None] + np.arange(len(added))
        is_document[places] = False
        joined[places] = added
        is_text[places] = added is not prefix
    joined[is_document] = values
    return joined, is_text


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

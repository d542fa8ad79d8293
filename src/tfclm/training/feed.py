"""Feeds token blocks to Keras in batches, by the model's own `prepare_tf_dataset` and transformers' collator."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import tensorflow as tf
from transformers import DataCollatorForLanguageModeling

from tfclm.compat import is_selection
from tfclm.training.order import RunOrder, WorkerOrder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TFPreTrainedModel

    from tfclm.training.workers import Workers

Order: TypeAlias = np.ndarray[Any, Any] | RunOrder | WorkerOrder
# Tokens per Python call: a call costs nearly the same for one row and for a thousand.
FETCH_TOKENS = 1 << 16


class BlockCollator(DataCollatorForLanguageModeling):
    """transformers' causal collator, with a fast path for rows of equal length, which need no padding."""

    def tf_call(self, examples: list[Any]) -> dict[str, Any]:
        """Stacks rows of equal length; anything else goes to transformers' implementation."""
        rows = [example["input_ids"] for example in examples if example.keys() <= {"input_ids", "labels"}]
        if len(rows) < len(examples) or len({len(row) for row in rows}) != 1 or self.pad_to_multiple_of:
            padded: dict[str, Any] = super().tf_call(examples)
            return padded
        # In NumPy: each TensorFlow operation would wait for the interpreter lock, which the training loop holds.
        input_ids = np.asarray(rows)
        if "labels" in examples[0]:
            labels = np.asarray([example["labels"] for example in examples])
        else:
            labels = np.where(input_ids == self.tokenizer.pad_token_id, -100, input_ids)
        batch = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids), "labels": labels}
        return {name: tf.constant(array) for name, array in batch.items()}


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForLanguageModeling:
    """The collator for causal language modeling, with labels equal to the inputs, also for EOS tokens.

    transformers' collator needs a padding token, which GPT-2 lacks, and sets the labels of all tokens equal to it to
    -100: with pad == EOS, the model never learns to stop. So the copy of the tokenizer used here has a padding token
    beyond the vocabulary.
    """
    padding = copy.deepcopy(tokenizer)
    padding.add_special_tokens({"pad_token": "<|tfclm_pad|>"})
    return BlockCollator(padding, mlm=False, return_tensors="tf")


def feed(
    model: TFPreTrainedModel,
    blocks: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int | Sequence[int],
    order: Order | None = None,
    drop_remainder: bool = False,
) -> tf.data.Dataset:
    """Makes batches for `model.fit`.

    They equal those of `model.prepare_tf_dataset(blocks, collate_fn=DataCollatorForLanguageModeling(...))`, but are
    made several times faster. Blocks with a column `labels` keep theirs.

    Args:
        model: the model to train.
        blocks: a dataset with a column `input_ids`, lists of equal length, and maybe `labels`, as `tfclm.pack` makes
            it.
        tokenizer: the model's tokenizer.
        batch_size: rows per batch; or several sizes, which the batches have in turn.
        order: indices into `blocks`, of all rows of a run. If None, every block once.
        drop_remainder: leave out a short last batch.

    Returns:
        Batches ({"input_ids" [B, L], "attention_mask" [B, L]}, labels [B, L]), all int64.
    """
    fetch = _Fetch(blocks)
    order = np.arange(len(blocks)) if order is None else order
    rows = _Rows(len(order), fetch)
    fetched = int(np.sum(batch_size)) * max(FETCH_TOKENS // (int(np.sum(batch_size)) * fetch.block_size), 1)
    batches = model.prepare_tf_dataset(
        rows, batch_size=fetched, shuffle=False, drop_remainder=False, collate_fn=collator(tokenizer)
    )
    rows.order = order
    batches = batches.rebatch(batch_size, drop_remainder=drop_remainder)
    # Each worker's feed has its own rows only. Besides, sharding removes `rebatch` where a strategy has one replica.
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    batches = batches.with_options(options)
    if not isinstance(batch_size, int):
        return batches.prefetch(tf.data.AUTOTUNE)
    count = len(order) // batch_size if drop_remainder else -(-len(order) // batch_size)
    return batches.apply(tf.data.experimental.assert_cardinality(count)).prefetch(tf.data.AUTOTUNE)


def worker_feed(
    model: TFPreTrainedModel,
    blocks: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    order: RunOrder | np.ndarray[Any, Any],
    workers: Workers,
    endless: bool = False,
) -> tf.data.Dataset | tf.distribute.DistributedDataset:
    """Makes this worker's part of the batches that `feed` makes; it reads its own rows only.

    Args:
        model: the model to train.
        blocks: a dataset as for `feed`.
        tokenizer: the model's tokenizer.
        batch_size: rows per batch, over all replicas of all workers.
        order: indices into `blocks`, for the batches of all workers.
        workers: the workers of the run; with one, this is `feed`.
        endless: repeat at the end, so that the workers need not agree before each batch whether there is one.
    """
    if workers.count == 1:
        return feed(model, blocks, tokenizer, batch_size=batch_size, order=order)
    own, sizes = workers.share(order, batch_size)
    # Where a short batch leaves nothing for this worker, its dataset has the types of one that is not empty.
    batches = feed(model, blocks, tokenizer, batch_size=sizes, order=own if len(own) else np.zeros(1, np.int64))
    batches = batches if len(own) else batches.take(0)
    batches = batches.repeat() if endless else batches
    return workers.strategy.distribute_datasets_from_function(lambda context: batches)


class _Rows(datasets.Dataset):
    """The rows of a run by their positions. The table, which takes no memory, only says how many there are."""

    def __init__(self, count: int, fetch: _Fetch) -> None:
        super().__init__(pa.table({"position": pa.nulls(count)}), fingerprint="rows")
        self._fetch = fetch
        # `prepare_tf_dataset` looks at 200 random rows for their types. Until this is set, these are one block.
        self.order: Order | None = None
        self.set_transform(fetch)  # else `to_tf_dataset` would convert the table

    def __getitem__(self, key: Any) -> Any:
        positions = np.arange(key.start, key.stop) if isinstance(key, slice) else np.asarray(key)
        return self._fetch(np.zeros_like(positions) if self.order is None else self.order[positions])


class _Fetch:
    """Reads the token ids and labels of blocks from the memory-mapped Arrow buffers.

    `blocks.select(order)` does the same, but runs Python code for every row and would be the slowest part of the feed.
    """

    def __init__(self, blocks: datasets.Dataset) -> None:
        # A shuffle or selection is a list of indices into a table that is not reordered itself.
        self._blocks = blocks.flatten_indices() if is_selection(blocks) else blocks
        columns = {
            name: self._blocks.data.column(name)
            for name in ("input_ids", "labels")
            if name in self._blocks.column_names
        }
        self.block_size = len(columns["input_ids"][0])
        # The columns of a table may be chunked differently.
        self._chunks = {
            name: [
                chunk.flatten().to_numpy().reshape(len(chunk), self.block_size) for chunk in column.chunks if len(chunk)
            ]
            for name, column in columns.items()
        }

    def __reduce__(self) -> tuple[type[_Fetch], tuple[datasets.Dataset]]:
        # datasets hashes this object by its pickle: that should hold file names, not gigabytes.
        return _Fetch, (self._blocks,)

    def __call__(self, indices: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        return {name: _gather(chunks, indices) for name, chunks in self._chunks.items()}


def _gather(chunks: list[np.ndarray[Any, Any]], indices: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rows [N, L] by their indices [N] into all chunks together."""
    starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])
    chunk_of = np.searchsorted(starts, indices, side="right") - 1
    rows = np.empty((len(indices), chunks[0].shape[1]), chunks[0].dtype)
    for number in np.unique(chunk_of):
        rows_here = chunk_of == number
        rows[rows_here] = chunks[number][indices[rows_here] - starts[number]]
    return rows

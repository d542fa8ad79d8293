"""Token blocks to batches, through the model's own `prepare_tf_dataset` and the stock TensorFlow collator."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from transformers import DataCollatorForLanguageModeling

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase, TFPreTrainedModel

# How many tokens one Python call fetches; a call costs the same for one row and for a thousand.
FETCH_TOKENS = 1 << 16


class BlockCollator(DataCollatorForLanguageModeling):
    """The stock causal collator, with a short way for what `pack` gives: rows of equal length and nothing to pad."""

    def tf_call(self, examples: list[Any]) -> dict[str, Any]:
        """Stack rows of equal length; anything else takes the stock way."""
        rows = [example["input_ids"] for example in examples if example.keys() == {"input_ids"}]
        if len(rows) < len(examples) or len({len(row) for row in rows}) != 1 or self.pad_to_multiple_of:
            padded: dict[str, Any] = super().tf_call(examples)
            return padded
        # NumPy first: each TensorFlow operation would wait for the interpreter lock that the training loop holds.
        input_ids = np.asarray(rows)
        labels = np.where(input_ids == self.tokenizer.pad_token_id, -100, input_ids)
        batch = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids), "labels": labels}
        return {name: tf.constant(array) for name, array in batch.items()}


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForLanguageModeling:
    """The collator for causal language modelling, labels equal to the inputs: every EOS keeps its label.

    The stock collator needs a pad token, which GPT-2 has not, and sets the label of each id equal to it to -100: with
    pad == EOS the model never learns to stop. This one pads, if ever, with a token of its own beyond the vocabulary,
    added to a copy of the tokenizer.
    """
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"pad_token": "<|tfclm_pad|>"})
    return BlockCollator(own, mlm=False, return_tensors="tf")


def feed(
    model: TFPreTrainedModel,
    blocks: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    order: np.ndarray[Any, Any] | None = None,
    drop_remainder: bool = False,
) -> tf.data.Dataset:
    """Batches for `model.fit`: ({"input_ids" [B, L], "attention_mask" [B, L]}, labels [B, L]), all int64.

    They are what `model.prepare_tf_dataset(blocks, collate_fn=DataCollatorForLanguageModeling(...))` gives, at many
    times its speed. Rows come exactly in `order`: indices into `blocks`, of a whole run and as often as they occur
    there, so a resumed run passes `order[done:]`. Without `order`, every block once. The last batch is short unless
    `drop_remainder`.
    """
    import datasets
    import pyarrow as pa

    fetch = _Fetch(blocks)
    order = np.arange(len(blocks)) if order is None else np.asarray(order, np.int64)
    rows = datasets.Dataset(pa.table({"block": order})).with_transform(fetch)
    fetched = batch_size * max(FETCH_TOKENS // (batch_size * fetch.block_size), 1)
    batches = model.prepare_tf_dataset(
        rows, batch_size=fetched, shuffle=False, drop_remainder=False, collate_fn=collator(tokenizer)
    )
    batches = batches.rebatch(batch_size, drop_remainder=drop_remainder)
    count = len(order) // batch_size if drop_remainder else -(-len(order) // batch_size)
    return batches.apply(tf.data.experimental.assert_cardinality(count)).prefetch(tf.data.AUTOTUNE)


class _Fetch:
    """From rows of block indices to rows of ids, read from the memory-mapped Arrow buffers.

    `blocks.select(order)` would do the same with some Python for every row, which made it the slowest part of a feed.
    """

    def __init__(self, blocks: datasets.Dataset) -> None:
        # A shuffle or selection is a list of indices beside the whole table.
        self._blocks = blocks if blocks._indices is None else blocks.flatten_indices()
        column = self._blocks.data.column("input_ids")
        self.block_size = len(column[0])
        self._chunks = [
            chunk.flatten().to_numpy().reshape(len(chunk), self.block_size) for chunk in column.chunks if len(chunk)
        ]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])

    def __reduce__(self) -> tuple[type[_Fetch], tuple[datasets.Dataset]]:
        # datasets hashes what it is given to call: the name of a file, not its gigabytes.
        return _Fetch, (self._blocks,)

    def __call__(self, rows: dict[str, list[int]]) -> dict[str, np.ndarray[Any, Any]]:
        wanted = np.asarray(rows["block"])
        places = np.searchsorted(self._starts, wanted, side="right") - 1
        ids = np.empty((len(wanted), self.block_size), self._chunks[0].dtype)
        for place in np.unique(places):
            here = places == place
            ids[here] = self._chunks[place][wanted[here] - self._starts[place]]
        return {"input_ids": ids}


def run_order(blocks: int, batch_size: int, epochs: int, seed: int) -> np.ndarray[Any, Any]:
    """The block of every row of a whole run, epoch after epoch: int64 [epochs * steps * batch].

    Each epoch is a permutation of the blocks that depends on (seed, epoch) alone, cut to whole batches: another
    remainder is left out each time. With fewer blocks than `batch_size` a batch is all of them.
    """
    whole = blocks - blocks % min(batch_size, blocks)
    epochs_order = [np.random.default_rng([seed, epoch]).permutation(blocks)[:whole] for epoch in range(epochs)]
    return np.concatenate([np.empty(0, np.int64), *epochs_order])

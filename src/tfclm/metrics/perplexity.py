"""Perplexity: exp of the summed negative log-likelihood divided by the number of tokens.

A mean of batch means would be wrong: a short last batch, or one with few labels, would weigh as much as a full one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
import tf_keras

from tfclm.errors import InputError
from tfclm.metrics.finite import exp

if TYPE_CHECKING:
    import datasets
    from numpy.typing import ArrayLike
    from transformers import TFPreTrainedModel

IGNORED = -100  # the label that transformers' collators give to positions without a target
Row = tuple[np.ndarray, np.ndarray]  # input ids and labels, [L]


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a model on a text.

    Attributes:
        loss: mean negative log-likelihood per token, in nats.
        tokens: number of tokens that were scored.
        loss_standard_error: standard error of the loss, as if tokens were independent.
    """

    loss: float
    tokens: int
    loss_standard_error: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite if that overflows, NaN if the loss is NaN."""
        return exp(self.loss)

    @property
    def standard_error(self) -> float:
        """Standard error of the perplexity, as if tokens were independent: perplexity times that of the loss."""
        return self.perplexity * self.loss_standard_error


def token_losses(logits: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Negative log-likelihood of each label, given the tokens before it.

    Args:
        logits: [B, L, V], of any float type; position i predicts label i + 1.
        labels: int [B, L]; -100 where there is no target.

    Returns:
        losses float32 [B, L - 1] in nats, 0 where there is no target; mask bool [B, L - 1], True where there is one.
    """
    targets = labels[:, 1:]
    mask = tf.not_equal(targets, IGNORED)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels=tf.where(mask, targets, tf.zeros_like(targets)),
        # In bfloat16, values near 10 have a resolution of 1/16.
        logits=tf.cast(logits[:, :-1], tf.float32),
    )
    return tf.where(mask, losses, tf.zeros_like(losses)), mask


class TokenLoss(tf_keras.metrics.Metric):
    """Keras metric: mean loss per token since the last reset; sums in float64."""

    def __init__(self, name: str = "loss") -> None:
        super().__init__(name=name, dtype=tf.float64)
        self.total = self.add_weight(name="total", initializer="zeros")
        self.tokens = self.add_weight(name="tokens", initializer="zeros")

    def update_state(self, losses: tf.Tensor, mask: tf.Tensor) -> None:
        """Adds losses [B, L - 1] where mask [B, L - 1] holds."""
        self.total.assign_add(tf.reduce_sum(tf.cast(losses, tf.float64)))
        self.tokens.assign_add(tf.reduce_sum(tf.cast(mask, tf.float64)))

    def result(self) -> tf.Tensor:
        """The mean as float64; NaN before the first token."""
        return self.total / self.tokens


def perplexity(
    model: TFPreTrainedModel,
    input_ids: datasets.Dataset | ArrayLike,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> Perplexity:
    """Computes the perplexity of a causal language model on token ids.

    Args:
        model: a TensorFlow causal language model of transformers.
        input_ids: int [N, L], or a dataset of blocks as `tfclm.pack` makes it, which is streamed: each block is scored
            on its own, L - 1 tokens per block. Or int [T], one text, scored in windows.
        window: tokens per window, 2 or more, for a text [T].
        stride: tokens by which the window moves, 1 to `window` (the default). Each token is scored once, in the first
            window that holds it. After the first window it has at least window - stride tokens before it: T - 1 tokens
            are scored. With stride = window the first token of each window has no context and is not scored.
        batch_size: rows per forward pass.

    Returns:
        A `Perplexity`; sums are kept in float64.

    Raises:
        InputError: no token ids, no token to score, or a window or stride out of range.

    Source:
        The fixed-length and the strided protocol of transformers' "Perplexity of fixed-length models".

    Example:
        >>> model, tokenizer = tfclm.load("distilgpt2")
        >>> ids = tokenizer("Once upon a time there was a king.")["input_ids"]
        >>> tfclm.perplexity(model, ids, window=1024, stride=512).perplexity
    """
    rows = _make_rows(input_ids, window, stride)

    def sum_losses(ids: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        losses, mask = token_losses(model(input_ids=ids, training=False).logits, labels)
        losses = tf.cast(losses, tf.float64)
        count = tf.reduce_sum(tf.cast(mask, tf.float64))
        return tf.stack([tf.reduce_sum(losses), tf.reduce_sum(losses * losses), count])

    # One trace for all lengths, including that of the short last window.
    traced = tf.function(sum_losses).get_concrete_function(
        tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None, None], tf.int64)
    )
    total, squares, tokens = sum(
        (traced(tf.constant(ids), tf.constant(labels)).numpy() for ids, labels in _make_batches(rows, batch_size)),
        np.zeros(3),
    )
    if not tokens:
        raise InputError("no token to score: a text needs at least 2 tokens, because the first is only context")
    mean = total / tokens
    variance = max(squares / tokens - mean * mean, 0.0) * tokens / max(tokens - 1, 1)
    return Perplexity(loss=float(mean), tokens=int(tokens), loss_standard_error=float(math.sqrt(variance / tokens)))


def _make_rows(input_ids: Any, window: int | None, stride: int | None) -> Iterator[Row]:
    """The rows to score: the blocks of a dataset or of int [N, L], or the windows of int [T]."""
    if hasattr(input_ids, "column_names"):
        if "input_ids" not in input_ids.column_names:
            columns = ", ".join(input_ids.column_names)
            raise InputError(
                f"`input_ids` has no token ids (columns {columns}): give a dataset with a column input_ids, as "
                "tfclm.pack makes it"
            )
        return ((row, row) for row in _stream_blocks(input_ids))
    ids = np.asarray(input_ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"`input_ids` is {ids.dtype}: give the ids that the model's tokenizer makes from a text")
    if ids.ndim == 2:
        return ((row, row) for row in ids)
    if window is None:
        raise InputError("one text of [T] tokens is scored in windows: give `window`")
    return _make_windows(ids, window, window if stride is None else stride)


def _stream_blocks(blocks: datasets.Dataset) -> Iterator[np.ndarray]:
    """Yields the rows of a dataset, with 1000 at a time in memory."""
    for batch in blocks.with_format("numpy").iter(batch_size=1000):
        yield from batch["input_ids"]


def _make_windows(ids: np.ndarray, window: int, stride: int) -> Iterator[Row]:
    if window < 2:
        raise InputError(f"`window` {window}: give 2 or more")
    if not 0 < stride <= window:
        raise InputError(f"`stride` {stride}: give 1 to {window}, the window")
    scored = 0
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        labels = ids[start:end].astype(np.int64)
        labels[: scored - start] = IGNORED
        yield ids[start:end], labels
        scored = end
        if end == len(ids):
            return


def _make_batches(rows: Iterable[Row], size: int) -> Iterator[Row]:
    """Stacks consecutive rows of equal length: ids int32 [B, L], labels int64 [B, L]."""
    batch: list[Row] = []
    for row in rows:
        if batch and (len(batch) == size or len(batch[0][0]) != len(row[0])):
            yield _stack(batch)
            batch = []
        batch.append(row)
    if batch:
        yield _stack(batch)


def _stack(batch: list[Row]) -> Row:
    ids, labels = zip(*batch, strict=True)
    return np.stack(ids).astype(np.int32), np.stack(labels).astype(np.int64)

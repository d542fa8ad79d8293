"""One metric: the summed negative log-likelihood and the number of tokens it was summed over, divided once.

A mean of batch means is no perplexity: a short last batch, or one with few labels, weighs as much as a full one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from tfclm.errors import InputError
from tfclm.metrics.finite import exp

IGNORED = -100  # the label that the collators of transformers give to a position that counts for nothing


@dataclass(frozen=True)
class Perplexity:
    """The score of a text: mean negative log-likelihood a token (natural log) and what it was taken over."""

    loss: float
    tokens: int
    loss_standard_error: float

    @property
    def perplexity(self) -> float:
        """exp(loss): infinite where that overflows, NaN where the loss is."""
        return exp(self.loss)

    @property
    def standard_error(self) -> float:
        """Standard error of the perplexity, tokens taken as independent: perplexity times that of the loss."""
        return self.perplexity * self.loss_standard_error


def token_losses(logits: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Negative log-likelihood of each label given what stands before it.

    Args:
        logits: [B, L, V], of any float type; position i predicts label i + 1.
        labels: int [B, L]; -100 where nothing is to be predicted.

    Returns:
        losses float32 [B, L - 1], 0 where ignored, and mask bool [B, L - 1].
    """
    targets = labels[:, 1:]
    mask = tf.not_equal(targets, IGNORED)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels=tf.where(mask, targets, tf.zeros_like(targets)),
        # In bfloat16 a loss near 10 moves in steps of 1/16.
        logits=tf.cast(logits[:, :-1], tf.float32),
    )
    return tf.where(mask, losses, tf.zeros_like(losses)), mask


class TokenLoss(tf_keras.metrics.Metric):
    """Keras metric: mean loss a token over everything since the last reset, sums kept in float64."""

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
    model: Any, input_ids: Any, *, window: int | None = None, stride: int | None = None, batch_size: int = 8
) -> Perplexity:
    """Perplexity of a causal language model on token ids.

    Args:
        model: a TensorFlow causal language model of transformers.
        input_ids: int [N, L], or a dataset of such blocks as `tfclm.pack` makes them, which is read as it is scored:
            blocks are scored each on its own, L - 1 tokens a block. Or int [T], one text that is scored by the strided
            protocol.
        window: tokens that the model sees at once when a text is strided.
        stride: tokens by which the window moves, window by default. Each token is scored once, in the first window
            that holds it, with at least window - stride tokens before it (after the first window): T - 1 tokens in
            all. With stride = window the first token of every window has nothing before it and is not scored.
        batch_size: rows a call of the model.

    Returns:
        A `Perplexity`; sums are kept in float64.

    Raises:
        ValueError: no token ids, no token to score, or a window or stride that does not fit.

    Source: the fixed-length protocol of transformers' "Perplexity of fixed-length models".
    """
    rows: Iterable[tuple[np.ndarray, np.ndarray]]
    if hasattr(input_ids, "column_names"):
        if "input_ids" not in input_ids.column_names:
            columns = ", ".join(input_ids.column_names)
            raise InputError(
                f"input_ids has no token ids (columns {columns}): give a dataset with a column input_ids, as tfclm.pack "
                "makes it"
            )
        rows = ((row, row) for row in _rows(input_ids))
    elif not np.issubdtype((ids := np.asarray(input_ids)).dtype, np.integer):
        raise ValueError(f"input_ids is {ids.dtype}: give the ids that the model's tokenizer makes of a text")
    elif ids.ndim == 2:
        rows = ((row, row) for row in ids)
    elif window is None:
        raise ValueError("one text of [T] tokens is scored in windows: give window")
    else:
        rows = _windows(ids, window, window if stride is None else stride)

    def sums(ids: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        losses, mask = token_losses(model(input_ids=ids, training=False).logits, labels)
        losses = tf.cast(losses, tf.float64)
        count = tf.reduce_sum(tf.cast(mask, tf.float64))
        return tf.stack([tf.reduce_sum(losses), tf.reduce_sum(losses * losses), count])

    # One trace for all lengths, the short last window's too.
    traced = tf.function(sums).get_concrete_function(
        tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None, None], tf.int64)
    )
    total, squares, tokens = sum(
        (traced(tf.constant(ids), tf.constant(labels)).numpy() for ids, labels in _batches(rows, batch_size)),
        np.zeros(3),
    )
    if not tokens:
        raise ValueError("no token to score: a text needs at least 2 tokens, the first is only context")
    mean = total / tokens
    variance = max(squares / tokens - mean * mean, 0.0) * tokens / max(tokens - 1, 1)
    return Perplexity(loss=float(mean), tokens=int(tokens), loss_standard_error=float(math.sqrt(variance / tokens)))


def _rows(blocks: Any) -> Iterator[np.ndarray]:
    """The rows of a dataset, of which a few at a time are in memory."""
    for some in blocks.with_format("numpy").iter(batch_size=1000):
        yield from some["input_ids"]


def _windows(ids: np.ndarray, window: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if not 0 < stride <= window or window < 2:
        raise ValueError(f"stride {stride} must lie between 1 and the window of {window} tokens (2 at least)")
    scored = 0
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        labels = ids[start:end].astype(np.int64)
        labels[: scored - start] = IGNORED
        yield ids[start:end], labels
        scored = end
        if end == len(ids):
            return


def _batches(rows: Iterable[tuple[np.ndarray, np.ndarray]], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Stacks neighbouring rows of one length; ids int32 [B, L], labels int64 [B, L]."""
    batch: list[tuple[np.ndarray, np.ndarray]] = []
    for row in rows:
        if batch and (len(batch) == size or len(batch[0][0]) != len(row[0])):
            yield _stack(batch)
            batch = []
        batch.append(row)
    if batch:
        yield _stack(batch)


def _stack(batch: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    ids, labels = zip(*batch, strict=True)
    return np.stack(ids).astype(np.int32), np.stack(labels).astype(np.int64)

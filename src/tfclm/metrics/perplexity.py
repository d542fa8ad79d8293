"""Perplexity: exp of the summed negative log-likelihood divided by the number of tokens.

A mean of batch means would be wrong: a short last batch, or one with few labels, would weigh as much as a full one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    # The labels are shifted rather than the logits: a slice would copy [B, L, V], and so would its gradient.
    targets = tf.pad(labels[:, 1:], [[0, 0], [0, 1]], constant_values=IGNORED)
    mask = tf.not_equal(targets, IGNORED)
    # In bfloat16, values near 10 have a resolution of 1/16.
    losses = _cross_entropy(tf.cast(logits, tf.float32), tf.where(mask, targets, tf.zeros_like(targets)))
    losses = tf.where(mask, losses, tf.zeros_like(losses))
    return losses[:, :-1], mask[:, :-1]


@tf.custom_gradient
def _cross_entropy(logits: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], Any]]:
    """The cross-entropy [B, L] of logits float32 [B, L, V] and targets int [B, L].

    Where operations have to be deterministic, `tf.nn.sparse_softmax_cross_entropy_with_logits` takes several times the
    memory and time: it applies log_softmax, and keeps that and the logits for the gradient. Here, the gradient is the
    only other tensor of this size.
    """
    highest = tf.reduce_max(logits, -1, keepdims=True)
    exponentials = tf.exp(logits - highest)
    total = tf.reduce_sum(exponentials, -1, keepdims=True)
    chosen = tf.gather(logits, targets, batch_dims=2)
    losses = tf.squeeze(tf.math.log(total) + highest, -1) - chosen

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, None]:
        # Softmax minus the one-hot targets, times upstream.
        shape = tf.shape(exponentials)
        rows = tf.reshape(exponentials * (upstream[..., None] / total), [-1, shape[-1]])
        flat = tf.reshape(targets, [-1])
        places = tf.stack([tf.range(tf.size(flat), dtype=flat.dtype), flat], -1)
        return tf.reshape(tf.tensor_scatter_nd_sub(rows, places, tf.reshape(upstream, [-1])), shape), None

    return losses, gradient


def sum_losses(losses: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """The sum of losses [B, L - 1] and the number of tokens where mask [B, L - 1] holds: float64 [2]."""
    return tf.stack([tf.reduce_sum(tf.cast(losses, tf.float64)), tf.reduce_sum(tf.cast(mask, tf.float64))])


class TokenLoss(tf_keras.metrics.Metric):
    """Keras metric: mean loss per token since the last reset; sums in float64.

    Under a tf.distribute strategy, every replica adds the sums over all replicas. So each has the same state, and
    reading it needs no communication.
    """

    def __init__(self, name: str = "loss") -> None:
        super().__init__(name=name, dtype=tf.float64)
        same = tf.VariableAggregation.ONLY_FIRST_REPLICA
        self.total = self.add_weight(name="total", initializer="zeros", aggregation=same)
        self.tokens = self.add_weight(name="tokens", initializer="zeros", aggregation=same)

    def update_state(self, sums: tf.Tensor) -> None:
        """Adds the sum of losses and the number of tokens, float64 [2], as `sum_losses` gives them."""
        self.total.assign_add(sums[0])
        self.tokens.assign_add(sums[1])

    def result(self) -> tf.Tensor:
        """The mean as float64; NaN before the first token."""
        return self.total / self.tokens


def perplexity(
    model: TFPreTrainedModel,
    input_ids: datasets.Dataset | ArrayLike,
    *,
    window: int | None = None,
    stride: int | None = None,
    prefix: Sequence[int] = (),
    batch_size: int = 8,
) -> Perplexity:
    """Computes the perplexity of a causal language model on token ids.

    Args:
        model: a TensorFlow causal language model of transformers.
        input_ids: int [N, L], or a dataset of blocks as `tfclm.pack` makes it, which is streamed: each block is scored
            on its own, L - 1 tokens per block, or those whose `labels` are not -100 if the dataset has that column. Or
            int [T], one text, scored in windows.
        window: tokens per window, for a text [T]: the prefix and 2 or more, or 1 or more after a prefix.
        stride: tokens by which the window moves, 1 to `window` without the prefix (the default). Each token is scored
            once, in the first window that holds it, T - 1 tokens in all. Without a prefix, and with stride = window,
            the first token of each window has no context and is not scored.
        prefix: token ids with which each block and window begins, such as the BOS: those that the tokenizer puts before
            a text, `tfclm.corpus.prefix_ids(tokenizer)`. They are only context and never scored, so that the token
            after them is. A block, or the text, that begins with them already does not get them again.
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
        >>> prefix = tfclm.corpus.prefix_ids(tokenizer)
        >>> tfclm.perplexity(model, ids, window=1024, stride=512, prefix=prefix).perplexity
    """
    rows = _make_rows(input_ids, window, stride, np.asarray(prefix, np.int64))

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
        raise InputError("no token to score: a text needs a token after the first one, or after the prefix")
    mean = total / tokens
    variance = max(squares / tokens - mean * mean, 0.0) * tokens / max(tokens - 1, 1)
    return Perplexity(loss=float(mean), tokens=int(tokens), loss_standard_error=float(math.sqrt(variance / tokens)))


def _make_rows(input_ids: Any, window: int | None, stride: int | None, prefix: np.ndarray) -> Iterator[Row]:
    """The rows to score: the blocks of a dataset or of int [N, L], or the windows of int [T]."""
    if hasattr(input_ids, "column_names"):
        if "input_ids" not in input_ids.column_names:
            columns = ", ".join(input_ids.column_names)
            raise InputError(
                f"`input_ids` has no token ids (columns {columns}): give a dataset with a column input_ids, as "
                "tfclm.pack makes it"
            )
        return (_begin_block(*row, prefix) for row in _stream_blocks(input_ids))
    ids = np.asarray(input_ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"`input_ids` is {ids.dtype}: give the ids that the model's tokenizer makes from a text")
    if ids.ndim == 2:
        return (_begin_block(row, row, prefix) for row in ids)
    if window is None:
        raise InputError("one text of [T] tokens is scored in windows: give `window`")
    return _make_windows(ids, window, stride, prefix)


def _stream_blocks(blocks: datasets.Dataset) -> Iterator[Row]:
    """Yields the rows of a dataset, with 1000 at a time in memory."""
    labels = "labels" if "labels" in blocks.column_names else "input_ids"
    for batch in blocks.with_format("numpy").iter(batch_size=1000):
        yield from zip(batch["input_ids"], batch[labels], strict=True)


def _begin_block(ids: np.ndarray, labels: np.ndarray, prefix: np.ndarray) -> Row:
    """The block with the prefix, which it may begin with already."""
    size = len(prefix)
    if np.array_equal(ids[:size], prefix):
        ids, labels = ids[size:], labels[size:]
    return _put_before(prefix, ids, labels)


def _put_before(prefix: np.ndarray, ids: np.ndarray, labels: np.ndarray) -> Row:
    return np.concatenate([prefix, ids]), np.concatenate([np.full(len(prefix), IGNORED), labels])


def check_window(window: int, stride: int, prefix_size: int, context: int | None = None) -> None:
    """Raises `InputError` if a window or stride is out of its range for a prefix of this many tokens."""
    least = max(prefix_size, 1) + 1
    if not least <= window <= (context or window):
        most = "or more" if context is None else f"to {context}, the model's context"
        raise InputError(f"`window` {window}: give {least} {most}")
    room = window - prefix_size
    if not 0 < stride <= room:
        without = " without its prefix" if prefix_size else ""
        raise InputError(f"`stride` {stride}: give 1 to {room}, the window{without}")


def _make_windows(ids: np.ndarray, window: int, stride: int | None, prefix: np.ndarray) -> Iterator[Row]:
    size = window - len(prefix)
    stride = size if stride is None else stride
    check_window(window, stride, len(prefix))
    if np.array_equal(ids[: len(prefix)], prefix):
        ids = ids[len(prefix) :]
    scored = 0
    for start in range(0, len(ids), stride):
        end = min(start + size, len(ids))
        labels = ids[start:end].astype(np.int64)
        labels[: scored - start] = IGNORED
        yield _put_before(prefix, ids[start:end], labels)
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

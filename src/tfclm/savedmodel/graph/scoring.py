"""Log-probabilities of the tokens of texts, and the likeliest tokens in their places.

A text longer than the context is scored in overlapping windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfclm.savedmodel.graph.network import Network, Weights

__all__ = ["TokenScores", "score_tokens"]

Tensor = Any

CHUNK = 64  # tokens that are read at once, so that rows that are decoded in the meantime wait for no more than that


class TokenScores(NamedTuple):
    """Of each token of a text."""

    logprobs: Tensor  # float32 [L], its log-probability given those before it
    greedy_ids: Tensor  # int32 [L], the likeliest token in its place


def score_tokens(network: Network, ids: Tensor, length: Tensor, prefix: Sequence[int] = ()) -> TokenScores:
    """The scores of a text; log-probability 0 and id -1 for the prefix, or the first token, and for padding.

    `ids` int32 [L], padded on the right after `length` [] tokens, begins with `prefix`. Texts longer than the context
    are read in windows of its size, which advance by half of it and begin with the prefix too; each token is scored in
    the first window that contains it, as `tfclm.perplexity` does with stride = context // 2.
    """
    weights = network.weights()
    window, begin = network.context, len(prefix)
    stride = max(1, min(window // 2, window - begin))
    further = tf.maximum(0, (length - window + stride - 1) // stride)  # windows after the first one
    before = tf.constant(list(prefix), tf.int32, [begin])

    first = _score_window(network, weights, ids[: tf.minimum(length, window)])
    arrays = _arrays(further)

    def score(index: Tensor, arrays: TokenScores) -> tuple[Tensor, TokenScores]:
        start = (index + 1) * stride
        end = tf.minimum(length, start + window)
        scored = _score_window(network, weights, tf.concat([before, ids[start + begin : end]], 0))
        # The tokens that were not in the window before.
        return index + 1, _write(arrays, index, [field[window - stride - 1 :] for field in scored])

    _, arrays = tf.while_loop(lambda index, _: index < further, score, (0, arrays), parallel_iterations=1)

    def whole(first: Tensor, array: tf.TensorArray, none: int) -> Tensor:
        rest = tf.cond(further > 0, array.concat, lambda: tf.zeros([0], first.dtype))
        # No scores of the prefix's own tokens.
        scored = tf.concat([tf.fill([max(1, begin)], tf.cast(none, first.dtype)), first[max(0, begin - 1) :], rest], 0)
        return tf.pad(scored, [[0, tf.size(ids) - tf.size(scored)]], constant_values=none)

    return TokenScores(*map(whole, first, arrays, (0, -1)))


def _arrays(size: Tensor) -> TokenScores:
    """Arrays for the scores of `size` [] pieces of a text."""
    return TokenScores(
        *(tf.TensorArray(kind, size, element_shape=[None], infer_shape=False) for kind in (tf.float32, tf.int32))
    )


def _write(arrays: TokenScores, index: Tensor, piece: Sequence[Tensor]) -> TokenScores:
    return TokenScores(*(array.write(index, field) for array, field in zip(arrays, piece, strict=True)))


def _score_window(network: Network, weights: Weights, ids: Tensor) -> TokenScores:
    """The scores of ids[1:], [L - 1], for a text of at most a context."""
    length = tf.size(ids)
    targets = tf.concat([ids[1:], [0]], 0)

    def read(
        index: Tensor, buffers: Sequence[Tensor], arrays: TokenScores
    ) -> tuple[Tensor, Sequence[Tensor], TokenScores]:
        start = index * CHUNK
        count = tf.minimum(CHUNK, length - start)
        hidden, buffers = network.extend(ids[None], start, count, length[None], buffers, weights)
        logits = network.logits(hidden[0], weights, small_batch=False)
        labels = targets[start : start + count]
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        return index + 1, buffers, _write(arrays, index, [-losses, tf.argmax(logits, -1, output_type=tf.int32)])

    *_, arrays = tf.while_loop(
        lambda index, *_: index * CHUNK < length,
        read,
        (0, network.buffers(1, length), _arrays((length + CHUNK - 1) // CHUNK)),
        parallel_iterations=1,
    )
    return TokenScores(*(array.concat()[:-1] for array in arrays))

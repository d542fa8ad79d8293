"""Log-probabilities of the tokens of texts; a text longer than the context is scored in overlapping windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfclm.savedmodel.graph.network import Network, Weights

__all__ = ["token_logprobs"]

Tensor = Any

CHUNK = 64  # positions whose logits are in memory at once


def token_logprobs(network: Network, ids: Tensor, lengths: Tensor, prefix: Sequence[int] = ()) -> Tensor:
    """Log-probability of each token given those before it, float32 [B, L]; 0 for the prefix, or for the first token.

    `ids` int32 [B, L], padded on the right after `lengths` [B]; each row begins with `prefix`. Texts longer than the
    context are read in windows of its size, which advance by half of it and begin with the prefix too; each token is
    scored in the first window that contains it, as `tfclm.perplexity` does with stride = context // 2.
    """
    weights = network.weights()
    window, begin = network.context, len(prefix)
    stride = max(1, min(window // 2, window - begin))
    batch, length = tf.unstack(tf.shape(ids))
    further = tf.maximum(0, (length - window + stride - 1) // stride)  # windows after the first one
    padded = tf.pad(ids, [[0, 0], [0, tf.maximum(0, window + further * stride - length)]])
    before = tf.tile(tf.constant([prefix], tf.int32, [1, begin]), [batch, 1])

    first = _score_window(network, weights, tf.cond(further > 0, lambda: padded[:, :window], lambda: ids), lengths)
    # No log-probabilities of the prefix's own tokens.
    first = tf.pad(first[:, max(0, begin - 1) :], [[0, 0], [max(1, begin), 0]])
    pieces = tf.TensorArray(tf.float32, size=further, element_shape=[None, None], infer_shape=False)

    def score(index: Tensor, pieces: tf.TensorArray) -> tuple[Tensor, tf.TensorArray]:
        start = (index + 1) * stride
        following = padded[:, start + begin : start + window]
        scored = _score_window(network, weights, tf.concat([before, following], 1), lengths - start)
        return index + 1, pieces.write(index, tf.transpose(scored[:, -stride:]))

    _, pieces = tf.while_loop(lambda index, pieces: index < further, score, (0, pieces), parallel_iterations=1)
    rest = tf.cond(further > 0, lambda: tf.transpose(pieces.concat()), lambda: tf.zeros([batch, 0], tf.float32))
    return tf.concat([first, rest], 1)[:, :length]


def _score_window(network: Network, weights: Weights, ids: Tensor, lengths: Tensor) -> Tensor:
    """Log-probabilities of ids[:, 1:], float32 [B, L - 1]; `lengths` [B] are those of the texts from the window on."""
    hidden = network.hidden(ids, weights, tf.clip_by_value(lengths, 1, tf.shape(ids)[1]))[:, :-1]
    targets = ids[:, 1:]
    count = tf.shape(targets)[1]
    chunks = (count + CHUNK - 1) // CHUNK
    padding = [[0, 0], [0, chunks * CHUNK - count]]
    size = hidden.shape[-1]
    hidden = tf.transpose(tf.reshape(tf.pad(hidden, [*padding, [0, 0]]), [-1, chunks, CHUNK, size]), [1, 0, 2, 3])
    targets = tf.transpose(tf.reshape(tf.pad(targets, padding), [-1, chunks, CHUNK]), [1, 0, 2])

    def logprobs(chunk: tuple[Tensor, Tensor]) -> Tensor:
        hidden, targets = chunk
        logits = network.logits(hidden, weights, small_batch=False)
        return -tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=logits)

    scored = tf.map_fn(
        logprobs,
        (hidden, targets),
        fn_output_signature=tf.TensorSpec([None, CHUNK], tf.float32),
        parallel_iterations=1,
    )
    return tf.reshape(tf.transpose(scored, [1, 0, 2]), [-1, chunks * CHUNK])[:, :count]

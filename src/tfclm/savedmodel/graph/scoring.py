"""Log-probabilities of the tokens of texts; a text longer than the context is scored in overlapping windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfclm.savedmodel.graph.network import Network, Weights

__all__ = ["token_logprobs"]

Tensor = Any

CHUNK = 64  # tokens that are read at once, so that rows that are decoded in the meantime wait for no more than that


def token_logprobs(network: Network, ids: Tensor, length: Tensor, prefix: Sequence[int] = ()) -> Tensor:
    """Log-probability of each token of a text given those before it, float32 [L]; 0 for the prefix or the first token.

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
    # No log-probabilities of the prefix's own tokens.
    first = tf.pad(first[max(0, begin - 1) :], [[max(1, begin), 0]])
    pieces = tf.TensorArray(tf.float32, size=further, element_shape=[None], infer_shape=False)

    def score(index: Tensor, pieces: tf.TensorArray) -> tuple[Tensor, tf.TensorArray]:
        start = (index + 1) * stride
        end = tf.minimum(length, start + window)
        scored = _score_window(network, weights, tf.concat([before, ids[start + begin : end]], 0))
        # The tokens that were not in the window before.
        return index + 1, pieces.write(index, scored[window - stride - 1 :])

    _, pieces = tf.while_loop(lambda index, pieces: index < further, score, (0, pieces), parallel_iterations=1)
    rest = tf.cond(further > 0, pieces.concat, lambda: tf.zeros([0], tf.float32))
    scored = tf.concat([first, rest], 0)
    return tf.pad(scored, [[0, tf.size(ids) - tf.size(scored)]])


def _score_window(network: Network, weights: Weights, ids: Tensor) -> Tensor:
    """Log-probabilities of ids[1:], float32 [L - 1], for a text of at most a context."""
    length = tf.size(ids)
    targets = tf.concat([ids[1:], [0]], 0)
    pieces = tf.TensorArray(tf.float32, (length + CHUNK - 1) // CHUNK, element_shape=[None], infer_shape=False)

    def read(
        index: Tensor, buffers: Sequence[Tensor], pieces: tf.TensorArray
    ) -> tuple[Tensor, Sequence[Tensor], tf.TensorArray]:
        start = index * CHUNK
        count = tf.minimum(CHUNK, length - start)
        hidden, buffers = network.extend(ids, start, count, length, buffers, weights)
        logits = network.logits(hidden[0], weights, small_batch=False)
        labels = targets[start : start + count]
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        return index + 1, buffers, pieces.write(index, -losses)

    *_, pieces = tf.while_loop(
        lambda index, *_: index * CHUNK < length,
        read,
        (0, network.buffers(1, length), pieces),
        parallel_iterations=1,
    )
    return pieces.concat()[:-1]

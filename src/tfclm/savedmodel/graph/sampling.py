"""From logits to the next token: repetition penalty, temperature, top-k and top-p with a value a row.

The distribution is the one that transformers' processors and warpers define, in their order. A row takes one uniform
number a step, so that its choice depends on its own seed and logits alone. Where logits are exactly equal at the edge
of top-k or top-p, all of them stay in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

__all__ = ["SamplingParams", "apply_repetition_penalty", "sample_next_token", "uniform_samples"]

Tensor = Any

CANDIDATES = 1024  # as many of the likeliest tokens are sorted first, where top-p has no top-k beside it
COMPILED_CANDIDATES = 64  # the same with XLA, for every row
ORDINARY = 1e6  # temperatures and penalties up to this, and down to its inverse, are applied in float32
LOWEST = -3e38  # score of a token that cannot be drawn, as float32 has it
BLOCK = 16  # tokens, of which one maximum tells whether any of the highest scores can be among them


class SamplingParams(NamedTuple):
    """What a row is decoded with, [B] each."""

    max_new_tokens: Tensor  # int32, 1 or more
    temperature: Tensor  # float32, 0 is greedy
    top_k: Tensor  # int32, 0 is off
    top_p: Tensor  # float32 in (0, 1], 1 is off
    repetition_penalty: Tensor  # float32 above 0, 1 is off
    seed: Tensor  # int64, -1 is fresh


def uniform_samples(seeds: Tensor, count: int) -> Tensor:
    """Numbers in [0, 1), float64 [B, count], a function of each row's seed int64 [B] alone; a seed of -1 is fresh."""
    with tf.device("CPU:0"):
        # The one source of chance that a process with op determinism allows.
        fresh = tf.raw_ops.NonDeterministicInts(shape=tf.shape(seeds), dtype=tf.int64)
        seeds = tf.where(seeds == -1, fresh, seeds)

        def row(seed: Tensor) -> Tensor:
            # Not "auto_select", which draws differently on other devices.
            return tf.random.stateless_uniform([count], [seed, 0], dtype=tf.float64, alg="philox")

        return tf.map_fn(row, seeds, fn_output_signature=tf.TensorSpec([count], tf.float64))


def apply_repetition_penalty(logits: Tensor, tokens: Tensor, known: Tensor, penalty: Tensor) -> Tensor:
    """Logits [B, V] after the repetition penalty [B]: of tokens there, positive ones divided, negative ones multiplied.

    tokens int32 [B, C], of which `known` bool [B, C] are there, the first one always. logits are float32, or float64
    for penalties whose result float32 cannot hold.
    """

    def apply() -> Tensor:
        there = tf.where(known, tokens, tokens[:, :1])
        old = tf.gather(logits, there, batch_dims=1)
        factor = tf.cast(penalty, tf.float64)
        inverse = tf.cast(1 / factor, logits.dtype)
        new = old * tf.where(old > 0, inverse[:, None], tf.cast(factor, logits.dtype)[:, None])
        rows = tf.broadcast_to(tf.range(tf.shape(logits)[0])[:, None], tf.shape(there))
        return tf.tensor_scatter_nd_update(logits, tf.stack([rows, there], -1), new)

    return tf.cond(tf.reduce_any(penalty != 1), apply, lambda: logits)


def sample_next_token(
    logits: Tensor, tokens: Tensor, known: Tensor, params: SamplingParams, uniform: Tensor, *, xla: bool = False
) -> Tensor:
    """The next token of each row, int32 [B]: the likeliest where the temperature is 0, else drawn by uniform [B].

    logits float32 [B, V]; tokens and known as for `apply_repetition_penalty`. `xla` takes ops that compile well instead
    of those that are fast on their own.
    """
    vocabulary = logits.shape[-1]
    extreme = _extreme(params)

    def ordinary() -> tuple[Tensor, Tensor]:
        """The likeliest tokens int32 [B], and the scores float32 [B, V]: logits below the highest by temperature."""
        penalized = apply_repetition_penalty(logits, tokens, known, params.repetition_penalty)
        return _likeliest(penalized), _scores(penalized, params.temperature)

    def with_extremes() -> tuple[Tensor, Tensor]:
        """The same in float64 for the rows that need it; the others must not depend on their neighbours' knobs."""
        wide = apply_repetition_penalty(tf.cast(logits, tf.float64), tokens, known, params.repetition_penalty)
        exact, narrow = (_likeliest(wide), _scores(wide, params.temperature)), ordinary()
        return tf.where(extreme, exact[0], narrow[0]), tf.where(extreme[:, None], exact[1], narrow[1])

    greedy, scores = tf.cond(tf.reduce_any(extreme), with_extremes, ordinary)

    def sampled() -> Tensor:
        padded = _pad(scores)
        weights = tf.exp(padded)
        threshold = _threshold(padded, weights, params, vocabulary, xla)
        weights = tf.where(padded >= threshold[:, None], weights, 0.0)
        return tf.where(params.temperature > 0, _draw(weights, uniform, _group_size(vocabulary)), greedy)

    return tf.cond(tf.reduce_any(params.temperature > 0), sampled, lambda: greedy)


def _extreme(params: SamplingParams) -> Tensor:
    """The rows, bool [B], whose knobs may lead out of the range of float32."""

    def outside(values: Tensor) -> Tensor:
        return (values < 1 / ORDINARY) | (values > ORDINARY)

    return outside(params.repetition_penalty) | (outside(params.temperature) & (params.temperature > 0))


def _likeliest(logits: Tensor) -> Tensor:
    return tf.argmax(logits, -1, output_type=tf.int32)


def _scores(logits: Tensor, temperature: Tensor) -> Tensor:
    """Logits [B, V] from the highest, 0, down and divided by the temperature [B], 1 where that is 0; float32."""
    scores = logits - tf.reduce_max(logits, -1, keepdims=True)
    scores /= tf.cast(tf.where(temperature > 0, temperature, 1.0), logits.dtype)[:, None]
    return scores if logits.dtype == tf.float32 else tf.cast(tf.maximum(scores, LOWEST), tf.float32)


def _group_size(vocabulary: int) -> int:
    """Tokens of a group, so that there are about as many groups: whole blocks."""
    return BLOCK * int(np.ceil(np.sqrt(vocabulary) / BLOCK))


def _pad(scores: Tensor) -> Tensor:
    """Scores [B, V] as those of whole groups [B, N], with tokens that cannot be drawn at the end."""
    vocabulary = scores.shape[-1]
    return tf.pad(scores, [[0, 0], [0, -vocabulary % _group_size(vocabulary)]], constant_values=-np.inf)


def _draw(weights: Tensor, uniform: Tensor, size: int) -> Tensor:
    """By inversion, in the vocabulary's order, a token by its weight [B, N], of groups of `size`; int32 [B].

    In two levels, groups and the tokens of one, because a running sum over a vocabulary is slow.
    """
    groups = tf.reshape(weights, [-1, weights.shape[-1] // size, size])
    sums = tf.cumsum(tf.cast(tf.reduce_sum(groups, -1), tf.float64), -1)
    target = uniform * sums[:, -1]
    group = _first_above(sums, target)
    before = tf.where(group > 0, tf.gather(sums, tf.maximum(group - 1, 0), batch_dims=1), 0.0)
    inner = tf.cumsum(tf.cast(tf.gather(groups, group, batch_dims=1), tf.float64), -1)
    # The group's sum was rounded otherwise than its running sum: what is left must lie below the latter.
    left = tf.minimum(target - before, inner[:, -1] * (1 - 1e-12))
    return group * size + _first_above(inner, left)


def _highest(scores: Tensor, count: Tensor | int) -> Tensor:
    """The `count` highest of scores [B, N], descending; [B, count]."""
    blocks = tf.reshape(scores, [-1, scores.shape[-1] // BLOCK, BLOCK])

    def of_blocks() -> Tensor:
        # Each of them is the highest of its block, or lies below another one of the count that is.
        best = tf.math.top_k(tf.reduce_max(blocks, -1), count, sorted=False).indices
        few = tf.gather(blocks, best, batch_dims=1)
        return tf.math.top_k(tf.reshape(few, [-1, count * BLOCK]), count).values

    def of_all() -> Tensor:
        return tf.math.top_k(scores, count).values

    if isinstance(count, int):
        return of_blocks() if count <= blocks.shape[1] else of_all()
    return tf.cond(count <= blocks.shape[1], of_blocks, of_all)


def _first_above(running: Tensor, target: Tensor) -> Tensor:
    """The first position of a running sum [B, N] that is above the target [B]; int32 [B]."""
    below = tf.reduce_sum(tf.cast(running <= target[:, None], tf.int32), -1)
    return tf.minimum(below, running.shape[-1] - 1)


def _threshold(scores: Tensor, weights: Tensor, params: SamplingParams, vocabulary: int, xla: bool) -> Tensor:
    """The lowest score that stays in, [B], of scores [B, N], whose exp the weights are.

    The sorted head of the scores tells, in most cases. The rest of a row is sorted too if it does not, or, since a
    compiled sort is slow, searched. Either way a row's sums are those that it has alone.
    """
    limited = (params.top_k > 0) & (params.top_k < vocabulary)
    wanted = tf.where(limited, params.top_k, vocabulary)
    nucleus = params.top_p < 1
    off = (~limited & ~nucleus) | (params.temperature == 0)
    everything = tf.reduce_sum(weights, -1)

    def among(count: Tensor | int) -> tuple[Tensor, Tensor]:
        """The threshold, and whether it lies within the `count` highest scores."""
        values = _highest(scores, count)
        inside = tf.range(count)[None] < wanted[:, None]
        head = tf.where(inside, tf.exp(values), 0.0)
        # A running sum's end, unlike a sum, does not depend on the number of zeros behind.
        total = tf.where(limited, tf.cumsum(head, -1)[:, -1], everything)
        before = tf.cumsum(head / total[:, None], -1, exclusive=True)
        inside &= (before < params.top_p[:, None]) | ~nucleus[:, None]
        # A top_p that is subnormal counts as 0 on threads that flush those.
        kept = tf.maximum(1, tf.reduce_sum(tf.cast(inside, tf.int32), -1))
        lowest = tf.gather(values, kept - 1, batch_dims=1)
        # The total of a larger k is not known from here.
        return tf.where(off, -np.inf, lowest), off | (wanted <= count) | (~limited & (kept < count))

    first = tf.reduce_max(tf.where(limited, wanted, tf.where(nucleus, min(CANDIDATES, vocabulary), 1)))
    # XLA wants a fixed number.
    threshold, found = among(min(COMPILED_CANDIDATES, vocabulary) if xla else first)

    def beyond() -> Tensor:
        if xla:
            return tf.where(found, threshold, _search(scores, weights, params, vocabulary, ~found))
        return among(vocabulary)[0]

    return tf.cond(tf.reduce_all(found), lambda: threshold, beyond)


def _search(scores: Tensor, weights: Tensor, params: SamplingParams, vocabulary: int, rows: Tensor) -> Tensor:
    """The threshold of the `rows` bool [B] by bisection: the k-th score, then the nucleus among what is left."""
    distance = -scores  # 0 at the likeliest
    limited = (params.top_k > 0) & (params.top_k < vocabulary)

    def has_k(limit: Tensor) -> Tensor:
        return tf.reduce_sum(tf.cast(distance <= limit[:, None], tf.int32), -1) >= params.top_k

    farthest = _bisect(has_k, rows & limited)
    weights = tf.where(distance <= farthest[:, None], weights, 0.0)
    target = params.top_p * tf.reduce_sum(weights, -1)

    def has_p(limit: Tensor) -> Tensor:
        return tf.reduce_sum(tf.where(distance <= limit[:, None], weights, 0.0), -1) >= target

    edge = tf.minimum(_bisect(has_p, rows & (params.top_p < 1)), farthest)
    return tf.reduce_min(tf.where(distance <= edge[:, None], scores, np.inf), -1)


def _bisect(enough: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
    """The smallest float32 from 0 on, [B], for which `enough` holds; infinity for rows that are not `wanted`.

    Positive floats are ordered as their bits.
    """
    highest = int(np.float32(np.inf).view(np.int32))
    low = tf.where(wanted, 0, highest)

    def halve(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        middle = low + (high - low) // 2
        yes = enough(tf.bitcast(middle, tf.float32))
        return tf.where(yes, low, middle + 1), tf.where(yes, middle, high)

    high = tf.fill(tf.shape(low), highest)
    _, high = tf.while_loop(lambda low, high: tf.reduce_any(low < high), halve, (low, high))
    return tf.bitcast(high, tf.float32)

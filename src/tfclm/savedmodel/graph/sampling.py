"""From logits to the next token: biases, penalties, temperature, min-p, top-k and top-p with one value per row.

The distribution is the one that transformers' processors and warpers define, in their order; what they do not have is
defined, and comes, as in vLLM. Each row uses one uniform sample per step, so that its tokens depend on its own seed and
logits alone. Tokens that tie with the last one that top-k or top-p keeps are all kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import tensorflow as tf

__all__ = [
    "EXTRA_TYPES",
    "MAX_BIASES",
    "PARAM_TYPES",
    "ExtraParams",
    "SamplingParams",
    "adjust_logits",
    "apply_penalties",
    "highest_scores",
    "no_extras",
    "reported_logprobs",
    "resolve_seeds",
    "sample_next_token",
    "uniform_samples",
]

Tensor = Any

CANDIDATES = 1024  # the likeliest tokens that are sorted at first for top-p without top-k
COMPILED_CANDIDATES = 64  # the same with XLA, for every row
MAX_FLOAT32_PARAM = 1e6  # temperatures and penalties from its inverse up to it are applied in float32
MIN_SCORE = -3e38  # close to the lowest float32; such a token is never drawn
BLOCK_OF_POSITIONS = 64  # whose random numbers are drawn at once
MAX_BIASES = 300  # entries of logit_bias per row
BLOCK = 16  # tokens per block; only blocks with the highest maxima are searched for the highest scores


class SamplingParams(NamedTuple):
    """The sampling parameters of each row, [B] each."""

    max_new_tokens: Tensor  # int32, 1 or more
    temperature: Tensor  # float32, 0 = greedy
    top_k: Tensor  # int32, 0 = off
    top_p: Tensor  # float32 above 0 and up to 1 (1 = off)
    repetition_penalty: Tensor  # float32 above 0, 1 = off
    seed: Tensor  # int64, -1 = random


# The types of the parameters.
PARAM_TYPES = SamplingParams(
    max_new_tokens=tf.int32,
    temperature=tf.float32,
    top_k=tf.int32,
    top_p=tf.float32,
    repetition_penalty=tf.float32,
    seed=tf.int64,
)


class ExtraParams(NamedTuple):
    """The parameters that `generate_tokens` alone has, [B] each if not stated otherwise."""

    min_p: Tensor  # float32 from 0 (off) to 1
    presence_penalty: Tensor  # float32, 0 = off
    frequency_penalty: Tensor  # float32, 0 = off
    min_new_tokens: Tensor  # int32, 0 = off
    logit_bias_ids: Tensor  # int32 [B, MAX_BIASES], -1 = none
    logit_bias: Tensor  # float32 [B, MAX_BIASES]
    top_logprobs: Tensor  # int32, reported per new token besides its own; -1 = not even its own


# The types of these parameters.
EXTRA_TYPES = ExtraParams(
    min_p=tf.float32,
    presence_penalty=tf.float32,
    frequency_penalty=tf.float32,
    min_new_tokens=tf.int32,
    logit_bias_ids=tf.int32,
    logit_bias=tf.float32,
    top_logprobs=tf.int32,
)


def no_extras(batch: Tensor) -> ExtraParams:
    """The values for `batch` [] rows that turn all of these parameters off."""
    off = tf.zeros([batch])
    none = tf.fill([batch, MAX_BIASES], -1)
    return ExtraParams(off, off, off, tf.zeros([batch], tf.int32), none, tf.zeros([batch, MAX_BIASES]), none[:, 0])


def resolve_seeds(seeds: Tensor) -> Tensor:
    """The seeds int64 [B] with random ones in place of -1."""
    with tf.device("CPU:0"):
        # The only random op without a seed that TensorFlow allows with op determinism.
        fresh = tf.raw_ops.NonDeterministicInts(shape=tf.shape(seeds), dtype=tf.int64)
        return tf.where(seeds == -1, fresh, seeds)


def uniform_samples(seeds: Tensor, positions: Tensor, count: int) -> Tensor:
    """Numbers in [0, 1), float64 [B, count], for `count` tokens of each row from `positions` int32 [B] on.

    A number depends on the row's seed int64 [B] and on the token's position in the row alone, so that a text that is
    continued in several requests with the same seed gets the same tokens as in one. They are drawn in blocks of
    positions, because each draw has a cost of its own.
    """
    blocks = -(-count // BLOCK_OF_POSITIONS) + 1

    def row(arguments: tuple[Tensor, Tensor]) -> Tensor:
        seed, position = arguments
        first = tf.cast(position // BLOCK_OF_POSITIONS, tf.int64)
        # Not "auto_select", which picks another algorithm on other devices.
        drawn = [
            tf.random.stateless_uniform([BLOCK_OF_POSITIONS], [seed, first + block], dtype=tf.float64, alg="philox")
            for block in range(blocks)
        ]
        begin = position % BLOCK_OF_POSITIONS
        return tf.concat(drawn, 0)[begin : begin + count]

    with tf.device("CPU:0"):
        return tf.map_fn(row, (seeds, positions), fn_output_signature=tf.TensorSpec([count], tf.float64))


def adjust_logits(logits: Tensor, extra: ExtraParams, early: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """Logits float32 [B, V] plus the biases, and -inf for EOS in rows that are too short to end, `early` bool [B]."""
    batch = tf.shape(logits)[0]
    eos = [number for number in eos_ids if 0 <= number < logits.shape[-1]]
    biases = tf.where(extra.logit_bias_ids >= 0, extra.logit_bias, 0.0)
    ids = tf.concat([tf.maximum(extra.logit_bias_ids, 0), tf.tile(tf.constant([eos], tf.int32), [batch, 1])], 1)
    added = tf.concat([biases, tf.tile(tf.where(early, -np.inf, 0.0)[:, None], [1, len(eos)])], 1)
    return tf.tensor_scatter_nd_add(logits, _with_rows(ids), added)


def apply_penalties(
    logits: Tensor, tokens: Tensor, known: Tensor, new: Tensor, params: SamplingParams, extra: ExtraParams
) -> Tensor:
    """Logits [B, V] after the repetition penalty, then the frequency and presence penalties.

    Args:
        logits: float32 [B, V], or float64 for repetition penalties whose result float32 cannot hold.
        tokens: int32 [B, C], the prompt and the generated tokens.
        known: bool [B, C], which of `tokens` count for the repetition penalty; the first one always does.
        new: bool [B, C], which of `tokens` count for the other penalties.
        params: [B] each.
        extra: [B] each.
    """
    logits = _apply_repetition_penalty(logits, tokens, known, params.repetition_penalty)

    def subtract() -> Tensor:
        shape = [tf.shape(logits)[0], logits.shape[-1]]
        counts = tf.scatter_nd(_with_rows(tokens), tf.cast(new, tf.float32), shape)
        penalty = extra.frequency_penalty[:, None] * counts
        penalty += extra.presence_penalty[:, None] * tf.cast(counts > 0, tf.float32)
        return logits - tf.cast(penalty, logits.dtype)

    used = tf.reduce_any((extra.presence_penalty != 0) | (extra.frequency_penalty != 0))
    return tf.cond(used, subtract, lambda: logits)


def _with_rows(ids: Tensor) -> Tensor:
    """The indices [B, C, 2] of token ids [B, C] in logits [B, V]."""
    return tf.stack([tf.broadcast_to(tf.range(tf.shape(ids)[0])[:, None], tf.shape(ids)), ids], -1)


def _apply_repetition_penalty(logits: Tensor, tokens: Tensor, known: Tensor, penalty: Tensor) -> Tensor:
    """Logits [B, V] after the repetition penalty [B]: those of repeated tokens divided if positive, else multiplied."""

    def apply() -> Tensor:
        repeated = tf.where(known, tokens, tokens[:, :1])
        before = tf.gather(logits, repeated, batch_dims=1)
        factor = tf.cast(penalty, tf.float64)
        inverse = tf.cast(1 / factor, logits.dtype)
        after = before * tf.where(before > 0, inverse[:, None], tf.cast(factor, logits.dtype)[:, None])
        return tf.tensor_scatter_nd_update(logits, _with_rows(repeated), after)

    return tf.cond(tf.reduce_any(penalty != 1), apply, lambda: logits)


def sample_next_token(
    logits: Tensor,
    tokens: Tensor,
    known: Tensor,
    new: Tensor,
    params: SamplingParams,
    extra: ExtraParams,
    uniform: Tensor,
    *,
    xla: bool = False,
) -> Tensor:
    """The next token of each row, int32 [B]: the likeliest if the temperature is 0, else a sampled one.

    Args:
        logits: float32 [B, V], after `adjust_logits`.
        tokens: int32 [B, C], as for `apply_penalties`.
        known: bool [B, C], as for `apply_penalties`.
        new: bool [B, C], as for `apply_penalties`.
        params: [B] each.
        extra: [B] each.
        uniform: float64 [B], samples in [0, 1).
        xla: use ops that compile well instead of those that are fast without XLA.
    """
    vocab_size = logits.shape[-1]
    needs_float64 = _needs_float64(params)
    samples = tf.reduce_any(params.temperature > 0)

    def in_float32() -> tuple[Tensor, Tensor]:
        """The likeliest tokens int32 [B], and the scores float32 [B, V] if any row is sampled."""
        penalized = apply_penalties(logits, tokens, known, new, params, extra)
        scores = tf.cond(samples, lambda: _scores(penalized, params.temperature), lambda: penalized)
        return _likeliest(penalized), scores

    def partly_in_float64() -> tuple[Tensor, Tensor]:
        """The same, in float64 for the rows that need it only: a row must not depend on its neighbours' parameters."""
        wide = apply_penalties(tf.cast(logits, tf.float64), tokens, known, new, params, extra)
        exact, narrow = (_likeliest(wide), _scores(wide, params.temperature)), in_float32()
        return tf.where(needs_float64, exact[0], narrow[0]), tf.where(needs_float64[:, None], exact[1], narrow[1])

    greedy, scores = tf.cond(tf.reduce_any(needs_float64), partly_in_float64, in_float32)

    def sampled() -> Tensor:
        padded = _pad_to_groups(scores)
        padded, weights = _keep_min_p(padded, tf.exp(padded), extra.min_p)
        threshold = _lowest_kept_score(padded, weights, params, vocab_size, xla)
        weights = tf.where(padded >= threshold[:, None], weights, 0.0)
        return tf.where(params.temperature > 0, _draw(weights, uniform, _group_size(vocab_size)), greedy)

    return tf.cond(samples, sampled, lambda: greedy)


def reported_logprobs(logits: Tensor, token: Tensor, count: Tensor | int) -> tuple[Tensor, Tensor]:
    """Ids int32 and log-probabilities float32 [B, 1 + count] of `token` int32 [B] and of the likeliest tokens.

    They are those of the model: of its logits float32 [B, V], before anything is done to them.
    """
    own = token[:, None]

    def with_highest() -> Tensor:
        return tf.concat([own, _highest_ids(_pad_to_groups(logits), count)], 1)

    if isinstance(count, int):
        ids = with_highest() if count else own
    else:
        ids = tf.cond(count > 0, with_highest, lambda: own)
    # Fewer passes over the logits than tf.reduce_logsumexp, which also expects infinities.
    highest = tf.reduce_max(logits, -1, keepdims=True)
    total = highest + tf.math.log(tf.reduce_sum(tf.exp(logits - highest), -1, keepdims=True))
    return ids, tf.gather(logits, ids, batch_dims=1) - total


def _keep_min_p(scores: Tensor, weights: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [B, N], and `weights`, their exp, without tokens less likely than `min_p` [B] times the likeliest."""

    def keep() -> tuple[Tensor, Tensor]:
        kept = weights >= min_p[:, None]
        return tf.where(kept, scores, -np.inf), tf.where(kept, weights, 0.0)

    return cast("tuple[Tensor, Tensor]", tf.cond(tf.reduce_any(min_p > 0), keep, lambda: (scores, weights)))


def _needs_float64(params: SamplingParams) -> Tensor:
    """The rows, bool [B], whose parameters may exceed the range of float32."""

    def outside(values: Tensor) -> Tensor:
        return (values < 1 / MAX_FLOAT32_PARAM) | (values > MAX_FLOAT32_PARAM)

    return outside(params.repetition_penalty) | (outside(params.temperature) & (params.temperature > 0))


def _likeliest(logits: Tensor) -> Tensor:
    return tf.argmax(logits, -1, output_type=tf.int32)


def _scores(logits: Tensor, temperature: Tensor) -> Tensor:
    """Logits [B, V] minus the highest one, divided by the temperature [B], or by 1 where that is 0; float32."""
    scores = logits - tf.reduce_max(logits, -1, keepdims=True)
    scores /= tf.cast(tf.where(temperature > 0, temperature, 1.0), logits.dtype)[:, None]
    return scores if logits.dtype == tf.float32 else tf.cast(tf.maximum(scores, MIN_SCORE), tf.float32)


def _group_size(vocab_size: int) -> int:
    """Tokens per group, about the square root of the vocabulary size, in whole blocks."""
    return BLOCK * int(np.ceil(np.sqrt(vocab_size) / BLOCK))


def _pad_to_groups(scores: Tensor) -> Tensor:
    """Scores [B, V] padded to whole groups, [B, N], with -inf."""
    vocab_size = scores.shape[-1]
    return tf.pad(scores, [[0, 0], [0, -vocab_size % _group_size(vocab_size)]], constant_values=-np.inf)


def _draw(weights: Tensor, uniform: Tensor, size: int) -> Tensor:
    """A token int32 [B] drawn by weight [B, N], by inverse transform sampling in the vocabulary's order.

    First a group of `size` tokens is drawn, then a token of it, because a running sum over a vocabulary is slow.
    """
    groups = tf.reshape(weights, [-1, weights.shape[-1] // size, size])
    sums = tf.cumsum(tf.cast(tf.reduce_sum(groups, -1), tf.float64), -1)
    target = uniform * sums[:, -1]
    group = _first_above(sums, target)
    before = tf.where(group > 0, tf.gather(sums, tf.maximum(group - 1, 0), batch_dims=1), 0.0)
    inner = tf.cumsum(tf.cast(tf.gather(groups, group, batch_dims=1), tf.float64), -1)
    # Rounding may put the target at or above the end of the group's running sum, where no token is.
    remaining = tf.minimum(target - before, inner[:, -1] * (1 - 1e-12))
    return group * size + _first_above(inner, remaining)


def highest_scores(scores: Tensor, count: Tensor | int) -> Tensor:
    """The `count` highest of scores [B, N], descending; [B, count]. N must be a multiple of `BLOCK`."""
    blocks = tf.reshape(scores, [-1, scores.shape[-1] // BLOCK, BLOCK])

    def in_best_blocks() -> Tensor:
        # The `count` highest scores are in at most `count` blocks: those with the highest maxima.
        best = tf.math.top_k(tf.reduce_max(blocks, -1), count, sorted=False).indices
        candidates = tf.gather(blocks, best, batch_dims=1)
        return tf.math.top_k(tf.reshape(candidates, [-1, count * BLOCK]), count).values

    def in_all() -> Tensor:
        return tf.math.top_k(scores, count).values

    if isinstance(count, int):
        return in_best_blocks() if count <= blocks.shape[1] else in_all()
    return tf.cond(count <= blocks.shape[1], in_best_blocks, in_all)


def _highest_ids(scores: Tensor, count: Tensor | int) -> Tensor:
    """The positions int32 [B, count] of the highest of scores [B, N], the first one of equal scores first."""
    blocks = tf.reshape(scores, [-1, scores.shape[-1] // BLOCK, BLOCK])
    # They are in at most `count` blocks. XLA needs a static number.
    most = blocks.shape[1]
    searched = min(count, most) if isinstance(count, int) else tf.minimum(count, most)
    # In ascending order, so that equal scores keep theirs.
    best = tf.sort(tf.math.top_k(tf.reduce_max(blocks, -1), searched).indices, -1)
    candidates = tf.reshape(tf.gather(blocks, best, batch_dims=1), [-1, searched * BLOCK])
    ids = tf.reshape(best[:, :, None] * BLOCK + tf.range(BLOCK), tf.shape(candidates))
    return tf.gather(ids, tf.math.top_k(candidates, count).indices, batch_dims=1)


def _first_above(running: Tensor, target: Tensor) -> Tensor:
    """The first position of a running sum [B, N] that is above the target [B]; int32 [B]."""
    below = tf.reduce_sum(tf.cast(running <= target[:, None], tf.int32), -1)
    return tf.minimum(below, running.shape[-1] - 1)


def _lowest_kept_score(scores: Tensor, weights: Tensor, params: SamplingParams, vocab_size: int, xla: bool) -> Tensor:
    """The lowest score that top-k and top-p keep, [B], of scores [B, N]; `weights` are their exp.

    In most cases it is among a few of the highest scores, which are sorted first. If it is not, the whole row is
    sorted, or, since a compiled sort is slow, searched. Either way the result does not depend on other rows.
    """
    limited = (params.top_k > 0) & (params.top_k < vocab_size)
    k = tf.where(limited, params.top_k, vocab_size)
    nucleus = params.top_p < 1
    off = (~limited & ~nucleus) | (params.temperature == 0)
    row_sum = tf.reduce_sum(weights, -1)

    def among(count: Tensor | int) -> tuple[Tensor, Tensor]:
        """The threshold, and whether it is certainly among the `count` highest scores."""
        values = highest_scores(scores, count)
        inside = tf.range(count)[None] < k[:, None]
        head = tf.where(inside, tf.exp(values), 0.0)
        # The end of a running sum, unlike a sum, does not depend on the number of trailing zeros.
        total = tf.where(limited, tf.cumsum(head, -1)[:, -1], row_sum)
        before = tf.cumsum(head / total[:, None], -1, exclusive=True)
        inside &= (before < params.top_p[:, None]) | ~nucleus[:, None]
        # At least 1: threads that flush subnormal numbers read a subnormal top_p as 0.
        kept = tf.maximum(1, tf.reduce_sum(tf.cast(inside, tf.int32), -1))
        lowest = tf.gather(values, kept - 1, batch_dims=1)
        # If k is larger than `count`, the total is not known yet.
        return tf.where(off, -np.inf, lowest), off | (k <= count) | (~limited & (kept < count))

    first = tf.reduce_max(tf.where(limited, k, tf.where(nucleus, min(CANDIDATES, vocab_size), 1)))
    # XLA needs a static count.
    threshold, found = among(min(COMPILED_CANDIDATES, vocab_size) if xla else first)

    def among_all() -> Tensor:
        if xla:
            return tf.where(found, threshold, _search_lowest_kept_score(scores, weights, params, vocab_size, ~found))
        return among(vocab_size)[0]

    return tf.cond(tf.reduce_all(found), lambda: threshold, among_all)


def _search_lowest_kept_score(
    scores: Tensor, weights: Tensor, params: SamplingParams, vocab_size: int, rows: Tensor
) -> Tensor:
    """`_lowest_kept_score` of the `rows` bool [B] by bisection: the k-th score, then top-p among those kept."""
    distance = -scores  # 0 for the likeliest
    limited = (params.top_k > 0) & (params.top_k < vocab_size)

    def reaches_top_k(limit: Tensor) -> Tensor:
        return tf.reduce_sum(tf.cast(distance <= limit[:, None], tf.int32), -1) >= params.top_k

    top_k_limit = _bisect(reaches_top_k, rows & limited)
    weights = tf.where(distance <= top_k_limit[:, None], weights, 0.0)
    target = params.top_p * tf.reduce_sum(weights, -1)

    def reaches_top_p(limit: Tensor) -> Tensor:
        return tf.reduce_sum(tf.where(distance <= limit[:, None], weights, 0.0), -1) >= target

    limit = tf.minimum(_bisect(reaches_top_p, rows & (params.top_p < 1)), top_k_limit)
    return tf.reduce_min(tf.where(distance <= limit[:, None], scores, np.inf), -1)


def _bisect(condition: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """The smallest non-negative float32, [B], for which `condition` holds; infinity outside of `rows` bool [B].

    Bisects the bits, which are in the same order as the floats.
    """
    highest = int(np.float32(np.inf).view(np.int32))
    low = tf.where(rows, 0, highest)

    def halve(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        middle = low + (high - low) // 2
        holds = condition(tf.bitcast(middle, tf.float32))
        return tf.where(holds, low, middle + 1), tf.where(holds, middle, high)

    high = tf.fill(tf.shape(low), highest)
    _, high = tf.while_loop(lambda low, high: tf.reduce_any(low < high), halve, (low, high))
    return tf.bitcast(high, tf.float32)

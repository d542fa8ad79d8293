"""Sampled tokens, compared with the distribution that transformers' own warpers define."""

from __future__ import annotations

import functools
import math
from functools import partial

import numpy as np
import pytest
import tensorflow as tf
from conftest import LONG
from transformers.generation.tf_logits_process import (
    TFRepetitionPenaltyLogitsProcessor,
    TFTemperatureLogitsWarper,
    TFTopKLogitsWarper,
    TFTopPLogitsWarper,
)

from tfclm.savedmodel.graph import sampling
from tfclm.savedmodel.graph.sampling import MAX_BIASES, ExtraParams, SamplingParams, no_extras

DRAWS = 100_000 if LONG else 30_000
COMPILED = pytest.mark.parametrize("xla", [False, True], ids=["default", "xla"])


def params(temperature: list[float], top_k: list[int], top_p: list[float]) -> SamplingParams:
    """Parameters [B]; the others are off."""
    count = len(temperature)
    return SamplingParams(
        max_new_tokens=tf.ones([count], tf.int32),
        temperature=tf.constant(temperature, tf.float32),
        top_k=tf.constant(top_k, tf.int32),
        top_p=tf.constant(top_p, tf.float32),
        repetition_penalty=tf.ones([count]),
        seed=tf.zeros([count], tf.int64),
    )


def warped(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities [V] by the warpers of transformers, in the order of its `generate`."""
    scores = tf.constant(logits[None], tf.float32)
    if temperature != 1:
        scores = TFTemperatureLogitsWarper(temperature)(None, scores, 0)
    if top_k:
        scores = TFTopKLogitsWarper(top_k)(None, scores, 0)
    if top_p < 1:
        scores = TFTopPLogitsWarper(top_p)(None, scores, 0)
    return tf.nn.softmax(tf.cast(scores[0], tf.float64)).numpy()


@functools.cache
def traced_sampling(xla: bool) -> tf.types.experimental.GenericFunction:
    """`sample_next_token`, traced and compiled once for all tests with the same shapes."""

    def sample(logits: tf.Tensor, settings: SamplingParams, extra: ExtraParams, uniform: tf.Tensor) -> tf.Tensor:
        tokens = tf.zeros([tf.shape(logits)[0], 1], tf.int32)
        return sampling.sample_next_token(logits, tokens, tokens == 0, tokens > 0, settings, extra, uniform, xla=xla)

    return tf.function(sample, jit_compile=xla)


def sample_tokens(
    logits: np.ndarray, settings: SamplingParams, uniform: np.ndarray, *, xla: bool, min_p: float = 0.0
) -> np.ndarray:
    """`sample_next_token`, traced as in an exported model, after the token 0 of the prompt in each row."""
    traced, extra = traced_sampling(xla), no_extras(len(logits))
    extra = extra._replace(min_p=tf.fill([len(logits)], min_p))
    return traced(tf.constant(logits, tf.float32), settings, extra, tf.constant(uniform, tf.float64)).numpy()


@COMPILED
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 0, 1.0, 0.0),
        (1.0, 5, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (1.3, 9, 0.7, 0.0),
        (0.7, 1000, 0.95, 0.0),
        (1.0, 0, 1.0, 0.1),
        (2.0, 0, 0.8, 0.2),
        (2.0, 30, 0.9, 0.05),
        (1.5, 0, 1.0, 1.0),
    ],
)
def test_frequencies(temperature: float, top_k: int, top_p: float, min_p: float, xla: bool) -> None:
    """Parameters applied in another order, a token too many or too few, or another distribution."""
    logits = np.random.default_rng(4).normal(0, 1.5, 40).astype(np.float32)
    # After the temperature, and before top-k and top-p.
    likely = np.exp((logits - logits.max()) / temperature) >= min_p
    expected = warped(np.where(likely, logits, -np.inf), temperature, top_k, top_p) * DRAWS
    # Uniform samples as in requests, of many seeds and many steps.
    uniform = sampling.uniform_samples(tf.range(100, dtype=tf.int64), tf.range(100), DRAWS // 100).numpy().reshape(-1)
    settings = params([temperature] * DRAWS, [top_k] * DRAWS, [top_p] * DRAWS)
    tokens = sample_tokens(np.tile(logits, [DRAWS, 1]), settings, uniform, xla=xla, min_p=min_p)
    assert_frequencies(tokens, expected)


def assert_frequencies(tokens: np.ndarray, expected: np.ndarray) -> None:
    """Drawn tokens against the expected number of each, [V], by a chi-square test."""
    counts = np.bincount(tokens, minlength=len(expected))
    kept = expected > 0
    assert not counts[~kept].any()
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    free = max(kept.sum() - 1, 1)
    # Wilson and Hilferty's normal approximation of a chi-square: above 3.5 once in 4,000 tests.
    score = ((statistic / free) ** (1 / 3) - 1 + 2 / (9 * free)) / math.sqrt(2 / (9 * free))
    assert score < 3.5


def test_compiled_and_not_keep_the_same_tokens() -> None:
    """A bisection that ends next to the edge, a sorted head taken for the whole vocabulary, or another row's edge."""
    rng = np.random.default_rng(0)
    size = 50257
    logits = np.concatenate([rng.normal(0, 3, [24, size]), rng.normal(0, 0.01, [8, size])]).astype(np.float32)
    logits = -np.sort(-logits)
    top_k = rng.choice([0, 1, 5, 50, 3000, 50256, 50257, 60000], 32).astype(np.int32)
    top_p = rng.choice([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0], 32).astype(np.float32)

    def last_token(logits: tf.Tensor, top_k: tf.Tensor, top_p: tf.Tensor, xla: bool) -> tf.Tensor:
        given = params([1.0], [1], [1.0])._replace(temperature=tf.ones_like(top_p), top_k=top_k, top_p=top_p)
        tokens = tf.zeros_like(top_k)[:, None]
        # The largest uniform sample draws the last token that is kept.
        uniform = tf.fill([tf.size(top_k)], tf.constant(np.nextafter(1.0, 0.0), tf.float64))
        off = no_extras(tf.size(top_k))
        return sampling.sample_next_token(logits, tokens, tokens == 0, tokens > 0, given, off, uniform, xla=xla)

    def kept(xla: bool, rows: slice) -> np.ndarray:
        return traced[xla](logits[rows], top_k[rows], top_p[rows]).numpy() + 1

    traced = {xla: tf.function(partial(last_token, xla=xla), jit_compile=xla) for xla in (False, True)}
    together = [kept(xla, slice(32)) for xla in (False, True)]
    # The same as alone, although other rows need the search or the whole vocabulary.
    for xla in (False, True):
        assert [kept(xla, slice(row, row + 1))[0] for row in range(32)] == together[xla].tolist()
    limited = (top_k > 0) & (top_k < size)
    assert (together[0][limited & (top_p == 1)] == top_k[limited & (top_p == 1)]).all()
    # At the edge of top-p the order of a sum of 50,000 small numbers matters, most for nearly equal logits.
    tolerance = np.where(top_p < 1, np.maximum(1, together[0] * 1e-4), 0)
    assert (np.abs(together[0] - together[1]) <= tolerance).all()
    assert (together[0] > sampling.CANDIDATES).any()
    assert (together[0][~limited & (top_p == 1)] == size).all()


@pytest.mark.parametrize("copies", [1, 1000, 10**6])
def test_highest_scores(copies: int) -> None:
    """A score that is left out because others are in its block, or counted twice because scores are equal."""
    scores = np.random.default_rng(5).integers(0, 10**6 // copies, [4, 400]).astype(np.float32)
    scores[:, :40] += 10**6
    scores[2] = -np.inf
    traced = tf.function(sampling.highest_scores)
    for count in (1, 2, 24, 25, 26, 400):
        expected = -np.sort(-scores, -1)[:, :count]
        assert np.array_equal(traced(scores, tf.constant(count)), expected)
        assert np.array_equal(tf.function(sampling.highest_scores, jit_compile=True)(scores, count), expected)


@COMPILED
def test_every_sampled_token_is_possible(xla: bool) -> None:
    """A token of probability 0, or none at all, for extreme uniform samples, logits and parameters."""
    tiny = np.finfo(np.float32).tiny
    rows = [
        np.linspace(-4, 4, 37),
        np.zeros(37),
        np.where(np.arange(37) == 20, 0.0, -1e30),
        np.where(np.arange(37) % 2 == 1, 1.0, np.finfo(np.float32).min),
        np.where(np.arange(37) > 30, 5.0, -np.inf),
        np.where(np.arange(37) == 0, 0.0, -88.0),
        np.where(np.arange(37) == 36, 0.0, -103.0),
    ]
    cases = [
        (logits, temperature, top_k, top_p, uniform)
        for logits in rows
        for temperature in (1e-40, tiny, 1e-3, 1.0, 100.0, 1e30)
        for top_k in (0, 1, 36, 37, 2**31 - 1)
        for top_p in (1e-40, tiny, 1e-6, 0.5, 1 - 1e-7, 1.0)
        for uniform in (0.0, tiny, 0.5, np.nextafter(1.0, 0.0))
    ]
    logits, temperature, top_k, top_p, uniform = (list(column) for column in zip(*cases, strict=True))
    values = np.array(logits, np.float32)
    tokens = sample_tokens(values, params(temperature, top_k, top_p), np.array(uniform), xla=xla)
    assert tokens.min() >= 0
    assert tokens.max() < 37
    scores = values[np.arange(len(tokens)), tokens] - values.max(-1)
    with np.errstate(under="ignore"):
        assert (np.exp(scores / np.maximum(np.float32(temperature), 1e-30)) > 0).all()
    likeliest = (np.array(top_k) == 1) | (np.array(top_p) <= 1e-6) | (np.array(temperature) <= 1e-30)
    assert (scores[likeliest] == 0).all()


@COMPILED
def test_a_row_uses_its_own_params(xla: bool) -> None:
    """A parameter that is read from another row, or applied to the whole batch."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, [64, 300]).astype(np.float32)
    temperature = rng.choice([0.0, 0.5, 1.0, 2.0, 1e-30, 1e30], 64).tolist()
    top_k = rng.choice([0, 1, 7, 299, 300], 64).tolist()
    top_p = rng.choice([0.3, 0.9, 1.0], 64).tolist()
    uniform = rng.random(64)
    together = sample_tokens(logits, params(temperature, top_k, top_p), uniform, xla=xla)
    tokens = tf.zeros([1, 1], tf.int32)
    traced = tf.function(
        lambda row, settings, number: sampling.sample_next_token(
            row, tokens, tokens == 0, tokens > 0, settings, no_extras(1), number, xla=xla
        ),
        jit_compile=xla,
    )
    alone = [
        int(traced(logits[i : i + 1], params([temperature[i]], [top_k[i]], [top_p[i]]), uniform[i : i + 1])[0])
        for i in range(64)
    ]
    assert together.tolist() == alone
    greedy = np.array(temperature) == 0
    assert (together[greedy] == logits.argmax(-1)[greedy]).all()
    assert (together != logits.argmax(-1)).any()


def test_seeds() -> None:
    """Repeated samples: the same for all steps, for other rows, or for every request with seed -1."""
    # As in the process of `fit`, where most random ops refuse to run without a seed.
    tf.config.experimental.enable_op_determinism()
    given = tf.constant([5, 6, 2**63 - 1, -1, -1, 5], tf.int64)
    seeds, zeros = sampling.resolve_seeds(given), tf.zeros([6], tf.int32)
    numbers = sampling.uniform_samples(seeds, zeros, 50).numpy()
    assert (numbers[0] == numbers[5]).all()
    assert len(np.unique(numbers[:5])) == 5 * 50
    assert ((numbers >= 0) & (numbers < 1)).all()
    traced = tf.function(lambda: sampling.uniform_samples(sampling.resolve_seeds(given), zeros, 50))
    again = traced().numpy()
    assert (again[:3] == numbers[:3]).all()
    assert not np.isin(again[3:5], numbers).any()
    # They do not depend on where a call begins, on the number of tokens or on the row's place in the batch.
    one = sampling.uniform_samples(tf.constant([6], tf.int64), tf.constant([0]), 200).numpy()[0]
    assert (one[:50] == numbers[1]).all()
    for begin, count in ((7, 20), (63, 2), (64, 100), (130, 64)):
        part = sampling.uniform_samples(seeds[:2], tf.constant([3, begin]), count).numpy()
        assert (part[1] == one[begin : begin + count]).all()
    many = sampling.uniform_samples(tf.range(500, dtype=tf.int64), tf.zeros([500], tf.int32), 80).numpy()
    # 5 standard errors of a correlation.
    assert np.abs(np.corrcoef(many, rowvar=False) - np.eye(80)).max() < 5 / math.sqrt(500)
    assert abs(np.corrcoef(many[:-1].reshape(-1), many[1:].reshape(-1))[0, 1]) < 5 / math.sqrt(40_000)


@COMPILED
def test_repetition_penalty(xla: bool) -> None:
    """A penalty for unknown tokens or for another row's, or one that is applied twice."""
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 2, [6, 30]).astype(np.float32)
    tokens = rng.integers(0, 30, [6, 12]).astype(np.int32)
    lengths = np.array([1, 3, 12, 5, 12, 7])
    penalties = np.array([1.3, 1.0, 2.0, 0.5, 1.1, 1.0], np.float32)
    known = np.arange(12) < lengths[:, None]

    def apply(logits: tf.Tensor, tokens: tf.Tensor, known: tf.Tensor, penalties: tf.Tensor) -> tf.Tensor:
        settings = params([1.0] * 6, [0] * 6, [1.0] * 6)._replace(repetition_penalty=penalties)
        return sampling.apply_penalties(logits, tokens, known, known, settings, no_extras(6))

    ours = tf.function(apply, jit_compile=xla)(logits, tokens, known, penalties).numpy()
    for row, (length, penalty) in enumerate(zip(lengths, penalties, strict=True)):
        processor = TFRepetitionPenaltyLogitsProcessor(float(penalty))
        theirs = processor(tf.constant(tokens[row : row + 1]), tf.constant(logits[row : row + 1]), int(length))
        np.testing.assert_allclose(ours[row], theirs[0], rtol=1e-6)


@COMPILED
def test_extreme_params(xla: bool) -> None:
    """A penalty or temperature beyond float32, so that infinities are subtracted and unlikely tokens are sampled."""
    rng = np.random.default_rng(6)
    rows, size = 2000, 24
    wide = np.float32(10.0) ** rng.uniform(-37.9, 38.5, [2, rows])
    temperature, penalty = np.where(rng.random([2, rows]) < 0.7, wide, 1).astype(np.float32)
    temperature[rng.random(rows) < 0.1] = 0
    # Mistakes show if the temperature is about as large as the penalized logits.
    near = rng.random(rows) < 0.3
    temperature[near] = np.clip(penalty[near] ** rng.choice([-1, 1], near.sum()), 1.2e-38, 3e38)
    logits = rng.normal(0, 3, [rows, size]).astype(np.float32)
    tokens = np.sort(rng.integers(0, size, [rows, 12]).astype(np.int32), -1)
    known = np.arange(12) < rng.integers(1, 13, rows)[:, None]
    uniform = rng.random(rows)

    exact = logits.astype(np.float64)
    for row in range(rows):
        repeated = np.unique(tokens[row][known[row]])
        before = exact[row, repeated]
        exact[row, repeated] = np.where(before > 0, before / penalty[row], before * np.float64(penalty[row]))
    scores = exact - exact.max(-1, keepdims=True)
    with np.errstate(under="ignore", over="ignore"):
        scores /= np.where(temperature > 0, temperature, 1).astype(np.float64)[:, None]
        weights = np.exp(scores)
    edges = np.cumsum(weights, -1) / weights.sum(-1, keepdims=True)
    expected = np.where(temperature > 0, (edges <= uniform[:, None]).sum(-1), exact.argmax(-1))

    def sample(*given: tf.Tensor) -> tf.Tensor:
        logits, tokens, known, temperature, penalty, uniform = given
        one = tf.ones_like(temperature)
        settings = SamplingParams(one, temperature, tf.zeros_like(tokens[:, 0]), one, penalty, one)
        return sampling.sample_next_token(logits, tokens, known, known, settings, no_extras(rows), uniform, xla=xla)

    drawn = tf.function(sample, jit_compile=xla)(logits, tokens, known, temperature, penalty, uniform).numpy()
    # Rounding to float32 moves the edges between tokens by about 1e-6.
    unsure = (np.abs(edges - uniform[:, None]) < 1e-5).any(-1)
    assert unsure.mean() < 0.01
    assert (drawn == expected)[~unsure].all()


def adjusted(
    logits: np.ndarray,
    prompt: list[int],
    new: list[int],
    biases: dict[int, float],
    *,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
) -> np.ndarray:
    """Logits [V] by vLLM's definitions: biases, then the repetition, frequency and presence penalties."""
    result = logits.astype(np.float64)
    for token, bias in biases.items():
        result[token] += bias
    for token in range(len(result)):
        if token in prompt + new:
            result[token] = result[token] / repetition if result[token] > 0 else result[token] * repetition
        result[token] -= frequency * new.count(token)
        result[token] -= presence * (token in new)
    return result


@COMPILED
def test_biases_and_penalties(xla: bool) -> None:
    """A penalty for tokens of the prompt, once for a repeated token, or before the bias; EOS drawn too early."""
    rng = np.random.default_rng(11)
    size, length, eos = 30, 14, [3, 7, 600]
    batch = 40
    logits = rng.normal(0, 2, [batch, size]).astype(np.float32)
    tokens = rng.integers(0, size, [batch, length]).astype(np.int32)
    prompts, lengths = rng.integers(1, 8, batch), rng.integers(8, length + 1, batch)
    ids = np.full([batch, MAX_BIASES], -1, np.int32)
    biases = np.zeros([batch, MAX_BIASES], np.float32)
    for row in range(0, batch, 3):
        ids[row, :5], biases[row, :5] = rng.permutation(size)[:5], rng.uniform(-100, 100, 5)
    off = np.arange(batch) % 4 == 0
    repetition, frequency, presence = (
        np.where(off, value, rng.uniform(low, 2, batch)).astype(np.float32)
        for value, low in ((1, 0.5), (0, -2), (0, -2))
    )
    early = rng.random(batch) < 0.3

    def apply(
        logits: tf.Tensor, tokens: tf.Tensor, prompts: tf.Tensor, lengths: tf.Tensor, early: tf.Tensor
    ) -> tf.Tensor:
        settings = params([1.0] * batch, [0] * batch, [1.0] * batch)._replace(repetition_penalty=repetition)
        extra = no_extras(batch)._replace(
            frequency_penalty=tf.constant(frequency),
            presence_penalty=tf.constant(presence),
            logit_bias_ids=tf.constant(ids),
            logit_bias=tf.constant(biases),
        )
        known = tf.range(length) < lengths[:, None]
        new = known & (tf.range(length) >= prompts[:, None])
        logits = sampling.adjust_logits(logits, extra, early, eos)
        return sampling.apply_penalties(logits, tokens, known, new, settings, extra)

    traced = tf.function(apply, jit_compile=xla)
    ours = traced(logits, tokens, prompts.astype(np.int32), lengths.astype(np.int32), early).numpy()
    for row in range(batch):
        given = {int(token): float(bias) for token, bias in zip(ids[row], biases[row], strict=True) if token >= 0}
        expected = adjusted(
            logits[row],
            tokens[row, : prompts[row]].tolist(),
            tokens[row, prompts[row] : lengths[row]].tolist(),
            given,
            repetition=float(repetition[row]),
            frequency=float(frequency[row]),
            presence=float(presence[row]),
        )
        if early[row]:
            expected[eos[:2]] = -np.inf
        np.testing.assert_allclose(ours[row], expected, rtol=1e-5, atol=1e-4)


@COMPILED
def test_frequencies_after_penalties(xla: bool) -> None:
    """A distribution that is drawn from the logits before the penalties."""
    logits = np.random.default_rng(5).normal(0, 1, 20).astype(np.float32)
    prompt, new = [1, 2], [2, 2, 9]
    scores = adjusted(logits, prompt, new, {}, repetition=1.5, frequency=0.7, presence=-1.0)
    weights = np.exp(scores / 1.2)

    def sample(uniform: tf.Tensor) -> tf.Tensor:
        tokens = tf.tile(tf.constant([prompt + new]), [DRAWS, 1])
        known = tf.ones_like(tokens) > 0
        after = tf.tile(tf.constant([[False] * 2 + [True] * 3]), [DRAWS, 1])
        settings = params([1.2], [0], [1.0])
        settings = settings._replace(repetition_penalty=tf.constant([1.5]))
        settings = SamplingParams(*(tf.tile(value, [DRAWS]) for value in settings))
        extra = no_extras(DRAWS)._replace(
            frequency_penalty=tf.fill([DRAWS], 0.7), presence_penalty=tf.fill([DRAWS], -1.0)
        )
        rows = tf.tile(tf.constant(logits)[None], [DRAWS, 1])
        return sampling.sample_next_token(rows, tokens, known, after, settings, extra, uniform, xla=xla)

    uniform = tf.constant(np.random.default_rng(6).random(DRAWS))
    assert_frequencies(tf.function(sample, jit_compile=xla)(uniform).numpy(), weights / weights.sum() * DRAWS)


@COMPILED
@pytest.mark.parametrize("size", [30, 1000])
def test_reported_logprobs(size: int, xla: bool) -> None:
    """Log-probabilities of other tokens, of another row, or after the sampling parameters; ties in another order."""
    rng = np.random.default_rng(8)
    logits = rng.choice(np.linspace(-4, 4, 23), [5, size]).astype(np.float32)
    token = rng.integers(0, size, 5).astype(np.int32)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    for count in (0, 1, 20):
        traced = tf.function(partial(sampling.reported_logprobs, count=count), jit_compile=xla)
        ids, values = (value.numpy() for value in traced(logits, token))
        assert ids[:, 0].tolist() == token.tolist()
        # The likeliest first, and equal ones by their ids.
        assert ids[:, 1:].tolist() == np.argsort(-logits, -1, kind="stable")[:, :count].tolist()
        np.testing.assert_allclose(values, np.take_along_axis(exact, ids, -1), atol=1e-5)

"""The engine compared with transformers' `generate`, row by row, for every architecture of the tests."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from conftest import ARCHITECTURES, LONG

from tfclm.savedmodel.graph.engine import Completions, Engine, EngineLimits
from tfclm.savedmodel.graph.network import Network
from tfclm.savedmodel.graph.sampling import PARAM_TYPES, SamplingParams

CONTEXT = 64
NEW = 14 if LONG else 10
EOS = tuple(range(0, 512, 25))
PAD = 600  # beyond the vocabulary, as if it had been added to a tokenizer but not to the model
# `generate` of transformers takes a second for each length.
LENGTHS = (1, 17, CONTEXT - NEW, CONTEXT - 3, *((2, 3, 8, 31) if LONG else ()))
PROMPTS = 200 if LONG else 60
SOME = 72 if LONG else 48  # prompts with parameters per row, and for architectures other than GPT-2


class Loop(NamedTuple):
    """A model, its engine, and prompts of mixed lengths."""

    model: Any
    complete: Callable[..., Completions]
    prompts: list[list[int]]


@pytest.fixture(
    scope="module",
    params=[name if name == "gpt2" else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES],
)
def loop(request: pytest.FixtureRequest) -> Loop:
    """A tiny model and its engine, traced once."""
    from conftest import tiny_config
    from tf_keras.utils import set_random_seed

    from tfclm.checkpoint import create

    set_random_seed(2)
    model = create(tiny_config(request.param, context=CONTEXT, layers=2))
    # Initial weights are so small that all logits are nearly equal.
    model.set_weights([3 * weight for weight in model.get_weights()])
    engine = Engine(Network(model), EngineLimits(8, NEW, 16 * CONTEXT), eos_ids=EOS, pad_id=PAD)

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None], tf.int32),
            tf.TensorSpec([None], tf.int32),
            SamplingParams(*(tf.TensorSpec([None], kind) for kind in PARAM_TYPES)),
        ]
    )
    def traced(ids: tf.Tensor, lengths: tf.Tensor, params: SamplingParams) -> Completions:
        return engine.complete(ids, lengths, params)

    rng = random.Random(1)
    prompts = [[rng.randrange(512) for _ in range(LENGTHS[i % len(LENGTHS)])] for i in range(PROMPTS)]
    if request.param != "gpt2":
        prompts = prompts[:SOME]
    return Loop(model, traced, prompts)


def run(loop: Loop, prompts: list[list[int]], params: list[dict[str, float]]) -> list[list[int]]:
    """The new tokens of prompts that are decoded together, with one dictionary of parameters per row."""
    default = {
        "max_new_tokens": NEW,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "seed": 0,
    }
    ids = tf.ragged.constant(prompts, tf.int32).to_tensor(default_value=9)
    kinds = zip(default, PARAM_TYPES, strict=True)
    columns = (tf.constant([(default | row)[name] for row in params], kind) for name, kind in kinds)
    out = loop.complete(ids, tf.constant([len(prompt) for prompt in prompts]), SamplingParams(*columns))
    for row, count, stopped in zip(out.output_ids.numpy(), out.count.numpy(), out.stopped.numpy(), strict=True):
        assert (row[count:] == PAD).all()
        assert stopped == (row[count - 1] in EOS)
        assert not np.isin(row[: count - 1], EOS).any()
    return [row[:count].tolist() for row, count in zip(out.output_ids.numpy(), out.count.numpy(), strict=True)]


def batches(count: int) -> list[list[int]]:
    """Row numbers in a random order, in batches of 2 to 16."""
    rng = random.Random(count)
    order, parts = rng.sample(range(count), count), []
    while order:
        size = min(rng.randrange(2, 17), len(order))
        parts.append(order[:size])
        order = order[size:]
    return parts


def references(loop: Loop, penalty: float) -> list[list[int]]:
    """The tokens of transformers' greedy `generate`; prompts of one length are batched, so that none is padded."""
    by_length = defaultdict(list)
    for number, prompt in enumerate(loop.prompts):
        by_length[len(prompt)].append(number)
    tokens: dict[int, list[int]] = {}
    for length, numbers in by_length.items():
        ids = tf.constant([loop.prompts[number] for number in numbers])
        whole = loop.model.generate(
            ids,
            attention_mask=tf.ones_like(ids),
            max_new_tokens=min(NEW, CONTEXT - length),
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=list(EOS),
            pad_token_id=1,
        ).numpy()
        for number, row in zip(numbers, whole[:, length:].tolist(), strict=True):
            ends = [index for index, token in enumerate(row) if token in EOS]
            tokens[number] = row[: ends[0] + 1] if ends else row
    return [tokens[number] for number in range(len(loop.prompts))]


def is_tie(model: Any, prompt: list[int], ours: list[int], theirs: list[int], penalty: float) -> bool:
    """Whether two continuations diverge at tokens whose scores without a cache are equal up to rounding."""
    same = next(index for index, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other)
    seen = prompt + ours[:same]
    scores = model(tf.constant([seen]), training=False).logits[0, -1].numpy()
    scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    return abs(scores[ours[same]] - scores[theirs[same]]) < 1e-4


# Without a penalty, a graph that is exported is compared with `generate` in test_signatures.
@pytest.mark.parametrize("penalty", [1.3, pytest.param(1.0, marks=pytest.mark.long)])
def test_greedy_is_transformers(loop: Loop, penalty: float) -> None:
    """Positions, masks, cache, penalty or the end of a row that differ from `generate`, alone or in a batch."""
    expected = references(loop, penalty)
    params = {"repetition_penalty": penalty}
    alone = [run(loop, [prompt], [params])[0] for prompt in loop.prompts]
    together: dict[int, list[int]] = {}
    for rows in batches(len(loop.prompts)):
        together |= dict(zip(rows, run(loop, [loop.prompts[row] for row in rows], [params] * len(rows)), strict=True))
    ties = 0
    for number, tokens in enumerate(expected):
        for ours in (alone[number], together[number]):
            if ours != tokens:
                assert is_tie(loop.model, loop.prompts[number], ours, tokens, penalty)
                ties += 1
    # About one in 10,000 tokens has two candidates with scores this close.
    assert ties <= 2
    # There are rows that stop, that reach max_new_tokens and that reach the end of the context.
    assert {len(tokens) for tokens in expected} >= {3, NEW}
    assert sum(tokens[-1] in EOS for tokens in expected) > 3
    assert len({tuple(tokens) for tokens in expected}) > len(expected) // 2


def test_a_row_depends_on_itself_alone(loop: Loop) -> None:
    """A parameter, a length, a seed or a cache slot read from another row."""
    rng = random.Random(5)
    params = [
        {
            "max_new_tokens": rng.choice([1, 2, 7, NEW]),
            "temperature": rng.choice([0.0, 0.5, 1.0, 3.0]),
            "top_k": rng.choice([0, 1, 5, 511, 512]),
            "top_p": rng.choice([0.5, 0.9, 1.0]),
            "repetition_penalty": rng.choice([0.8, 1.0, 1.3]),
            "seed": rng.randrange(2**40),
        }
        for _ in range(SOME)
    ]
    alone = [run(loop, [prompt], [row])[0] for prompt, row in zip(loop.prompts[:SOME], params, strict=True)]
    for rows in batches(SOME):
        together = run(loop, [loop.prompts[row] for row in rows], [params[row] for row in rows])
        assert together == [alone[row] for row in rows]
    assert all(len(tokens) <= row["max_new_tokens"] for tokens, row in zip(alone, params, strict=True))
    assert len({tuple(tokens) for tokens in alone}) > SOME // 2


def test_steps_are_sampled_independently(loop: Loop) -> None:
    """One uniform sample for all steps or for all rows, so that equally likely tokens repeat."""
    params = {"temperature": 1e6}
    rows = run(loop, [[3]] * 16, [params | {"seed": seed} for seed in range(16)])
    tokens = [token for row in rows for token in row]
    # 16 x NEW draws from 512 equally likely tokens; some rows end early.
    assert len(set(tokens)) > 0.7 * len(tokens)
    assert run(loop, [[3]] * 2, [params | {"seed": 4}] * 2) == [rows[4]] * 2

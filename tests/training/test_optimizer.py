"""The optimizer: which weights decay, and the learning rate schedule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf
from conftest import ARCHITECTURES

from tfclm.training.optimizer import WarmupSchedule, make_optimizer
from tfclm.training.settings import TrainingSettings

# What a person would call a bias or a norm, by the end of the variable's name.
NO_DECAY = ("bias", "gamma", "beta", "layernorm/weight", "norm/weight")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norms_and_biases_do_not_decay_and_all_else_does(make_model, architecture: str):
    """GPT-2's ln_1, ln_2 and ln_f are decayed by transformers' own list of patterns; so is every bias of [1, n]."""
    model = make_model(architecture)
    settings = TrainingSettings(learning_rate=0.1, weight_decay=0.5, schedule="constant")
    optimizer = make_optimizer(model, settings, 10)
    for variable in model.trainable_variables:
        variable.assign(tf.ones_like(variable))
    optimizer.apply_gradients((tf.zeros_like(v), v) for v in model.trainable_variables)
    decayed = {v.name for v in model.trainable_variables if not np.array_equal(v, np.ones(v.shape))}
    kept = {v.name for v in model.trainable_variables} - decayed
    for variable in model.trainable_variables:
        if variable.name in decayed:
            # Without a gradient a step is the decay alone: w - rate * decay * w.
            np.testing.assert_allclose(variable, np.full(variable.shape, 0.95), rtol=1e-6)
    assert kept == {v.name for v in model.trainable_variables if v.name.split(":")[0].lower().endswith(NO_DECAY)}
    assert len(kept) > 4
    assert len(decayed) > 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", lambda done: 1 - done),
        ("cosine", lambda done: (1 + math.cos(math.pi * done)) / 2),
        ("constant", lambda done: 1.0),
    ],
)
def test_schedule(name: str, expected):
    """A warm-up off by one, or a schedule that never reaches 0, or becomes negative."""
    schedule = WarmupSchedule(peak=2e-4, steps=100, warmup_steps=10, schedule=name)
    for step in range(10):
        assert float(schedule(step)) == pytest.approx(2e-4 * step / 10, rel=1e-6, abs=1e-12)
    for step in (10, 11, 55, 99, 100, 150):
        assert float(schedule(step)) == pytest.approx(2e-4 * expected(min((step - 10) / 90, 1)), rel=1e-5, abs=1e-10)
    assert float(WarmupSchedule(1.0, 10, 0, name)(0)) == 1.0


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"epochs": 0}, "`epochs`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps`"),
        ({"learning_rate": 0.0}, "`learning_rate`"),
        ({"learning_rate": math.nan}, "`learning_rate`"),
        ({"max_steps": 0}, "`max_steps`"),
        ({"weight_decay": -0.1}, "`weight_decay`"),
        ({"weight_decay": math.nan}, "`weight_decay` nan"),
        ({"max_grad_norm": math.inf}, "`max_grad_norm` inf"),
        ({"max_grad_norm": math.nan}, "`max_grad_norm` nan"),
        ({"seed": 2**32}, "`seed` 4294967296: give a number below"),
        ({"save_steps": 0}, "`save_steps`"),
    ],
)
def test_values_out_of_range_are_named(values, flag: str):
    """A run that starts with a setting that makes no sense, and fails or idles an hour later."""
    with pytest.raises(ValueError, match=flag):
        TrainingSettings(**values).check()

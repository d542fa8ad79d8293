"""Requests that time out while their rows are decoded, on TensorFlow's C++ session, which TensorFlow Serving runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tfclm.savedmodel import saving
from tfclm.savedmodel.servable import Servable
from tfclm.savedmodel.settings import ServableSettings

CONTEXT = 192
LONGEST = 120  # tokens
PROGRAM = Path(__file__).with_name("cancelling.py")


@pytest.fixture(scope="module")
def version(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has no EOS, so that rows take as long as they are asked to."""
    import tf_keras
    from conftest import tiny_config
    from transformers import AutoTokenizer

    from tfclm.checkpoint import create

    tf_keras.utils.set_random_seed(7)
    model = create(tiny_config("gpt2", context=CONTEXT))
    model.set_weights([3 * weight for weight in model.get_weights()])
    model.generation_config.eos_token_id = None
    folder = tmp_path_factory.mktemp("version")
    saving.write(
        Servable(model, AutoTokenizer.from_pretrained(tokenizer_dir), ServableSettings(batch_timeout=2)), folder
    )
    return folder


@pytest.fixture(scope="module")
def ask(version: Path) -> Callable[[int, int], Any]:
    """Runs the choreography some times and a load for some seconds, in a process of its own; gives the outcomes."""

    def run(times: int, seconds: int) -> dict[str, int]:
        done = subprocess.run(
            [sys.executable, str(PROGRAM), str(version), str(times), str(seconds), str(LONGEST)],
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        outcomes: dict[str, int] = json.loads(done.stdout)
        return outcomes

    return run


@pytest.mark.slow
def test_time_outs(ask: Callable[[int, int], Any]) -> None:
    """A process that ends when a request times out while its rows are in several batches; wrong text after it."""
    outcomes = ask(20, 15)
    assert outcomes["timed out"] >= 15
    assert outcomes["answered"] >= 40


@pytest.mark.long
def test_a_minute_of_time_outs(ask: Callable[[int, int], Any]) -> None:
    """The same with more time for what is seldom."""
    assert ask(20, 60)["answered"] >= 100

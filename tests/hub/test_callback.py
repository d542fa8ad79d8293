"""`PushToHubCallback` in a training of Keras' own, as transformers' is used."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import WRITER, Faults, environment, held, hub

SCRIPT = """
import json, sys
import numpy as np, tensorflow as tf, tf_keras, transformers
from transformers import AutoTokenizer
from tfclm.checkpoint import load
from tfclm.hub import PushToHubCallback

model, tokenizer = load(sys.argv[1])
model.compile(optimizer=tf_keras.optimizers.legacy.Adam(1e-2))
ids = np.random.default_rng(0).integers(0, 500, (12, 16))
data = tf.data.Dataset.from_tensor_slices({"input_ids": ids, "labels": ids}).batch(4)
for name, options in {
    "epoch": {"license": "mit", "tags": "mine"},
    "steps": {"save_strategy": "steps", "save_steps": 4},
    "no": {"save_strategy": "no"},
}.items():
    callback = PushToHubCallback(name, tokenizer=tokenizer, hub_token=sys.argv[2], **options)
    assert isinstance(callback, transformers.PushToHubCallback)
    history = model.fit(data, validation_data=data, epochs=2, callbacks=[callback], verbose=0)
    assert len(history.history["loss"]) == 2
for options in ({"checkpoint": True, "save_strategy": "steps", "save_steps": 1}, {"save_strategy": "steps"}):
    try:
        PushToHubCallback("x", tokenizer=tokenizer, hub_token=sys.argv[2], **options)
    except ValueError as error:
        print(error)
callback = PushToHubCallback("x", tokenizer=tokenizer, hub_token=sys.argv[2], checkpoint=True)
try:
    model.fit(data, callbacks=[callback], verbose=0)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_plain_keras_training_pushes_its_last_state(tmp_path: Path, make_model, tokenizer):
    """transformers' own callback leaves out the last weights if a push is still running: here one hangs."""
    from huggingface_hub import ModelCard

    from tfclm.checkpoint import save

    save(make_model(), tokenizer, tmp_path / "model")
    with hub() as running:
        running.faults = Faults(["hang"], "me/epoch/commit/", hang=3.0)
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "model"), WRITER],
            cwd=tmp_path,
            env=environment(running.endpoint, tmp_path / "home", token=None),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert WRITER not in done.stdout + done.stderr
        for name in ("epoch", "steps", "no"):
            assert running.model(f"me/{name}").files() == held(tmp_path / name), name
            assert {"model.safetensors", "tokenizer.json", "README.md"} < held(tmp_path / name).keys()
        assert running.model("me/no").titles() == ["Upload no"]
        assert running.model("me/steps").titles()[-1] == "Upload steps"
        assert set(running.model("me/steps").titles()[:-1]) <= {"Step 4", "Step 8", "Step 12"}
        assert running.model("me/epoch").titles()[-1] == "Upload epoch"
    first, second, third = done.stdout.splitlines()
    assert "save_strategy='epoch'" in first
    assert "save_steps" in second
    assert "tfclm.finetune" in third
    card = ModelCard((tmp_path / "epoch" / "README.md").read_text())
    assert (card.data.license, "mine" in card.data.tags) == ("mit", True)
    assert "| 2 | 6 | " in card.text


def test_arguments_are_those_of_transformers():
    """A notebook that calls transformers' callback and cannot change the import alone."""
    from transformers import PushToHubCallback as Theirs

    from tfclm.hub import PushToHubCallback as Ours

    theirs, ours = (inspect.signature(each.__init__).parameters for each in (Theirs, Ours))
    positional = [each for each in theirs.values() if each.kind is each.POSITIONAL_OR_KEYWORD]
    for place, parameter in enumerate(positional):
        own = list(ours.values())[place]
        assert (own.name, own.default, own.kind) == (parameter.name, parameter.default, parameter.kind)
    assert any(each.kind is each.VAR_KEYWORD for each in ours.values())

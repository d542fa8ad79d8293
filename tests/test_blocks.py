"""`fit --blocks`: training on blocks that `prepare` has written. The blocks are written here without Apache Beam."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tf_keras
import yaml
from conftest import prepare_blocks, put_bos, tiny_config

from tfclm import fit
from tfclm.checkpoint import create, load, save
from tfclm.corpus import open_prepared
from tfclm.training import TrainingSettings, finetune
from tfclm.training.resume import Interrupted

BLOCK_SIZE = 16
Console = Callable[..., tuple[int, str]]


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Console:
    """Calls `fit` with the arguments of a shell; gives its exit code and what it prints on stderr."""

    def call(*arguments: object) -> tuple[int, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["tfclm", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            fit.main()
        return end.value.code, capfd.readouterr().err

    return call


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer) -> Path:
    """A tiny model without dropout, with its tokenizer."""
    tf_keras.utils.set_random_seed(0)
    # The sample at the end of a run fills the context.
    config = tiny_config("gpt2", context=BLOCK_SIZE + 4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    save(create(config), tokenizer, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path: Path, documents: list[str]) -> Path:
    """Documents to train on."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document[:300]}) + "\n" for document in documents[:12]))
    return path


@pytest.fixture
def validation_text(tmp_path: Path, documents: list[str]) -> Path:
    """Other documents."""
    path = tmp_path / "validation.jsonl"
    path.write_text("".join(json.dumps({"text": document[:300]}) + "\n" for document in documents[20:23]))
    return path


def run(console: Console, model: Path, output: Path, *options: object) -> dict:
    """A short run; gives its results."""
    short = ["--max-steps", 4, "--batch-size", 4, "--learning-rate", 1e-3]
    code, err = console("--model", model, "--output-dir", output, *short, *options)
    assert code == 0, err
    return json.loads((output / "results.json").read_text())


def test_blocks_train_as_their_text_does(
    console: Console, tmp_path: Path, checkpoint: Path, tokenizer, text: Path, validation_text: Path
):
    """Blocks that teach something else than the text they were made of."""
    blocks = prepare_blocks(tmp_path / "blocks", text, tokenizer)
    files = ["--validation-file", validation_text]
    prepared = run(console, checkpoint, tmp_path / "a", "--blocks", blocks, *files)
    plain = run(console, checkpoint, tmp_path / "b", "--train-file", text, "--block-size", BLOCK_SIZE, *files)
    assert prepared["loss"] == plain["loss"]
    assert prepared["loss"] < np.log(prepared["initial_perplexity"])
    assert prepared["bits_per_byte"] == plain["bits_per_byte"]
    for name in ("source", "block_size", "separator", "train_rows", "validation_rows", "train_dropped_tokens"):
        assert prepared["protocol"][name] == plain["protocol"][name], name
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    # The block size is that of the blocks, and the record repeats the run.
    assert yaml.safe_load((tmp_path / "a/fit.yaml").read_text())["block_size"] == BLOCK_SIZE


def test_documents_that_prepare_held_out(console: Console, tmp_path: Path, checkpoint: Path, tokenizer, text: Path):
    """A run on blocks that is validated on what it trains on."""
    blocks = prepare_blocks(tmp_path / "blocks", text, tokenizer, fraction=0.3, part_bytes=900)
    results = run(console, checkpoint, tmp_path / "out", "--blocks", blocks)
    manifest = json.loads((blocks / "manifest.json").read_text())
    validation = manifest["splits"]["validation"]
    assert results["tokens"] == validation["blocks"] * (BLOCK_SIZE - 1)
    assert results["protocol"]["validation"] == "0.3 of the documents, drawn with seed 0"
    assert results["protocol"]["validation_rows"] == validation["documents"]
    assert results["bytes"] is None


def test_an_interrupted_run_resumes_exactly(tmp_path: Path, checkpoint: Path, tokenizer, text: Path):
    """A resumed run on blocks that takes other blocks, or an interrupted run that goes on with blocks that changed."""

    class Stop(tf_keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs=None) -> None:
            if batch == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    folder = prepare_blocks(tmp_path / "blocks", text, tokenizer, fraction=0.3, part_bytes=900)
    settings = TrainingSettings(max_steps=5, batch_size=4, learning_rate=1e-3)

    def train(output: Path, folder: Path = folder, **options) -> list[np.ndarray]:
        prepared = open_prepared(str(folder))
        model, own = load(checkpoint)
        blocks = prepared.split("train").blocks, prepared.split("validation").blocks
        finetune(model, own, *blocks, settings, output_dir=output, **options)
        return [weight.numpy() for weight in model.weights]

    with pytest.raises(Interrupted):
        train(tmp_path / "a", callbacks=[Stop()])
    other = prepare_blocks(tmp_path / "other", text, tokenizer, fraction=0.3)
    with pytest.raises(ValueError, match="text or settings have changed"):
        train(tmp_path / "a", other)
    for resumed, whole in zip(train(tmp_path / "a"), train(tmp_path / "b"), strict=True):
        np.testing.assert_array_equal(resumed, whole)


def test_blocks_that_do_not_fit_are_refused(console: Console, tmp_path: Path, checkpoint: Path, tokenizer, text: Path):
    """Blocks of another tokenizer or block size that train a model, or errors of many lines."""
    blocks = prepare_blocks(tmp_path / "blocks", text, tokenizer)
    others = prepare_blocks(tmp_path / "others", text, put_bos(tokenizer), fraction=0.3)
    (tmp_path / "empty").mkdir()
    for options, message in [
        (["--blocks", others], "made with another tokenizer"),
        (["--blocks", blocks, "--block-size", 8], "--block-size 8, but --blocks"),
        (["--blocks", blocks, "--separator", "none"], "--separator none, but --blocks"),
        (["--blocks", blocks], "no blocks to validate on: give --validation-file"),
        (["--blocks", blocks, "--train-file", text], "--blocks and --train-file are mutually exclusive"),
        (["--blocks", blocks, "--model", "scratch"], "give the --model that it belongs to"),
        (["--blocks", tmp_path / "empty"], "empty holds no manifest.json"),
        (["--blocks", tmp_path / "none"], "none holds no manifest.json"),
        (["--blocks", "nowhere://x"], "nowhere://x cannot be used"),
    ]:
        code, err = console("--model", checkpoint, "--output-dir", tmp_path / "out", *options)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
    assert not (tmp_path / "out").exists()

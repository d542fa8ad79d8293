"""Interrupting and resuming: real processes, killed for real, through the command's own `run`."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

# Imports TensorFlow once and forks from there, before it has computed anything: a run starts in a second.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tfclm.training.run", "tfclm.checkpoint", "tfclm.fit"])


def _fit(settings: dict, log: str) -> None:
    from tfclm.fit import FitSettings, run

    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(run(FitSettings(**settings)))


class Runs:
    """Starts runs of one fixed setting in folders of its own."""

    def __init__(self, folder: Path, tokenizer_dir: Path, documents: list[str]):
        from transformers import AutoTokenizer

        from tfclm.checkpoint import create, save

        sys.path.insert(0, str(Path(__file__).parent.parent))
        from conftest import tiny_config

        self.folder = folder
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        save(create(tiny_config("gpt2")), tokenizer, folder / "model")
        text = folder / "text.jsonl"
        text.write_text("".join(json.dumps({"text": document[:1500]}) + "\n" for document in documents[:12]))
        self.settings = {
            "model": str(folder / "model"),
            "train_file": (str(text),),
            "block_size": 32,
            "batch_size": 4,
            "gradient_accumulation_steps": 2,
            "epochs": 2,
            "learning_rate": 1e-2,
            "save_steps": 3,
            "warmup_steps": 2,
            "num_proc": 1,
        }

    def start(self, name: str):
        settings = {**self.settings, "output_dir": str(self.folder / name)}
        process = SERVER.Process(target=_fit, args=(settings, str(self.folder / f"{name}.log")))
        process.start()
        return process

    def finish(self, name: str) -> int:
        process = self.start(name)
        process.join(120)
        assert process.exitcode is not None, "the run did not end"
        return process.exitcode

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def wait_for(self, name: str, pattern: str, process, seconds: float = 90) -> bool:
        """Waits until a file of that pattern is in the run's folder; False if the run ended first."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and process.is_alive():
            if any((self.folder / name).glob(pattern)):
                return True
        return False


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer_dir: Path, documents: list[str]) -> Runs:
    """With a run named reference that nothing has interrupted."""
    made = Runs(tmp_path_factory.mktemp("runs"), tokenizer_dir, documents)
    assert made.finish("reference") == 0, made.log("reference")
    return made


def assert_same_result(runs: Runs, name: str) -> None:
    """Bit for bit the weights of the reference, and the same record, but for the time it took."""
    one, other = runs.folder / "reference", runs.folder / name
    assert (other / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (one, other))
    for results in (first, second):
        del results["train"]["seconds"]
    assert second == first
    assert sorted(path.name for path in other.iterdir()) == sorted(path.name for path in one.iterdir())


def test_killed_at_random_moments(runs: Runs):
    """Dropout, data order, moments or the schedule that do not go on where they were, in or between epochs."""
    moments = random.Random(7)
    kills = 0
    while kills < 3:
        process = runs.start("killed")
        if not runs.wait_for("killed", "resume/state/checkpoint", process):
            break
        time.sleep(moments.uniform(0.0, 4.0))
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert kills >= 1
    assert runs.finish("killed") == 0, runs.log("killed")
    assert_same_result(runs, "killed")


@pytest.mark.parametrize(
    "moment", ["resume/state/ckpt-2*", "resume/state/ckpt-3*", "resume/best-1.*", "model.safetensors"]
)
def test_killed_during_a_save(runs: Runs, moment: str):
    """A half-written snapshot that is taken for whole, or a model folder that is taken for a complete run."""
    name = "save-" + "".join(filter(str.isalnum, moment))
    process = runs.start(name)
    assert runs.wait_for(name, moment, process), runs.log(name)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (runs.folder / name / "results.json").exists()
    assert runs.finish(name) == 0, runs.log(name)
    assert_same_result(runs, name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits(runs: Runs, number: signal.Signals):
    """A traceback, a lost step, or an exit code that says done."""
    name = f"signal-{number.name}"
    process = runs.start(name)
    assert runs.wait_for(name, "resume/state/ckpt-2.index", process), runs.log(name)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 1
    assert "the same command goes on from there" in runs.log(name)
    assert "Traceback" not in runs.log(name)
    assert runs.finish(name) == 0, runs.log(name)
    assert_same_result(runs, name)


def test_a_complete_run_is_not_run_again(runs: Runs):
    """The same command twice: weights overwritten unasked, or minutes spent on what is there."""
    before = (runs.folder / "reference" / "model.safetensors").stat().st_mtime_ns
    assert runs.finish("reference") == 0
    assert "is complete" in runs.log("reference")
    assert (runs.folder / "reference" / "model.safetensors").stat().st_mtime_ns == before


def test_one_run_a_folder(runs: Runs):
    """Two processes that write into one folder."""
    first = runs.start("shared")
    try:
        assert runs.wait_for("shared", "resume/state/checkpoint", first), runs.log("shared")
        from tfclm.errors import InputError
        from tfclm.training.folder import Lock

        with pytest.raises(InputError, match="in use by another run"):
            Lock(runs.folder / "shared")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(first.pid, signal.SIGKILL)
        first.join()


def _replicas(connection) -> None:
    import datasets
    import tensorflow as tf
    import tf_keras
    from conftest import tiny_config

    from tfclm.checkpoint import create
    from tfclm.training import TrainingSettings, finetune

    device = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * 2)
    ids = np.random.default_rng(0).integers(2, 60, (45, 16)).astype(np.int32)
    blocks = datasets.Dataset.from_dict({"input_ids": ids})
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(os.environ["TFCLM_TEST_TOKENIZER"])
    found = []
    for strategy in (tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])):
        with strategy.scope():
            tf_keras.utils.set_random_seed(0)
            model = create(tiny_config("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        settings = TrainingSettings(batch_size=8, gradient_accumulation_steps=2, learning_rate=1e-3, weight_decay=0.1)
        done = finetune(model, tokenizer, blocks, blocks.select(range(9)), settings, strategy=strategy)
        drift = max(
            (
                float(abs(v.values[0].numpy() - v.values[1].numpy()).max())
                for v in model.weights
                if hasattr(v, "values")
            ),
            default=0.0,
        )
        found.append((done.initial_loss, done.best_loss, drift))
    connection.send(found)


def test_two_replicas_train_as_one_device(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """Gradients or losses that are summed or averaged wrongly over replicas, or weights that drift apart."""
    monkeypatch.setenv("TFCLM_TEST_TOKENIZER", str(tokenizer_dir))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_replicas, args=(sender,))
    process.start()
    sender.close()
    (one, mirrored) = receiver.recv()
    process.join()
    assert mirrored[0] == pytest.approx(one[0], rel=1e-6)
    # Sums over replicas are in another order; Adam amplifies that in its first steps.
    assert mirrored[1] == pytest.approx(one[1], rel=1e-4)
    assert mirrored[2] == 0.0

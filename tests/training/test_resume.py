"""Interrupting and resuming: real processes, killed for real, through the command's own `run`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from tfclm.errors import InputError
from tfclm.training.resume import Interrupted

pytestmark = pytest.mark.slow

SERVER = multiprocessing.get_context("forkserver")


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
        # The sample at the end of a run fills the context.
        save(create(tiny_config("gpt2", context=40)), tokenizer, folder / "model")
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
        process.join(300)
        assert process.exitcode is not None, "the run did not end"
        return process.exitcode

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def wait_for(self, name: str, pattern: str, process, seconds: float = 300) -> bool:
        """Waits until a file of that pattern is in the run's folder; False if the run ended first."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and process.is_alive():
            if any((self.folder / name).glob(pattern)):
                return True
            time.sleep(0.001)  # without it, waiting costs as much as the run
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


def end_by(runs: Runs, name: str, number: signal.Signals, pattern: str, later: float = 0.0) -> int | None:
    """The exit code of a run that gets a signal so many seconds after a file of that pattern is there."""
    process = runs.start(name)
    assert runs.wait_for(name, pattern, process), runs.log(name)
    process.join(later)
    if process.is_alive():
        os.kill(process.pid, number)
    process.join(60)
    assert not (runs.folder / name / "results.json").exists(), "it ended before the signal"
    return process.exitcode


def test_stopped_and_killed(runs: Runs):
    """What a stop or a kill loses: a step, dropout, the data's order, moments, or a save that is half done.

    One run has them all, because each of its starts takes seconds.
    """
    assert end_by(runs, "ended", signal.SIGTERM, "resume/state/ckpt-2.index") == 1
    assert "the same command resumes the run" in runs.log("ended")
    assert "Traceback" not in runs.log("ended")
    moments = random.Random(7)
    assert end_by(runs, "ended", signal.SIGKILL, "resume/state/ckpt-4*", moments.uniform(0.0, 1.0)) == -signal.SIGKILL
    # A folder with a model is not yet that of a complete run.
    assert end_by(runs, "ended", signal.SIGKILL, "model.safetensors") == -signal.SIGKILL
    assert runs.finish("ended") == 0, runs.log("ended")
    assert_same_result(runs, "ended")


@pytest.mark.long
def test_killed_at_random_moments(runs: Runs):
    """Dropout, data order, moments or the schedule that do not go on where they were, in or between epochs."""
    moments = random.Random(7)
    kills = 0
    while kills < 2:
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


@pytest.mark.long
@pytest.mark.parametrize("moment", ["resume/state/ckpt-2*", "resume/state/ckpt-3*", "resume/best-[1-9]*.index"])
def test_killed_during_a_save(runs: Runs, moment: str):
    """A half-written snapshot that is taken for whole, or a model folder that is taken for a complete run."""
    name = "save-" + "".join(filter(str.isalnum, moment))
    end_by(runs, name, signal.SIGKILL, moment)
    assert runs.finish(name) == 0, runs.log(name)
    assert_same_result(runs, name)


@pytest.mark.long
def test_ctrl_c_saves_and_exits(runs: Runs):
    """A traceback, a lost step, or an exit code that says done."""
    assert end_by(runs, "ctrl-c", signal.SIGINT, "resume/state/ckpt-2.index") == 1
    assert "the same command resumes the run" in runs.log("ctrl-c")
    assert "Traceback" not in runs.log("ctrl-c")
    assert runs.finish("ctrl-c") == 0, runs.log("ctrl-c")
    assert_same_result(runs, "ctrl-c")


def test_a_complete_run_is_not_run_again(runs: Runs):
    """The same command twice: weights overwritten unasked, or minutes spent on what is there."""
    before = (runs.folder / "reference" / "model.safetensors").stat().st_mtime_ns
    assert runs.finish("reference") == 0
    assert "is complete" in runs.log("reference")
    assert (runs.folder / "reference" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.long
def test_one_run_a_folder(runs: Runs):
    """Two processes that write into one folder."""
    first = runs.start("shared")
    try:
        assert runs.wait_for("shared", "resume/state/checkpoint", first), runs.log("shared")
        from tfclm.runs.folder import Lock

        with pytest.raises(InputError, match="in use by another run"):
            Lock(runs.folder / "shared")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(first.pid, signal.SIGKILL)
        first.join()


def make_blocks(count: int, seed: int = 0) -> datasets.Dataset:
    """Blocks with something to learn: each token follows from the one before."""
    first = np.random.default_rng(seed).integers(2, 60, (count, 1))
    return datasets.Dataset.from_dict({"input_ids": ((first + np.arange(16) * 3) % 60 + 2).astype(np.int32)})


class Killed(Exception):
    """Ends a run where it is: nothing is saved on the way."""


def kill() -> None:
    """As `kill -9` would, for the run."""
    raise Killed


def press_ctrl_c() -> None:
    """As a person would, to this process."""
    os.kill(os.getpid(), signal.SIGINT)


class Witness(tf_keras.callbacks.Callback):
    """Notes which epochs end; calls `end` when that epoch's validation begins, or the one that a resumed run owes."""

    def __init__(self, end: Callable[[], None] | None = None, epoch: int = 0):
        super().__init__()
        self.end, self.epoch = end, epoch
        self.begun: int | None = None
        self.ended: list[int] = []

    def on_epoch_begin(self, epoch, logs=None):
        self.begun = epoch + 1

    def on_test_begin(self, logs=None):
        if self.end and self.begun in (None, self.epoch):
            self.end()

    def on_epoch_end(self, epoch, logs=None):
        self.ended.append(epoch + 1)


def finetune_tiny(folder: Path, tokenizer_dir: Path, callbacks=(), strategy=None, **settings):
    """A run of a tiny model, always from the same weights: its record, and the values of all weights."""
    from conftest import tiny_config
    from transformers import AutoTokenizer

    from tfclm.checkpoint import create
    from tfclm.training import TrainingSettings, finetune

    chosen = TrainingSettings(**{"epochs": 3, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 2} | settings)
    tf_keras.mixed_precision.set_global_policy(chosen.policy)
    try:
        tf_keras.utils.set_random_seed(0)
        with strategy.scope() if strategy else contextlib.nullcontext():
            model = create(tiny_config("gpt2"))
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        blocks = make_blocks(32), make_blocks(20, seed=1)
        done = finetune(model, tokenizer, *blocks, chosen, output_dir=folder, callbacks=callbacks, strategy=strategy)
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    return dataclasses.replace(done, seconds=0), [variable.numpy() for variable in model.weights]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tokenizer_dir: Path) -> dict:
    """By precision, a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {kind: finetune_tiny(folder / kind, tokenizer_dir, mixed_precision=kind) for kind in ("no", "float16")}


def event_steps(folder: Path, name: str) -> list[int]:
    """The steps for which TensorBoard has that value."""
    files = sorted(folder.glob("logs/events*"))
    events = [event for file in files for event in tf.compat.v1.train.summary_iterator(str(file))]
    return [event.step for event in events for value in event.summary.value if value.tag == name]


@pytest.mark.parametrize(
    ("end", "times", "epoch", "settings"),
    [
        pytest.param(press_ctrl_c, 1, 1, {}, marks=pytest.mark.long),
        pytest.param(press_ctrl_c, 2, 1, {}, marks=pytest.mark.long),
        pytest.param(kill, 2, 1, {"save_steps": 1}, marks=pytest.mark.long),
        (kill, 1, 1, {"save_steps": 1}),
        pytest.param(press_ctrl_c, 1, 3, {}, marks=pytest.mark.long),
        (press_ctrl_c, 2, 3, {"mixed_precision": "float16"}),
    ],
)
def test_stopped_while_an_epoch_is_validated(
    tmp_path: Path,
    tokenizer_dir: Path,
    undisturbed: dict,
    capfd: pytest.CaptureFixture[str],
    end,
    times: int,
    epoch: int,
    settings: dict,
):
    """The optimizer's moments and step number lost, or an epoch whose end no callback, event or line tells of."""
    expected, expected_weights = undisturbed[settings.get("mixed_precision", "no")]
    assert expected.best_epoch == 3, "the best weights must be from after the stop, or they show nothing"
    witnesses = [*(Witness(end, epoch) for _ in range(times)), Witness()]
    capfd.readouterr()
    for witness in witnesses[:-1]:
        with pytest.raises(Interrupted if end is press_ctrl_c else Killed):
            finetune_tiny(tmp_path, tokenizer_dir, [witness], **settings)
    done, weights = finetune_tiny(tmp_path, tokenizer_dir, witnesses[-1:], **settings)
    assert done == expected
    for one, other in zip(weights, expected_weights, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [number for witness in witnesses for number in witness.ended] == [1, 2, 3]
    assert event_steps(tmp_path, "val_loss") == [4, 8, 12]
    err = capfd.readouterr().err
    assert [err.count(f"epoch {number}: loss") for number in (1, 2, 3)] == [1, 1, 1]


def test_stopped_while_the_weights_before_training_are_validated(
    tmp_path: Path, tokenizer_dir: Path, undisturbed: dict
):
    """A resumed run that looks for best weights where none were kept yet."""
    former = signal.getsignal(signal.SIGINT)

    def press_when_listened_to() -> None:
        while signal.getsignal(signal.SIGINT) is former:
            time.sleep(0.001)
        press_ctrl_c()

    presser = threading.Thread(target=press_when_listened_to)
    presser.start()
    with pytest.raises(Interrupted, match="after step 0 of"):
        finetune_tiny(tmp_path, tokenizer_dir)
    presser.join()
    assert not list(tmp_path.glob("resume/best-*"))
    done, _ = finetune_tiny(tmp_path, tokenizer_dir)
    assert done == undisturbed["no"][0]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, tokenizer_dir: Path) -> Path:
    """The folder of a run that was stopped."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Interrupted):
        finetune_tiny(folder, tokenizer_dir, [Witness(press_ctrl_c, 2)])
    return folder


STATE = {
    "state/checkpoint": "resume/state ",
    "state/ckpt-*.index": "resume/state ",
    "state/ckpt-*.data*": "resume/state ",
    "best-*.index": "resume/best-4 ",
    "best-*.data*": "resume/best-4 ",
}


# The file `checkpoint` names the newest complete state: without it, there is none.
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *((file, damage) for file in STATE for damage in ("empty", "half")),
        *((file, "gone") for file in list(STATE)[1:]),
    ],
)
def test_broken_state_is_named(tmp_path: Path, tokenizer_dir: Path, interrupted: Path, file: str, damage: str):
    """A traceback, or a run that begins anew without a word, because a full disk has cut a file short."""
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    (path,) = (tmp_path / "resume").glob(file)
    whole = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(whole[: len(whole) // 2] if damage == "half" else b"")
    with pytest.raises(InputError, match="use `overwrite` to start over") as raised:
        finetune_tiny(tmp_path, tokenizer_dir)
    assert STATE[file] in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def _on_two_devices(connection, folder: Path, tokenizer_dir: Path) -> None:
    from conftest import tiny_config
    from transformers import AutoTokenizer

    from tfclm.checkpoint import create
    from tfclm.training import TrainingSettings, finetune

    device = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * 2)
    ids = np.random.default_rng(0).integers(2, 60, (45, 16)).astype(np.int32)
    blocks = datasets.Dataset.from_dict({"input_ids": ids})
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    found = []
    for strategy in (tf.distribute.get_strategy(), two):
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
    whole = finetune_tiny(folder / "whole", tokenizer_dir, strategy=two)
    with pytest.raises(Interrupted):
        finetune_tiny(folder / "stopped", tokenizer_dir, [Witness(press_ctrl_c, 1)], strategy=two)
    connection.send((found, whole, finetune_tiny(folder / "stopped", tokenizer_dir, strategy=two)))


class Reports(tf_keras.callbacks.Callback):
    """Keeps what the steps report; presses Ctrl-C after one of them."""

    def __init__(self, end: int | None = None):
        super().__init__()
        self.end = end
        self.logs: list[dict[str, float]] = []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append({name: float(value) for name, value in logs.items()})
        if len(self.logs) == self.end:
            press_ctrl_c()


def _report_on_two_devices(connection, folder: Path, tokenizer_dir: Path) -> None:
    from conftest import tiny_config

    from tfclm.checkpoint import create
    from tfclm.metrics.perplexity import token_losses
    from tfclm.training.order import RunOrder

    device = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * 2)
    # What the first step should report, but for dropout.
    tf_keras.utils.set_random_seed(0)
    model = create(tiny_config("gpt2"))
    ids = tf.constant([make_blocks(32)[int(row)]["input_ids"] for row in RunOrder(32, 6, 1, 0)[np.arange(6)]])
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(token_losses(model(input_ids=ids).logits, ids)[0])
    gradients = tape.gradient(loss, model.trainable_variables)
    expected = {"loss": float(loss), "grad_norm": float(tf.linalg.global_norm(gradients))}

    two, reports = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), Reports()
    settings = {"strategy": two, "epochs": 1, "batch_size": 6}
    whole, _ = finetune_tiny(folder / "whole", tokenizer_dir, [reports], **settings)
    with pytest.raises(Interrupted):
        finetune_tiny(folder / "stopped", tokenizer_dir, [Reports(2)], **settings)
    resumed, _ = finetune_tiny(folder / "stopped", tokenizer_dir, **settings)
    connection.send((expected, reports.logs, whole, resumed))


def _in_a_process_with_two_devices(target: Callable, folder: Path, tokenizer_dir: Path):
    """What it has found: TensorFlow cannot be given a second device once it has computed."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    sys.path.insert(0, str(Path(__file__).parent.parent))  # of `conftest`; the process gets a copy
    process = SERVER.Process(target=target, args=(sender, folder, tokenizer_dir))
    process.start()
    sender.close()
    found = receiver.recv()
    process.join()
    return found


def test_what_two_replicas_report(tmp_path: Path, tokenizer_dir: Path):
    """A norm of the gradient, or a loss, that is summed over replicas; an epoch's loss that a resumed run rounds."""
    expected, logs, whole, resumed = _in_a_process_with_two_devices(_report_on_two_devices, tmp_path, tokenizer_dir)
    # Dropout moves these by some percent; a sum would double them.
    assert logs[0] == {name: pytest.approx(value, rel=0.2) for name, value in expected.items()}
    assert logs[-1]["loss"] == whole.epochs[0]["loss"]
    assert resumed.epochs == whole.epochs  # to the last bit
    assert resumed == whole


@pytest.fixture(scope="module")
def on_two_devices(tmp_path_factory, tokenizer_dir: Path):
    """What the runs of a process with two devices have come to."""
    return _in_a_process_with_two_devices(_on_two_devices, tmp_path_factory.mktemp("two"), tokenizer_dir)


@pytest.mark.long
def test_two_replicas_train_as_one_device(on_two_devices):
    """Gradients or losses that are summed or averaged wrongly over replicas, or weights that drift apart."""
    (one, mirrored), _, _ = on_two_devices
    assert mirrored[0] == pytest.approx(one[0], rel=1e-6)
    # Sums over replicas are in another order; Adam amplifies that in its first steps.
    assert mirrored[1] == pytest.approx(one[1], rel=1e-4)
    assert mirrored[2] == 0.0


@pytest.mark.long
def test_two_replicas_stopped_while_an_epoch_is_validated(on_two_devices):
    """Moments of the optimizer that are not restored on the replicas."""
    _, (expected, expected_weights), (done, weights) = on_two_devices
    assert expected.best_epoch == 3
    assert done == expected
    for one, other in zip(weights, expected_weights, strict=True):
        np.testing.assert_array_equal(one, other)

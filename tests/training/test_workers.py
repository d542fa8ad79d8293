"""Many workers: the same weights as one process with as many devices, and how a run ends and goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from conftest import prepare_blocks
from transformers import AutoTokenizer
from worker_runs import CASES, fit, make_config, work

from tfclm.checkpoint import create, save
from tfclm.errors import InputError
from tfclm.launch import free_ports, worker_config
from tfclm.training.startup import answers
from tfclm.training.workers import find_cluster

pytestmark = pytest.mark.slow

SERVER = multiprocessing.get_context("forkserver")
# Seconds within which all workers end once one has.
END = 30


class Runs:
    """Starts workers, and reads what they leave in a folder."""

    def __init__(self, folder: Path, tokenizer_dir: Path):
        self.folder, self.tokenizer_dir = folder, tokenizer_dir

    def start(self, cases: list[dict[str, dict[str, Any]]]) -> list[Any]:
        """A process for each of `cases`, the first one the chief."""
        ports = free_ports(len(cases))
        return [self.begin(worker_config(ports, index), f"{index}", each) for index, each in enumerate(cases)]

    def begin(self, config: str | None, log: str, cases: dict[str, dict[str, Any]]) -> Any:
        arguments = (config, self.folder / f"{log}.log", self.folder, self.tokenizer_dir, cases)
        process = SERVER.Process(target=work, args=arguments)
        process.start()
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def finish(self, cases: list[dict[str, dict[str, Any]]], codes: list[int], seconds: float = 300) -> None:
        """Runs workers to their ends, which are these exit codes."""
        processes = self.start(cases)
        join(processes, seconds)
        found = [process.exitcode for process in processes]
        assert found == codes, "\n".join(self.log(str(index)) for index in range(len(cases)))

    def found(self, name: str) -> tuple[dict[str, Any], list[np.ndarray]]:
        """What a run reported, and its weights."""
        with np.load(self.folder / f"{name}.npz") as file:
            weights = [file[key] for key in file.files if key != "found"]
            return json.loads(str(file["found"])), weights


def join(processes: list[Any], seconds: float) -> None:
    """Waits for processes; kills those that do not end."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(until - time.monotonic(), 0))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


def assert_same(runs: Runs, one: str, other: str) -> None:
    """The same reports, record and weights, bit for bit."""
    (found, weights), (other_found, other_weights) = runs.found(one), runs.found(other)
    assert found == other_found
    for values, other_values in zip(weights, other_weights, strict=True):
        np.testing.assert_array_equal(values, other_values)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, documents: list[str]) -> Runs:
    """Every case but XLA's on two workers, and those that are compared with it on one process."""
    made = Runs(tmp_path_factory.mktemp("workers"), tokenizer_dir)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    save(create(make_config("gpt2", 0.0)), tokenizer, made.folder / "model")
    text = made.folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document[:300]}) + "\n" for document in documents[:12]))
    prepare_blocks(made.folder / "prepared", text, tokenizer, fraction=0.3, part_bytes=900)
    cases = {name: case for name, case in CASES.items() if name != "jit"}
    made.finish([cases, cases], [0, 0])
    alone = made.begin(None, "alone", {name: case for name, case in cases.items() if name != "dropout"})
    join([alone], 300)
    assert alone.exitcode == 0, made.log("alone")
    return made


@pytest.mark.parametrize("name", ["gpt2", "llama", "stopping", "blocks"])
def test_two_workers_equal_two_devices(runs: Runs, name: str):
    """Rows that two workers share or leave out, sums that are added up twice, or workers that drift apart."""
    if name != "blocks":  # there, the command that every worker but the chief runs returns no weights
        assert_same(runs, f"{name}-worker0", f"{name}-worker1")
    (found, weights), (other, other_weights) = runs.found(f"{name}-worker0"), runs.found(f"{name}-mirrored")
    assert found == other
    for values, other_values in zip(weights, other_weights, strict=True):
        np.testing.assert_array_equal(values, other_values)


def test_two_workers_train_as_one_device(runs: Runs):
    """A loss, gradient norm or gradient that is a mean over workers with unequal parts, or twice as large."""
    (found, weights), (alone, alone_weights) = runs.found("gpt2-worker0"), runs.found("gpt2-one")
    assert found["record"]["steps"] == 8
    np.testing.assert_allclose(found["reports"], alone["reports"], rtol=2e-5)
    for values, other_values in zip(weights, alone_weights, strict=True):
        np.testing.assert_allclose(values, other_values, atol=2e-5)
    assert found["record"]["initial_loss"] == pytest.approx(alone["record"]["initial_loss"], rel=1e-7)


def test_stopped_and_killed_workers_resume(runs: Runs):
    """A worker that waits for ever for one that has ended; steps, dropout or sums lost between the two."""
    case = {"interrupted": CASES["dropout"]}

    def ending(step: int, number: int) -> dict[str, dict[str, Any]]:
        return {"interrupted": {**CASES["dropout"], "end": (step, number)}}

    # SIGTERM to one of them saves at the same step everywhere.
    runs.finish([case, ending(2, signal.SIGTERM)], [1, 1])
    assert "Interrupted: stopped after step 3 of 9" in runs.log("0")
    processes = runs.start([case, ending(3, signal.SIGKILL)])
    processes[1].join(300)
    join(processes, END)
    assert [process.exitcode for process in processes] == [1, -signal.SIGKILL], runs.log("0")
    assert "WorkersLost: worker 1 has ended" in runs.log("0")
    runs.finish([case, case], [0, 0])
    (found, weights), (whole, whole_weights) = runs.found("interrupted-worker0"), runs.found("dropout-worker0")
    assert found["record"] == whole["record"]
    assert found["reports"] == whole["reports"][-len(found["reports"]) :]
    for values, other_values in zip(weights, whole_weights, strict=True):
        np.testing.assert_array_equal(values, other_values)


@pytest.fixture
def own_runs(tmp_path: Path, tokenizer_dir: Path) -> Runs:
    """Runs in a folder of their own."""
    return Runs(tmp_path, tokenizer_dir)


def count_saves(folder: Path) -> int:
    """How often the run in a folder has saved its state, from its beginning on."""
    states = folder.glob("resume/state/ckpt-*.index")
    return max((int(path.stem.partition("-")[2]) for path in states), default=0)


@pytest.mark.long
def test_three_workers_killed_at_random(own_runs: Runs):
    """An order of ends, of any worker at any moment, after which the run does not go on to the same weights."""
    case = {**CASES["dropout"], "epochs": 60}
    own_runs.finish([{"whole": case}] * 3, [0, 0, 0])
    moments = random.Random(20)
    for number in range(20):
        before = count_saves(own_runs.folder / "killed")
        processes = own_runs.start([{"killed": case}] * 3)
        victim = moments.choice(processes)
        kind = moments.choice([signal.SIGKILL, signal.SIGTERM])
        starts = number % 4 == 3  # one in four is killed while it starts
        if starts:
            victim.join(moments.uniform(0, 10))
        else:
            saves, until = before + moments.randint(1, 3), time.monotonic() + 300
            while count_saves(own_runs.folder / "killed") < saves and time.monotonic() < until:
                time.sleep(0.01)
            victim.join(moments.uniform(0, 0.3))
        assert all(process.is_alive() for process in processes), own_runs.log("0")
        os.kill(victim.pid, kind)
        # Workers that wait for one that has ended before it was there are killed, as `tfclm.launch` does.
        join(processes, END)
        codes = [process.exitcode for process in processes]
        print(f"{number}: worker {processes.index(victim)}, {kind.name}, starts: {starts}, {before} saves, {codes}")
        if not starts:
            wanted = [-kind if process is victim and kind == signal.SIGKILL else 1 for process in processes]
            assert codes == wanted, "\n".join(own_runs.log(str(index)) for index in range(3))
        assert 0 not in codes
    own_runs.finish([{"killed": case}] * 3, [0, 0, 0])
    (found, weights), (whole, whole_weights) = own_runs.found("killed-worker0"), own_runs.found("whole-worker0")
    assert found["record"] == whole["record"]
    for values, other_values in zip(weights, whole_weights, strict=True):
        np.testing.assert_array_equal(values, other_values)


@pytest.mark.long
def test_another_number_of_workers_resumes(own_runs: Runs):
    """Sums of the epoch's loss that are those of one replica, or dropout that changes without a word."""
    for name, dropout in (("fewer", 0.0), ("fewer-dropout", 0.1)):
        case = {**CASES["dropout"], "dropout": dropout}
        own_runs.finish([{name: case}, {name: {**case, "end": (2, signal.SIGTERM)}}], [1, 1])
        own_runs.finish([{name: case}], [0])
        assert ("continues on 1" in own_runs.log("0")) == bool(dropout)
    own_runs.finish([{"same": {**CASES["dropout"], "dropout": 0.0}}], [0])
    (found, weights), (whole, whole_weights) = own_runs.found("fewer-worker0"), own_runs.found("same-worker0")
    assert found["record"]["steps"] == whole["record"]["steps"]
    for values, other_values in zip(weights, whole_weights, strict=True):
        np.testing.assert_allclose(values, other_values, atol=2e-5)


@pytest.mark.long
def test_xla_compiles_the_gradients(own_runs: Runs):
    """XLA refuses a step that exchanges values between CPUs: a run with --jit-compile that fails."""
    cases = {"jit": CASES["jit"], "plain": {**CASES["jit"], "jit_compile": False}}
    own_runs.finish([cases, cases], [0, 0])
    assert_same(own_runs, "jit-worker0", "jit-worker1")
    for values, plain in zip(own_runs.found("jit-worker0")[1], own_runs.found("plain-worker0")[1], strict=True):
        np.testing.assert_allclose(values, plain, atol=2e-5)


def test_a_worker_that_does_not_start_is_named(tmp_path: Path, tokenizer_dir: Path):
    """A worker that waits for the others for ever, without a word."""
    program = "from tfclm.training.workers import make_strategy; make_strategy('multi_worker', 'auto', 2)"
    config = worker_config(free_ports(2), 0)
    done = forked.run(program, TF_CONFIG=config)
    assert done.returncode == 1
    missing = json.loads(config)["cluster"]["worker"][1]
    assert (
        f"not all workers have started within 2 seconds (`startup_timeout`): no answer from worker 1 ({missing})"
        in (done.stderr)
    )


def test_a_worker_that_is_told_to_end_before_training(own_runs: Runs):
    """SIGTERM that TensorFlow swallows while workers wait for each other, so that the run goes on and is killed."""
    ports = free_ports(2)
    flags = "--strategy multi_worker --communication ring --train-file none.txt --output-dir"
    arguments = [*flags.split(), str(own_runs.folder / "run")]

    def start(index: int) -> Any:
        given = worker_config(ports, index), own_runs.folder / f"{index}.log", arguments
        process = SERVER.Process(target=fit, args=given)
        process.start()
        return process

    first = start(0)
    until = time.monotonic() + 60
    while not answers(f"127.0.0.1:{ports[0]}") and time.monotonic() < until:
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGTERM)
    processes = [first, start(1)]
    join(processes, 60)
    assert [process.exitcode for process in processes] == [1, 1]
    assert own_runs.log("0") == "tfclm.fit: interrupted; start all workers again to resume the run\n"
    assert "tfclm.fit: worker 0 has ended" in own_runs.log("1")
    assert "Traceback" not in own_runs.log("1")


CLUSTER = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "set TF_CONFIG"),
        ("{", "is not JSON with a cluster and a task"),
        ({"cluster": {}}, "is not JSON with a cluster and a task"),
        ({**CLUSTER, "task": {"type": "worker", "index": 2}}, "has no worker 2"),
        ({**CLUSTER, "cluster": {"worker": ["a:1"], "ps": ["b:1"]}}, "has tasks of type ps"),
        ({**CLUSTER, "cluster": {"worker": ["a:1"], "chief": ["b:1", "c:1"]}}, "more than one chief"),
        ({**CLUSTER, "cluster": {"worker": ["a:1", "b"]}}, "the address 'b'"),
        ({**CLUSTER, "cluster": {"worker": ["a:1", "a:1"]}}, "the address 'a:1'"),
    ],
)
def test_wrong_clusters_are_explained(monkeypatch: pytest.MonkeyPatch, config: Any, words: str):
    """A traceback from inside TensorFlow, or a worker that waits for one that there is not."""
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    if config is not None:
        monkeypatch.setenv("TF_CONFIG", config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(InputError, match="TF_CONFIG") as raised:
        find_cluster()
    assert words in str(raised.value)


@pytest.mark.parametrize(("task", "node", "right"), [(1, "n1", True), (2, "n2", True), (2, "n3", False)])
def test_slurm_names_the_workers(monkeypatch: pytest.MonkeyPatch, task: int, node: str, right: bool):
    """A step of Slurm on CPUs, where TensorFlow's resolver divides by no GPU; or a task that is taken for another."""
    monkeypatch.delenv("TF_CONFIG", raising=False)
    step = {"STEP_NUM_TASKS": "3", "STEP_NODELIST": "n[1-2]", "STEP_TASKS_PER_NODE": "2,1", "PROCID": str(task)}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURMD_NODENAME", node)
    if not right:
        with pytest.raises(InputError, match="runs on n3, but TensorFlow expects it on n2"):
            find_cluster()
        return
    resolver = find_cluster()
    assert resolver.cluster_spec().as_dict() == {"worker": ["n1:8888", "n1:8889", "n2:8888"]}
    assert (resolver.task_type, resolver.task_id) == ("worker", task)

"""Requests that end while their rows are decoded, in TensorFlow's C++ session and in tfclm's own server."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import grpc
import pytest
from server.processes import launcher
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from tfclm.client import Client
from tfclm.savedmodel import saving
from tfclm.savedmodel.graph.signatures import GenerationModule
from tfclm.savedmodel.settings import ServableSettings

CONTEXT = 192
MAX_NEW_TOKENS = 120
PROGRAM = Path(__file__).with_name("cancelling.py")


@pytest.fixture(scope="module")
def version(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without EOS, so that rows always reach their max_new_tokens."""
    import tf_keras
    from conftest import tiny_config
    from transformers import AutoTokenizer

    from tfclm.checkpoint import create

    tf_keras.utils.set_random_seed(7)
    model = create(tiny_config("gpt2", context=CONTEXT))
    model.set_weights([3 * weight for weight in model.get_weights()])
    model.generation_config.eos_token_id = None
    folder = tmp_path_factory.mktemp("version")
    saving.write(GenerationModule(model, AutoTokenizer.from_pretrained(tokenizer_dir), ServableSettings()), folder)
    return folder


@pytest.fixture(scope="module")
def ask(version: Path) -> Callable[[int, int], Any]:
    """Runs `cancelling.py` in a separate process; returns the number of each outcome."""

    def run(repeats: int, seconds: int) -> dict[str, int]:
        done = forked.run(PROGRAM.read_text(), version, repeats, seconds, MAX_NEW_TOKENS)
        assert done.returncode == 0, done.stderr[-3000:]
        outcomes: dict[str, int] = json.loads(done.stdout)
        return outcomes

    return run


@pytest.mark.slow
def test_timeouts(ask: Callable[[int, int], Any]) -> None:
    """A crash when a request times out while its rows are in several batches, or wrong text afterwards."""
    outcomes = ask(12, 2)
    assert outcomes["timed out"] >= 9
    assert outcomes["answered"] >= 18


@pytest.mark.long
def test_a_minute_of_timeouts(ask: Callable[[int, int], Any]) -> None:
    """The same, with more time for rare failures."""
    assert ask(20, 60)["answered"] >= 100


class MixedLoad:
    """Clients of one server: some wait for their answers, others time out, cancel or disconnect."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self.prompts = [f"{'ab c'[: 1 + number % 4]} {number}" for number in range(12)]
        self.expected = [self.wait_for([number])[0] for number in range(12)]

    def body(self, numbers: list[int]) -> dict[str, Any]:
        """The inputs for these prompts, with 3 to 120 new tokens each."""
        return {
            "prompt": [self.prompts[number] for number in numbers],
            "max_new_tokens": [(3, 20, MAX_NEW_TOKENS)[number % 3] for number in numbers],
            "temperature": [number % 2 for number in numbers],
            "seed": numbers,
        }

    def wait_for(self, numbers: list[int]) -> list[str]:
        with Client(f"http://127.0.0.1:{self.server.rest_port}", "model", timeout=120) as client:
            return [text.decode() for text in client.predict("generate", self.body(numbers))["completion"]]

    def waiting(self, numbers: list[int], rng: random.Random) -> None:
        answers = self.wait_for(numbers)
        if answers != [self.expected[number] for number in numbers]:
            self.problems.append(f"{numbers}: {answers}")
        self.outcomes["answered"] += 1

    def call(self, numbers: list[int]) -> Any:
        request = predict_pb2.PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = "model", "generate"
        import tensorflow as tf

        types = {"prompt": tf.string, "max_new_tokens": tf.int32, "temperature": tf.float32, "seed": tf.int64}
        for name, values in self.body(numbers).items():
            request.inputs[name].CopyFrom(tf.make_tensor_proto(values, types[name]))
        return request

    def with_deadline(self, numbers: list[int], rng: random.Random) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{self.server.grpc_port}") as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            try:
                stub.Predict(self.call(numbers), timeout=rng.uniform(0.01, 0.4))
                self.outcomes["in time"] += 1
            except grpc.RpcError as error:
                self.outcomes[error.code().name] += 1

    def cancelling(self, numbers: list[int], rng: random.Random) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{self.server.grpc_port}") as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            future = stub.Predict.future(self.call(numbers), timeout=60)
            time.sleep(rng.uniform(0, 0.2))
            self.outcomes["cancelled"] += future.cancel()

    def disconnecting(self, numbers: list[int], rng: random.Random) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.rest_port, timeout=60)
        params = {"top_k": [0], "top_p": [1.0], "repetition_penalty": [1.0], "stop": [""]}
        body = {"signature_name": "generate", "inputs": self.body(numbers) | params}
        connection.request("POST", "/v1/models/model:predict", json.dumps(body))
        time.sleep(rng.uniform(0, 0.2))
        connection.close()
        self.outcomes["disconnected"] += 1

    def ask_until(self, seed: int, until: float) -> None:
        rng = random.Random(seed)
        kinds = [self.waiting, self.with_deadline, self.cancelling, self.disconnecting]
        while time.monotonic() < until:
            # Two of the clients always wait.
            kind = self.waiting if seed < 2 else rng.choice(kinds)
            try:
                kind([rng.randrange(12) for _ in range(rng.choice([1, 1, 3, 9]))], rng)
            except Exception as error:
                self.problems.append(f"{kind.__name__}: {error!r}")


def run_mixed_load(version: Path, folder: Path, seconds: float) -> Counter[str]:
    """Runs the load on a server process, checks all answers, and returns the number of each outcome."""
    (folder / "model").mkdir()
    (folder / "model" / "1").symlink_to(version)
    with launcher() as launch:
        flags = ["--no_access_log", "--rest_api_timeout_in_ms=120000"]  # the first request takes long on a busy machine
        server = launch(f"--model_base_path={folder / 'model'}", *flags).listens()
        clients = MixedLoad(server)
        until = time.monotonic() + seconds
        threads = [threading.Thread(target=clients.ask_until, args=(seed, until)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not clients.problems, clients.problems[:3]
        assert [clients.wait_for([number])[0] for number in range(12)] == clients.expected
        server.terminate()
        assert server.ends(60) == 0
    return clients.outcomes


@pytest.mark.slow
def test_deadlines_cancels_and_disconnects(version: Path, tmp_path: Path) -> None:
    """A request that fails, or gets another text, because a request in its batch was cancelled."""
    outcomes = run_mixed_load(version, tmp_path, 4)
    assert outcomes["answered"] >= 6
    assert min(outcomes[kind] for kind in ("cancelled", "disconnected", "DEADLINE_EXCEEDED")) >= 3


@pytest.mark.long
def test_a_minute_of_deadlines_cancels_and_disconnects(version: Path, tmp_path: Path) -> None:
    """The same, with more time for rare failures."""
    assert run_mixed_load(version, tmp_path, 60)["answered"] >= 50

"""More requests than a model's queue has room for, on a real server."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from server.serving_models import export
from tfclm.savedmodel.graph.engine import Engine, EngineLimits
from tfclm.savedmodel.graph.network import Network
from tfclm.savedmodel.graph.sampling import SamplingParams

NEW = 100
CALLERS = 12
IDS = list(range(1, 20))


class Generation(tf.Module):
    """An exported model's engine, with room for two requests, and with ids in place of texts."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.weights = network.variables
        self._engine = Engine(network, EngineLimits(1, NEW, 128, waiting=2), eos_ids=[], pad_id=0)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([1, None], tf.int32, name="ids")])
    def generate(self, ids: tf.Tensor) -> dict[str, Any]:
        zero = tf.zeros([1])
        none = tf.zeros([1], tf.int32)
        params = SamplingParams(none + NEW, zero, none, zero + 1, zero + 1, tf.zeros([1], tf.int64))
        return {"tokens": self._engine.complete(ids, tf.shape(ids)[1:], params).output_ids}

    def signatures(self) -> dict[str, Any]:
        return {"serving_default": self.generate}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a version of such a model."""
    from conftest import tiny_config

    from tfclm.checkpoint import create

    folder = tmp_path_factory.mktemp("full") / "base"
    export(Generation(Network(create(tiny_config("gpt2", context=128)))), folder, 1)
    return folder


@pytest.mark.slow
def test_more_requests_than_may_wait(base: Path, start_server: Any, client: Any) -> None:
    """A server that fails, hangs, or forgets those it has accepted; another status than that of a full queue."""
    server = start_server(model_base_path=str(base))
    rest = client(server)
    expected = rest.predict({"instances": [{"ids": IDS}]}, "model").json["predictions"]
    assert len(expected[0]) == NEW
    errors: list[str] = []

    def over_rest(_: int) -> str:
        answer = rest.predict({"instances": [{"ids": IDS}]}, "model")
        if answer.status == 200:
            return "answered" if answer.json["predictions"] == expected else "wrong"
        errors.append(answer.error)
        return f"HTTP {answer.status}"

    request = predict_pb2.PredictRequest()
    request.model_spec.name = "model"
    request.inputs["ids"].CopyFrom(tf.make_tensor_proto([IDS], tf.int32))
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        predict = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict

        def over_grpc(_: int) -> str:
            try:
                answer = predict(request, timeout=60)
            except grpc.RpcError as error:
                errors.append(error.details())
                return str(error.code())
            return "answered" if tf.make_ndarray(answer.outputs["tokens"]).tolist() == expected else "wrong"

        for ask, refused in ((over_rest, "HTTP 503"), (over_grpc, "StatusCode.UNAVAILABLE")):
            together = threading.Barrier(CALLERS)

            def at_once(number: int, ask: Any = ask, together: threading.Barrier = together) -> str:
                together.wait()
                return ask(number)

            with ThreadPoolExecutor(CALLERS) as pool:
                outcomes = Counter(pool.map(at_once, range(CALLERS)))
            assert outcomes["answered"] >= 2
            assert outcomes[refused] >= 1
            assert sum(outcomes.values()) == outcomes["answered"] + outcomes[refused]
            assert over_rest(0) == "answered"
    assert all("batch scheduling queue" in error for error in errors), errors

"""The calls of PredictionService, for both protocols: pick the requested version of a model and run it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    inference_pb2,
    model_pb2,
    predict_pb2,
    regression_pb2,
)

from tfclm.server.examples import DEFAULT_SIGNATURE
from tfclm.server.execution import Caller
from tfclm.server.manager import Manager
from tfclm.server.monitoring import UNKNOWN_MODEL, Metrics
from tfclm.server.servable import Servable
from tfclm.server.status import Code, StatusError, invalid
from tfclm.server.wire.messages import read_tensors, write_tensor

METADATA_FIELD = "signature_def"


class Service:
    """The calls of PredictionService. Each raises `StatusError`.

    `timeout_ms` limits a run, 0 for no limit; a `caller` may also cancel, and then does not wait for its run.
    """

    def __init__(self, manager: Manager, metrics: Metrics) -> None:
        self.manager, self.metrics = manager, metrics

    def predict(self, request: predict_pb2.PredictRequest, caller: Caller | None = None) -> predict_pb2.PredictResponse:
        """Runs a signature on tensors."""
        response = predict_pb2.PredictResponse()
        with self.manager.use(_spec(request)) as servable:
            inputs = read_tensors(request.inputs)
            signature = request.model_spec.signature_name
            outputs = servable.predict(signature, inputs, only=request.output_filter, caller=caller)
            _set_model_spec(response, servable, signature or DEFAULT_SIGNATURE)
        for name, array in outputs.items():
            if caller is not None:
                caller.remaining()
            write_tensor(array, response.outputs[name])
        return response

    def classify(
        self, request: classification_pb2.ClassificationRequest, timeout_ms: int = 0, caller: Caller | None = None
    ) -> classification_pb2.ClassificationResponse:
        """Runs a classification signature on examples."""
        response = classification_pb2.ClassificationResponse()
        with self.manager.use(_spec(request)) as servable:
            signature = request.model_spec.signature_name
            result = servable.classify(signature, request.input, timeout_ms=timeout_ms, caller=caller)
            response.result.CopyFrom(result)
            _set_model_spec(response, servable, signature or DEFAULT_SIGNATURE)
        return response

    def regress(
        self, request: regression_pb2.RegressionRequest, timeout_ms: int = 0, caller: Caller | None = None
    ) -> regression_pb2.RegressionResponse:
        """Runs a regression signature on examples."""
        response = regression_pb2.RegressionResponse()
        with self.manager.use(_spec(request)) as servable:
            signature = request.model_spec.signature_name
            result = servable.regress(signature, request.input, timeout_ms=timeout_ms, caller=caller)
            response.result.CopyFrom(result)
            _set_model_spec(response, servable, signature or DEFAULT_SIGNATURE)
        return response

    def multi_inference(
        self, request: inference_pb2.MultiInferenceRequest, caller: Caller | None = None
    ) -> inference_pb2.MultiInferenceResponse:
        """Runs classification and regression signatures on the same examples."""
        spec = request.tasks[0].model_spec if request.tasks else model_pb2.ModelSpec()
        with self.manager.use(spec) as servable:
            results = servable.multi_inference(request.tasks, request.input, caller=caller)
        return inference_pb2.MultiInferenceResponse(results=results)

    def metadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        """The signatures of a model."""
        spec = _spec(request)
        if not request.metadata_field:
            raise invalid("GetModelMetadataRequest must specify at least one metadata_field")
        for field in request.metadata_field:
            if field != METADATA_FIELD:
                raise invalid(f"Metadata field {field} is not supported")
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        with self.manager.use(spec) as servable:
            signatures = get_model_metadata_pb2.SignatureDefMap(signature_def=servable.signatures)
            _set_model_spec(response, servable, "")
        response.metadata[METADATA_FIELD].Pack(signatures)
        return response

    @contextmanager
    def counted(self, name: str, api: str, entrypoint: str) -> Iterator[None]:
        """Counts a request to the named model by its status, and records its latency if it succeeds."""
        if name and not self.manager.has(name):
            name = UNKNOWN_MODEL
        start, code = time.perf_counter(), Code.INTERNAL
        try:
            yield
            code = Code.OK
            elapsed = (time.perf_counter() - start) * 1e6
            self.metrics.request_latency.observe(elapsed, model_name=name, API=api, entrypoint=entrypoint)
        except StatusError as error:
            code = error.code
            raise
        finally:
            self.metrics.request_count.add(model_name=name, status=code.name)


def _spec(request: Any) -> Any:
    if not request.HasField("model_spec"):
        raise invalid("Missing ModelSpec")
    return request.model_spec


def _set_model_spec(response: Any, servable: Servable, signature_name: str) -> None:
    response.model_spec.name = servable.name
    response.model_spec.signature_name = signature_name
    response.model_spec.version.value = servable.version

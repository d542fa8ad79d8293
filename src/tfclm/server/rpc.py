"""gRPC: PredictionService, ModelService and the standard health service."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from tfclm.errors import InputError
from tfclm.server.config_files import Tls
from tfclm.server.execution import Caller
from tfclm.server.service import Service
from tfclm.server.status import Code, StatusError, invalid

T = TypeVar("T")

_log = logging.getLogger(__name__)
_access = logging.getLogger("tfclm.server.access")
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_MAX_MESSAGE = 1024  # bytes; those that are not ASCII are sent as three each, and clients accept 8 KiB of metadata
_MAX_LOGGED = 512
_MAX_SECONDS = 1e9  # longer times mean no deadline
_SERVICES = (
    "",
    "ModelService",
    "PredictionService",
    "tensorflow.serving.ModelService",
    "tensorflow.serving.PredictionService",
)


@dataclass(frozen=True)
class RpcOptions:
    """How the gRPC server listens; `port` 0 means no TCP, -1 any free port."""

    host: str
    port: int
    socket_path: str | None
    threads: int
    queued: int
    message_bytes: int
    health: bool
    tls: Tls | None


class RpcServer:
    """The gRPC server."""

    def __init__(self, service: Service, options: RpcOptions) -> None:
        self._options = options
        self._server = grpc.server(
            ThreadPoolExecutor(options.threads, thread_name_prefix="tfclm-grpc"),
            maximum_concurrent_rpcs=options.threads + options.queued,
            options=[
                # A port that is in use is an error, not shared.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", options.message_bytes),
                ("grpc.max_send_message_length", -1),
            ],
        )
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(_Prediction(service), self._server)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(
            _Model(service, max(options.threads // 2, 1)), self._server
        )
        self._health = health.HealthServicer()
        if options.health:
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def start(self) -> int:
        """Listens; returns the TCP port, 0 if there is none.

        Raises:
            InputError: the port or the socket is not available.
        """
        port = 0
        if self._options.port:
            host = f"[{self._options.host}]" if ":" in self._options.host else self._options.host
            port = self._add_port(f"{host}:{max(self._options.port, 0)}", "port")
        if self._options.socket_path:
            self._add_port(f"unix:{self._options.socket_path}", "grpc_socket_path")
        self._server.start()
        for name in _SERVICES:
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return port

    def stop(self, grace_seconds: float) -> None:
        """Accepts no more calls, waits up to `grace_seconds` for current ones, then cancels them."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_seconds).wait(grace_seconds + 1)

    def _add_port(self, address: str, setting: str) -> int:
        try:
            tls = self._options.tls
            if tls is None:
                return int(self._server.add_insecure_port(address))
            credentials = grpc.ssl_server_credentials(
                [(tls.key, tls.certificate)],
                root_certificates=tls.authority,
                require_client_auth=tls.verify_client,
            )
            return int(self._server.add_secure_port(address, credentials))
        except RuntimeError as error:
            raise InputError(f"`{setting}`: cannot listen on {address}; is another server running there?") from error


class _Prediction(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, service: Service) -> None:
        self._service = service

    def Predict(self, request: predict_pb2.PredictRequest, context: Any) -> predict_pb2.PredictResponse:
        return self._inference("Predict", request, context, self._service.predict)

    def Classify(
        self, request: classification_pb2.ClassificationRequest, context: Any
    ) -> classification_pb2.ClassificationResponse:
        return self._inference("Classify", request, context, self._service.classify)

    def Regress(self, request: regression_pb2.RegressionRequest, context: Any) -> regression_pb2.RegressionResponse:
        return self._inference("Regress", request, context, self._service.regress)

    def MultiInference(
        self, request: inference_pb2.MultiInferenceRequest, context: Any
    ) -> inference_pb2.MultiInferenceResponse:
        name = request.tasks[0].model_spec.name if request.tasks else ""
        return _call("MultiInference", name, context, lambda caller: self._service.multi_inference(request, caller))

    def GetModelMetadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest, context: Any
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        return _call("GetModelMetadata", request.model_spec.name, context, lambda _: self._service.metadata(request))

    def _inference(self, method: str, request: Any, context: Any, run: Callable[..., T]) -> T:
        name = request.model_spec.name

        def counted(caller: Caller) -> T:
            with self._service.counted(name, method, "GRPC"):
                caller.remaining()
                return run(request, caller=caller)

        return _call(method, name, context, counted)


class _Model(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, service: Service, reloads: int) -> None:
        self._service = service
        # A reload waits until its models are loaded: reloads must not take all threads.
        self._reloads = threading.Semaphore(reloads)

    def GetModelStatus(
        self, request: get_model_status_pb2.GetModelStatusRequest, context: Any
    ) -> get_model_status_pb2.GetModelStatusResponse:
        def status(caller: Caller) -> get_model_status_pb2.GetModelStatusResponse:
            if not request.HasField("model_spec"):
                raise invalid("Missing ModelSpec")
            return self._service.manager.status(request.model_spec)

        return _call("GetModelStatus", request.model_spec.name, context, status)

    def HandleReloadConfigRequest(
        self, request: model_management_pb2.ReloadConfigRequest, context: Any
    ) -> model_management_pb2.ReloadConfigResponse:
        def reload(caller: Caller) -> model_management_pb2.ReloadConfigResponse:
            if request.config.WhichOneof("config") != "model_config_list":
                raise invalid(
                    "ServerModelConfig type not supported by HandleReloadConfigRequest."
                    " Only ModelConfigList is currently supported"
                )
            metrics = self._service.metrics
            before = {name: metrics.value(name) for name in request.metric_names}
            if not self._reloads.acquire(blocking=False):
                raise StatusError(Code.UNAVAILABLE, "Other reloads are still waiting for their models; try again later")
            try:
                self._service.manager.reload(request.config, caller)
            finally:
                self._reloads.release()
            response = model_management_pb2.ReloadConfigResponse()
            for name, value in before.items():
                response.metric.add(name=name, int64_value_increase=metrics.value(name) - value)
            return response

        return _call("HandleReloadConfigRequest", "", context, reload)


def _call(method: str, model: str, context: Any, run: Callable[[Caller], T]) -> T:
    """Runs a call, reports its failure to the client as gRPC does, and writes the access log."""
    seconds = context.time_remaining()
    caller = Caller(seconds if seconds is not None and seconds < _MAX_SECONDS else None)
    if not context.add_callback(caller.cancel):
        # The call was cancelled while it waited for its thread.
        caller.cancel()
    start, code = time.perf_counter(), Code.INTERNAL
    try:
        try:
            result = run(caller)
        except StatusError as error:
            code = error.code
            message = error.message.encode("utf-8", "replace")
            if len(message) > _MAX_MESSAGE:
                message = message[:_MAX_MESSAGE] + b"...TRUNCATED"
            context.abort(_CODES[error.code], message.decode("utf-8", "ignore"))
        except Exception:
            _log.exception("a call failed: %s", method)
            context.abort(grpc.StatusCode.INTERNAL, "Internal error; see the server's log")
        code = Code.OK
        return result
    finally:
        fields = {
            "protocol": "grpc",
            "client": context.peer(),
            "method": method,
            "model": model[:_MAX_LOGGED],
            "code": code.name,
            "ms": round((time.perf_counter() - start) * 1000, 3),
        }
        _access.info("request", extra={"fields": fields})

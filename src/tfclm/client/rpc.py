"""A model behind TensorFlow Serving's gRPC API, asked without TensorFlow."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

import grpc

from tfclm.client.messages import from_tensor, message, to_tensor
from tfclm.client.rest import CONNECT_SECONDS
from tfclm.client.transport import Model, ServerError, Signature, not_available, read_signatures, reason
from tfclm.errors import InputError

_REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.OUT_OF_RANGE)
_MOST_BYTES = 2**31 - 1


class RpcTransport:
    """One model at `address`: grpc://HOST:PORT, grpcs://HOST:PORT for TLS, or unix:PATH.

    UNAVAILABLE, gRPC's 503, is asked again up to `retries` times, after a growing pause, within the timeout.
    """

    def __init__(self, address: str, model: Model, timeout: float, retries: int) -> None:
        scheme, _, target = address.partition("://")
        if scheme not in ("grpc", "grpcs") or not target:
            scheme, target = "", address
        if not target.startswith("unix:") and ("/" in target or ":" not in target):
            raise InputError(f"URL {address}: give host and port, such as grpc://localhost:8500")
        self.address = address
        self._model = model
        self._timeout = timeout
        policy = {
            "maxAttempts": min(5, retries + 1),  # five is the most that gRPC does
            "initialBackoff": "0.2s",
            "maxBackoff": "5s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE"],
        }
        config = {"methodConfig": [{"name": [{}], **({"retryPolicy": policy} if retries else {})}]}
        options = [
            ("grpc.service_config", json.dumps(config)),
            ("grpc.max_receive_message_length", _MOST_BYTES),
            ("grpc.max_send_message_length", _MOST_BYTES),
        ]
        if scheme == "grpcs":
            self._channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(), options)
        else:
            self._channel = grpc.insecure_channel(target, options)
        self._connected = False

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()

    def signatures(self) -> dict[str, Signature]:
        """The model's signatures, from its metadata."""
        request = message("tensorflow.serving.GetModelMetadataRequest")(metadata_field=["signature_def"])
        self._name(request.model_spec)
        reply = self._ask("PredictionService/GetModelMetadata", request, "GetModelMetadataResponse")
        signatures = message("tensorflow.serving.SignatureDefMap")()
        signatures.ParseFromString(reply.metadata["signature_def"].value)
        return read_signatures(signatures)

    def predict(self, signature: str, inputs: Mapping[str, tuple[str, list[Any]]]) -> dict[str, list[Any]]:
        """Runs a signature."""
        request = message("tensorflow.serving.PredictRequest")()
        self._name(request.model_spec)
        request.model_spec.signature_name = signature
        for name, (dtype, values) in inputs.items():
            values = [value.encode() if isinstance(value, str) else value for value in values]
            request.inputs[name].CopyFrom(to_tensor(values, dtype))
        reply = self._ask("PredictionService/Predict", request, "PredictResponse")
        return {name: from_tensor(tensor) for name, tensor in reply.outputs.items()}

    def _name(self, spec: Any) -> None:
        spec.name = self._model.name
        if self._model.version is not None:
            spec.version.value = self._model.version
        if self._model.label is not None:
            spec.version_label = self._model.label

    def _connect(self) -> None:
        """Waits until the channel is ready; a server that is not there is told from one that is busy."""
        if self._connected:
            return
        known = threading.Event()
        states: list[Any] = []

        def changed(state: Any) -> None:
            if state in (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE):
                states.append(state)
                known.set()

        self._channel.subscribe(changed, try_to_connect=True)
        known.wait(CONNECT_SECONDS)
        self._channel.unsubscribe(changed)
        if not states or states[0] != grpc.ChannelConnectivity.READY:
            raise ServerError(f"no server answers at {self.address}: start one (python -m tfclm.serve) or give its URL")
        self._connected = True

    def _ask(self, method: str, request: Any, response: str) -> Any:
        self._connect()
        read: Callable[[bytes], Any] = message(f"tensorflow.serving.{response}").FromString
        call = self._channel.unary_unary(
            f"/tensorflow.serving.{method}", lambda request: request.SerializeToString(), read
        )
        try:
            return call(request, timeout=self._timeout)
        except grpc.RpcError as error:
            code, said = error.code(), reason(error.details() or "")
            if code == grpc.StatusCode.NOT_FOUND:
                versions = {} if method.startswith("ModelService") else self._versions()
                raise not_available(self._model, self.address, versions) from error
            if code in _REFUSED:
                raise InputError(said) from error
            if code == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise ServerError(f"{self.address} did not answer within {self._timeout:g} s") from error
            raise ServerError(f"{self.address} answered {code.name}: {said}") from error

    def _versions(self) -> dict[int, int]:
        request = message("tensorflow.serving.GetModelStatusRequest")()
        request.model_spec.name = self._model.name
        try:
            reply = self._ask("ModelService/GetModelStatus", request, "GetModelStatusResponse")
        except InputError:
            return {}
        return {version.version: version.state for version in reply.model_version_status}

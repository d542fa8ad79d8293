"""Calls a model over TensorFlow Serving's gRPC API."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import grpc

from tfclm.client import tls
from tfclm.client.messages import message, to_tensor
from tfclm.client.replies import read_signatures, read_tensors, reading
from tfclm.client.sockets import CONNECT_SECONDS
from tfclm.client.transport import (
    Call,
    Limits,
    Model,
    ServerError,
    Signature,
    is_cancelled_batch,
    not_available,
    one_line,
    too_large,
)
from tfclm.errors import InputError

_REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.OUT_OF_RANGE)
_CANCELLED = (grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL)
_MAX_BYTES = 2**31 - 1


class RpcTransport:
    """One model at `address`: grpc://HOST:PORT, grpcs://HOST:PORT for TLS, or unix:PATH.

    A request that fails with UNAVAILABLE, gRPC's 503, is sent again up to `retries` times, after a growing pause and
    within the timeout. A request that was cancelled with a batch of other requests is sent again at once.
    """

    def __init__(self, address: str, model: Model, limits: Limits, tls_files: tls.Tls) -> None:
        scheme, _, target = address.partition("://")
        if scheme not in ("grpc", "grpcs") or not target:
            scheme, target = "", address
        host, _, port = target.rpartition(":")
        # A Unix socket cannot be probed for TLS.
        self._server = None
        if not target.startswith("unix:"):
            if "/" in target or not host or not port.isdecimal() or int(port) >= 2**16:
                raise InputError(f"`url` {address}: give host and port, such as grpc://localhost:8500")
            self._server = tls.Server(address, scheme, host.strip("[]"), int(port))
        self.address = address
        self._model = model
        self._limits = limits
        self._tls = tls_files
        policy = {
            "maxAttempts": min(5, limits.retries + 1),  # five is gRPC's maximum
            "initialBackoff": "0.2s",
            "maxBackoff": "5s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE"],
        }
        config = {"methodConfig": [{"name": [{}], **({"retryPolicy": policy} if limits.retries else {})}]}
        options = [
            ("grpc.service_config", json.dumps(config)),
            ("grpc.max_receive_message_length", min(limits.max_reply_bytes, _MAX_BYTES)),
            ("grpc.max_send_message_length", _MAX_BYTES),
        ]
        if scheme == "grpcs":
            credentials = grpc.ssl_channel_credentials(
                tls_files.read("ca_file"), tls_files.read("key_file"), tls_files.read("cert_file")
            )
            self._channel = grpc.secure_channel(target, credentials, options)
        else:
            self._channel = grpc.insecure_channel(target, options)
        self._connected = False

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()

    def signatures(self, call: Call) -> dict[str, Signature]:
        """The model's signatures, from its metadata."""
        request = message("tensorflow.serving.GetModelMetadataRequest")(metadata_field=["signature_def"])
        self._set_model(request.model_spec)
        reply = self._ask("PredictionService/GetModelMetadata", request, call)
        with reading(self.address, "metadata that is not TensorFlow Serving's, or"):
            metadata = message("tensorflow.serving.GetModelMetadataResponse").FromString(reply).metadata
            if "signature_def" not in metadata:
                raise ValueError("it has no signature_def")
            packed = metadata["signature_def"].value
            return read_signatures(message("tensorflow.serving.SignatureDefMap").FromString(packed))

    def predict(
        self, name: str, signature: Signature, inputs: Mapping[str, tuple[str, list[Any]]], call: Call
    ) -> dict[str, list[Any]]:
        """Runs a signature."""
        request = message("tensorflow.serving.PredictRequest")()
        self._set_model(request.model_spec)
        request.model_spec.signature_name = name
        for key, (dtype, values) in inputs.items():
            try:
                request.inputs[key].CopyFrom(to_tensor(_encoded(values), dtype))
            except ValueError as error:
                raise InputError(f"`{key}` has rows of different lengths: give all rows the same length") from error
        reply = self._ask("PredictionService/Predict", request, call)
        size = len(next(iter(inputs.values()))[1]) if inputs else 1
        with reading(self.address, "predictions"):
            outputs = message("tensorflow.serving.PredictResponse").FromString(reply).outputs
            return read_tensors(outputs, signature.outputs, size)

    def _set_model(self, spec: Any) -> None:
        spec.name = self._model.name
        if self._model.version is not None:
            spec.version.value = self._model.version
        if self._model.label is not None:
            spec.version_label = self._model.label

    def _connect(self, call: Call) -> None:
        """Waits until the channel is ready, to tell a server that is not there from one that is busy."""
        if self._connected:
            return
        known = threading.Event()
        states: list[Any] = []

        def changed(state: Any) -> None:
            if state in (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE):
                states.append(state)
                known.set()

        self._channel.subscribe(changed, try_to_connect=True)
        known.wait(min(CONNECT_SECONDS, call.remaining()))
        self._channel.unsubscribe(changed)
        if not states or states[0] != grpc.ChannelConnectivity.READY:
            raise self._diagnosis(call) or ServerError(
                f"{self.address} does not speak gRPC: for its REST port, give http://"
                if states
                else f"{self.address} did not answer within {CONNECT_SECONDS:g} s"
            )
        self._connected = True

    def _diagnosis(self, call: Call) -> ServerError | None:
        if self._server is None:
            return tls.unreachable(self.address, OSError())
        return tls.diagnose(self._server, self._tls, call)

    def _ask(self, method: str, request: Any, call: Call, retries: int | None = None) -> bytes:
        retries = self._limits.retries if retries is None else retries
        self._connect(call)
        send = self._channel.unary_unary(f"/tensorflow.serving.{method}", lambda request: request.SerializeToString())
        try:
            return bytes(send(request, timeout=call.remaining()))
        except grpc.RpcError as error:
            code, message = error.code(), one_line(error.details() or "")
            if code in _CANCELLED and retries and is_cancelled_batch(message):
                return self._ask(method, request, call, retries - 1)
            if code == grpc.StatusCode.NOT_FOUND:
                versions = {} if method.startswith("ModelService") else self._versions(call)
                raise not_available(self._model, self.address, versions) from error
            if code in _REFUSED:
                raise InputError(message) from error
            if code == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise call.timed_out() from error
            if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "message larger than max" in message:
                raise too_large(self.address, self._limits.max_reply_bytes) from error
            if code == grpc.StatusCode.UNAVAILABLE and (found := self._diagnosis(call)):
                raise found from error
            raise ServerError(f"{self.address} answered {code.name}: {message}") from error

    def _versions(self, call: Call) -> dict[int, int]:
        request = message("tensorflow.serving.GetModelStatusRequest")()
        request.model_spec.name = self._model.name
        try:
            reply = self._ask("ModelService/GetModelStatus", request, call)
        except InputError:
            return {}
        with reading(self.address, "a status"):
            status = message("tensorflow.serving.GetModelStatusResponse").FromString(reply)
            return {version.version: version.state for version in status.model_version_status}


def _encoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_encoded(item) for item in value]
    return value.encode() if isinstance(value, str) else value

"""Servers in place of TensorFlow Serving, on real sockets: what they send is up to the test."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from typing import Any

import grpc
from google.protobuf import json_format

from tfclm.client import messages

PARAMETERS: dict[str, tuple[str, Any]] = {
    "max_new_tokens": ("DT_INT32", 5),
    "temperature": ("DT_FLOAT", 0.0),
    "top_k": ("DT_INT32", 50),
    "top_p": ("DT_FLOAT", 1.0),
    "repetition_penalty": ("DT_FLOAT", 1.0),
    "seed": ("DT_INT64", -1),
    "stop": ("DT_STRING", b""),
}
GENERATED: dict[str, tuple[str, list[Any]]] = {
    "generated_text": ("DT_STRING", ["The é".encode(), b"x y"]),
    "completion": ("DT_STRING", [" é".encode(), b" y"]),
    "completion_bytes": ("DT_STRING", [b" \xc3\xa9", b" y\xff"]),
    "finish_reason": ("DT_STRING", [b"stop", b"length"]),
    "prompt_tokens": ("DT_INT32", [1, 2]),
    "completion_tokens": ("DT_INT32", [3, 4]),
}
SCORED: dict[str, tuple[str, list[Any]]] = {
    "loss": ("DT_FLOAT", [0.5, 2.0]),
    "perplexity": ("DT_FLOAT", [1.5, 7.5]),
    "token_count": ("DT_INT32", [2, 1]),
    "token_ids": ("DT_INT32", [[1, 2, 3], [4, 5, 0]]),
    "token_logprobs": ("DT_FLOAT", [[0.0, -0.5, -0.5], [0.0, -2.0, 0.0]]),
}


def signature_map(temperature: float = 0.0) -> Any:
    """The signatures `generate` and `score` of an exported model."""
    signatures = messages.message("tensorflow.serving.SignatureDefMap")()
    generate, score = signatures.signature_def["generate"], signatures.signature_def["score"]
    generate.inputs["prompt"].dtype = messages.DTYPES["DT_STRING"]
    score.inputs["text"].dtype = messages.DTYPES["DT_STRING"]
    for name, (dtype, value) in (PARAMETERS | {"temperature": ("DT_FLOAT", temperature)}).items():
        generate.inputs[name].dtype = messages.DTYPES[dtype]
        generate.defaults[name].CopyFrom(messages.to_tensor([value], dtype))
    for signature, outputs in ((generate, GENERATED), (score, SCORED)):
        for name, (dtype, _) in outputs.items():
            signature.outputs[name].dtype = messages.DTYPES[dtype]
    return signatures


def rest_metadata(**options: Any) -> bytes:
    """The metadata as REST sends it."""
    return json.dumps(
        {"metadata": {"signature_def": json.loads(json_format.MessageToJson(signature_map(**options)))}}
    ).encode()


def grpc_metadata(**options: Any) -> bytes:
    """The metadata as gRPC sends it."""
    metadata = messages.message("tensorflow.serving.GetModelMetadataResponse")()
    metadata.metadata["signature_def"].Pack(signature_map(**options))
    return bytes(metadata.SerializeToString())


def rest_predictions(outputs: dict[str, tuple[str, list[Any]]], rows: int) -> bytes:
    """The reply to a row request."""

    def plain(name: str, value: Any) -> Any:
        if not isinstance(value, bytes):
            return value
        # Only what is named _bytes is sent as base64.
        return {"b64": base64.b64encode(value).decode()} if name.endswith("_bytes") else value.decode()

    predictions = [{name: plain(name, values[row]) for name, (_, values) in outputs.items()} for row in range(rows)]
    return json.dumps({"predictions": predictions}, ensure_ascii=False).encode()


def grpc_predictions(outputs: dict[str, tuple[str, list[Any]]], rows: int) -> bytes:
    """The reply to Predict."""
    response = messages.message("tensorflow.serving.PredictResponse")()
    for name, (dtype, values) in outputs.items():
        response.outputs[name].CopyFrom(messages.to_tensor(values[:rows], dtype))
    return bytes(response.SerializeToString())


def http_reply(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """The bytes of a reply."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def read_request(connection: socket.socket) -> tuple[str, bytes]:
    """A request's path and body; an empty path if the client has disconnected or speaks TLS."""
    received = b""
    while b"\r\n\r\n" not in received:
        chunk = connection.recv(2**16)
        # TLS begins with this byte, and is no request.
        if not chunk or chunk[0] == 0x16:
            return "", b""
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while lengths and len(body) < int(lengths[0]):
        body += connection.recv(2**16)
    return head.split(b" ")[1].decode(), body


@contextmanager
def tcp_server(serve: Callable[[socket.socket], None], context: ssl.SSLContext | None = None) -> Iterator[int]:
    """A server that calls `serve(connection)` in a thread for each, over TLS with a context; gives its port.

    `serve` ends when the client is gone: every error of its socket ends it.
    """
    open_connections: list[socket.socket] = []

    def handle(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            if context is None:
                serve(connection)
            else:
                connection.settimeout(30)
                with context.wrap_socket(connection, server_side=True) as wrapped:
                    serve(wrapped)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connection.settimeout(30)
                open_connections.append(connection)
                threading.Thread(target=handle, args=[connection], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            for connection in open_connections:
                # Of a TLS connection the descriptor has gone to another object, which ends by its time-out.
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


@contextmanager
def rest_server(answer: Callable[[str, bytes], bytes], context: ssl.SSLContext | None = None) -> Iterator[str]:
    """A server that sends the bytes of `answer(path, body)` for each request; gives its URL."""

    def serve(connection: socket.socket) -> None:
        while True:
            path, body = read_request(connection)
            if not path:
                return
            connection.sendall(answer(path, body))

    with tcp_server(serve, context) as port:
        yield f"http{'s' if context else ''}://127.0.0.1:{port}"


@contextmanager
def grpc_server(
    handlers: dict[str, Callable[[bytes, Any], bytes]], credentials: Any = None, compression: Any = None
) -> Iterator[int]:
    """A server with the methods of PredictionService and ModelService as `handlers` by name; gives its port."""
    server = grpc.server(
        futures.ThreadPoolExecutor(4), compression=compression, options=[("grpc.max_send_message_length", -1)]
    )
    methods = {name: grpc.unary_unary_rpc_method_handler(handler) for name, handler in handlers.items()}
    for service in ("PredictionService", "ModelService"):
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(f"tensorflow.serving.{service}", methods),)
        )
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait(10)

"""What a server may take of a client: the time of a call as a whole, and the memory of a reply."""

from __future__ import annotations

import functools
import gzip
import json
import resource
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import grpc
import pytest

from tfclm.client import Client, ServerError, messages

from .doubles import (
    GENERATED,
    grpc_metadata,
    grpc_predictions,
    grpc_server,
    http_reply,
    read_request,
    rest_metadata,
    rest_predictions,
    rest_server,
    tcp_server,
)

TIMEOUT = 1.0
# A client that waits for ever, or for every read anew, is far beyond it.
BOUND = 4.0


def drip(connection: socket.socket, start: bytes, piece: bytes) -> None:
    """Sends a start, and then a piece ten times a second, until the client disconnects."""
    read_request(connection)
    connection.sendall(start)
    for _ in range(200):
        time.sleep(0.1)
        connection.sendall(piece)


def redirect(connection: socket.socket) -> None:
    """Sends the client in a circle."""
    while path := read_request(connection)[0]:
        connection.sendall(http_reply(b"", "307 Temporary Redirect", f"Location: {path}"))


def busy(connection: socket.socket) -> None:
    """Wants to be asked in an hour."""
    while read_request(connection)[0]:
        connection.sendall(http_reply(b'{"error": "busy"}', "503 Unavailable", "Retry-After: 3600"))


@pytest.mark.parametrize(
    ("serve", "message"),
    [
        (lambda c: drip(c, b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b" "), "did not answer within 1 s"),
        (lambda c: drip(c, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"), "did not answer"),
        (lambda c: drip(c, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"), "did not answer"),
        (lambda c: drip(c, b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"), "did not answer within 1 s"),
        (lambda c: drip(c, b"", b"H"), "did not answer within 1 s"),
        (lambda c: drip(c, b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "did not answer within 1 s"),
        (lambda c: time.sleep(20), "did not answer within 1 s"),
        (busy, "answered HTTP 503, too many requests: busy; try again after 3600 s"),
        (redirect, "redirects to /v1/models/model/metadata"),
    ],
    ids=["body", "chunks", "chunk size", "headers", "status line", "continue", "silence", "Retry-After", "redirects"],
)
def test_the_timeout_is_the_whole_calls(serve: Callable[[socket.socket], None], message: str):
    """A timeout that starts again with every byte, or that a header of the server's overrides."""
    with tcp_server(serve) as port, Client(f"http://127.0.0.1:{port}", timeout=TIMEOUT) as client:
        began = time.monotonic()
        with pytest.raises(ServerError, match=message) as error:
            client.generate("a")
        assert time.monotonic() - began < BOUND
    assert "\n" not in str(error.value)


def test_the_timeout_is_that_of_all_requests_together():
    """A timeout for each of metadata, status and prediction, so that a call takes several."""

    def answer(path: str, body: bytes) -> bytes:
        time.sleep(0.7 * TIMEOUT)
        return http_reply(rest_metadata() if path.endswith("/metadata") else rest_predictions(GENERATED, 1))

    with rest_server(answer) as url, Client(url, timeout=TIMEOUT) as client:
        began = time.monotonic()
        with pytest.raises(ServerError, match="did not answer within 1 s"):
            client.generate("a")
        assert time.monotonic() - began < 1.3 * TIMEOUT


def test_the_timeout_is_that_of_all_grpc_calls_together():
    """As over REST: metadata, prediction and status had a deadline each."""

    def late(reply: bytes) -> Callable[[bytes, Any], bytes]:
        return lambda request, context: time.sleep(0.7 * TIMEOUT) or reply

    handlers = {"GetModelMetadata": late(grpc_metadata()), "Predict": late(grpc_predictions(GENERATED, 1))}
    with grpc_server(handlers) as port, Client(f"grpc://127.0.0.1:{port}", timeout=TIMEOUT) as client:
        began = time.monotonic()
        with pytest.raises(ServerError, match="did not answer within 1 s"):
            client.generate("a")
        assert time.monotonic() - began < 1.3 * TIMEOUT


@pytest.mark.parametrize("scheme", ["https", "grpcs", "grpc"])
@pytest.mark.parametrize("serve", [lambda c: time.sleep(20), lambda c: drip(c, b"", b"\x16")], ids=["silent", "drips"])
def test_the_timeout_is_that_of_the_handshake(scheme: str, serve: Callable[[socket.socket], None]):
    """A server that accepts the connection and never completes TLS's or HTTP/2's handshake holds the caller."""
    with tcp_server(serve) as port, Client(f"{scheme}://127.0.0.1:{port}", timeout=TIMEOUT) as client:
        began = time.monotonic()
        with pytest.raises(ServerError):
            client.generate("a")
        assert time.monotonic() - began < BOUND


def test_a_request_that_the_server_does_not_take():
    """A body larger than the buffers of the sockets, sent to a server that does not read it, blocks for ever."""

    def serve(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(http_reply(rest_metadata()))
        time.sleep(20)

    with tcp_server(serve) as port, Client(f"http://127.0.0.1:{port}", timeout=TIMEOUT) as client:
        began = time.monotonic()
        with pytest.raises(ServerError, match="did not answer within 1 s"):
            client.generate("a" * 2**25)
        assert time.monotonic() - began < BOUND


# Bytes


def endless(connection: socket.socket, start: bytes, piece: bytes) -> None:
    """Sends a start and a piece again and again."""
    read_request(connection)
    connection.sendall(start)
    while True:
        connection.sendall(piece)


@functools.cache
def bomb() -> bytes:
    """A gzip body of 3 MB that inflates to 512 MB."""
    packer = zlib.compressobj(1, wbits=31)
    return b"".join(packer.compress(b" " * 2**20) for _ in range(2**9)) + packer.flush()


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
TOO_LARGE = "sent a reply of more than 33554432 bytes: ask for less, or raise `max_reply_bytes`"


@pytest.mark.parametrize(
    ("serve", "message"),
    [
        (lambda c: endless(c, OK + b"\r\n", b" " * 2**20), TOO_LARGE),
        (lambda c: endless(c, OK + CHUNKED, b"100000\r\n" + b" " * 2**20 + b"\r\n"), TOO_LARGE),
        (lambda c: endless(c, OK + CHUNKED, b"0" * 2**20), "."),
        (lambda c: endless(c, OK, b"a: b\r\n" * 2**16), "."),
        (lambda c: endless(c, OK, b"a" * 2**20), "."),
        (lambda c: endless(c, b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 2**10), "."),
        (lambda c: endless(c, http_reply(bomb(), "200 OK", "Content-Encoding: gzip"), b""), TOO_LARGE),
        (
            lambda c: endless(
                c, http_reply(bomb(), "302 Found", "Content-Encoding: gzip", "Location: /v1/models/model"), b""
            ),
            ".",
        ),
        (lambda c: endless(c, http_reply(b'{"predictions": [' + b"[]," * 2**23 + b"[]]}"), b""), "lists"),
    ],
    ids=["body", "chunks", "chunk size", "headers", "header", "continue", "gzip", "redirect", "lists"],
)
def test_a_reply_is_bounded(serve: Callable[[socket.socket], None], message: str):
    """A server that fills the client's memory."""
    bomb()
    program = """
import re, sys
from tfclm.client import Client, ServerError

def peak():  # of this program alone, where getrusage has its parent's too
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024

before = peak()
try:
    Client(sys.argv[1], timeout=8).generate("a")
except ServerError as error:
    print(error)
print(peak() - before)
"""
    with tcp_server(serve) as port:
        run = subprocess.run(
            [sys.executable, "-c", program, f"http://127.0.0.1:{port}"],
            capture_output=True,
            text=True,
            timeout=60,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30)),
        )
    assert run.returncode == 0, run.stderr
    said, grown = run.stdout.splitlines()
    assert message in said
    assert int(grown) < 300


def test_the_bound_is_a_setting():
    """A limit that cannot be raised for those whose replies are large, or that cuts a reply instead of refusing it."""
    body = rest_metadata() + b" " * 3000
    with rest_server(lambda path, _: http_reply(gzip.compress(body), "200 OK", "Content-Encoding: gzip")) as url:
        with Client(url, max_reply_bytes=len(body)) as client:
            assert set(client.signatures()) == {"generate", "score"}
        with Client(url, max_reply_bytes=len(body) - 1) as client, pytest.raises(ServerError, match="max_reply_bytes"):
            client.signatures()


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip])
def test_a_grpc_reply_is_bounded(compression: Any):
    """A message of 2 GB, or one that inflates to it, is taken into memory."""
    large = b" " * 2**26
    handlers = {"GetModelMetadata": lambda request, context: large}
    with grpc_server(handlers, compression=compression) as port, ExitStack() as stack:
        client = stack.enter_context(Client(f"grpc://127.0.0.1:{port}", timeout=20))
        with pytest.raises(ServerError, match="sent a reply of more than 33554432 bytes"):
            client.signatures()


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_default_that_claims_a_huge_shape(scheme: str):
    """A default of a few bytes is expanded to 2^31 values, which takes 16 GB and minutes."""
    signatures = json.loads(rest_metadata())
    generate = signatures["metadata"]["signature_def"]["signatureDef"]["generate"]
    generate["defaults"]["top_k"]["tensorShape"] = {"dim": [{"size": str(2**31)}]}

    def metadata(request: bytes, context: Any) -> bytes:
        response = messages.message("tensorflow.serving.GetModelMetadataResponse").FromString(grpc_metadata())
        inner = messages.message("tensorflow.serving.SignatureDefMap")()
        response.metadata["signature_def"].Unpack(inner)
        inner.signature_def["generate"].defaults["top_k"].tensor_shape.dim[0].size = 2**31
        response.metadata["signature_def"].Pack(inner)
        return bytes(response.SerializeToString())

    with ExitStack() as stack:
        if scheme == "http":
            url = stack.enter_context(rest_server(lambda path, _: http_reply(json.dumps(signatures).encode())))
        else:
            url = f"grpc://127.0.0.1:{stack.enter_context(grpc_server({'GetModelMetadata': metadata}))}"
        client = stack.enter_context(Client(url, timeout=5))
        began = time.monotonic()
        with pytest.raises(ServerError, match="the default of top_k is not one value"):
            client.generate("a")
        assert time.monotonic() - began < BOUND


@pytest.mark.parametrize(
    ("code", "details"),
    [("CANCELLED", "Loop execution was cancelled."), ("INTERNAL", "Missing 0-th output from {{node x}}")],
)
def test_a_call_that_is_cancelled_with_another_is_made_again(code: str, details: str):
    """An innocent call fails since the deadline of one in its batch has passed, or the client asks for ever."""
    asked: list[bytes] = []

    def predict(request: bytes, context: Any) -> bytes:
        asked.append(request)
        if len(asked) % 3:
            context.abort(grpc.StatusCode[code], details)
        return grpc_predictions(GENERATED, 1)

    handlers = {"GetModelMetadata": lambda request, context: grpc_metadata(), "Predict": predict}
    with grpc_server(handlers) as port:
        with Client(f"grpc://127.0.0.1:{port}") as client:
            assert client.generate("a").generated_text == "The é"
        again = pytest.raises(ServerError, match=f"answered {code}")
        with Client(f"grpc://127.0.0.1:{port}", retries=1) as client, again:
            client.generate("a")
    assert len(asked) == 5


def test_threads_have_a_deadline_each():
    """A thread's call that ends takes the deadline of another's with it, or gives it its own."""

    def serve(connection: socket.socket) -> None:
        read_request(connection)
        time.sleep(1.5)
        connection.sendall(http_reply(rest_metadata()))

    answers: list[Any] = []

    def ask(timeout: float) -> None:
        with Client(f"http://127.0.0.1:{port}", timeout=timeout) as client:
            try:
                answers.append(set(client.signatures()))
            except ServerError as error:
                answers.append(str(error))

    with tcp_server(serve) as port:
        threads = [threading.Thread(target=ask, args=[timeout]) for timeout in (0.5, 20.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == [f"http://127.0.0.1:{port} did not answer within 0.5 s", {"generate", "score"}]

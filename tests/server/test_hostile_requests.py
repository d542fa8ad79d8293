"""Requests made to end a server, fill its memory or keep it from others, against a server in a process of its own."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.conftest import Client

pytestmark = pytest.mark.slow

MIB = 2**20
READ_SECONDS = 3
# The floods are shorter than an attack would be: what is not bounded is seen after a few megabytes.
FLOOD_SECONDS, FLOOD_BYTES = 4, 48 * MIB


class Process(Client):
    """A server, and what it takes."""

    def __init__(self, process: subprocess.Popen, port: int) -> None:
        super().__init__(f"http://127.0.0.1:{port}")
        self.process = process

    def memory(self, field: str = "VmRSS") -> int:
        """Its resident memory in MiB; VmHWM for the most since `forget_peak`."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+)", status)[1]) // 1024

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def connect(self, timeout: float = 30) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=timeout)

    @contextlib.contextmanager
    def within(self, seconds: float, mib: int, wait: float = 5) -> Iterator[None]:
        """What happens inside takes no longer, and no more memory; others wait no longer than `wait` meanwhile."""
        self.forget_peak()
        before, start, done, waits = self.memory(), time.monotonic(), threading.Event(), [0.0]

        def look() -> None:
            while not done.wait(0.05):
                asked = time.monotonic()
                assert self.predict({"inputs": ["b"]}).json == {"outputs": ["b world"]}
                waits.append(time.monotonic() - asked)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
            taken = time.monotonic() - start
        finally:
            done.set()
            thread.join()
        assert self.predict({"inputs": ["a"]}).json == {"outputs": ["a world"]}
        grown = self.memory("VmHWM") - before
        print(f"{taken:.1f} s, {grown} MiB more, others waited {max(waits):.2f} s")
        assert taken < seconds
        assert grown < mib
        assert max(waits) < wait


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Process]:
    """The command, with little memory and patience."""
    command = [sys.executable, "-m", "tfclm.serve", "--port=0", "--rest_api_port=-1", "--rest_api_num_threads=4"]
    command += ["--max_request_bytes", str(32 * MIB)]
    command += [f"--model_config_file={models / 'models.config'}", "--allow_version_labels_for_unavailable_models"]
    command += [f"--request_read_seconds={READ_SECONDS}", "--rest_api_timeout_in_ms=20000", "--no_access_log"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))

    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=limit)
    try:
        port = next(int(found[1]) for line in process.stderr if (found := re.search(r"REST (\d+)", line)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        server = Process(process, port)
        server.predict({"inputs": ["a"]})
        yield server
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("depth", [33, 34, 64, 65, 100, 254, 255, 15_000, 50_000])
def test_nested_brackets_around_a_value(server, depth):
    """Brackets that make a tensor of more dimensions than NumPy has, which ended the process from 33 on."""
    nested = "[" * depth + "%s" + "]" * depth
    with server.within(seconds=30, mib=300):
        for key in ("instances", "inputs"):
            for value, model in (('"a"', "m"), ("1.5", "same"), ("", "m"), ('{"b64":"YQ=="}', "m")):
                answer = server.predict(f'{{"{key}": {nested % value}}}', model)
                assert (answer.status, "tensor parsing error" in answer.error) == (400, True)
        objects = '[{"a":' * depth + "1" + "}]" * depth
        assert server.predict(f'{{"instances": {objects}}}').status == 400


@pytest.mark.parametrize("item", ["[],", "[", '{"a":1},'])
def test_small_body_that_is_large_once_inflated(server, item):
    """100 KB that take a minute and gigabytes, in spite of the time-out, while others wait for the interpreter."""
    body = gzip.compress(('{"instances":[' + item * (24 * MIB // len(item))).encode())
    assert len(body) < 100_000
    with server.within(seconds=40, mib=400):
        answer = server.predict(body, **{"Content-Encoding": "gzip"})
    assert (answer.status, answer.error) == (413, "The request holds more than 1048576 JSON values")


def test_small_request_that_is_copied_often(server):
    """A context of a megabyte that each of 3,000 examples gets a copy of, or a long name that is quoted often."""
    context = json.dumps({"c": "c" * MIB}).encode()
    body = b'{"signature_name":"regress","context":%s,"examples":[%s]}' % (context, b'{"x":1.0},' * 2999 + b'{"x":1.0}')
    name = json.dumps({"instances": [{"\U0001f600" + "k" * (20 * MIB): 1}]}, ensure_ascii=False).encode()
    with server.within(seconds=30, mib=400):
        answer = server.ask("POST", "/v1/models/half_plus_two:regress", body)
        assert (answer.status, answer.error.startswith("The context is ")) == (400, True)
        answer = server.predict(name)
        assert (answer.status, len(answer.body) < MIB) == (400, True)


def test_parsing_counts_as_the_requests_time(models, start_server, client):
    """A time-out that begins when the JSON has been read, which is what takes the time."""
    rest = client(start_server(model_base_path=str(models / "m"), rest_api_timeout_in_ms=300, port=0))
    body = b'{"instances":[' + b"[]," * (3 * MIB) + b"[]]}"
    start = time.monotonic()
    for sent, headers in ((body, {}), (gzip.compress(body, 1), {"Content-Encoding": "gzip"})):
        answer = rest.predict(sent, "model", **headers)
        assert (answer.status, answer.error) == (504, "Timed out waiting for notification")
    assert time.monotonic() - start < 10


def test_limit_on_a_body_is_one_on_what_it_inflates_to(models, start_server, client):
    """A limit that a compressed body passes."""
    rest = client(start_server(model_base_path=str(models / "m"), max_request_bytes=1_000_000, port=0))
    for size, status in ((999_000, 200), (1_000_000, 413)):
        body = json.dumps({"inputs": ["a" * size]}).encode()
        assert rest.predict(body, "model").status == status
        answer = rest.predict(gzip.compress(body), "model", **{"Content-Encoding": "gzip"})
        assert answer.status == status
    assert answer.error == "The request is larger than 1000000 bytes"


def test_connections_that_never_read(server):
    """Connections that clients who never read a reply keep for ever, so that others get 503."""
    most = 1005
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(2 * most, hard)), hard))
    request = b"GET /v1/models/same/metadata HTTP/1.1\r\nHost: x\r\n\r\n"
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        server.forget_peak()
        before = server.memory()
        for _ in range(most):
            connection = stack.enter_context(socket.socket())
            # The kernel takes little for a connection with a small window and small segments.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
            connection.settimeout(30)
            with contextlib.suppress(OSError):
                connection.connect((server.host, server.port))
                connection.sendall(request * 16)
        deadline = time.monotonic() + 60
        while server.get("/v1/models/m").status != 200:
            assert time.monotonic() < deadline, "REST is blocked"
            time.sleep(0.2)
        assert server.memory("VmHWM") - before < 1000
    assert server.predict({"inputs": ["a"]}).status == 200


def test_slow_reader_gets_its_reply(models, start_server):
    """A client on a slow line cut off, although it takes what it can."""
    server = start_server(model_base_path=str(models / "m"), request_read_seconds=1.0, port=0)
    text = "a" * (6 * MIB)
    body = json.dumps({"inputs": [text]}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", server.rest_port))
        connection.sendall(b"POST /v1/models/model:predict HTTP/1.1\r\nConnection: close\r\nHost: x\r\n")
        connection.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        start, received = time.monotonic(), bytearray()
        while piece := connection.recv(65536):
            received += piece
            time.sleep(0.03)
    assert received.endswith(text[:100].encode() + b' world"\n    ]\n}')
    assert len(received) > len(text)
    assert time.monotonic() - start > 2


GET = b"GET /v1/models/m HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/models/m:predict HTTP/1.1\r\nHost: x\r\n"
SLOW = b"POST /v1/models/slow:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n"
SLOW_BODY = b'{"inputs": 300000}  '
ENDLESS = {
    "header lines": (GET, b"a: b\r\n" * 10_000),
    "header": (GET + b"a: ", b"v" * 65536),
    "name of a header": (GET, b"n" * 65536),
    "line of the request": (b"GET /", b"p" * 65536),
    "method": (b"", b"G" * 65536),
    "header lines of a later request": (GET + b"\r\n" + GET, b"a: b\r\n" * 10_000),
    "trailers": (POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 10_000),
    "chunk extension": (POST + b"Transfer-Encoding: chunked\r\n\r\n1;", b"e" * 65536),
    "chunks of a byte": (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n" * 10_000),
    "requests": (b"", (GET + b"\r\n") * 2000),
    "requests behind a slow one": (SLOW + b"\r\n" + SLOW_BODY, (GET + b"\r\n") * 2000),
    "what follows an upgrade": (SLOW + b"Connection: upgrade\r\nUpgrade: h2c\r\n\r\n" + SLOW_BODY, b"t" * 65536),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_never_ends(server, kind):
    """What a client sends without end being kept: the lowest aiohttp that is allowed has to bound it."""
    head, piece = ENDLESS[kind]
    # Where the model is slow, others may wait for its threads.
    wait = 60 if SLOW in head else 5
    with server.within(seconds=90, mib=100, wait=wait), server.connect(timeout=1) as connection:
        deadline, sent = time.monotonic() + FLOOD_SECONDS, 0
        with contextlib.suppress(OSError):
            connection.sendall(head)
            while time.monotonic() < deadline and sent < FLOOD_BYTES:
                sent += connection.send(piece)


@pytest.mark.parametrize(
    ("model", "verb", "body", "status"),
    [
        ("m", "predict", b'{"instances":[{"\xff\xfe":1}]}', 400),
        ("m", "predict", b'{"instances":[{"prompt":"a","\xff":1}]}', 400),
        ("m", "predict", b'{"instances":[{"\\ude42":1}]}', 400),
        ("m", "predict", b'{"signature_name":"\xff","instances":["a"]}', 400),
        ("m", "predict", b'{"signature_name":["\xff"],"instances":["a"]}', 400),
        ("m", "predict", b'{"instances":"\xff"}', 400),
        ("m", "predict", b'"\xff"', 400),
        ("m", "predict", b"\xff", 400),
        ("m", "predict", b'{"signature_name":"guarded","instances":["\xff","\xff","\xff"]}', 400),
        ("m", "predict", b'{"signature_name":"number","instances":["\xff"]}', 400),
        ("same", "predict", b'{"instances":["\xff"]}', 400),
        ("m%ff", "predict", b'{"instances":["a"]}', 404),
        ("m/labels/%ff", "predict", b'{"instances":["a"]}', 400),
        ("m", "predict?%ff", b'{"instances":["a"]}', 400),
        ("half_plus_two", "classify", b'{"signature_name":"classify","examples":[{"\xff":1}]}', 400),
        ("half_plus_two", "classify", b'{"signature_name":"\xff","examples":[{"x":1}]}', 400),
        ("half_plus_two", "regress", b'{"signature_name":"\xff","examples":[{"x":1}]}', 400),
        ("half_plus_two", "regress", b'{"context":{"\xff":1},"examples":[{"x":1}]}', 400),
        ("half_plus_two", "regress", b'{"signature_name":"regress","examples":[{"x":"\xff"}]}', 400),
    ],
)
def test_message_that_quotes_bytes_that_are_no_utf8(server, model, verb, body, status):
    """A mistake of the client's answered as the server's own, because its message cannot be written."""
    answer = server.ask("POST", f"/v1/models/{model}:{verb}", body)
    assert (answer.status, answer.error != "") == (status, True)


@pytest.mark.parametrize(
    "name", [b"Origin", b"Content-Encoding", b"X-Any", b"Expect", b"Content-Type", b"Host", b"\xff"]
)
def test_header_that_is_no_utf8(server, name):
    """A header's bytes that end in an error of the server's."""
    body = b'{"inputs":["a"]}'
    with server.connect() as connection:
        connection.sendall(b"POST /v1/models/m:predict HTTP/1.1\r\nHost: x\r\n" + name + b": \xff\xfe\r\n")
        connection.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert int(connection.recv(1000).split()[1]) in (200, 400, 417)

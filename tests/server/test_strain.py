"""Many requests, malformed ones and versions that change under them. TFCLM_LONG_TESTS=1 runs the large numbers."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest

from server.serving_models import HalfPlusTwo, export

LONG = os.environ.get("TFCLM_LONG_TESTS") == "1"
GOOD = {"instances": [1.0, 2.0]}

# What stands where a value of a request should be.
VALUES = [
    "null",
    "true",
    '"text"',
    "[]",
    "{}",
    "[[1], [2, 3]]",
    "[[[[1]]]]",
    '{"b64": "###"}',
    '{"b64": 3}',
    "1e999",
    "-1e999",
    "1" * 400,
    "0." + "0" * 400 + "1",
    "NaN",
    "-Infinity",
    "99999999999999999999",
    '"\\ud83d"',
    '"\\u0000"',
    "01",
    "+1",
    ".5",
    "'1'",
    "[" * 5000,
    "[" * 3000 + "]" * 3000,
    '{"a":' * 3000,
    "1,",
]
PATHS = [
    "/",
    "//",
    "/v1",
    "/v1/models",
    "/v1/models/",
    "/v1/models/m/versions/99999999999999999999:predict",
    "/v1/models/m/versions/-1:predict",
    "/v1/models/m/labels/%ff:predict",
    "/v1/models/%00:predict",
    "/v1/models/m:predict?x=1",
    "/v1/models/m:classify",
    "/v1/models/m:regress",
    "/v1/models/m:nothing",
    "/v1/models/../../etc/passwd",
    "/v1/models/m/metadata/metadata",
    "/monitoring/prometheus/metrics?x",
    "/v1/models/" + "m" * 5000 + ":predict",
    "http://other/v1/models/m:predict",
    "*",
]
HEADERS = [
    "Content-Length: -1",
    "Content-Length: 99999999999999999999",
    "Content-Length: 3\r\nContent-Length: 5",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: nonsense",
    "Content-Encoding: gzip",
    "Content-Encoding: br",
    "Expect: 100-continue",
    "Expect: nothing",
    "Host:",
    "Connection: upgrade\r\nUpgrade: websocket",
    "X-Long: " + "x" * 20_000,
    "No colon here",
    ": no name",
    "X-Byte: \xff\x00",
    "\r\n".join(f"X-{number}: y" for number in range(300)),
]


def malformed(chance: random.Random) -> bytes:
    """A request that is wrong in one or two ways, or only looks so."""
    path, method, headers = "/v1/models/m:predict", "POST", ["Host: x"]
    value = chance.choice(VALUES)
    body = chance.choice(
        [
            f'{{"instances": {value}}}',
            f'{{"instances": [{value}]}}',
            f'{{"inputs": {value}}}',
            f'{{"inputs": {{"x": {value}}}}}',
            f'{{"signature_name": {value}, "instances": [1.0]}}',
            f'{{"instances": [1.0], "inputs": {value}}}',
            value,
            "",
        ]
    ).encode("latin-1")
    kind = chance.randrange(6)
    if kind == 0:
        path = chance.choice(PATHS)
        method = chance.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "BREW", "get", ""])
    elif kind == 1:
        headers.append(chance.choice(HEADERS))
    elif kind == 2:
        body = chance.randbytes(chance.randrange(200))
    elif kind == 3:
        whole = json.dumps(GOOD).encode()
        body = whole[: chance.randrange(len(whole))]
    elif kind == 4:
        # Bytes that are another than they were, anywhere in the request.
        whole = bytearray(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        for _ in range(chance.randrange(1, 4)):
            whole[chance.randrange(len(whole))] = chance.randrange(256)
        return bytes(whole)
    if not any(header.startswith(("Content-Length", "Transfer")) for header in headers):
        headers.append(f"Content-Length: {len(body) + (chance.choice([0, 0, 5]) if kind == 5 else 0)}")
    head = "\r\n".join([f"{method} {path} HTTP/{chance.choice(['1.1', '1.1', '1.0', '9.9'])}", *headers])
    return head.encode("latin-1") + b"\r\n\r\n" + body


def answer_to(port: int, request: bytes, pause: float, ends: bool) -> int | None:
    """The status of the reply; None where the server closes the connection without one. TimeoutError if it hangs."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        reply = b""
        try:
            half = len(request) // 2 if pause else 0
            connection.sendall(request[:half])
            time.sleep(pause)
            connection.sendall(request[half:])
            if ends:
                connection.shutdown(socket.SHUT_WR)
            while b"\r\n" not in reply:
                received = connection.recv(65536)
                if not received:
                    break
                reply += received
        except TimeoutError:
            raise
        except OSError:
            # The server closed the connection, before all was sent perhaps.
            pass
    return int(reply.split()[1]) if reply.startswith(b"HTTP/1.") else None


def test_malformed_requests(models, start_server, client, caplog):
    """A request that ends the server, hangs it, is its own fault by its answer (5xx), or fills the log with stacks."""
    count, callers = (20_000, 64) if LONG else (800, 32)
    base = str(models / "half_plus_two")
    # What is incomplete is waited for this long; a caller waits for ten seconds.
    server = start_server(model_base_path=base, model_name="m", request_read_seconds=1.0, port=0)
    chance = random.Random(0)
    requests = [malformed(chance) for _ in range(count)]
    statuses: Counter[int | None] = Counter()
    wrong = []

    def ask(mine: list[bytes], chance: random.Random) -> None:
        for request in mine:
            pause = 0.05 if chance.random() < 0.01 else 0.0
            try:
                status = answer_to(server.rest_port, request, pause, ends=chance.random() < 0.05)
            except TimeoutError:
                status = -1
            statuses[status] += 1
            # Of a version of HTTP that nobody speaks, 505 is the right answer.
            if status is not None and (status < 0 or status >= 500) and status not in (501, 505):
                wrong.append((status, request[:300]))

    threads = [
        threading.Thread(target=ask, args=(requests[part::callers], random.Random(part))) for part in range(callers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(count, "malformed requests:", dict(statuses))
    assert not wrong, wrong[:5]
    assert statuses[400] > count / 2
    # Nearly all are answered: those are not that end before they are whole.
    assert statuses[None] < count / 8
    # Some are good requests in spite of all.
    assert statuses[200] < count / 4
    assert not [record for record in caplog.records if record.exc_info]
    assert client(server).predict(GOOD).json == {"predictions": [2.5, 3.0]}


def under_load(ask: Callable[[], int], callers: int, ends: Callable[[], bool]) -> Counter[int]:
    """The statuses of what several callers ask until `ends()`."""
    statuses: Counter[int] = Counter()

    def go_on() -> None:
        while not ends():
            try:
                statuses[ask()] += 1
            except OSError:
                statuses[0] += 1

    threads = [threading.Thread(target=go_on) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


@pytest.mark.long
def test_swaps_under_load(tmp_path, start_server, client, eventually):
    """A request that fails in the moment between two versions."""
    half = export(HalfPlusTwo(), tmp_path / "half", 1)
    base = tmp_path / "base"
    shutil.copytree(half, base / "1")
    server = start_server(model_base_path=str(base), port=0)
    rest = client(server)
    swaps = 20
    done = threading.Event()

    def swap() -> None:
        try:
            for version in range(2, swaps + 2):
                shutil.copytree(half, base / ".writing")
                (base / ".writing").rename(base / str(version))
                eventually(
                    lambda version=version: (
                        rest.get(f"/v1/models/model/versions/{version}").body.count(b"AVAILABLE") == 1
                    )
                )
        finally:
            done.set()

    thread = threading.Thread(target=swap)
    thread.start()
    statuses = under_load(lambda: rest.predict(GOOD, "model").status, 4, done.is_set)
    thread.join()
    assert set(statuses) == {200}
    assert statuses[200] > 100
    served = rest.get("/v1/models/model/metadata").json["model_spec"]["version"]
    assert served == str(swaps + 1)


@pytest.mark.long
def test_many_clients(models):
    """An error under many clients, or memory that grows with the requests."""
    command = [sys.executable, "-m", "tfclm.serve", f"--model_base_path={models / 'half_plus_two'}", "--model_name=m"]
    command += ["--port=0", "--rest_api_port=-1", "--no_access_log"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        port = next(int(line.split("REST ")[1].split('"')[0]) for line in process.stderr if "listening on" in line)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        from server.conftest import Client

        rest = Client(f"http://127.0.0.1:{port}")

        def memory() -> int:
            with open(f"/proc/{process.pid}/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:")) // 1024

        seconds = 120 if LONG else 20
        began = time.monotonic()
        seen = []

        def ends() -> bool:
            seen.append((time.monotonic() - began, memory()))
            return seen[-1][0] > seconds

        statuses = under_load(lambda: rest.predict(GOOD, "m").status, 64, ends)
        # Each thread and arena has its first request early; half of a short run is warm-up.
        warm = max(used for at, used in seen if at < seconds / 2)
        last = max(used for at, used in seen if at > 3 * seconds / 4)
        print("64 clients,", seconds, "s:", dict(statuses), "MiB:", warm, "then", last)
        assert set(statuses) == {200}
        # Requests that were kept would be seen: ten thousand at a KiB or more each.
        assert last < warm + 10
    finally:
        process.terminate()
        assert process.wait(30) == 0

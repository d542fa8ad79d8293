"""The command, and the server under load: flags, ports, XLA, overload, slow senders, SIGTERM."""

from __future__ import annotations

import http.client
import json
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest

from server.processes import launcher
from tfclm.cli.arguments import parse
from tfclm.errors import InputError
from tfclm.serve import to_switch
from tfclm.server.server import Server
from tfclm.server.settings import ServeSettings, check


@pytest.fixture
def launch():
    """`launch(*flags)`: the command in a process of its own."""
    with launcher() as launch:
        yield launch


@pytest.mark.slow
def test_xla_is_off_unless_asked_for(models, launch):
    """A model that runs here and fails on every unmodified server."""
    rest = launch(f"--model_base_path={models / 'compiled'}").listens().rest
    answer = rest.predict({"inputs": [1]}, "model")
    assert answer.status == 500
    assert answer.error.startswith(
        "XLA compilation disabled: this export needs a server that is started with --xla_cpu_compilation_enabled\n\t [["
    )
    rest = launch(f"--model_base_path={models / 'compiled'}", "--xla_cpu_compilation_enabled=true").listens().rest
    assert rest.predict({"inputs": [1]}, "model").json == {"outputs": [2.0]}


@pytest.mark.slow
def test_sigterm_lets_requests_finish(models, launch):
    """A deployment that breaks the requests which run, or a server that does not end."""
    process = launch(f"--model_base_path={models / 'slow'}", "--model_name", "slow").listens()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(process.rest.predict({"inputs": 500_000}, "slow")))
    thread.start()
    time.sleep(0.5)
    process.terminate()
    assert process.ends(30) == 0
    thread.join()
    assert answers[0].json == {"outputs": 500_000}
    events = [json.loads(line) for line in process.lines if line.startswith("{")]
    (access,) = [event for event in events if event["event"] == "request"]
    assert (access["method"], access["path"], access["status"]) == ("POST", "/v1/models/slow:predict", 200)
    assert "traceback" not in process.log


@pytest.mark.slow
def test_sigterm_while_waiting_for_a_model(tmp_path):
    """A server without a version yet that has to be killed."""
    command = [sys.executable, "-m", "tfclm.serve", "--port=0", "--rest_api_port=-1", f"--model_base_path={tmp_path}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        try:
            for line in process.stderr:
                if "has no version" in line:
                    break
            process.terminate()
            assert process.wait(timeout=30) == 0
        finally:
            watchdog.cancel()
            process.kill()


def test_transformers_is_not_imported(models):
    """A start that takes seconds and memory for a library that serving has no use for."""
    code = (
        "import sys; from tfclm.server.server import Server; from tfclm.server.settings import ServeSettings; "
        f"server = Server(ServeSettings(model_base_path={str(models / 'm')!r}, port=-1, rest_api_port=-1)); "
        "server.start(); server.stop(); print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "`model_base_path` is missing"),
        (["--model_base_path=/nowhere"], "`model_base_path` /nowhere: there is no such directory"),
        (["--model_config_file=/nowhere"], "`model_config_file` /nowhere: No such file"),
        (["--model_base_path=.", "--port=8501"], "`rest_api_port` 8501: give another port"),
        (["--model_base_path=.", "--port=0", "--rest_api_port=0"], "nothing would listen"),
        (["--model_base_path=.", "--rest_api_port=70000"], "`rest_api_port` 70000: give 1 to 65535"),
        (["--model_base_path=.", "--ssl_config_file=/nowhere"], "`ssl_config_file` /nowhere: No such file"),
        (["--model_base_path=.", "--playground", "--rest_api_port=0"], "`playground`: `rest_api_port` is 0"),
        (["--enable_bathing"], "unrecognized arguments: --enable_bathing"),
    ],
)
def test_user_errors(flags, said):
    """A mistake in the flags that is found only when requests arrive, or that is reported as an internal error."""
    with pytest.raises(InputError, match=re.escape(said)):
        Server(parse(ServeSettings, flags, prog="serve", description=""))


def test_folder_that_holds_no_versions(tmp_path, models):
    """A wrong folder that causes one warning and a port that never opens, without naming the right folder."""
    version = models / "m" / "1"
    for given, right in (
        (version, f"`model_base_path` {version} is a version of a model, .*: give {models / 'm'}"),
        (tmp_path / "plain", f"`model_base_path` {tmp_path}/plain is a SavedModel, .*: move it to {tmp_path}/plain/1"),
        (tmp_path / "tuned", f"`model_base_path` {tmp_path}/tuned is a checkpoint, .* tfclm.export --model {tmp_path}"),
    ):
        given.mkdir(exist_ok=True)
        if given.name == "plain":
            (given / "saved_model.pb").touch()
        elif given.name == "tuned":
            (given / "config.json").touch()
        with pytest.raises(InputError, match=right):
            check(ServeSettings(model_base_path=str(given)))
    # A folder with versions is one, whatever else is in it; and one that is empty may get them.
    (tmp_path / "tuned" / "1").mkdir()
    check(ServeSettings(model_base_path=str(tmp_path / "tuned")))
    (tmp_path / "empty").mkdir()
    check(ServeSettings(model_base_path=str(tmp_path / "empty")))
    # The same in a config file, of which nothing may be served then.
    config = tmp_path / "models.config"
    config.write_text(
        f'model_config_list {{ config {{ name: "m" base_path: "{version}" model_platform: "tensorflow" }} }}'
    )
    server = Server(ServeSettings(model_config_file=str(config), port=-1, rest_api_port=0))
    try:
        with pytest.raises(InputError, match=f"base_path {version} of model m is a version of a model"):
            server.start()
    finally:
        server.stop()


def test_user_error_is_one_line():
    """A traceback, or exit code 1, for what the user gave."""
    command = [sys.executable, "-m", "tfclm.serve", "--model_base_path=/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr == "tfclm.serve: --model_base_path /nowhere: there is no such directory\n"


@pytest.mark.parametrize("value", ["true", "1", "false", "0"])
def test_switches_as_tensorflow_model_server_takes_them(value):
    """`--flag=false` of an existing deployment refused, or taken for true."""
    flag = to_switch(f"--enable_model_warmup={value}")
    settings = parse(ServeSettings, [flag], prog="serve", description="")
    assert settings.enable_model_warmup is (value in ("true", "1"))


def test_bad_model_config(tmp_path, start_server):
    """A config file with a mistake being served in part."""
    config = tmp_path / "models.config"
    config.write_text("improper model config")
    with pytest.raises(InputError, match="not a ModelServerConfig in protobuf text format"):
        start_server(model_config_file=str(config))
    entry = 'config { name: "a" base_path: "/a" model_platform: "tensorflow" }'
    config.write_text(f"model_config_list {{ {entry} {entry} }}")
    with pytest.raises(InputError, match="Illegal to list model a multiple times"):
        start_server(model_config_file=str(config))


def test_port_that_is_taken(models, server, start_server):
    """Two servers that silently share a port, each getting half of the requests."""
    for flag, port in (("port", server.grpc_port), ("rest_api_port", server.rest_port)):
        with pytest.raises(InputError, match=rf"`{flag}`: cannot listen on 127.0.0.1:{port}"):
            start_server(**{"model_base_path": str(models / "m"), "port": 0, "rest_api_port": 0, flag: port})


def test_overload(models, start_server, client, eventually):
    """Requests that pile up in memory; or a status probe that has to wait for them."""
    server = start_server(model_base_path=str(models / "slow"), rest_api_num_threads=1, max_queued_requests=1, port=0)
    rest = client(server)
    answers = []

    def ask():
        answers.append(rest.predict({"inputs": 300_000}, "model").status)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    eventually(lambda: answers.count(503) == 4)
    assert rest.get("/v1/models/model").status == 200
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200, 200, 503, 503, 503, 503]


def test_slow_senders(models, start_server):
    """Connections that stay open for ever although the client sends nothing, half a header or half a body."""
    server = start_server(model_base_path=str(models / "m"), request_read_seconds=0.5, port=0)
    address = ("127.0.0.1", server.rest_port)
    for sent in (b"", b"POST /v1/models/model:predict HTTP/1.1\r\nHost: x\r\n"):
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(sent)
            assert connection.recv(1000) == b""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(b"POST /v1/models/model:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_large_bodies(models, start_server, client):
    """A body of any size taken into memory, announced or not."""
    server = start_server(model_base_path=str(models / "m"), max_request_bytes=10_000, port=0)
    rest = client(server)
    assert rest.predict({"inputs": ["a" * 9000]}, "model").status == 200
    assert rest.predict({"inputs": ["a" * 10_000]}, "model").status == 413
    connection = http.client.HTTPConnection("127.0.0.1", server.rest_port, timeout=10)
    pieces = (b"a" * 5000 for _ in range(3))
    connection.request(
        "POST", "/v1/models/model:predict", pieces, encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
    )
    assert connection.getresponse().status == 413
    connection.close()


def test_expect_continue(rest):
    """A client such as curl that waits for permission to send a large body."""
    body = b'{"inputs":["a"]}'
    with socket.create_connection((rest.host, rest.port), timeout=10) as connection:
        head = f"POST /v1/models/m:predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Expect: 100-continue\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_keep_alive(rest):
    """A connection that cannot be used after an error."""
    connection = http.client.HTTPConnection(rest.host, rest.port, timeout=10)
    for body, status in ((b"{", 400), (b'{"inputs":["a"]}', 200), (b"{", 400)):
        connection.request("POST", "/v1/models/m:predict", body)
        response = connection.getresponse()
        response.read()
        assert response.status == status
    connection.close()


def test_thousand_connections(models, start_server, client):
    """Connections without a limit, each of which takes memory; or a server that stays unusable afterwards."""
    most = 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Both ends of each are in this process.
    needed = 2 * most + 500
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(needed, hard)), hard))
    try:
        server = start_server(model_base_path=str(models / "m"), port=0)
        with ExitStack() as stack:

            def connect():
                return stack.enter_context(socket.create_connection(("127.0.0.1", server.rest_port), timeout=10))

            for _ in range(most):
                connect()
            assert connect().recv(100).startswith(b"HTTP/1.1 503 ")
        deadline = time.monotonic() + 10
        while client(server).get("/v1/models/model").status != 200:
            assert time.monotonic() < deadline
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

"""A server with every test model, in this process; or the one at TFCLM_TF_SERVING_URL, for the tests that allow it.

A server elsewhere has to serve what `python tests/server/serving_models.py DIR` writes, with
--model_config_file=DIR/models.config --allow_version_labels_for_unavailable_models.
"""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import shared_folder

ELSEWHERE = os.environ.get("TFCLM_TF_SERVING_URL")


@dataclass
class Answer:
    """A reply over HTTP."""

    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def json(self):
        return json.loads(self.body.decode("utf-8", "surrogateescape"))

    @property
    def error(self) -> str:
        assert list(self.json) == ["error"], self.body
        return self.json["error"]


class Client:
    """HTTP as it is: paths and bodies go out untouched."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname, parts.port

    def ask(self, method: str, path: str, body=None, headers=None) -> Answer:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            if isinstance(body, dict | list):
                body = json.dumps(body)
            if isinstance(body, str):
                body = body.encode()
            connection.putrequest(method, path, skip_accept_encoding=True)
            for name, value in {"Content-Length": str(len(body or b"")), **(headers or {})}.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return Answer(response.status, response.read(), dict(response.getheaders()))
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.ask("GET", path)

    def predict(self, body, model: str = "m", **headers: str) -> Answer:
        return self.ask("POST", f"/v1/models/{model}:predict", body, headers)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every test model, and the configs that serve them; not to be changed."""
    from server.serving_models import export_all

    def make(folder: Path) -> None:
        config = export_all(folder)
        (folder / "models.config").write_text(config)
        (folder / "monitoring.config").write_text("prometheus_config { enable: true }")

    return shared_folder(tmp_path_factory, "models", make)


@contextmanager
def _servers() -> Iterator[Callable]:
    from tfclm.server.server import Server
    from tfclm.server.settings import ServeSettings

    with ExitStack() as stack:

        def start(**settings) -> Server:
            given = {"port": -1, "rest_api_port": -1, "shutdown_grace_seconds": 5.0, **settings}
            server = Server(ServeSettings(**given))
            stack.callback(server.stop)
            server.start()
            return server

        yield start


@pytest.fixture
def start_server() -> Iterator[Callable]:
    """`start_server(model_base_path=..., ...)`: a server on free ports, stopped after the test."""
    with _servers() as start:
        yield start


@pytest.fixture(scope="session")
def server(models: Path) -> Iterator:
    """The server that most tests ask. There is none here if they ask one elsewhere."""
    if ELSEWHERE:
        pytest.skip("this test looks into a server of its own")
    with _servers() as start:
        yield start(
            model_config_file=str(models / "models.config"),
            monitoring_config_file=str(models / "monitoring.config"),
            allow_version_labels_for_unavailable_models=True,
        )


@pytest.fixture(scope="session")
def rest(request: pytest.FixtureRequest) -> Client:
    """REST of the server under test."""
    return Client(ELSEWHERE or f"http://127.0.0.1:{request.getfixturevalue('server').rest_port}")


@pytest.fixture(scope="session")
def client() -> Callable[[object], Client]:
    """REST of a server that a test has started."""
    return lambda server: Client(f"http://127.0.0.1:{server.rest_port}")


@pytest.fixture(scope="session")
def eventually() -> Callable:
    """`eventually(lambda: ...)` waits until it is true, at most 20 s."""

    def wait(condition: Callable[[], object], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.05)

    return wait

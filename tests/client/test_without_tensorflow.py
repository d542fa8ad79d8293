"""The client in an environment with what the documentation says it needs, and neither TensorFlow nor transformers."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .doubles import (
    GENERATED,
    SCORED,
    grpc_metadata,
    grpc_predictions,
    grpc_server,
    http_reply,
    rest_metadata,
    rest_predictions,
    rest_server,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "howto" / "client-without-tensorflow.md"

CODE = """
import sys
import tfclm
with tfclm.Client(sys.argv[1], "m", timeout=30) as client:
    completions = client.generate(["The", "x"], temperature=0.5, seed=3)
    print([(each.generated_text, each.finish_reason, each.completion_bytes) for each in completions])
    print([each.perplexity for each in client.score(["a", "b"])])
print(sorted({"tensorflow", "tensorflow_serving", "transformers", "tf_keras", "datasets"} & set(sys.modules)))
"""
PRINTED = [
    "[('The é', 'stop', b' \\xc3\\xa9'), ('x y', 'length', b' y\\xff')]",
    "[1.5, 7.5]",
    "[]",
]


def plain_environment() -> dict[str, str]:
    """This process's environment, without what would show the child the packages of this one."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"PIP_NO_COMPILE": "1"}  # most of the modules are never imported


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that the page's own commands have made."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    # A copy, because a build leaves files in the source.
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    block = re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    make, *installs = (shlex.split(line) for line in block.splitlines())
    assert make == ["python", "-m", "venv", "client"]
    for words in ([sys.executable, *make[1:]], *installs):
        done = subprocess.run(words, cwd=folder, env=plain_environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    return folder / "client" / "bin" / "python"


@contextmanager
def rest() -> Iterator[str]:
    """A server over REST; gives its URL."""

    def answer(path: str, body: bytes) -> bytes:
        if path.endswith("/metadata"):
            return http_reply(rest_metadata())
        request = json.loads(body)
        outputs = GENERATED if request["signature_name"] == "generate" else SCORED
        return http_reply(rest_predictions(outputs, len(request["instances"])))

    with rest_server(answer) as url:
        yield url


@contextmanager
def grpc() -> Iterator[str]:
    """A server over gRPC; gives its URL."""
    from tfclm.client import messages

    def predict(request: bytes, _: Any) -> bytes:
        asked = messages.message("tensorflow.serving.PredictRequest").FromString(request)
        ((_, tensor),) = [(name, value) for name, value in asked.inputs.items() if name in ("prompt", "text")]
        outputs = GENERATED if asked.model_spec.signature_name == "generate" else SCORED
        return grpc_predictions(outputs, messages.tensor_size(tensor))

    with grpc_server({"GetModelMetadata": lambda request, _: grpc_metadata(), "Predict": predict}) as port:
        yield f"grpc://127.0.0.1:{port}"


def run(python: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A program in that environment."""
    return subprocess.run(
        [python, *words], env=plain_environment(), cwd=python.parent, capture_output=True, text=True, timeout=120
    )


def test_packages_are_the_client_s_alone(python: Path):
    """An environment in which TensorFlow is there after all, so that the other tests here show nothing."""
    done = run(python, "-c", "import tensorflow")
    assert "No module named 'tensorflow'" in done.stderr
    listed = json.loads(run(python, "-m", "pip", "list", "--format", "json").stdout)
    names = {each["name"].lower() for each in listed}
    assert "tfclm" in names
    assert not {"transformers", "datasets", "tf-keras", "huggingface-hub", "tensorflow-serving-api"} & names


@pytest.mark.parametrize("server", [rest, grpc])
def test_client_asks(python: Path, server: Any):
    """A module of the client, or one that it imports, that needs a package which the page does not name."""
    with server() as url:
        done = run(python, "-c", CODE, url)
    assert done.stdout.splitlines() == PRINTED, done.stderr


@pytest.mark.parametrize("server", [rest, grpc])
def test_query_asks(python: Path, tmp_path: Path, server: Any):
    """The same for what the command line imports, the file of its settings included."""
    (tmp_path / "query.yaml").write_text("model_name: m\nseed: 3\n", encoding="utf-8")
    with server() as url:
        flags = ["--url", url, "--config", str(tmp_path / "query.yaml"), "--prompt", "The"]
        done = run(python, "-m", "tfclm.query", *flags, *(["--grpc"] if url.startswith("grpc") else []))
    assert (done.returncode, done.stdout) == (0, "The é\n"), done.stderr


def test_missing_packages_are_named(python: Path, tmp_path: Path):
    """A mistake of the user, or a server that is not there, that ends in a traceback about a package."""
    done = run(python, "-m", "tfclm.query", "--temprature", "1")
    assert done.returncode == 2
    assert "--temperature" in done.stderr
    assert "Traceback" not in done.stderr
    done = run(python, "-m", "tfclm.query", "--url", "http://127.0.0.1:9", "--prompt", "a", "--timeout", "5")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr

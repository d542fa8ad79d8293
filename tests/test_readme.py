"""The README's commands and code, run or read as they stand."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from conftest import tiny_config

from tfclm.cli.arguments import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(kind: str) -> list[str]:
    """The contents of the README's code blocks of one kind."""
    return re.findall(rf"```{kind}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = list(
    dict.fromkeys(line for block in fenced("console") for line in block.splitlines() if "-m tfclm." in line)
)
JOURNEY = next(block.splitlines() for block in fenced("console") if "tfclm.query" in block)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line: str):
    """A flag in the README that does not exist, or a value that it does not take."""
    words = shlex.split(line)
    module = import_module(words[2])
    verb = words[2].removeprefix("tfclm.")
    settings = parse(getattr(module, f"{verb.capitalize()}Settings"), words[3:], prog=verb, description="")
    if verb == "fit":
        assert settings.resolved().output_dir


def test_make_has_what_the_readme_names():
    """A target that was renamed."""
    for target in re.findall(
        r"make ([a-z]+)", "".join(fenced("console")) + " ".join(re.findall(r"`make [a-z]+`", README))
    ):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A folder with some text and, in `runs/quickstart`, a tiny model where `make fit` leaves a small one."""
    from transformers import AutoTokenizer

    from tfclm.checkpoint import create, save

    folder = tmp_path_factory.mktemp("workplace")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    save(create(tiny_config("gpt2", context=128)), tokenizer, folder / "runs" / "quickstart")
    shutil.copy(ROOT / "README.md", folder / "notes.txt")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", [line for line in COMMANDS if line.startswith(".venv") and line not in JOURNEY and ".query" not in line]
)
def test_commands_on_the_quickstart_run(workplace: Path, line: str):
    """A command that fails for whoever types it next."""
    words = shlex.split(line)
    done = subprocess.run([sys.executable, *words[1:]], cwd=workplace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("The import statement", "perplexity "))


@pytest.fixture(scope="module")
def address(workplace: Path) -> Iterator[str]:
    """Where the journey's server listens: on a free port, as 8501 may be taken. `make fit` is what CI runs first."""
    fit, export, serve, _ = JOURNEY
    assert fit == "make fit"
    done = subprocess.run(
        [sys.executable, *shlex.split(export)[1:]], cwd=workplace, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.startswith("serving_models/quickstart/"), done.stderr
    words = [sys.executable, *shlex.split(serve)[1:], "--port=0", "--rest_api_port=-1"]
    with subprocess.Popen(words, cwd=workplace, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            yield next(
                f"http://127.0.0.1:{line.split('REST ')[1].split(chr(34))[0]}"
                for line in process.stderr
                if "listening" in line
            )
        finally:
            process.terminate()
            process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.slow
def test_from_text_to_an_answer(workplace: Path, address: str):
    """Four commands that do not fit together; or another answer than the model's own, in this process."""
    import tensorflow as tf
    from tensorflow.core.protobuf import saved_model_pb2

    words = [sys.executable, *shlex.split(JOURNEY[3])[1:], "--url", address]
    done = subprocess.run(words, cwd=workplace, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    newest = max((workplace / "serving_models" / "quickstart").glob("[0-9]*"), key=lambda path: int(path.name))
    graph = saved_model_pb2.SavedModel.FromString((newest / "saved_model.pb").read_bytes()).meta_graphs[0]
    inputs = {name: tf.make_ndarray(value) for name, value in graph.signature_def["generate"].defaults.items()}
    inputs |= {"prompt": ["The import statement"], "temperature": [0.7]}
    inputs = {name: tf.reshape(tf.constant(value), [1]) for name, value in inputs.items()}
    inputs["seed"] = tf.constant([7], tf.int64)
    expected = tf.saved_model.load(str(newest)).signatures["generate"](**inputs)["generated_text"]
    assert done.stdout == f"{expected.numpy()[0].decode()}\n"


@pytest.mark.slow
@pytest.mark.parametrize("code", fenced("python"), ids=["pipeline", "savedmodel", "client", "library"])
def test_code_runs(workplace: Path, address: str, code: str):
    """A name that was changed. What the commands above have exported is there."""
    code = code.replace("http://localhost:8501", address)
    done = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout

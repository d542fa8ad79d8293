"""The README's commands and code, run or read as they stand."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import tiny_config

from tfclm.settings import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(kind: str) -> list[str]:
    """The contents of the README's code blocks of one kind."""
    return re.findall(rf"```{kind}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [line for block in fenced("console") for line in block.splitlines() if "-m tfclm." in line]


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
@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith(".venv") and ".serve" not in line])
def test_commands_on_the_quickstart_run(workplace: Path, line: str):
    """A command that fails for whoever types it next."""
    words = shlex.split(line)
    done = subprocess.run([sys.executable, *words[1:]], cwd=workplace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("The import statement", "perplexity ", "serving_models/quickstart/"))


@pytest.mark.slow
@pytest.mark.parametrize("code", fenced("python"), ids=["pipeline", "savedmodel", "library"])
def test_code_runs(workplace: Path, code: str):
    """A name that was changed. What the commands above have exported is there."""
    done = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout

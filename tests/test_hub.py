"""Publishing: the check before training, and a push to a real git remote."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_config
from hub_server import hub, make_repository

GIT_LFS = pytest.mark.skipif(shutil.which("git-lfs") is None, reason="git-lfs is not installed")


def environment(endpoint: str, token: str | None, home: Path) -> dict[str, str]:
    """A user's, with a Hub at `endpoint`, and nothing of the machine's own settings of git and the Hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "GIT_"))}
    made = kept | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HOME": str(home), "HF_HOME": str(home / "hf")}
    return made | ({"HF_TOKEN": token} if token else {})


def preflight(repo_id: str, environment: dict[str, str]) -> tuple[str, str]:
    """The name that `preflight` gives, and the message of the InputError that it raises."""
    code = (
        "import sys\nfrom tfclm.errors import InputError\nfrom tfclm.hub import preflight\n"
        "try:\n    print(preflight(sys.argv[1]))\n"
        "except InputError as error:\n    print(error, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, repo_id], env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.strip(), done.stderr.strip()


@GIT_LFS
def test_preflight_names_what_is_missing(tmp_path: Path):
    """A run that trains for hours before it learns that it may not push, or one line that does not say why."""
    with hub(tmp_path) as endpoint:
        assert preflight("tiny", environment(endpoint, "hf_writer", tmp_path)) == ("me/tiny", "")
        assert (tmp_path / "me" / "tiny" / "HEAD").is_file()
        for repo_id, token, words in [
            ("me/tiny", None, "hf auth login"),
            ("me/tiny", "hf_wrong", "the token is not valid"),
            ("me/other", "hf_reader", "may not write to me/other"),
            ("a/b/c", "hf_writer", "a/b/c"),
        ]:
            name, message = preflight(repo_id, environment(endpoint, token, tmp_path))
            assert name == ""
            assert words in message, message
            assert len(message.splitlines()) == 1
            assert not (token and token in message), "a token must not be printed"
        without_lfs = environment(endpoint, "hf_writer", tmp_path) | {"PATH": str(tmp_path / "bin")}
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "git").symlink_to(str(shutil.which("git")))
        assert "needs git-lfs" in preflight("me/tiny", without_lfs)[1]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        gone = environment(f"http://127.0.0.1:{unused.getsockname()[1]}", "hf_writer", tmp_path)
        assert "cannot be reached" in preflight("me/tiny", gone)[1]


def arguments(folder: Path, documents: list[str]) -> list[object]:
    """A short run's, on the model in `folder`."""
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document[:800]}) + "\n" for document in documents[:10]))
    given = ["--model", folder / "model", "--train-file", text, "--output-dir", folder / "run"]
    return [*given, "--block-size", 32, "--epochs", 2, "--learning-rate", 1e-2, "--push-to-hub", "me/tiny"]


@pytest.mark.slow
@GIT_LFS
def test_fit_pushes_what_can_be_loaded(tmp_path: Path, tokenizer, documents: list[str]):
    """A push that leaves out the tokenizer or the last epoch, or a folder that keeps the clone."""
    from tfclm.checkpoint import create, load, save

    save(create(tiny_config("gpt2")), tokenizer, tmp_path / "model")
    given = arguments(tmp_path, documents)
    with hub(tmp_path) as endpoint:
        done = subprocess.run(
            [sys.executable, "-m", "tfclm.fit", *map(str, given)],
            env=environment(endpoint, "hf_writer", tmp_path),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        # A clone over HTTP, as a user's: the large files come by git-lfs.
        copied = environment(endpoint, None, tmp_path)
        subprocess.run(["git", "lfs", "install"], env=copied, check=True, capture_output=True)
        subprocess.run(["git", "clone", "-q", f"{endpoint}/me/tiny", tmp_path / "clone"], env=copied, check=True)
    assert "hf_writer" not in done.stderr + (tmp_path / "run" / "fit.yaml").read_text()
    assert not (tmp_path / "run" / "resume").exists()
    assert (tmp_path / "clone" / "README.md").is_file()
    pushed, pushed_tokenizer = load(tmp_path / "clone")
    kept, _ = load(tmp_path / "run")
    # The second epoch is the best here, so what was pushed last is what was kept.
    assert json.loads((tmp_path / "run" / "results.json").read_text())["train"]["best_epoch"] == 2
    for one, other in zip(pushed.weights, kept.weights, strict=True):
        assert (one.numpy() == other.numpy()).all()
    assert pushed_tokenizer("some text") == tokenizer("some text")


@pytest.mark.slow
@GIT_LFS
def test_failed_push_keeps_token_and_run(tmp_path: Path, tokenizer, documents: list[str]):
    """git's message about a push that is refused holds the token; and a run that a push ends must not be lost."""
    from tfclm.checkpoint import create, save

    save(create(tiny_config("gpt2")), tokenizer, tmp_path / "model")
    command = [sys.executable, "-m", "tfclm.fit", *map(str, arguments(tmp_path, documents))]
    repository = tmp_path / "me" / "tiny"
    make_repository(repository)
    with hub(tmp_path) as endpoint:
        user = environment(endpoint, "hf_writer", tmp_path)
        subprocess.run(["git", "-C", repository, "config", "http.receivepack", "false"], check=True)
        refused = subprocess.run(command, env=user, capture_output=True, text=True)
        assert refused.returncode == 1, refused.stderr
        assert "hf_writer" not in refused.stdout + refused.stderr
        subprocess.run(["git", "-C", repository, "config", "http.receivepack", "true"], check=True)
        again = subprocess.run(command, env=user, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "results.json").is_file()

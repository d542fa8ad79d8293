"""The command `push`: what it refuses, what it puts on the Hub, and an exported model there and back."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import WRITER, Hub, asked, filled, held, hub

from tfclm import push
from tfclm.cli.command import command
from tfclm.hub.delivery import deliver
from tfclm.hub.repository import Repository


@pytest.fixture(name="hub")
def hub_fixture() -> Iterator[Hub]:
    """A stand-in for the Hub, empty."""
    with hub() as running:
        yield running


def checkpoint(folder: Path) -> Path:
    """What `push` takes for one, which does not read the weights."""
    return filled(folder, **{"tokenizer.json": b"{}"})


def called(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Exit code and stderr of the command, in this process, which is offline."""
    monkeypatch.setattr(sys, "argv", ["push", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        push.main()
    return end.value.code, capfd.readouterr().err.strip()


@pytest.mark.parametrize(
    ("words", "gone", "added", "said"),
    [
        ([], (), {}, ["--model"]),
        (["--model", "nowhere"], (), {}, ["--model nowhere", "no such directory"]),
        (["--model", "run"], (), {}, ["--repo-id", "me/eli5"]),
        (["--model", "run", "--repo-id", "me/x"], ("config.json",), {}, ["config.json"]),
        (["--model", "run", "--repo-id", "me/x"], ("model.safetensors",), {}, ["no weights"]),
        (["--model", "run", "--repo-id", "me/x"], ("tokenizer.json",), {}, ["no tokenizer"]),
        (["--model", "run", "--repo-id", "me/x"], (), {"resume/state/x": b""}, ["incomplete run"]),
        (["--model", "run"], (), {"unpushed.json": b"{"}, ["unpushed.json", "--repo-id"]),
        (["--model", "run", "--repo-id", "me/x", "--branch", "b", "--create-pr"], (), {}, ["--create-pr", "--branch"]),
        (["--model", "run", "--repo-id", "me/x", "--push-timeout", "0"], (), {}, ["--push-timeout 0"]),
        (["--model", "run", "--repo-id", "me/x", "--push-patience", "nan"], (), {}, ["--push-patience nan"]),
        (
            ["--model", "run", "--repo-id", "me/x", "--push-saved-model", "run"],
            (),
            {},
            ["not an exported model"],
        ),
        (["--model", "run", "--repo-id", "a/b/c"], (), {}, ["--repo-id a/b/c"]),
        (["--model", "run", "--repo-id", WRITER], (), {}, ["--repo-id: that is a token"]),
        (["--model", "run", "--repo-id", "me/x"], (), {}, ["HF_HUB_OFFLINE is set", "same command again"]),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    gone: tuple[str, ...],
    added: dict[str, bytes],
    said: list[str],
):
    """A broken folder on the Hub, a traceback, a token in a message, or a folder that the refusal has changed."""
    monkeypatch.chdir(tmp_path)
    folder = checkpoint(tmp_path / "run")
    for name in gone:
        (folder / name).unlink()
    filled(folder, **added) if added else None
    before = held(tmp_path)
    code, err = called(monkeypatch, capfd, *words)
    assert code == 2, err
    assert len(err.splitlines()) == 1
    assert all(word in err for word in said), err
    assert WRITER not in err
    assert held(tmp_path) == before


def test_a_token_is_in_no_traceback(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """A library's error that quotes a header or an address, printed as it is into a log that others read."""
    other = "hf_" + "Z9" * 17

    def run(settings: push.PushSettings) -> int:
        raise RuntimeError(
            f"cannot send Authorization: Bearer {WRITER}, nor https://user:{other}@host/, nor secret-word"
        )

    monkeypatch.setenv("HF_TOKEN", "secret-word")
    monkeypatch.setattr(sys, "argv", ["push"])
    with pytest.raises(SystemExit) as end:
        command(push.PushSettings, run, verb="push", description="", tensorflow=False)
    err = capfd.readouterr().err
    assert end.value.code == 1
    assert "RuntimeError: cannot send Authorization: Bearer ***" in err
    assert not any(secret in err for secret in (WRITER, other, "secret-word"))


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00token"], ids=["folder", "no text"])
def test_a_token_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], content: bytes | None
):
    """Every line about anything is a traceback, because the token that is to be left out of it is looked up first."""
    from huggingface_hub import constants

    file = tmp_path / "token"
    file.mkdir() if content is None else file.write_bytes(content)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(file))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert called(monkeypatch, capfd, "--model", "nowhere") == (
        2,
        "tfclm.push: --model nowhere: there is no such directory",
    )

    def run(settings: push.PushSettings) -> int:
        raise RuntimeError(f"cannot send {WRITER}")

    with pytest.raises(SystemExit) as end:
        command(push.PushSettings, run, verb="push", description="", tensorflow=False)
    err = capfd.readouterr().err
    assert end.value.code == 1
    assert err.splitlines()[-1] == "RuntimeError: cannot send ***"
    # Where the token itself is needed, it is what the line is about.
    folder = checkpoint(tmp_path / "run")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    code, err = called(monkeypatch, capfd, "--model", folder, "--repo-id", "me/x")
    why = "Is a directory" if content is None else "it is not text"
    assert code == 2
    assert err.startswith(f"tfclm.push: the Hub's token in {file} cannot be read ({why}): run `hf auth login` again"), (
        err
    )


def test_archive_without_room_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """A run that is complete, and ends in a traceback because the disk has no room for the archive that is pushed."""
    folder = checkpoint(tmp_path / "run")
    filled(tmp_path / "serving" / "1", **{"saved_model.pb": b"x"})
    (tmp_path / "serving" / "1" / "v").symlink_to("/proc/self/mem")  # a file whose first byte cannot be read
    said: list[str] = []
    repository = Repository("me/x", token=WRITER)
    servable = tmp_path / "serving" / "1"
    assert not deliver(folder, repository, patience=0, servable=servable, log=said.append)
    assert "me/x does not hold the last state, which is safe in" in said[0]
    assert "OSError: [Errno 5] Input/output error" in said[0]
    assert (folder / "unpushed.json").is_file()


PUSH = """
import sys, tfclm.push
sys.argv[1:] = WORDS
try:
    tfclm.push.main()
except SystemExit as end:
    answer([end.code, "tensorflow" in sys.modules, "transformers" in sys.modules])
"""


def test_checkpoint_is_pushed_with_a_card(hub: Hub, tmp_path: Path):
    """A repository without a card, or one whose card is not in the folder; TensorFlow imported to copy files."""
    folder = checkpoint(tmp_path / "my model")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "left.txt").write_text("hidden")
    for _ in range(2):
        result, err = asked(f"WORDS = ['--model', {str(folder)!r}, '--repo-id', 'new']{PUSH}", hub.endpoint, folder)
        assert result == [0, False, False], err
    pushed = hub.model("me/new")
    assert pushed.titles() == ["Upload my model"]
    assert pushed.files() == {name: content for name, content in held(folder).items() if ".cache" not in name}
    assert b"# my model" in pushed.files()["README.md"]


def exported(folder: Path) -> Path:
    """What looks like a servable with two versions."""
    for number in (9, 10):
        filled(folder / str(number), **{"saved_model.pb": f"version {number}".encode(), "variables/a.index": b"\0"})
    return folder


def test_exported_model_goes_to_the_hub_and_comes_back(hub: Hub, tmp_path: Path):
    """The version of yesterday in the zip, a file lost on the way, or a second download of what is here."""
    folder, servable = checkpoint(tmp_path / "run"), exported(tmp_path / "serving")
    words = ["--model", str(folder), "--repo-id", "me/x", "--push-saved-model", str(servable)]
    for _ in range(2):
        result, err = asked(f"WORDS = {words!r}{PUSH}", hub.endpoint, folder)
        assert result == [0, False, False], err
    assert len(hub.model("me/x").titles()) == 1, "the same version is the same file"
    assert hub.model("me/x").files().keys() == held(folder).keys() | {"saved_model.zip"}
    code = """
from tfclm.hub import fetch_servable
answer([str(fetch_servable("me/x")), "tensorflow" in sys.modules, "transformers" in sys.modules])
"""
    for _ in range(2):
        (path, *imported), _ = asked(code, hub.endpoint, folder)
        assert imported == [False, False], "a server has no transformers"
        assert held(Path(path)) == {f"10/{name}": content for name, content in held(servable / "10").items()}
    assert len([each for each in hub.requests if each == "GET /me/x/resolve/main/saved_model.zip"]) == 1


@pytest.mark.parametrize(
    ("repo_id", "words"),
    [
        ("me/none", "there is no me/none on the Hub"),
        ("me/bare", "me/bare has no saved_model.zip: push an exported model with `push_saved_model`"),
        ("a/b/c", "owner/name"),
    ],
)
def test_what_cannot_be_fetched_is_named(hub: Hub, tmp_path: Path, repo_id: str, words: str):
    """A traceback of the client where a name is wrong or nothing was exported."""
    hub.make("models/me/bare", {"config.json": b"{}"})
    code = f"""
from tfclm.hub import fetch_servable, fetch_run
for fetch in (fetch_servable, lambda repo_id: fetch_run(repo_id, folder / "into")):
    try:
        fetch({repo_id!r})
    except InputError as error:
        print(error, file=sys.stderr)
answer((folder / "into").exists())
"""
    made, err = asked(code, hub.endpoint, tmp_path)
    assert not made
    assert len(err.splitlines()) == 2
    assert words in err
    assert err.count(repo_id) >= 2


def test_marks_survive_and_are_named_in_the_command(hub: Hub, tmp_path: Path):
    """A later push that goes to main, in public, because it forgot what the run was given."""
    folder = checkpoint(tmp_path / "run")
    where = {"repo_id": "lab/y", "private": True, "branch": "b", "create_pr": False}
    (folder / "unpushed.json").write_text(json.dumps(where))
    result, err = asked(f"WORDS = ['--model', {str(folder)!r}]{PUSH}", hub.endpoint, folder)
    assert result[0] == 0, err
    assert hub.model("lab/y").private
    assert hub.model("lab/y").files("b") == held(folder)
    assert not (folder / "unpushed.json").exists()

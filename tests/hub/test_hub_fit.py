"""Runs that push: the guide's whole journey, a Hub that fails, a kill, and what comes back."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import yaml
from conftest import tiny_config
from hub_server import WRITER, Faults, Hub, environment, held, hub

pytestmark = pytest.mark.slow


@pytest.fixture(name="hub")
def hub_fixture(model_dir: Path, documents: list[str]) -> Iterator[Hub]:
    """A stand-in for the Hub with a base model and a dataset."""
    with hub() as running:
        running.upload("models/base/tiny", model_dir)
        rows = "".join(json.dumps({"text": text[:800]}) + "\n" for text in documents[:30])
        running.make("datasets/some/texts", {"train.jsonl": rows.encode()})
        yield running


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A tiny checkpoint with a card."""
    from transformers import AutoTokenizer

    from tfclm.checkpoint import create, save

    folder = tmp_path_factory.mktemp("base")
    # The sample at the end of a run fills the context.
    save(create(tiny_config("gpt2", context=40)), AutoTokenizer.from_pretrained(tokenizer_dir), folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\nlanguage: en\n---\n\n# tiny\n")
    return folder


class User:
    """Somebody at a shell, with the real client and a cache of their own."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.home = home
        home.mkdir()
        self.environment = environment(hub.endpoint, home)

    def start(self, module: str, *words: object) -> subprocess.Popen[str]:
        """Starts a command, in the home folder."""
        command = [sys.executable, "-m", f"tfclm.{module}", *map(str, words)]
        return subprocess.Popen(
            command, cwd=self.home, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __call__(self, module: str, *words: object, code: int = 0) -> tuple[str, str]:
        """Runs a command to its end; stdout and stderr."""
        done = self.start(module, *words)
        out, err = done.communicate(timeout=300)
        assert done.returncode == code, err
        assert WRITER not in out + err
        return out, err

    def python(self, code: str) -> str:
        """What a script prints."""
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=self.home, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


FIT = (
    *("--model", "base/tiny", "--dataset", "some/texts", "--output-dir", "run", "--push-to-hub", "tiny"),
    *("--block-size", 32, "--batch-size", 8, "--epochs", 2, "--learning-rate", 1e-2),
)


def test_journey_from_the_hub_to_the_hub(hub: Hub, tmp_path: Path):
    """The guide's way: load, fit, push, and load what was pushed; a file that is missing there, or older than here."""
    user = User(hub, tmp_path / "user")
    _, err = user("fit", *FIT, "--push-checkpoint")
    pushed, folder = hub.model("me/tiny"), tmp_path / "user" / "run"
    assert pushed.files() == held(folder)
    assert not any(name.startswith(("resume", "unpushed")) for name in pushed.files())
    assert pushed.titles()[-1].startswith("Perplexity ")
    assert "epoch 2, step" in pushed.refs["main"][-1].message
    for title, commit in zip(pushed.titles()[:-1], pushed.refs["main"][1:-1], strict=True):
        assert re.fullmatch(r"Epoch \d, step \d+", title)
        assert "results.json" not in commit.files, "what measures other weights must not lie beside these"
        assert "resume/state/checkpoint" in commit.files
    for commit in pushed.refs["main"]:
        assert not any(WRITER.encode() in content for content in commit.files.values())
    assert f"{hub.endpoint}/me/tiny holds run" in err

    other = User(hub, tmp_path / "other")
    other.environment.pop("HF_TOKEN")
    text = other.python(
        "import tfclm\nmodel, tokenizer = tfclm.load('me/tiny')\n"
        "from transformers import pipeline\n"
        "generator = pipeline('text-generation', model='me/tiny', framework='tf', torch_dtype=None)\n"
        "print(generator('Python is', max_new_tokens=8, do_sample=False)[0]['generated_text'])"
    )
    assert text.startswith("Python is")
    card_is_complete(pushed.files()["README.md"].decode(), json.loads((folder / "results.json").read_text()))


def card_is_complete(text: str, results: dict) -> None:
    """Metadata that the Hub's own reader understands, and what a reader of the card looks for."""
    from huggingface_hub import ModelCard

    data = ModelCard(text).data
    assert data.license == "cc-by-4.0"
    assert data.language == "en"
    assert data.base_model == "base/tiny"
    assert data.datasets == ["some/texts"]
    assert data.pipeline_tag == "text-generation"
    (measured,) = data.eval_results
    assert (measured.metric_type, measured.dataset_type) == ("perplexity", "some/texts")
    assert measured.metric_value == pytest.approx(results["perplexity"], abs=1e-4)
    protocol = results["protocol"]
    assert measured.metric_args["block_size"] == 32
    for epoch in results["train"]["epochs"]:
        assert f"| {epoch['epoch']} | {epoch['step']} | {epoch['loss']:.4f} | {epoch['val_loss']:.4f} |" in text
    for words in (
        f"{protocol['train_rows']} documents, {results['train']['corpus_tokens']} tokens",
        f"over {results['tokens']} tokens",
        "## Intended use",
        "license is that of base/tiny: cc-by-4.0",
        'pipeline("text-generation", model="me/tiny"',
        "python -m tfclm.serve --hub me/tiny",
        "learning_rate: 0.01",
        f"transformers {results['versions']['transformers']}",
        "loss.png",
    ):
        assert words in text, words


def test_failing_push_loses_nothing_and_can_be_finished(hub: Hub, tmp_path: Path):
    """A run that a Hub without an answer ends or holds up, or one that ends with exit code 0 and a stale Hub."""
    user = User(hub, tmp_path / "user")
    hub.faults = Faults(["500"] * 10_000, "me/tiny/(tree|commit)/")
    _, err = user("fit", *FIT, "--push-patience", 1, code=1)
    folder = tmp_path / "user" / "run"
    assert json.loads((folder / "results.json").read_text())["train"]["epochs"][-1]["epoch"] == 2
    assert "me/tiny does not hold the last state, which is safe in run: a fault (the Hub answered 500)" in err
    assert "Traceback" not in err
    words = shlex.split(err.rsplit("finish with:", 1)[1])
    assert words[:3] == ["python", "-m", "tfclm.push"]
    _, err = user("push", "--model", "run", "--push-patience", 1, code=1)
    assert "finish with:" in err
    hub.faults = Faults()
    assert (folder / "unpushed.json").is_file()
    user("push", *words[3:])
    assert hub.model("me/tiny").files() == held(folder)
    assert "unpushed.json" not in held(folder)
    (title,) = hub.model("me/tiny").titles()
    user("push", *words[3:])
    assert hub.model("me/tiny").titles() == [title], "a push of what is there already makes no commit"


@pytest.mark.long
def test_offline_run_is_pushed_later(
    hub: Hub, tmp_path: Path, model_dir: Path, documents: list[str], monkeypatch: pytest.MonkeyPatch
):
    """A flight that keeps a run from starting; or a run whose history is lost because it was pushed afterwards."""
    from tfclm import fit

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text[:800]}) + "\n" for text in documents[:30]))
    settings = fit.FitSettings(
        **{"model": str(model_dir), "train_file": ("text.jsonl",), "output_dir": "run", "push_to_hub": "lab/later"},
        **{"block_size": 32, "batch_size": 8, "epochs": 2, "private": True, "branch": "flight", "push_later": True},
    )
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert fit.run(settings) == 0
    assert (tmp_path / "run" / "unpushed.json").is_file()
    assert "resume" not in {path.name for path in (tmp_path / "run").iterdir()}
    user = User(hub, tmp_path / "user")
    user("push", "--model", tmp_path / "run")
    pushed = hub.model("lab/later")
    assert pushed.private
    assert pushed.files("flight") == held(tmp_path / "run")
    assert pushed.files("main") == {}
    assert [line.split(":")[0][:7] for line in pushed.refs["flight"][-1].message.splitlines()] == ["epoch 1", "epoch 2"]


def weights(folder: Path) -> bytes:
    """A run's result."""
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.long
def test_killed_run_resumes_here_and_elsewhere(hub: Hub, tmp_path: Path):
    """Commits made twice, a run that begins anew, or a pushed state without optimizer or position in the data."""
    user, other = User(hub, tmp_path / "user"), User(hub, tmp_path / "other")
    command = [*FIT, "--epochs", 8, "--push-checkpoint"]
    run = user.start("fit", *command)
    deadline = time.monotonic() + 120
    while not any(title.startswith("Epoch") and "Epoch 1," not in title for title in titles(hub)):
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert not (tmp_path / "user" / "run" / "results.json").exists(), "it was killed too late to say anything"
    there = len(titles(hub))

    _, err = other("fit", "--resume-from", "me/tiny", "--output-dir", "elsewhere")
    assert "epoch 1: " not in err
    assert hub.model("me/tiny").files() == held(tmp_path / "other" / "elsewhere")
    epochs = [int(title.split()[1].strip(",")) for title in titles(hub) if title.startswith("Epoch")]
    assert epochs == sorted(set(epochs))
    assert len(epochs) > there
    user("fit", *command)
    assert weights(tmp_path / "user" / "run") == weights(tmp_path / "other" / "elsewhere")
    assert hub.model("me/tiny").files() == held(tmp_path / "user" / "run")
    assert [title for title in titles(hub) if title.startswith("Epoch")] == titles(hub)[: len(epochs)]


@pytest.mark.parametrize(
    ("target", "flags", "expected"),
    [
        ("me/other", [], None),
        ("me/other", ["--push-to-hub", "me/mine"], "me/mine"),
        ("somebody/run", [], "somebody/run"),
        ("run", [], "run"),
        ("run", ["--push-to-hub", "none"], None),
    ],
)
def test_settings_that_come_with_a_state(hub: Hub, tmp_path: Path, target: str, flags: list[str], expected: str | None):
    """A state of somebody else that overwrites, exports or pushes where its author likes, to a repository of yours."""
    user = User(hub, tmp_path / "user")
    written = {
        **{"dataset": "python-docs", "epochs": 7, "learning_rate": 1e-3, "push_to_hub": target, "train_file": []},
        **{"overwrite": True, "export_to": "served", "max_perplexity": 3.0, "push_saved_model": True},
    }
    state = {"fit.yaml": yaml.safe_dump(written).encode(), "resume/state/checkpoint": b"model_checkpoint_path: 'x'"}
    hub.make("models/somebody/run", state)
    code = (
        "import sys; from tfclm.cli.arguments import parse; from tfclm.fit import FitSettings, preset; "
        "from tfclm.settings import record, to_yaml; "
        "settings = parse(FitSettings, sys.argv[1:], prog='fit', description='', preset=preset); "
        "print(settings.overwrite, settings.export_to, settings.max_perplexity, settings.push_saved_model); "
        "print(to_yaml(record(settings)))"
    )
    words = ["--resume-from", "somebody/run", "--output-dir", "run", *flags]
    said = []
    for _ in range(2):  # the second time from what is in the folder
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=user.home, env=user.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said.append("was pushed to me/other" in done.stderr)
        first, _, rest = done.stdout.partition("\n")
        assert first == "False None None False"
        settings = yaml.safe_load(rest)
        assert (settings["epochs"], settings["learning_rate"], settings["push_to_hub"]) == (7, 1e-3, expected)
        assert settings["output_dir"] == "run"
        # The settings that are compared when the run is resumed.
        there = yaml.safe_load((user.home / "run" / "fit.yaml").read_text())
        assert there == settings | {"output_dir": None}
    assert said == [target == "me/other" and not flags, False]


def titles(hub: Hub) -> list[str]:
    """Those of the commits on the repository of the runs here."""
    return hub.model("me/tiny").titles() if "models/me/tiny" in hub.repositories else []


@pytest.mark.long
def test_exported_model_is_pushed_and_served_elsewhere(hub: Hub, tmp_path: Path):
    """A servable that stays at home, or one that the Hub gives back and no server can load."""
    user = User(hub, tmp_path / "user")
    user("fit", *FIT, "--export-to", "serving/tiny", "--push-saved-model", "--push-strategy", "no")
    assert hub.model("me/tiny").files().keys() == held(tmp_path / "user" / "run").keys() | {"saved_model.zip"}
    assert len(hub.model("me/tiny").titles()) == 1
    version = held(tmp_path / "user" / "serving" / "tiny" / "1")

    other = User(hub, tmp_path / "other")
    for number in (1, 2):
        out, _ = other("export", "--from-hub", "me/tiny", "--serving-dir", "mine")
        assert out == f"mine/{number}\n"
        assert held(tmp_path / "other" / "mine" / str(number)) == version
    _, err = other("export", "--from-hub", "me/tiny", "--serving-dir", "mine", "--max-perplexity", 1.5, code=1)
    assert "not published: perplexity" in err
    _, err = other("export", "--from-hub", "me/tiny", "--model", "x", "--serving-dir", "mine", code=2)
    assert "--model" in err
    assert sorted(path.name for path in (tmp_path / "other" / "mine").iterdir()) == [".verdicts", "1", "2"]

    server = other.start("serve", "--hub", "me/tiny", "--rest_api_port", -1, "--port", 0, "--model_name", "tiny")
    try:
        assert server.stderr is not None
        port = next(
            match[1] for line in server.stderr if (match := re.search(r"listening on .*REST (\d+)", line)) is not None
        )
        answer = requests.post(
            f"http://127.0.0.1:{port}/v1/models/tiny:predict", json={"instances": ["The import"]}, timeout=60
        )
        assert answer.json()["predictions"][0].startswith("The import")
    finally:
        server.terminate()
        server.communicate(timeout=60)

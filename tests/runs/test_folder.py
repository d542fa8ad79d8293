"""The output folder of a run: what counts as one, and what is left in it."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tfclm.errors import InputError
from tfclm.runs.card import model_card
from tfclm.runs.curve import make_figure
from tfclm.runs.folder import RunFolder
from tfclm.training.finetuning import TrainingRecord

SETTINGS = {
    **{"model": "m", "epochs": 3, "output_dir": "o"},
    **dict.fromkeys(("push_to_hub", "dataset", "dataset_config", "dataset_revision")),
}
PROTOCOL = {
    "source": "a.txt",
    "split": "train",
    "validation": "a tenth",
    "block_size": 8,
    "separator": "eos",
    "dropped_tokens": 0,
    "text_column": "text",
    "train_rows": 9,
    "validation_rows": 1,
}


def done(**changes) -> TrainingRecord:
    """What a short run did."""
    epochs = [{"epoch": 1, "step": 8, "loss": 3.0, "val_loss": 2.0, "val_perplexity": math.exp(2.0)}]
    values = {"initial_loss": 4.0, "best_loss": 2.0, "best_step": 8, "best_epoch": 1, "epochs": epochs}
    return TrainingRecord(**{**values, "steps": 8, "tokens": 64, "seconds": 1.0, **changes})


def complete(path: Path, *files: str, overwrite: bool = False, **changes) -> dict:
    """Goes through a run that trains nothing and whose checkpoint has these files; its results."""
    with RunFolder(path, SETTINGS, overwrite) as folder:
        folder.begin()
        for name in files:
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text(name)
        return folder.finish(done(**changes), PROTOCOL, 100, 400, files, 720, {})


def interrupted(path: Path) -> None:
    """Leaves a run that was stopped."""
    with RunFolder(path, SETTINGS, overwrite=False) as folder:
        folder.begin()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["fit.yaml", "results.json", "thesis.txt"])
def test_a_folder_without_a_run_is_left_alone(tmp_path: Path, name: str, overwrite: bool):
    """A user's own settings file that makes a folder of other things count as a run, and be written into."""
    (tmp_path / name).write_text("epochs: 3\n")
    with pytest.raises(InputError, match="holds no run: give another directory, or empty this one"):
        RunFolder(tmp_path, SETTINGS, overwrite)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_run_is_one_from_its_begin_on(tmp_path: Path):
    """A run that was killed before its first step, and whose folder is refused afterwards."""
    interrupted(tmp_path)
    interrupted(tmp_path)
    with pytest.raises(InputError, match="`epochs` 3 there, 4 now"):
        RunFolder(tmp_path, SETTINGS | {"epochs": 4}, overwrite=False)


@pytest.mark.parametrize("text", [b"", b"- 1\n", b"a: [\n", b"\xff\xfe\x00", b"epochs: 2001-99-99\n"])
def test_broken_settings_of_a_run(tmp_path: Path, text: bytes):
    """A traceback from a fit.yaml that a full disk has cut short."""
    interrupted(tmp_path)
    (tmp_path / "fit.yaml").write_bytes(text)
    with pytest.raises(InputError, match=r"fit\.yaml .*use `overwrite` to start over"):
        RunFolder(tmp_path, SETTINGS, overwrite=False)
    assert complete(tmp_path, overwrite=True)["loss"] == 2.0


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"perplexity": 2.0', '{"perplexity": 2.0, "train": null}', "\0"])
def test_broken_results(tmp_path: Path, text: str, capfd: pytest.CaptureFixture[str]):
    """A traceback from a results.json that is no run's; and --overwrite must not need it."""
    complete(tmp_path, "config.json")
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=r"results\.json .*use `overwrite` to start over"):
        RunFolder(tmp_path, SETTINGS, overwrite=False)
    complete(tmp_path, "config.json", overwrite=True)
    assert "files of its checkpoint may be left" in capfd.readouterr().err
    assert RunFolder(tmp_path, SETTINGS, overwrite=False).results["files"] == ["config.json"]


def test_overwriting_leaves_no_file_of_the_former_run(tmp_path: Path):
    """A former tokenizer's added tokens or chat template, which loading would take for the new one's."""
    complete(tmp_path, "config.json", "added_tokens.json", "additional_chat_templates/tool.jinja")
    (tmp_path / "notes.txt").write_text("mine")
    interrupted_names = {"config.json", "added_tokens.json", "additional_chat_templates", "notes.txt"}
    # A run that was to overwrite and was stopped, itself overwritten.
    for _ in range(2):
        with RunFolder(tmp_path, SETTINGS, overwrite=True) as folder:
            folder.begin()
        assert {path.name for path in tmp_path.iterdir()} == interrupted_names | {"fit.yaml", "resume"}
    complete(tmp_path, "config.json", "vocab.json")
    written = {"README.md", "fit.yaml", "loss.png", "results.json"}
    assert {path.name for path in tmp_path.iterdir()} == written | {"config.json", "vocab.json", "notes.txt"}


def test_only_files_inside_of_the_folder_are_removed(tmp_path: Path):
    """A results.json from somewhere else, with names that lead out of the folder."""
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    complete(tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    results["files"] = ["../outside.txt", str(outside), "..", "."]
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    complete(tmp_path / "run", overwrite=True)
    assert outside.read_text() == "mine"


# The file system is the collaborator here: its locks fail as those of networks do.
WITHOUT_LOCKS = """
import errno, fcntl, os, sys
from pathlib import Path
from tfclm.runs.folder import RunFolder
numbers = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF]
def flock(handle, operation):
    raise OSError(numbers[0], os.strerror(numbers[0]))
fcntl.flock = flock
for path in sys.argv[1:]:
    with RunFolder(Path(path), {"model": "m"}, overwrite=False) as folder:
        folder.begin()
        folder.record({"perplexity": 2.5})
    del numbers[0]
assert not numbers
"""


def test_a_filesystem_without_locks(tmp_path: Path):
    """A run that fails on a network file system, or that does not say what is not checked there."""
    folders = [tmp_path / str(number) for number in range(4)]
    command = [sys.executable, "-c", WITHOUT_LOCKS, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [json.loads((folder / "results.json").read_text())["perplexity"] for folder in folders] == [2.5] * 4
    (said,) = done.stderr.splitlines()  # printed once per process
    words = f"{folders[0]}: no locks here ({os.strerror(errno.ENOLCK)}); do not let two commands"
    assert said.startswith(f"tfclm: {words}")


def test_a_lock_that_fails_for_another_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A failing disk that is taken for a filesystem without locks."""

    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(InputError, match="Input/output error"):
        interrupted(tmp_path / "run")


def test_a_locked_folder_is_in_use(tmp_path: Path):
    """Two runs that write into one folder."""
    with RunFolder(tmp_path / "run", SETTINGS, overwrite=False):
        with pytest.raises(InputError, match="in use by another run"):
            interrupted(tmp_path / "run")
        (tmp_path / "run" / "kept").touch()


def test_results_are_json(tmp_path: Path):
    """NaN and Infinity, which Python writes and no other reader takes."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    epochs = [{"epoch": 1, "step": 8, "loss": math.nan, "val_loss": 800.0, "val_perplexity": math.inf}]
    returned = complete(tmp_path, initial_loss=800.0, best_loss=math.nan, epochs=epochs)
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert results == returned
    assert [results[name] for name in ("initial_perplexity", "perplexity", "loss")] == [None, None, None]
    assert results["train"]["epochs"] == [epochs[0] | {"loss": None, "val_perplexity": None}]


def test_card_and_curve_of_what_is_not_finite(tmp_path: Path):
    """A card that says "inf" and "nan", or a curve that fails for them when the training is over."""
    epochs = [{"epoch": 1, "step": 8, "loss": math.nan, "val_loss": 800.0, "val_perplexity": math.inf}]
    complete(tmp_path, initial_loss=800.0, best_loss=math.nan, epochs=epochs)
    card = (tmp_path / "README.md").read_text()
    assert "Validation perplexity **not finite** (not finite before training)" in card
    assert "| 1 | 8 | not finite | 800.0000 | not finite |" in card
    assert not {"nan", "inf"} & set(card.lower().replace("*", " ").split())
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_curve_of_the_perplexity_can_be_read():
    """A fall from 5000 to 5 on a linear axis, along which everything after the first epoch is flat."""
    losses = [math.log(value) for value in (500, 50, 20, 5)]
    epochs = [{"epoch": i + 1, "step": 8 * (i + 1), "loss": loss, "val_loss": loss} for i, loss in enumerate(losses)]
    figure = make_figure(done(initial_loss=math.log(5000), epochs=epochs))
    axes = {each.get_title(): each for each in figure.axes}
    below = axes["Validation perplexity"]
    assert below.get_yscale() == "log"
    assert below.lines[0].get_ydata() == pytest.approx([5000, 500, 50, 20, 5])
    assert axes["Loss"].get_yscale() == "linear"
    figure.draw_without_rendering()
    assert {"10", "100", "1000"} <= {label.get_text() for label in below.get_yticklabels()}


def card(settings: dict, protocol: dict, base: dict | None = None) -> str:
    """The card of a short run."""
    results = {
        **{"perplexity": 7.4, "initial_perplexity": 54.6, "tokens": 100, "versions": {"python": "3.11"}},
        "protocol": PROTOCOL | protocol,
        "train": {**vars(done()), "corpus_tokens": 720},
    }
    return model_card(results, SETTINGS | {"train_file": [], "validation_file": []} | settings, base or {})


def test_card_of_local_files_is_fit_to_be_seen():
    """Somebody's home folder on the Hub, a Python list, "split None", or a repository that there is none of."""
    text = card(
        {"model": "/home/ann/first", "output_dir": "/home/ann/second", "train_file": ["/home/ann/tickets.jsonl"]},
        {
            "source": ["/home/ann/tickets.jsonl"],
            "split": None,
            "validation": "files /home/ann/a.jsonl, /home/ann/b.jsonl",
        },
    )
    for words in (
        "Fine-tuned from the local model first on the file tickets.jsonl.",
        "* Source: the file tickets.jsonl, column text.",
        "* Validation: 2 files: a.jsonl, b.jsonl; 1 document.",
        "The card of the local model first names no license",
        "name: the file tickets.jsonl",
        "model: first\n",
        "train_file:\n- tickets.jsonl\n",
        "output_dir: second\n",
        'pipeline("text-generation", model="second"',
        "`python -m tfclm.export --model second --serving-dir serving_models/second` makes a version that an "
        "unmodified server hosts, or `python -m tfclm.serve --model_name=second "
        "--model_base_path=serving_models/second`.",
    ):
        assert words in text, words
    for words in ("/home", "None", "['", "--hub", "saved_model.zip"):
        assert words not in text.replace("torch_dtype=None", "").replace("hence the None", ""), words


def test_card_names_the_tokens_before_each_block():
    """A perplexity of blocks with a BOS that reads as one of blocks without."""
    assert "in blocks of 8 tokens, each scored on its own" in card({}, {})
    text = card({}, {"prefix": ["<s>"]})
    assert "in blocks of 8 tokens, which begin with `<s>`, each scored on its own" in text
    assert "prefix:" in text.split("# o")[0]


def test_card_names_some_of_many_files_and_a_dataset_as_it_is():
    """A card that is a list of a thousand files, or one that shortens the name of a dataset or model of the Hub."""
    text = card({"push_to_hub": "me/x"}, {"source": [f"/data/{number}.txt" for number in range(1000)], "split": None})
    assert "on 1000 files: 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 995 more." in text
    assert "`python -m tfclm.serve --hub me/x`" in text
    protocol = {"source": "some/texts", "split": "train[:9]", "validation": "split test (the dataset's own)"}
    text = card(
        {"dataset": "some/texts", "model": "base/tiny"}, protocol, {"base_model": "base/tiny", "license": "mit"}
    )
    assert "Fine-tuned from base/tiny on some/texts, split train[:9]." in text
    assert "The license is that of base/tiny: mit." in text
    assert "model: base/tiny\n" in text
    assert "* Validation: split test (the dataset's own); 1 document." in text
    assert "Python's own documentation (python-docs), split" in card({"model": "scratch"}, {"source": "python-docs"})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "The weights are those after epoch 1 (step 8)."),
        ({"best_step": 0, "best_epoch": 0}, "The weights are the initial ones."),
        (
            {"best_step": 10, "best_epoch": None, "diverged": "the loss is not finite at step 12"},
            "The weights are those after step 10, within an epoch; training ended early: the loss is not finite at "
            "step 12.",
        ),
    ],
)
def test_card_says_where_the_weights_are_from(tmp_path: Path, changes: dict, text: str):
    """Weights from inside an epoch, kept because the training diverged, that are said to be an epoch's."""
    results = complete(tmp_path, **changes)
    assert text in (tmp_path / "README.md").read_text()
    assert (results["train"]["best_step"], results["train"]["best_epoch"]) == (
        changes.get("best_step", 8),
        changes.get("best_epoch", 1),
    )

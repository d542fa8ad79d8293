"""Where a run's model goes: what is refused before it trains, and what the served version is compared on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tfclm.errors import InputError
from tfclm.fit import FitSettings, open_release

OTHER = {"source": "another", "validation": "files old.txt", "block_size": 32}


def served(folder: Path, **record: Any) -> None:
    """A served version of which there is nothing but its record."""
    (folder / "1" / "assets.extra").mkdir(parents=True)
    (folder / "1" / "assets.extra" / "tfclm.json").write_text(json.dumps(record))


def settings(folder: Path, **more: Any) -> FitSettings:
    """Those of a run that is to be exported and may be 2 % worse."""
    made = {"train_file": ("train.txt",), "output_dir": "run", "export_to": str(folder), "max_regression": 0.02}
    return FitSettings(**made | more)


@pytest.mark.parametrize(
    ("record", "more", "protocol", "said"),
    [
        # Measured on one text, where the run has one that both can be scored on.
        ({"perplexity": 3.0, "protocol": OTHER}, {"validation_file": ("val.txt",)}, "files val.txt", None),
        ({"perplexity": None}, {"validation_file": ("val.txt",)}, "files val.txt", None),
        (
            {"perplexity": 3.0, "protocol": OTHER},
            {"train_file": (), "dataset": "some/texts"},
            "split test (the dataset's own)",
            None,
        ),
        # Nothing to score both on: drawn from the training text, or a served version without `score`.
        (
            {"perplexity": 3.0, "protocol": OTHER},
            {},
            "0.1 of the documents, drawn with seed 0",
            "measured differently (source, validation differ): give `validation_split` or `validation_file`",
        ),
        (
            {"perplexity": 3.0, "protocol": OTHER},
            {"train_file": (), "dataset": "some/texts"},
            "0.1 of the documents, drawn with seed 0",
            "measured differently (source, validation differ): give `validation_split` or `validation_file`",
        ),
        (
            {"perplexity": 3.0, "protocol": OTHER, "signatures": ["generate_tokens"]},
            {"validation_file": ("val.txt",)},
            "files val.txt",
            "measured differently",
        ),
    ],
)
def test_second_training_on_other_data_is_not_refused(
    tmp_path: Path, record: dict[str, Any], more: dict[str, Any], protocol: str, said: str | None
):
    """The gate's most natural use refused before it trains; or hours of training before the line that refuses it."""
    served(tmp_path, **record)
    release = open_release(settings(tmp_path, **more))
    assert release is not None
    measured = {"source": "tickets", "validation": protocol, "block_size": 32}
    if said is None:
        release.check()
        release.check(measured, 1000)
    else:
        with pytest.raises(InputError) as refused:
            release.check(measured, 1000)
        assert said in str(refused.value)


def test_both_are_scored_on_the_runs_validation_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The training text, or another split, on which a model that has learnt it is compared with one that has not."""
    import datasets

    monkeypatch.chdir(tmp_path)
    Path("val.txt").write_text("one text\n\nanother text\n")
    release = open_release(settings(tmp_path, validation_file=("val.txt",)))
    assert release is not None
    texts = release.validation_texts(None)
    assert texts is not None
    assert [text.strip() for text in texts()] == ["one text", "another text"]
    splits = {name: datasets.Dataset.from_dict({"text": [f"of {name}"]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk("stored")
    release = open_release(settings(tmp_path, train_file=(), dataset="stored"))
    assert release is not None
    texts = release.validation_texts({"validation": "split test (the dataset's own)"})
    assert texts is not None
    assert list(texts()) == ["of test"]
    assert release.validation_texts({"validation": "0.1 of the documents, drawn with seed 0"}) is None

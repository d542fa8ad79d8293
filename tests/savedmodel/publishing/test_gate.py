"""The gate: which perplexities let a model be published."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tfclm import corpus
from tfclm.errors import InputError
from tfclm.savedmodel.publishing.gate import (
    Gate,
    PerplexityResult,
    QuantizationLoss,
    decide,
    record_verdict,
    served_record,
)

PROTOCOL = {"block_size": 32, "separator": True, "split": "test", "dropped_tokens": 3}
MEASURED = PerplexityResult(20.0, 1000, PROTOCOL)


def served(perplexity: float | None = 20.0, **protocol: object) -> dict[str, object]:
    """The record of a version that is there."""
    return {"perplexity": perplexity, "protocol": {**PROTOCOL, **protocol}}


@pytest.mark.parametrize(
    ("limits", "record", "passed"),
    [
        (Gate(), served(1.0), True),
        (Gate(max_perplexity=20.0), {}, True),
        (Gate(max_perplexity=19.9), {}, False),
        (Gate(max_regression=0.02), {}, True),
        (Gate(max_regression=0.02), served(30.0), True),
        (Gate(max_regression=0.02), served(19.7), True),
        (Gate(max_regression=0.02), served(19.5), False),
        (Gate(max_regression=0.0), served(20.0), True),
        (Gate(max_regression=-0.1), served(21.0), False),
        (Gate(max_regression=0.02), served(20.0, train_dropped_tokens=7), True),
        (Gate(max_perplexity=10.0, max_regression=0.02), served(30.0), False),
        (Gate(max_perplexity=30.0, max_regression=0.02), served(10.0), False),
    ],
)
def test_verdicts(limits: Gate, record: dict[str, object], passed: bool):
    """A limit compared the wrong way round, one of two that overrides the other, or a first version refused."""
    verdict = decide(limits, MEASURED, record)
    assert verdict["passed"] is passed
    assert ("reason" in verdict) is not passed


def test_not_a_number_is_refused():
    """A diverged model that passes, because every comparison with NaN is false."""
    for perplexity in (math.nan, math.inf):
        diverged = replace(MEASURED, perplexity=perplexity)
        for limits in (Gate(max_perplexity=1e9), Gate(max_regression=1.0)):
            verdict = decide(limits, diverged, served())
            assert not verdict["passed"]
            assert verdict["reason"] == "the model has diverged and has no perplexity: train it again"
            assert json.loads(json.dumps(verdict, allow_nan=False))["perplexity"] is None
        assert decide(Gate(), diverged, served())["passed"]


def test_smaller_weights_are_judged_by_the_models_own_text():
    """A limit for one text that is compared with the perplexity of another, on which smaller weights were measured."""
    docs = {"block_size": 32, "source": "python-docs"}
    cost = QuantizationLoss(PerplexityResult(40.0, 500, docs), PerplexityResult(42.0, 500, docs))
    applied = cost.applied(MEASURED)
    assert (applied.perplexity, applied.tokens, applied.protocol) == (pytest.approx(21.0), 1000, PROTOCOL)
    assert not decide(Gate(max_regression=0.02), applied, served(20.0))["passed"]
    assert decide(Gate(max_perplexity=21.1), applied, {})["passed"]
    expected = {"float32_perplexity": 40.0, "perplexity": 42.0, "tokens": 500, "protocol": docs}
    assert cost.record() == expected
    # Measured on the same text as the model, the ratio gives what was measured.
    assert QuantizationLoss(MEASURED, replace(MEASURED, perplexity=20.5)).applied(MEASURED).perplexity == pytest.approx(
        20.5
    )
    diverged = QuantizationLoss(MEASURED, replace(MEASURED, perplexity=math.nan))
    assert diverged.applied(MEASURED).finite is diverged.record()["perplexity"] is None


def test_served_version_is_found_by_its_folders_name(tmp_path: Path):
    """A version that a server reads as 7 taken for one without a record, because its folder is called 007."""
    (tmp_path / "007/assets.extra").mkdir(parents=True)
    (tmp_path / "007/assets.extra/tfclm.json").write_text(json.dumps({"perplexity": 3.0}))
    assert served_record(f"file://{tmp_path}/", Gate(max_regression=0.1)) == {"perplexity": 3.0}


def test_what_cannot_be_compared():
    """Perplexities of different texts or block sizes compared, or a gate that opens because nothing was measured."""
    with pytest.raises(InputError, match=r"results\.json"):
        decide(Gate(max_perplexity=10.0), None, {})
    with pytest.raises(InputError, match=r"block_size, split differ"):
        decide(Gate(max_regression=0.1), MEASURED, served(block_size=64, split="train"))
    # Another tokenizer's tokens of the same text, or another text under the same name.
    with pytest.raises(InputError, match=r"\(tokens differ\): give `dataset` or `file`, on which both are"):
        decide(Gate(max_regression=0.1), MEASURED, served() | {"tokens": 1400})
    with pytest.raises(InputError, match="no perplexity in its record"):
        decide(Gate(max_regression=0.1), MEASURED, served(None))


@pytest.mark.parametrize(
    ("validation", "changed", "differ"),
    [
        ("files val.txt", {"source": "more.txt", "train_rows": 90, "split": None, "dropped_rows": 1}, None),
        ("files val.txt", {"validation_rows": 7}, "validation_rows"),
        ("split test", {"split": "train[:50]", "train_rows": 50}, None),
        ("split test", {"source": "me/other"}, "source"),
        ("split test (the dataset's own)", {"validation": "split test"}, None),
        ("split test", {"validation": "split dev"}, "validation"),
        ("split test", {"validation": None}, "validation"),
        ("split test", {"prefix": ["<s>"]}, "prefix"),
        ("0.1 of the documents, drawn with seed 0", {"train_rows": 90}, "train_rows"),
    ],
)
def test_more_training_text_is_no_other_measurement(validation: str, changed: dict[str, object], differ: str | None):
    """The next training refused because it has more text, though what was measured is the same; or another text not."""
    protocol = {
        **{"source": "train.txt", "split": "train", "train_rows": 80, "dropped_rows": 0, "text_column": "text"},
        **{"validation": validation, "validation_rows": 8, "block_size": 32, "dropped_tokens": 3},
    }
    record = {"perplexity": 20.0, "tokens": 1000, "protocol": protocol}
    measured = replace(MEASURED, protocol={**protocol, **changed})
    if differ is None:
        assert decide(Gate(max_regression=0.02), measured, record)["passed"]
    else:
        with pytest.raises(InputError, match=rf"\({differ} differ\)"):
            decide(Gate(max_regression=0.02), measured, record)


def test_what_the_corpus_says_of_its_validation_is_understood(tmp_path: Path):
    """A wording that was changed there, so that other training text counts as another measurement, or the reverse."""
    for name, count in (("one.txt", 20), ("more.txt", 30), ("val.txt", 5)):
        (tmp_path / name).write_text("\n\n".join(f"{name} has text {number}." for number in range(count)))

    def measured(name: str, **options: Any) -> PerplexityResult:
        texts = corpus.read(files=[str(tmp_path / name)], **options)
        return replace(MEASURED, protocol=texts.description)

    for options, comparable in (({"validation_files": [str(tmp_path / "val.txt")]}, True), ({}, False)):
        record = {"perplexity": 20.0, "protocol": measured("one.txt", **options).protocol}
        if comparable:
            assert decide(Gate(max_regression=0.0), measured("more.txt", **options), record)["passed"]
        else:
            with pytest.raises(InputError, match="measured differently"):
                decide(Gate(max_regression=0.0), measured("more.txt", **options), record)


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        (Gate(max_perplexity=0.5), "`max_perplexity` 0.5"),
        (Gate(max_perplexity=float("nan")), "`max_perplexity` nan"),
        (Gate(max_regression=-1.0), "`max_regression` -1.0"),
        (Gate(max_regression=float("nan")), "`max_regression` nan"),
    ],
)
def test_limits_out_of_range(limits: Gate, named: str):
    """A limit that no model meets, or that every model meets."""
    with pytest.raises(InputError, match=named):
        limits.check()


def test_verdicts_are_kept(tmp_path: Path):
    """A verdict that overwrites another one, that a server takes for a version, or whose failure is a traceback."""
    paths = [record_verdict(f"{tmp_path}/", {"passed": passed}) for passed in (True, False)]
    assert [json.loads(Path(path).read_text())["passed"] for path in paths] == [True, False]
    assert [entry.name for entry in tmp_path.iterdir()] == [".verdicts"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"`serving_dir` .*file: the verdict cannot be written"):
        record_verdict(f"{tmp_path}/file", {"passed": True})

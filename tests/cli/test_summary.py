"""What a finished run prints, and whether the commands in it do what the run did."""

from __future__ import annotations

import math
import shlex

import pytest

from tfclm import evaluate, fit
from tfclm.cli.arguments import parse
from tfclm.cli.summary import summarize


def shown(losses: list[float], **settings) -> tuple[str, dict[str, list[str]]]:
    """The summary of a run with these validation losses, of which the first is before training, and its commands."""
    chosen = fit.FitSettings(**{"learning_rate": 2e-5, "output_dir": "runs/a b"} | settings)
    results = {
        **{"initial_perplexity": math.exp(losses[0]), "perplexity": math.exp(min(losses)), "sample": None},
        "train": {"diverged": None, "epochs": [{"val_loss": loss} for loss in losses[1:]]},
    }
    if math.isnan(losses[-1]):
        results |= {"perplexity": None}
    summary = summarize(results, chosen, str(chosen.output_dir), exports=chosen.export_to is not None)
    commands = [shlex.split(line) for line in summary.splitlines() if " -m tfclm." in line]
    return summary, {words[2].removeprefix("tfclm."): words[3:] for words in commands}


def test_what_to_go_on_with_reads_the_text_as_the_run_did():
    """A suggested command that fails, because it looks for a column `text`, or is beyond the model's context."""
    told = {
        "text_column": "answers.text",
        "block_size": 32,
        "separator": "none",
        "train_file": ("a b.jsonl", "c.jsonl"),
    }
    _, commands = shown([5.0, 4.0], **told, validation_fraction=0.2, seed=7)
    assert list(commands) == ["generate", "evaluate", "export", "fit"]
    measuring = parse(evaluate.EvaluateSettings, commands["evaluate"], prog="", description="")
    assert measuring == evaluate.EvaluateSettings(
        model="runs/a b", file=("FILE",), text_column="answers.text", block_size=32, separator="none"
    )
    further = parse(fit.FitSettings, commands["fit"], prog="", description="")
    expected = fit.FitSettings(**told, model="runs/a b", output_dir="runs/a b-2", validation_fraction=0.2, seed=7)
    assert further == expected
    _, commands = shown([5.0, 4.0], train_file=("a.txt",))
    assert commands["evaluate"] == ["--model", "runs/a b", "--file", "FILE"]


def test_a_gain_that_is_none_is_left_out():
    """(1.0 times lower), which says nothing, or a perplexity that rose called lower."""
    assert "perplexity 148.41 before, 54.60 after (2.7 times lower), in runs/a b" in shown([5.0, 4.0])[0]
    assert "perplexity 148.41 before, 146.94 after, in runs/a b" in shown([5.0, 4.99])[0]


def test_no_export_is_suggested_that_is_made_or_refused_anyway():
    """A command that repeats what the run itself does next, or publishes what its gate has refused."""
    assert "export" in shown([5.0, 4.0])[1]
    assert "export" not in shown([5.0, 4.0], export_to="serving_models/x", max_perplexity=2.0)[1]
    assert "export" not in shown([5.0, math.nan])[1]


@pytest.mark.parametrize(
    ("losses", "settings", "expected"),
    [
        ([7.0, 6.9, 6.8, 6.7], {}, "(6.800 to 6.700 in the last epoch): more --epochs (3 here) or a higher --lea"),
        ([7.0, 6.9, 6.8], {"max_steps": 9}, "more --max-steps (9 here) or a higher --learning-rate (2e-05 here)"),
        ([7.0, 3.0, 2.5, 2.49], {}, None),
        ([7.0, 3.0, 3.5], {}, None),
        ([7.0, 3.0], {}, None),
        ([7.0, 3.0, math.nan], {}, None),
    ],
)
def test_a_training_that_ended_too_early_is_reported(losses: list[float], settings: dict, expected: str | None):
    """A perplexity of hundreds that is taken for what the text allows, where more training would make it small."""
    summary, _ = shown(losses, **settings)
    assert ("still falling" in summary) == (expected is not None)
    assert (expected or "") in summary

"""What a finished run prints: its perplexity, a sample, and the commands to continue with."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tfclm.cli.arguments import flags
from tfclm.terminal import log
from tfclm.training.settings import TrainingSettings

# Settings that decide how a text is read, and how it is split into training and validation.
READING = ("text_column", "block_size", "separator")
SPLITTING = (
    *("dataset", "dataset_config", "dataset_revision", "train_split", "validation_split", "train_file"),
    *("validation_file", "validation_fraction", "seed"),
)


def summarize(results: Mapping[str, Any], settings: TrainingSettings, output_dir: str, *, exports: bool) -> str:
    """The lines on a complete run.

    Args:
        results: what `results.json` holds.
        settings: the run's, whose flags the commands repeat.
        output_dir: the run's directory.
        exports: the run itself exports the model.
    """
    folder, python = shlex.quote(output_dir), _python()
    reading = flags(settings, READING)
    evaluating = shlex.join(["--file", "FILE", *reading])
    further = shlex.join([*flags(settings, SPLITTING), *reading, "--output-dir", f"{output_dir}-2"])
    lines = [
        *_divergence(results),
        _perplexity(results, output_dir),
        *([f"sample: {results['sample']!r}"] if results["sample"] is not None else []),
        *_still_falling(results["train"]["epochs"], settings),
        "next steps:",
        f'  {python} -m tfclm.generate --model {folder} --prompt "…"',
        f"  {python} -m tfclm.evaluate --model {folder} {evaluating}",
    ]
    # A model that diverged should not be served.
    if not exports and results["perplexity"]:
        name = shlex.quote(Path(output_dir).resolve().name)
        lines.append(f"  {python} -m tfclm.export --model {folder} --serving-dir serving_models/{name}")
    lines += ["train it further with:", f"  {python} -m tfclm.fit --model {folder} {further}"]
    return "\n".join(lines)


def closing_sample(output_dir: Path, ids: Sequence[int], seed: int) -> str | None:
    """A continuation of a validation block by the model in the output directory; None if it fails, which is logged."""
    import tf_keras

    from tfclm.checkpoint import load
    from tfclm.checkpoint.generation import sample

    # transformers' top_p does not run in half precision.
    tf_keras.mixed_precision.set_global_policy("float32")
    try:
        model, tokenizer = load(output_dir)
        prompt = tokenizer.decode(ids[: min(8, len(ids) // 2)], skip_special_tokens=True)
        return sample(model, tokenizer, prompt, seed=seed)
    except Exception as error:  # a complete run does not fail because of its sample
        log(f"no sample: {type(error).__name__}: {' '.join(str(error).split())[:400]}")
        return None


def _python() -> str:
    """The interpreter as a command: `python`, or the one below this directory that `make` installed."""
    own = Path(sys.executable)
    return shlex.quote(str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else "python")


def _perplexity(results: Mapping[str, Any], output_dir: str) -> str:
    shown = [
        f"{perplexity:.2f}" if perplexity else "not finite"
        for perplexity in (results["initial_perplexity"], results["perplexity"])
    ]
    return f"validation perplexity {shown[0]} before, {shown[1]} after{_gain(results)}, in {output_dir}"


def _gain(results: Mapping[str, Any]) -> str:
    """How much lower the perplexity is, if that shows in its first decimal."""
    before, after = results["initial_perplexity"], results["perplexity"]
    gain = f"{before / after:.1f}" if before and after else "1.0"
    return f" ({gain} times lower)" if float(gain) > 1 else ""


def _divergence(results: Mapping[str, Any]) -> list[str]:
    diverged = results["train"]["diverged"]
    if not diverged:
        return []
    return [
        f"training stopped: {diverged}; the last good weights are kept. "
        "Try a lower --learning-rate, more --warmup-steps or a smaller --max-grad-norm"
    ]


def _still_falling(epochs: Sequence[Mapping[str, Any]], settings: TrainingSettings) -> list[str]:
    """A line if the validation loss fell so much in the last epoch that the training probably ended too early.

    A loss that falls by 0.02 is a perplexity that falls by 2 %: much for the last epoch of most schedules.
    """
    losses = [epoch["val_loss"] for epoch in epochs]
    if len(losses) < 2 or None in losses or not losses[-2] - losses[-1] >= 0.02:
        return []
    length = f"--max-steps ({settings.max_steps} here)" if settings.max_steps else f"--epochs ({settings.epochs} here)"
    return [
        f"the validation loss was still falling at the end ({losses[-2]:.3f} to {losses[-1]:.3f} in the last epoch): "
        f"more {length} or a higher --learning-rate ({settings.learning_rate:g} here) will probably lower the "
        "perplexity"
    ]

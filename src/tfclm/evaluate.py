"""`python -m tfclm.evaluate`: the perplexity of a checkpoint on a text."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from tfclm.cli.command import command
from tfclm.corpus.settings import SourceSettings
from tfclm.errors import InputError
from tfclm.metrics.finite import plain
from tfclm.settings import setting
from tfclm.terminal import log, print_result


@dataclass(frozen=True)
class EvaluateSettings(SourceSettings):
    """Settings of `evaluate`."""

    model: str | None = setting(None, "directory or Hub id of the checkpoint")
    revision: str | None = setting(None, "branch, tag or commit of a Hub model")
    split: str = setting("test", "split of the dataset, also an expression such as test[:100]")
    file: tuple[str, ...] = setting((), "local files (.txt .jsonl .json .csv .parquet, also .gz) or globs of them")
    stride: int | None = setting(None, "score one long text in windows that move by this many tokens, not in blocks")
    window: int | None = setting(None, "tokens per window, with `stride`; the model's context if not given")
    batch_size: int = setting(4, "rows per forward pass")
    json: bool = setting(False, "print a JSON object")


def run(settings: EvaluateSettings) -> int:
    """Prints the perplexity; the exit code is 1 if it is not finite."""
    from tfclm.checkpoint import load
    from tfclm.cli.evaluation import evaluate

    if settings.model is None:
        raise InputError("`model` is missing: give the directory or Hub id of a checkpoint")
    if settings.batch_size < 1:
        raise InputError(f"`batch_size` {settings.batch_size}: give 1 or more")
    if settings.window is not None and settings.stride is None:
        raise InputError("`window` goes with `stride`; `block_size` sets the length of blocks")
    model, tokenizer = load(settings.model, revision=settings.revision)
    result = evaluate(
        model,
        tokenizer,
        settings,
        split=settings.split,
        files=settings.file,
        stride=settings.stride,
        window=settings.window,
        batch_size=settings.batch_size,
    )
    finite = all(math.isfinite(result[name]) for name in ("perplexity", "standard_error", "loss"))
    if settings.json:
        print_result(json.dumps(plain(result)))
    elif finite:
        line = f"perplexity {result['perplexity']:.4f} ± {result['standard_error']:.4f} over {result['tokens']} tokens"
        bits = result["bits_per_byte"]
        print_result(line if bits is None else f"{line}, {bits:.4f} bits per byte")
    if not finite:
        why = "the weights or the logits hold NaN or infinity"
        if math.isfinite(result["loss"]):
            why = f"exp of the mean loss {result['loss']:.4f} is larger than a float can hold"
        log(f"tfclm.evaluate: the perplexity of {settings.model} is not finite: {why}")
    return 0 if finite else 1


def main() -> None:
    """The command."""
    command(EvaluateSettings, run, verb="evaluate", description=__doc__ or "")


if __name__ == "__main__":
    main()

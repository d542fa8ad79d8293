"""`python -m tfclm.evaluate`: the perplexity of a checkpoint on a text."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from tfclm.cli.command import command
from tfclm.corpus.settings import SourceSettings
from tfclm.errors import InputError
from tfclm.metrics.finite import plain
from tfclm.settings import setting
from tfclm.terminal import log, print_result


@dataclass(frozen=True)
class EvaluateSettings(SourceSettings):
    """Settings of `evaluate`."""

    model: str | None = setting(None, "folder or Hub id of the checkpoint")
    revision: str | None = setting(None, "branch, tag or commit of a Hub model id")
    split: str = setting("test", "split of the dataset, also an expression such as test[:100]")
    file: tuple[str, ...] = setting((), "local files (.txt .jsonl .json .csv .parquet, also .gz) or globs of them")
    stride: int | None = setting(None, "score one long text in windows that move by this many tokens, not in blocks")
    window: int | None = setting(None, "tokens of a window, with --stride; the model's context if not given")
    batch_size: int = setting(4, "rows a forward pass")
    json: bool = setting(False, "print a JSON object")


def run(settings: EvaluateSettings) -> int:
    """Prints the perplexity; 1 if it is not finite."""
    from tfclm.checkpoint import load

    if settings.model is None:
        raise InputError("--model is missing: give the folder or Hub id of a checkpoint")
    if settings.batch_size < 1:
        raise InputError(f"--batch-size {settings.batch_size}: give 1 or more")
    if settings.window is not None and settings.stride is None:
        raise InputError("--window goes with --stride; the length of blocks is --block-size")
    model, tokenizer = load(settings.model, revision=settings.revision)
    result = measure(model, tokenizer, settings)
    finite = all(math.isfinite(result[name]) for name in ("perplexity", "standard_error", "loss"))
    if settings.json:
        print_result(json.dumps(plain(result)))
    elif finite:
        error = result["standard_error"]
        print_result(f"perplexity {result['perplexity']:.4f} ± {error:.4f} over {result['tokens']} tokens")
    if not finite:
        why = "its weights, or what it computes from them, hold NaN or infinity"
        if math.isfinite(result["loss"]):
            why = f"exp of the mean loss {result['loss']:.4f} is beyond the largest number"
        log(f"tfclm.evaluate: the perplexity of {settings.model} is not finite: {why}")
    return 0 if finite else 1


def measure(model: Any, tokenizer: Any, settings: EvaluateSettings) -> dict[str, Any]:
    """Perplexity of a loaded model on the settings' source, and how it was measured: what `--json` prints."""
    from tfclm import corpus
    from tfclm.checkpoint import context_size
    from tfclm.metrics.perplexity import perplexity

    context = context_size(model)
    split = corpus.read_split(
        dataset=settings.dataset,
        dataset_config=settings.dataset_config,
        revision=settings.dataset_revision,
        split=settings.split,
        files=settings.file,
        text_column=settings.text_column,
    )
    if settings.stride is None:
        block_size = settings.block_size_for(context)
        corpus.check_block_size(block_size, context)
        tokens = corpus.tokenize(split.texts, tokenizer, settings.num_proc)
        packed = corpus.pack(tokens, block_size, settings.separator_ids(tokenizer))
        corpus.check_vocabulary(packed.largest_id, model.config.vocab_size)
        score = perplexity(model, packed.blocks, batch_size=settings.batch_size)
        protocol: dict[str, Any] = {
            "block_size": block_size,
            "separator": settings.separator,
            "dropped_tokens": packed.dropped_tokens,
        }
    else:
        window = settings.window or context
        if window is None:
            raise InputError("this model's context has no bound: give --window")
        if not 2 <= window <= (context or window):
            raise InputError(f"--window {window}: give 2 to {context}, the model's context")
        if not 0 < settings.stride <= window:
            raise InputError(f"--stride {settings.stride}: give 1 to {window}, the window")
        ids = tokenizer("\n\n".join(split.texts["text"]), verbose=False)["input_ids"]
        if len(ids) < 2:
            raise InputError(f"the text has {len(ids)} tokens: 2 are needed, the first is only context")
        score = perplexity(model, ids, window=window, stride=settings.stride, batch_size=settings.batch_size)
        protocol = {"window": window, "stride": settings.stride, "separator": "\n\n"}
    return {
        "perplexity": score.perplexity,
        "standard_error": score.standard_error,
        "loss": score.loss,
        "tokens": score.tokens,
        "protocol": protocol | split.description,
    }


def main() -> None:
    """The command."""
    command(EvaluateSettings, run, verb="evaluate", description=__doc__ or "")


if __name__ == "__main__":
    main()

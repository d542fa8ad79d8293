"""`python -m tfclm.generate`: text from a checkpoint, in this process."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from tfclm.cli.command import command
from tfclm.cli.prompts import read_prompt
from tfclm.errors import InputError
from tfclm.settings import setting
from tfclm.terminal import log, print_result


@dataclass(frozen=True)
class GenerateSettings:
    """Settings of `generate`; sampling parameters that are None are those of the checkpoint's generation_config."""

    model: str | None = setting(None, "folder or Hub id of the checkpoint")
    revision: str | None = setting(None, "branch, tag or commit of a Hub id")
    prompt: str | None = setting(None, "what to go on from; standard input if not given", literal=True)
    max_new_tokens: int | None = setting(None, "tokens at most; 100, or what the context leaves, if not given")
    temperature: float | None = setting(None, "flattens (above 1) or sharpens the distribution; 0 is greedy")
    top_k: int | None = setting(None, "draw from this many of the likeliest tokens; 0 is off")
    top_p: float | None = setting(None, "draw from the likeliest tokens that together have this probability; 1 is off")
    seed: int | None = setting(None, "the same seed gives the same text")
    json: bool = setting(False, "print a JSON object")


def run(settings: GenerateSettings) -> int:
    """Prints the prompt and its continuation; 1 if the model computes none."""
    from tfclm.checkpoint import load
    from tfclm.checkpoint.generation import sample

    if settings.model is None:
        raise InputError("--model is missing: give the folder or Hub id of a checkpoint")
    prompt = read_prompt(settings.prompt, sys.stdin)
    model, tokenizer = load(settings.model, revision=settings.revision)
    idle = [f"--{name.replace('_', '-')}" for name in ("top_k", "top_p") if getattr(settings, name) is not None]
    if idle and settings.temperature is None and not model.generation_config.do_sample:
        log(
            f"tfclm.generate: {' and '.join(idle)} changes nothing at temperature 0, which this checkpoint's "
            "generation_config asks for: give --temperature"
        )
    try:
        text = sample(
            model,
            tokenizer,
            prompt,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=settings.seed,
        )
    except FloatingPointError as error:
        log(f"tfclm.generate: {settings.model}: {error}")
        return 1
    if text.strip() == prompt.strip():
        log("tfclm.generate: the text ended at once: the end of text came first")
    print_result(json.dumps({"generated_text": text}, ensure_ascii=False) if settings.json else text)
    return 0


def main() -> None:
    """The command."""
    command(GenerateSettings, run, verb="generate", description=__doc__ or "")


if __name__ == "__main__":
    main()

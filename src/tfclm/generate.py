"""`python -m tfclm.generate`: text from a checkpoint, in this process."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from tfclm.cli.arguments import flag
from tfclm.cli.command import command
from tfclm.cli.prompts import read_prompt
from tfclm.errors import InputError
from tfclm.settings import setting
from tfclm.terminal import log, print_result


@dataclass(frozen=True)
class GenerateSettings:
    """Settings of `generate`; sampling parameters default to the checkpoint's generation_config."""

    model: str | None = setting(None, "directory or Hub id of the checkpoint")
    revision: str | None = setting(None, "branch, tag or commit of a Hub id")
    prompt: str | None = setting(None, "text to continue; standard input if not given", literal=True)
    max_new_tokens: int | None = setting(None, "maximum number of new tokens; 100, or as many as the context leaves")
    temperature: float | None = setting(None, "above 1 flattens the distribution, below 1 sharpens it; 0 = greedy")
    top_k: int | None = setting(None, "sample from this many most likely tokens; 0 = off")
    top_p: float | None = setting(
        None, "sample from the most likely tokens that together have this probability; 1 = off"
    )
    seed: int | None = setting(None, "the same seed gives the same text")
    json: bool = setting(False, "print a JSON object")


def run(settings: GenerateSettings) -> int:
    """Prints the prompt and its continuation; the exit code is 1 if the logits are not finite."""
    from tfclm.checkpoint import load
    from tfclm.checkpoint.generation import sample

    if settings.model is None:
        raise InputError("`model` is missing: give the directory or Hub id of a checkpoint")
    prompt = read_prompt(settings.prompt, sys.stdin)
    model, tokenizer = load(settings.model, revision=settings.revision)
    unused = [flag(name) for name in ("top_k", "top_p") if getattr(settings, name) is not None]
    if unused and settings.temperature is None and not model.generation_config.do_sample:
        log(
            f"tfclm.generate: {' and '.join(unused)} has no effect at temperature 0, which this checkpoint's "
            "generation_config sets: give --temperature"
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
        log("tfclm.generate: the model continued the prompt with nothing but the end of text")
    print_result(json.dumps({"generated_text": text}, ensure_ascii=False) if settings.json else text)
    return 0


def main() -> None:
    """The command."""
    command(GenerateSettings, run, verb="generate", description=__doc__ or "")


if __name__ == "__main__":
    main()

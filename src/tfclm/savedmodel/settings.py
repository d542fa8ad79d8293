"""What an exported model is told when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from tfclm.checkpoint import generation
from tfclm.errors import InputError
from tfclm.settings import documented, setting

INT32 = 2**31 - 1
DEFAULT_NEW_TOKENS = 100
# The largest and the smallest normal float32.
LARGEST, SMALLEST = (2 - 2**-23) * 2.0**127, 2.0**-126
# Of whole numbers, the smallest and the largest.
RANGES = {
    "max_new_tokens": (1, INT32),
    "max_new_tokens_limit": (1, INT32),
    "top_k": (0, INT32),
    "max_batch_size": (1, 4096),
    "max_request_rows": (1, 2**20),
    "max_request_tokens": (1, 2**24),
}


@documented
@dataclass(frozen=True)
class ServableSettings:
    """Settings of `export_saved_model`; None takes the checkpoint's generation_config."""

    max_new_tokens: int | None = setting(None, "default of max_new_tokens; 100 if generation_config has none")
    max_new_tokens_limit: int | None = setting(
        None, "the largest max_new_tokens that a request may ask for; what the context holds, with xla 256 at most"
    )
    temperature: float | None = setting(None, "default temperature; 0 is greedy, as where do_sample is false")
    top_k: int | None = setting(None, "default of top_k; 0 is off")
    top_p: float | None = setting(None, "default of top_p; 1 is off")
    repetition_penalty: float | None = setting(None, "default repetition_penalty; 1 is off")
    truncate_prompts: bool = setting(
        False, "cut the left side of a prompt until max_new_tokens more fit into the context"
    )
    max_batch_size: int = setting(8, "rows that are decoded together, of one request or several")
    batch_timeout: float = setting(30.0, "milliseconds that a request waits for others to be decoded with")
    max_request_rows: int = setting(4096, "rows that one request may have; the model refuses more")
    max_request_tokens: int | None = setting(
        None,
        "tokens that one request may have: its rows times the longest of them, and for texts 4 bytes per token; "
        "1048576, or a batch of full contexts if that is more",
    )
    compile: Literal["none", "xla"] = setting(
        "none", "xla is faster, and for servers with --xla_cpu_compilation_enabled only"
    )
    buckets: tuple[int, ...] = setting((), "with xla, the prompt lengths that are compiled for; 32, 128, 512 and so on")
    weights: Literal["float32", "bfloat16"] = setting(
        "float32", "type that the weights are kept in; bfloat16 needs xla"
    )

    def check(self) -> None:
        """Raises InputError for a value out of its range, naming the flag."""
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"--{name.replace('_', '-')} {value}: give {low} or more")
            if value is not None and value > high:
                raise InputError(f"--{name.replace('_', '-')} {value}: give {high} at most")
        if self.temperature is not None and not 0 <= self.temperature <= LARGEST:
            raise InputError(f"--temperature {self.temperature}: give 0, which is greedy, or more, 3.4e38 at most")
        if self.top_p is not None and not SMALLEST <= self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p}: give a number from 1.2e-38 to 1, which is off")
        if self.repetition_penalty is not None and not SMALLEST <= self.repetition_penalty <= LARGEST:
            raise InputError(
                f"--repetition-penalty {self.repetition_penalty}: give a number from 1.2e-38 to 3.4e38; 1 is off"
            )
        if not 0 <= self.batch_timeout <= 60_000:
            raise InputError(f"--batch-timeout {self.batch_timeout}: give milliseconds, 0 to 60000")
        if self.buckets and self.compile != "xla":
            raise InputError("--buckets goes with --compile xla: otherwise a prompt of any length runs as it is")
        if any(size < 1 for size in self.buckets):
            raise InputError(f"--buckets {' '.join(map(str, self.buckets))}: give numbers of tokens, 1 or more")
        if self.weights != "float32" and self.compile != "xla":
            raise InputError(
                f"--weights {self.weights} goes with --compile xla: not compiled, it is slower than float32"
            )


@dataclass(frozen=True)
class Defaults:
    """The value of each knob that a request does not give."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float


# What generation_config may ask for beyond the knobs, with the value that asks for nothing.
UNSUPPORTED: dict[str, Any] = {
    **generation.UNSUPPORTED,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "forced_decoder_ids": None,
}


def defaults(settings: ServableSettings, generation_config: Any, limit: int) -> Defaults:
    """The knobs' defaults: the settings', else those of the checkpoint's generation_config.

    Raises:
        InputError: generation_config asks for what the graph does not do.
    """
    for name, off in UNSUPPORTED.items():
        value = getattr(generation_config, name, off)
        if value not in (off, None):
            raise InputError(
                f"generation_config.json has {name} {value}, which an exported model does not do: take it out"
            )
    try:
        made = _knobs(settings, generation_config, limit)
        dataclasses.replace(settings, **vars(made)).check()
    except (InputError, OverflowError) as error:
        raise InputError(f"generation_config.json has a value that no request may have: {error}") from error
    # Its own default is 20.
    given = settings.max_new_tokens or generation_config.max_new_tokens
    if given is None and getattr(generation_config, "max_length", None) not in (None, 20):
        raise InputError(
            f"generation_config.json has max_length {generation_config.max_length}, which counts the prompt: give "
            "--max-new-tokens, which does not"
        )
    if settings.max_new_tokens is not None and settings.max_new_tokens > limit:
        raise InputError(f"--max-new-tokens {settings.max_new_tokens}: the limit is {limit}")
    return made


def _knobs(settings: ServableSettings, generation_config: Any, limit: int) -> Defaults:
    given = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Defaults)}
    resolved = generation.resolve_parameters(generation_config, given)
    new = resolved["max_new_tokens"]
    return Defaults(**resolved | {"max_new_tokens": min(limit, DEFAULT_NEW_TOKENS if new is None else new)})

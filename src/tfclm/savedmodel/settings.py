"""Settings of an exported model, and the default values of its sampling parameters."""

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
# The smallest and the largest value of each integer.
RANGES = {
    "max_new_tokens": (1, INT32),
    "max_new_tokens_limit": (1, INT32),
    "top_k": (0, INT32),
    "max_batch_size": (1, 4096),
    "cache_tokens": (1, 2**31 - 1),
    "max_request_rows": (1, 2**20),
    "max_request_tokens": (1, 2**24),
    "max_top_logprobs": (0, 1000),
}


@documented
@dataclass(frozen=True)
class ServableSettings:
    """Settings of `export_saved_model`; None takes the checkpoint's generation_config."""

    max_new_tokens: int | None = setting(None, "default of `max_new_tokens`; 100 if generation_config has none")
    max_new_tokens_limit: int | None = setting(
        None, "largest `max_new_tokens` that a request may ask for; by default the context - 1, with xla at most 256"
    )
    temperature: float | None = setting(None, "default of `temperature`; 0 = greedy, as with do_sample false")
    top_k: int | None = setting(None, "default of `top_k`; 0 = off")
    top_p: float | None = setting(None, "default of `top_p`; 1 = off")
    repetition_penalty: float | None = setting(None, "default of `repetition_penalty`; 1 = off")
    truncate_prompts: bool = setting(
        False, "cut long prompts on the left, so that `max_new_tokens` more tokens fit into the context"
    )
    max_batch_size: int = setting(8, "maximum number of rows decoded together, from one or several requests")
    cache_tokens: int | None = setting(
        None,
        "maximum number of tokens whose keys and values are kept, of rows that are decoded and in the prefix cache; by "
        "default as many as take the memory of the weights in float32, at least two contexts",
    )
    prefix_cache: bool = setting(True, "start from the keys and values of earlier rows that begin with the same tokens")
    max_request_rows: int = setting(4096, "maximum number of rows per request")
    max_request_tokens: int | None = setting(
        None,
        "maximum number of tokens per request: its rows times the longest one, 4 bytes of text being one token; "
        "by default 1048576, or a batch of full contexts if that is more",
    )
    max_top_logprobs: int = setting(20, "largest `top_logprobs` that a request may ask for")
    compile: Literal["none", "xla"] = setting(
        "none", "xla is faster, but only servers started with --xla_cpu_compilation_enabled can run it"
    )
    buckets: tuple[int, ...] = setting(
        (), "with xla, the sizes of the key-value cache in tokens that are compiled; by default 256, 512 and so on"
    )
    weights: Literal["float32", "bfloat16", "int8"] = setting(
        "float32",
        "type in which the weights are stored; bfloat16 needs xla, and int8 a server on Linux and x86-64, without xla",
    )

    def check(self) -> None:
        """Raises `InputError`, naming the field, for a value out of its range."""
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"`{name}` {value}: give {low} or more")
            if value is not None and value > high:
                raise InputError(f"`{name}` {value}: give at most {high}")
        if self.temperature is not None and not 0 <= self.temperature <= LARGEST:
            raise InputError(f"`temperature` {self.temperature}: give 0 (greedy) to 3.4e38")
        if self.top_p is not None and not SMALLEST <= self.top_p <= 1:
            raise InputError(f"`top_p` {self.top_p}: give 1.2e-38 to 1 (1 = off)")
        if self.repetition_penalty is not None and not SMALLEST <= self.repetition_penalty <= LARGEST:
            raise InputError(f"`repetition_penalty` {self.repetition_penalty}: give 1.2e-38 to 3.4e38 (1 = off)")
        if self.buckets and self.compile != "xla":
            raise InputError("`buckets` requires `compile` xla: without it, the key-value cache may have any size")
        if any(size < 1 for size in self.buckets):
            raise InputError(f"`buckets` {' '.join(map(str, self.buckets))}: give numbers of tokens, 1 or more")
        if self.weights == "int8" and self.compile == "xla":
            raise InputError("`weights` int8 cannot be compiled: leave out `compile` xla, or give `weights` bfloat16")
        if self.weights == "bfloat16" and self.compile != "xla":
            raise InputError("`weights` bfloat16 requires `compile` xla: without it, bfloat16 is slower than float32")


@dataclass(frozen=True)
class Defaults:
    """The values of the sampling parameters that a request does not give."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float


# Other fields of generation_config that change the output, each with the value that turns it off.
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
    """The sampling parameters' default values, from the settings, else from the checkpoint's generation_config.

    Args:
        settings: of the export.
        generation_config: of the model.
        limit: the largest max_new_tokens.

    Raises:
        InputError: generation_config asks for something that the graph does not support, or has a value out of range.
    """
    for name, off in UNSUPPORTED.items():
        value = getattr(generation_config, name, off)
        if value not in (off, None):
            raise InputError(
                f"generation_config.json has {name} {value}, which an exported model does not support: remove it"
            )
    try:
        resolved = _resolve(settings, generation_config, limit)
        dataclasses.replace(settings, **vars(resolved)).check()
    except (InputError, OverflowError) as error:
        raise InputError(f"generation_config.json has a value that no request may have: {error}") from error
    # 20 is the default of max_length itself.
    given = settings.max_new_tokens or generation_config.max_new_tokens
    if given is None and getattr(generation_config, "max_length", None) not in (None, 20):
        raise InputError(
            f"generation_config.json has max_length {generation_config.max_length}, which counts the prompt: give "
            "`max_new_tokens`, which does not"
        )
    if settings.max_new_tokens is not None and settings.max_new_tokens > limit:
        raise InputError(f"`max_new_tokens` {settings.max_new_tokens}: the limit is {limit}")
    return resolved


def _resolve(settings: ServableSettings, generation_config: Any, limit: int) -> Defaults:
    given = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Defaults)}
    resolved = generation.resolve_parameters(generation_config, given)
    new_tokens = resolved["max_new_tokens"]
    if new_tokens is None:
        new_tokens = DEFAULT_NEW_TOKENS
    return Defaults(**resolved | {"max_new_tokens": min(limit, new_tokens)})

"""Generates text from a model in this process, with transformers' own `generate`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tfclm.errors import InputError, first_line

if TYPE_CHECKING:
    import tensorflow as tf
    from transformers import GenerationConfig, PreTrainedTokenizerBase, TFLogitsProcessorList, TFPreTrainedModel

DEFAULT_NEW_TOKENS = 100
# Settings of generation_config.json that TensorFlow's `generate` ignores or fails on, or that replace sampling by
# another algorithm, each with the value that turns it off. All others are applied: penalties, suppressed and forced
# tokens.
UNSUPPORTED: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0.0,
    "typical_p": 1.0,
    "min_p": 0.0,
    "top_h": None,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "sequence_bias": None,
    "force_words_ids": None,
    "constraints": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "stop_strings": None,
    "max_time": None,
    "watermarking_config": None,
    "dola_layers": None,
    "token_healing": False,
    "custom_generate": None,
}


def resolve_parameters(generation_config: GenerationConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the sampling parameters that are None by the checkpoint's values or the defaults.

    Args:
        generation_config: the checkpoint's. If its `do_sample` is not set, temperature is 0 (greedy), top_k 0 (off)
            and top_p 1 (off).
        given: any of temperature, top_k, top_p, repetition_penalty and max_new_tokens, by name. A max_new_tokens that
            is None here and in the checkpoint stays None.

    Raises:
        InputError: generation_config has a value of the wrong type.
    """
    do_sample = generation_config.do_sample
    if do_sample not in (True, False, None):
        raise InputError(f"do_sample is {do_sample!r}, neither true nor false")
    # Name: default, whether it is a whole number, whether the checkpoint's value also applies to greedy decoding.
    known: dict[str, tuple[Any, bool, bool]] = {
        "temperature": (1.0 if do_sample else 0.0, False, False),
        "top_k": (0, True, False),
        "top_p": (1.0, False, False),
        "repetition_penalty": (1.0, False, True),
        "max_new_tokens": (None, True, True),
    }
    resolved = {}
    for name, value in given.items():
        default, is_whole, always_applies = known[name]
        if value is None and (do_sample or always_applies):
            value = getattr(generation_config, name, None)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int if is_whole else int | float)
            ):
                raise InputError(f"{name} is {value!r}, not a {'whole number' if is_whole else 'number'}")
        value = default if value is None else value
        resolved[name] = value if is_whole else float(value)
    return resolved


def sample(
    model: TFPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> str:
    """Continues a prompt.

    Args:
        model: a TensorFlow causal language model of transformers.
        tokenizer: the model's tokenizer.
        prompt: text to continue; if empty, generation starts from the BOS token, or the EOS token if there is none.
        max_new_tokens: maximum number of new tokens; if None, 100 or as many as fit into the context.
        temperature: 1e-6 to 1e6; 0 is greedy. If None, temperature, top_k and top_p are those of the model's
            generation_config, as in an exported model.
        top_k: sample from this many most likely tokens; 0 is off.
        top_p: sample from the most likely tokens that together have this probability; 1 is off.
        seed: the same seed gives the same text; if None, each call gives another.

    Returns:
        The prompt and its continuation, without special tokens.

    Raises:
        InputError: a parameter is out of range, the prompt does not fit into the model's context, it is empty and the
            tokenizer has neither BOS nor EOS, or generation_config has an unsupported setting.
        FloatingPointError: the model's logits are not finite.

    Example:
        >>> model, tokenizer = tfclm.load("distilgpt2")
        >>> sample(model, tokenizer, "The capital of France is", max_new_tokens=5, seed=0)
    """
    import tensorflow as tf

    temperature, top_k, top_p = _resolve_sampling(model, temperature, top_k, top_p)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"`max_new_tokens` {max_new_tokens}: give 1 or more")
    ids = _encode_prompt(tokenizer, prompt)
    limit = _limit_new_tokens(model, len(ids), max_new_tokens)
    if seed is not None:
        # generate's own `seed` uses the same random numbers at every step.
        tf.random.set_seed(seed)
    config, processors = _adapt_config(model, len(ids))
    vars(config).update(
        max_new_tokens=limit,
        max_length=None,  # which would include the prompt
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        do_sample=bool(temperature),
    )
    if temperature:
        vars(config).update(temperature=temperature, top_k=top_k, top_p=top_p)
    try:
        output = model.generate(
            tf.constant([ids], tf.int32),
            generation_config=config,
            logits_processor=processors,
            attention_mask=tf.ones((1, len(ids)), tf.int32),
        )
    except (ValueError, TypeError) as error:  # of transformers' processors, for values that they do not accept
        raise InputError(f"generation_config.json has a value that cannot be used: {first_line(error)}") from error
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def _resolve_sampling(
    model: TFPreTrainedModel, temperature: float | None, top_k: int | None, top_p: float | None
) -> tuple[float, int, float]:
    """The sampling parameters with the checkpoint's values filled in, checked to be in range."""
    try:
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        resolved = resolve_parameters(model.generation_config, given)
    except (InputError, OverflowError) as error:
        raise InputError(f"generation_config.json has a value that cannot be used: {error}") from error
    temperature, top_k, top_p = resolved["temperature"], resolved["top_k"], resolved["top_p"]
    if temperature != 0 and not 1e-6 <= temperature <= 1e6:  # beyond, logits overflow or vanish
        raise InputError(f"`temperature` {temperature}: give 0 (greedy) or a number from 1e-6 to 1e6")
    if not 0 < top_p <= 1:
        raise InputError(f"`top_p` {top_p}: give a number above 0 and up to 1 (1 = off)")
    if top_k < 0:
        raise InputError(f"`top_k` {top_k}: give 0 (off) or more")
    return temperature, top_k, top_p


def _encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if not ids and start is None:
        raise InputError("the prompt is empty, and the tokenizer has no BOS or EOS to start from: give a `prompt`")
    return ids or [start]


def _limit_new_tokens(model: TFPreTrainedModel, prompt_tokens: int, max_new_tokens: int | None) -> int:
    """The maximum number of new tokens: as given, or 100 or as many as fit into the context."""
    from tfclm.checkpoint.model import context_size

    context = context_size(model)
    if context is None:
        return max_new_tokens or DEFAULT_NEW_TOKENS
    remaining = context - prompt_tokens
    if remaining < (max_new_tokens or 1):
        remedy = "give a shorter prompt"
        if max_new_tokens and remaining > 0:
            remedy += " or a smaller `max_new_tokens`"
        raise InputError(
            f"the prompt's {prompt_tokens} tokens leave room for {max(remaining, 0)} more in the model's context of "
            f"{context}: {remedy}"
        )
    return max_new_tokens or min(DEFAULT_NEW_TOKENS, remaining)


def _check_finite(input_ids: tf.Tensor, scores: tf.Tensor, cur_len: int) -> tf.Tensor:
    """A logits processor that refuses NaN and infinity: from NaN, `generate` would draw arbitrary tokens."""
    import tensorflow as tf

    if tf.reduce_any(tf.math.is_nan(scores)) or not tf.math.is_finite(tf.reduce_max(scores)):
        raise FloatingPointError("the model's logits are not finite: its weights hold NaN or infinity, or overflow")
    return scores


def _adapt_config(model: TFPreTrainedModel, prompt_tokens: int) -> tuple[GenerationConfig, TFLogitsProcessorList]:
    """The model's generation_config, checked and changed to what TensorFlow's `generate` supports.

    Returns:
        The config, and logits processors for the settings that `generate` itself does not apply correctly.
    """
    from transformers import TFLogitsProcessorList

    config = copy.deepcopy(model.generation_config)
    for name, off in UNSUPPORTED.items():
        value = getattr(config, name, None)
        if value not in (None, off):
            raise InputError(f"generation_config.json has {name} {value}, which generate does not support: remove it")
    _check_token_ids(config, model.config.vocab_size)
    min_length = _resolve_min_length(config, prompt_tokens)
    penalty = config.repetition_penalty
    if penalty is not None:
        if not isinstance(penalty, int | float) or not 0 < penalty < float("inf"):
            raise InputError(
                f"generation_config.json has repetition_penalty {penalty!r}: give a number above 0; 1 is off"
            )
        config.repetition_penalty = float(penalty)
    vars(config).update(
        # MinLength below replaces TensorFlow's minimum, which supports one EOS token only, fails for a minimum above
        # the maximum, and ignores min_new_tokens.
        min_length=0,
        min_new_tokens=None,
        # `generate` fails if a file has null here.
        num_beams=1,
        num_beam_groups=1,
        num_return_sequences=1,
        # The form of the output.
        return_dict_in_generate=False,
        output_scores=False,
        output_attentions=False,
        output_hidden_states=False,
        use_cache=True,
    )
    processors = TFLogitsProcessorList([_check_finite])
    eos_ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if min_length and eos_ids != [None]:
        processors.append(_min_length_processor()(min_length, eos_ids))
    return config, processors


def _check_token_ids(config: GenerationConfig, vocab_size: int) -> None:
    """Raises `InputError` for a BOS, EOS or padding token that the vocabulary does not have."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < vocab_size:
                raise InputError(f"generation_config.json has {name} {number!r}: give a token id of the vocabulary")


def _resolve_min_length(config: GenerationConfig, prompt_tokens: int) -> int:
    """The minimum length of the text including the prompt, from min_length and min_new_tokens; 0 for none."""
    lengths = []
    for name, counted in (("min_length", 0), ("min_new_tokens", prompt_tokens)):
        value = getattr(config, name, None) or 0
        if not isinstance(value, int) or value < 0:
            raise InputError(f"generation_config.json has {name} {value!r}: give a number of tokens")
        lengths.append(value + counted if value else 0)
    return max(lengths)


@functools.cache
def _min_length_processor() -> Any:
    """The class of a logits processor; defined on first use, so that importing this module imports no TensorFlow."""
    import tensorflow as tf
    from transformers import TFLogitsProcessor

    class MinLength(TFLogitsProcessor):
        """Forbids the EOS tokens until the text, with its prompt, has `length` tokens."""

        def __init__(self, length: int, eos_ids: list[int]) -> None:
            self.length = length
            self.eos_ids = eos_ids

        def __call__(self, input_ids: tf.Tensor, scores: tf.Tensor, cur_len: tf.Tensor | int) -> tf.Tensor:
            vocabulary = tf.range(scores.shape[-1])
            is_eos = tf.reduce_any(vocabulary[:, None] == tf.constant(self.eos_ids), axis=1)
            return tf.where(is_eos & (cur_len < self.length), scores.dtype.min, scores)

    return MinLength

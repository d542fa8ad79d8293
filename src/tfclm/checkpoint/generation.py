"""Text from a model in this process, through transformers' own `generate`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

from tfclm.errors import InputError, first_line

# What generation_config.json may ask for and TensorFlow's `generate` ignores, fails on or does instead of sampling,
# with the value that asks for nothing. The rest it obeys: penalties, suppressed and forced tokens.
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


def resolve_parameters(generation_config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters that hold: those that are given and, for each that is None, the checkpoint's.

    Args:
        generation_config: the checkpoint's. Where it does not sample, the temperature is 0 (greedy), top_k 0 (off) and
            top_p 1 (off).
        given: any of temperature, top_k, top_p, repetition_penalty and max_new_tokens, by name. A max_new_tokens that
            neither gives stays None.

    Raises:
        InputError: generation_config has a value of another type than the parameter's.
    """
    drawn = generation_config.do_sample
    if drawn not in (True, False, None):
        raise InputError(f"do_sample is {drawn!r}, neither true nor false")
    # Name: value if neither gives one, whether it is a whole number, whether it counts for greedy decoding too.
    known: dict[str, tuple[Any, bool, bool]] = {
        "temperature": (1.0 if drawn else 0.0, False, False),
        "top_k": (0, True, False),
        "top_p": (1.0, False, False),
        "repetition_penalty": (1.0, False, True),
        "max_new_tokens": (None, True, True),
    }
    resolved = {}
    for name, value in given.items():
        otherwise, whole, always = known[name]
        if value is None and (drawn or always):
            value = getattr(generation_config, name, None)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int if whole else int | float)):
                raise InputError(f"{name} is {value!r}, no {'whole number' if whole else 'number'}")
        value = otherwise if value is None else value
        resolved[name] = value if whole else float(value)
    return resolved


def sample(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> str:
    """The prompt and its continuation.

    Args:
        model: a TensorFlow causal language model of transformers.
        tokenizer: its tokenizer.
        prompt: what to go on from; empty begins a text of its own.
        max_new_tokens: tokens at most; 100, or what the context leaves, if not given.
        temperature: 1e-6 to 1e6; 0 is greedy. It, top_k and top_p are the model's generation_config's if not given, as
            in an exported model.
        top_k: draw from this many of the likeliest tokens; 0 is off.
        top_p: draw from the likeliest tokens that together have this probability; 1 is off.
        seed: the same seed gives the same text; None is fresh.

    Raises:
        InputError: a value out of range, a prompt that leaves no room in the model's context, an empty one where the
            tokenizer has no token to begin with, or a generation_config that asks for what is not done here.
        FloatingPointError: the model's logits are not finite.
    """
    import tensorflow as tf

    try:
        chosen = resolve_parameters(
            model.generation_config, {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        )
    except (InputError, OverflowError) as error:
        raise InputError(f"generation_config.json has a value that cannot be used: {error}") from error
    temperature, top_k, top_p = chosen.values()
    if temperature != 0 and not 1e-6 <= temperature <= 1e6:  # beyond, logits overflow or vanish
        raise InputError(f"--temperature {temperature}: give 0 (greedy) or a number from 1e-6 to 1e6")
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p {top_p}: give a number above 0, up to 1 (off)")
    if top_k < 0:
        raise InputError(f"--top-k {top_k}: give 0 (off) or more")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {max_new_tokens}: give 1 or more")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = tokenizer(prompt)["input_ids"] or [start]
    if ids == [None]:
        raise InputError("the prompt is empty, and the tokenizer has no BOS or EOS to begin with: give a --prompt")
    from tfclm.checkpoint import context_size

    context = context_size(model)
    room = (context or len(ids) + (max_new_tokens or 100)) - len(ids)
    if room < (max_new_tokens or 1):
        raise InputError(
            f"the prompt's {len(ids)} tokens leave room for {max(room, 0)} more in the model's context of {context}: "
            f"give a shorter prompt{' or a smaller --max-new-tokens' if max_new_tokens and room > 0 else ''}"
        )
    if seed is not None:
        # generate's own `seed` draws with the same numbers at every step.
        tf.random.set_seed(seed)
    config, processors = _obeyed(model, len(ids))
    vars(config).update(
        max_new_tokens=max_new_tokens or min(100, room),
        max_length=None,  # which counts the prompt
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
    except (ValueError, TypeError) as error:  # of its processors, for values that they do not take
        raise InputError(f"generation_config.json has a value that cannot be used: {first_line(error)}") from error
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def _check_finite(input_ids: Any, scores: Any, cur_len: int) -> Any:
    """Of NaN every token is drawn alike, and a text of them looks like one."""
    import tensorflow as tf

    if tf.reduce_any(tf.math.is_nan(scores)) or not tf.math.is_finite(tf.reduce_max(scores)):
        raise FloatingPointError("the model's logits are not finite: its weights hold NaN or infinity, or overflow")
    return scores


def _obeyed(model: Any, prompt_length: int) -> tuple[Any, Any]:
    """The generation_config for TensorFlow's `generate`, and processors for what `generate` does not do rightly."""
    from transformers import TFLogitsProcessorList

    config = copy.deepcopy(model.generation_config)
    for name, off in UNSUPPORTED.items():
        value = getattr(config, name, None)
        if value not in (None, off):
            raise InputError(f"generation_config.json has {name} {value}, which generate does not do: take it out")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < model.config.vocab_size:
                raise InputError(f"generation_config.json has {name} {number!r}: give a token id of the vocabulary")
    lengths = []
    for name, counted in (("min_length", 0), ("min_new_tokens", prompt_length)):
        value = getattr(config, name, None) or 0
        if not isinstance(value, int) or value < 0:
            raise InputError(f"generation_config.json has {name} {value!r}: give a number of tokens")
        lengths.append(value + counted if value else 0)
    penalty = config.repetition_penalty
    if penalty is not None:
        if not isinstance(penalty, int | float) or not 0 < penalty < float("inf"):
            raise InputError(
                f"generation_config.json has repetition_penalty {penalty!r}: give a number above 0; 1 is off"
            )
        config.repetition_penalty = float(penalty)
    vars(config).update(
        # TensorFlow's own takes one EOS alone, refuses a minimum above the maximum, and knows no min_new_tokens.
        min_length=0,
        min_new_tokens=None,
        # Where a file says null, generate finds no way to go.
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
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if max(lengths) and ends != [None]:
        processors.append(_minimum_length()(max(lengths), ends))
    return config, processors


@functools.cache
def _minimum_length() -> Any:
    """The class of a processor that keeps a text from ending; made on the first use to import no TensorFlow before."""
    import tensorflow as tf
    from transformers import TFLogitsProcessor

    class MinimumLength(TFLogitsProcessor):
        """No EOS before the text, with its prompt, has so many tokens."""

        def __init__(self, length: int, ends: list[int]) -> None:
            self.length = length
            self.ends = ends

        def __call__(self, input_ids: Any, scores: Any, cur_len: Any) -> Any:
            vocabulary = tf.range(scores.shape[-1])
            end = tf.reduce_any(vocabulary[:, None] == tf.constant(self.ends), axis=1)
            return tf.where(end & (cur_len < self.length), scores.dtype.min, scores)

    return MinimumLength

"""Text from a model in this process, through transformers' own `generate`."""

from __future__ import annotations

from typing import Any

from tfclm.errors import InputError


def sample(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 0.95,
    seed: int | None = None,
) -> str:
    """The prompt and its continuation.

    Args:
        model: a TensorFlow causal language model of transformers.
        tokenizer: its tokenizer.
        prompt: what to go on from; empty begins a text of its own.
        max_new_tokens: tokens at most; 100, or what the context leaves, if not given.
        temperature: 1e-6 to 1e6; 0 is greedy.
        top_k: draw from this many of the likeliest tokens; 0 is off.
        top_p: draw from the likeliest tokens that together have this probability; 1 is off.
        seed: the same seed gives the same text; None is fresh.

    Raises:
        InputError: a value out of range, a prompt that leaves no room in the model's context, or an empty one where the
            tokenizer has no token to begin with.
        FloatingPointError: the model's logits are not finite.
    """
    import tensorflow as tf

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
    drawing = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    from transformers import TFLogitsProcessorList

    output = model.generate(
        tf.constant([ids], tf.int32),
        attention_mask=tf.ones((1, len(ids)), tf.int32),
        max_new_tokens=max_new_tokens or min(100, room),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        logits_processor=TFLogitsProcessorList([_check_finite]),
        **(drawing if temperature else {"do_sample": False}),
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def _check_finite(input_ids: Any, scores: Any, cur_len: int) -> Any:
    """Of NaN every token is drawn alike, and a text of them looks like one."""
    import tensorflow as tf

    if tf.reduce_any(tf.math.is_nan(scores)) or not tf.math.is_finite(tf.reduce_max(scores)):
        raise FloatingPointError("the model's logits are not finite: its weights hold NaN or infinity, or overflow")
    return scores

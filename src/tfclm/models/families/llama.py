"""Llama and its successors: RMS norms, rotary positions, gated feed-forward parts."""

from __future__ import annotations

import math
from dataclasses import replace

from tfclm.errors import InputError
from tfclm.models.families.fields import (
    Fields,
    biases,
    layer_windows,
    one_window,
    rotated_sizes,
)
from tfclm.models.rope import rope
from tfclm.models.spec import Names, Spec

__all__ = [
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
]


def llama(fields: Fields) -> Spec:
    """The `Spec` of a config of the type llama."""
    return Spec(**rotated_sizes(fields, eps=fields.rms_norm_eps, **biases(fields)))


def mistral(fields: Fields) -> Spec:
    """The `Spec` of a config of the type mistral."""
    return Spec(**rotated_sizes(fields, eps=fields.rms_norm_eps, windows=one_window(fields)))


def qwen2(fields: Fields) -> Spec:
    """The `Spec` of a config of the type qwen2."""
    windows = _qwen_windows(fields)
    return Spec(**rotated_sizes(fields, eps=fields.rms_norm_eps, qkv_bias=True, windows=windows))


def qwen3(fields: Fields) -> Spec:
    """The `Spec` of a config of the type qwen3."""
    eps = fields.rms_norm_eps
    given = rotated_sizes(fields, eps=eps, qk_norm="head", windows=_qwen_windows(fields))
    return Spec(**{**given, **biases(fields)})


def _qwen_windows(fields: Fields) -> tuple[int | None, ...]:
    # The class of the config makes `layer_types` of these two.
    fields.get("use_sliding_window")
    fields.get("max_window_layers")
    return layer_windows(fields)


def gemma(fields: Fields) -> Spec:
    """The `Spec` of a config of the type gemma."""
    function = fields.hidden_act
    if fields.get("hidden_activation", function) != function and function != "gelu":
        raise InputError(
            f"config.json has hidden_act {function!r} and hidden_activation {fields.hidden_activation!r}: remove the "
            "one that the model was not trained with"
        )
    # The first releases say "gelu", and were trained with the approximation by tanh.
    return _gemma(fields, {"gelu": "gelu_pytorch_tanh"}.get(function, function))


def _gemma(fields: Fields, function: str) -> Spec:
    return Spec(
        **{
            **rotated_sizes(fields, eps=fields.rms_norm_eps, norm="rms_plus_one", **biases(fields)),
            "activation": function,
            "embedding_scale": math.sqrt(fields.hidden_size),
        }
    )


SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def gemma2(fields: Fields) -> Spec:
    """The `Spec` of a config of the type gemma2."""
    return replace(
        _gemma(fields, fields.hidden_activation),
        names=Names(norms=SANDWICH),
        windows=layer_windows(fields),
        attention_scale=fields.query_pre_attn_scalar**-0.5,
        attention_cap=fields.get("attn_logit_softcapping"),
        logit_cap=fields.get("final_logit_softcapping"),
    )


def gemma3_text(fields: Fields) -> Spec:
    """The `Spec` of a config of the type gemma3_text."""
    fields.get("sliding_window_pattern")  # the class of the config makes `layer_types` of it
    fields.get("_sliding_window_pattern")
    spec = gemma2(fields)
    local = rope(fields.rope_local_base_freq, spec.head_dim, None, spec.context or 0)
    windows = spec.windows
    return replace(
        spec,
        qk_norm="head",
        ropes=(*spec.ropes, local),
        layer_ropes=tuple(0 if window is None else 1 for window in windows),
    )


def smollm3(fields: Fields) -> Spec:
    """The `Spec` of a config of the type smollm3."""
    fields.get("no_rope_layer_interval")  # the class of the config makes `no_rope_layers` of it
    fields.get("use_sliding_window")
    rotated = tuple(0 if used else None for used in fields.no_rope_layers)  # 1 means that the layer has a rope
    given = rotated_sizes(fields, eps=fields.rms_norm_eps, **biases(fields))
    return Spec(**{**given, "layer_ropes": rotated, "windows": layer_windows(fields)})


def phi3(fields: Fields) -> Spec:
    """The `Spec` of a config of the type phi3."""
    fraction = fields.get("partial_rotary_factor", 1.0)
    return Spec(
        **rotated_sizes(
            fields,
            fraction,
            eps=fields.rms_norm_eps,
            windows=one_window(fields),
            fused_qkv="parts",
            fused_gate_up=True,
            embedding_dropout=fields.get("embd_pdrop", 0.0),
            residual_dropout=fields.get("resid_pdrop", 0.0),
        )
    )


def olmo2(fields: Fields) -> Spec:
    """The `Spec` of a config of the type olmo2."""
    names = Names(norms=("", "post_attention_layernorm", "", "post_feedforward_layernorm"))
    eps = fields.rms_norm_eps
    return Spec(**rotated_sizes(fields, eps=eps, names=names, qk_norm="whole", **biases(fields)))


def granite(fields: Fields) -> Spec:
    """The `Spec` of a config of the type granite."""
    return Spec(
        **{
            **rotated_sizes(fields, eps=fields.rms_norm_eps, **biases(fields)),
            "embedding_scale": fields.embedding_multiplier,
            "residual_scale": fields.residual_multiplier,
            "attention_scale": fields.attention_multiplier,
            "logit_scale": 1 / fields.logits_scaling,
        }
    )

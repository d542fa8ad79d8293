"""Decoders with layer norms and rotary positions, ALiBi or sinusoids."""

from __future__ import annotations

import math

from tfclm.errors import InputError
from tfclm.models.families.fields import (
    Fields,
    decoder_sizes,
    layer_norm_settings,
    rotated_sizes,
)
from tfclm.models.spec import Names, Spec

__all__ = ["bloom", "ctrl", "falcon", "gpt_neox", "mpt", "persimmon", "phi", "stablelm"]


def gpt_neox(fields: Fields) -> Spec:
    """The `Spec` of a config of the type gpt_neox."""
    names = Names(
        stem="gpt_neox",
        embedding="embed_in",
        qkv="attention.query_key_value",
        o="attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        final_norm="final_layer_norm",
        head="embed_out",
    )
    fields.get("rotary_emb_base")  # the class of the config copies these two
    fields.get("partial_rotary_factor")
    bias = bool(fields.attention_bias)
    given = layer_norm_settings(fields, names=names, fused_qkv="groups", qkv_bias=bias, o_bias=bias)
    return Spec(**rotated_sizes(fields, fields.rotary_pct, parallel=bool(fields.use_parallel_residual), **given))


def _alibi_slopes(heads: int) -> tuple[float, ...]:
    """The slopes of BLOOM and Falcon."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-(2.0 ** -(math.log2(power) - 3)) * number) for number in range(1, power + 1)]
    extra = [2.0 ** (-(2.0 ** -(math.log2(2 * power) - 3)) * number) for number in range(1, 2 * (heads - power) + 1, 2)]
    return tuple(slopes + extra)


def bloom(fields: Fields) -> Spec:
    """The `Spec` of a config of the type bloom."""
    names = Names(
        stem="transformer",
        embedding="word_embeddings",
        embedding_norm="word_embeddings_layernorm",
        layer="h",
        qkv="self_attention.query_key_value",
        o="self_attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        final_norm="ln_f",
    )
    return Spec(
        **decoder_sizes(
            fields,
            **layer_norm_settings(fields, names=names, fused_qkv="groups", eps=fields.layer_norm_epsilon),
            context=fields.get("seq_length"),
            activation="gelu_new",
            residual_from_norm=bool(fields.apply_residual_connection_post_layernorm),
            alibi=_alibi_slopes(fields.num_attention_heads),
        )
    )


def falcon(fields: Fields) -> Spec:
    """The `Spec` of a config of the type falcon."""
    new, parallel = bool(fields.new_decoder_architecture), bool(fields.new_decoder_architecture or fields.parallel_attn)
    norms_in_parallel = fields.get("num_ln_in_parallel_attn", 2 if new else 1)
    multi_query, groups = fields.multi_query, fields.get("num_kv_heads")
    if new and not fields.parallel_attn:
        raise InputError("config.json has parallel_attn false with new_decoder_architecture: no Falcon has both")
    if parallel and norms_in_parallel == 2:
        norms = ("ln_attn", "", "ln_mlp", "")
    elif parallel:
        norms = ("input_layernorm", "", "input_layernorm", "")
    else:
        norms = ("input_layernorm", "", "post_attention_layernorm", "")
    names = Names(
        stem="transformer",
        embedding="word_embeddings",
        layer="h",
        qkv="self_attention.query_key_value",
        o="self_attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        norms=norms,
        final_norm="ln_f",
    )
    bias, heads = bool(fields.bias), fields.num_attention_heads
    given = layer_norm_settings(
        fields, names=names, fused_qkv="groups", eps=fields.layer_norm_epsilon, parallel=parallel
    )
    given |= {
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": bias,
        "kv_heads": groups if new else 1 if multi_query else heads,
        "inner_size": fields.get("ffn_hidden_size", 4 * fields.hidden_size),
        "activation": fields.activation,
        "head_dim": fields.hidden_size // heads,
    }
    if fields.alibi:
        fields.get("rope_theta")
        return Spec(**decoder_sizes(fields, **given, alibi=_alibi_slopes(heads), alibi_bfloat16=True))
    return Spec(**rotated_sizes(fields, **given))


def mpt(fields: Fields) -> Spec:
    """The `Spec` of a config of the type mpt."""
    names = Names(
        stem="transformer",
        embedding="wte",
        layer="blocks",
        qkv="attn.Wqkv",
        o="attn.out_proj",
        up="ffn.up_proj",
        down="ffn.down_proj",
        norms=("norm_1", "", "norm_2", ""),
        final_norm="norm_f",
    )
    attention = fields.attn_config
    fields.get("no_bias")  # PyTorch's class has no biases either way
    for name in ("init_device", "verbose", "learned_pos_emb", "embedding_fraction", "norm_type", "expansion_ratio"):
        fields.get(name)  # PyTorch's class does not read them
    for name, only in (
        ("attn_type", "multihead_attention"),
        ("prefix_lm", False),
        ("attn_uses_sequence_id", False),
        ("qk_ln", False),
        ("alibi", True),
        # PyTorch's class ignores it, so that its logits are not those that the model was trained for.
        ("alibi_bias_max", 8),
    ):
        if getattr(attention, name, only) != only:
            raise InputError(
                f"config.json has {name} {getattr(attention, name)!r} in attn_config; only {only!r} is supported"
            )
    heads, hidden = fields.num_attention_heads, fields.hidden_size
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** -(number * 8 / power) for number in range(1, power + 1)]
    if power != heads:
        slopes = (slopes[1::2] + slopes[::2])[:heads]
    return Spec(
        **decoder_sizes(
            fields,
            **layer_norm_settings(fields, names=names, fused_qkv="parts", eps=fields.layer_norm_epsilon),
        )
        | {
            "norm_bias": False,
            "qkv_bias": False,
            "o_bias": False,
            "mlp_bias": False,
            "inner_size": 4 * hidden,
            "context": fields.max_seq_len,
            "activation": "gelu",
            "attention_scale": attention.softmax_scale or (hidden / heads) ** -0.5,
            "attention_dropout": attention.attn_pdrop,
            "residual_dropout": attention.attn_pdrop,
            "qkv_limit": attention.clip_qkv or None,
            "alibi": tuple(slopes),
        }
    )


def persimmon(fields: Fields) -> Spec:
    """The `Spec` of a config of the type persimmon."""
    names = Names(
        qkv="self_attn.query_key_value",
        o="self_attn.dense",
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        final_norm="final_layernorm",
    )
    given = layer_norm_settings(fields, names=names, fused_qkv="groups")
    norm = {"qk_norm": "head"} if fields.qk_layernorm else {}
    return Spec(**rotated_sizes(fields, fields.partial_rotary_factor, **given, **norm))


def phi(fields: Fields) -> Spec:
    """The `Spec` of a config of the type phi."""
    names = Names(
        o="self_attn.dense",
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
        up="mlp.fc1",
        down="mlp.fc2",
        norms=("input_layernorm", "", "input_layernorm", ""),
        final_norm="final_layernorm",
    )
    given = layer_norm_settings(
        fields,
        names=names,
        parallel=True,
        head_bias=True,
        embedding_dropout=fields.get("embd_pdrop", 0.0),
        residual_dropout=fields.get("resid_pdrop", 0.0),
    )
    norm = {"qk_norm": "head"} if fields.qk_layernorm else {}
    return Spec(**rotated_sizes(fields, fields.partial_rotary_factor, **given, **norm))


def stablelm(fields: Fields) -> Spec:
    """The `Spec` of a config of the type stablelm."""
    if fields.qk_layernorm:
        raise InputError("config.json has qk_layernorm true: StableLM's norms of single heads are not supported")
    parallel = bool(fields.use_parallel_residual)
    norms = ("input_layernorm", "", "input_layernorm" if parallel else "post_attention_layernorm", "")
    given = layer_norm_settings(
        fields, names=Names(norms=norms), parallel=parallel, qkv_bias=bool(fields.use_qkv_bias), o_bias=False
    )
    return Spec(**rotated_sizes(fields, fields.partial_rotary_factor, **given | {"mlp_bias": False, "gated": True}))


def ctrl(fields: Fields) -> Spec:
    """The `Spec` of a config of the type ctrl."""
    names = Names(
        stem="transformer",
        embedding="w",
        layer="h",
        q="multi_head_attention.Wq",
        k="multi_head_attention.Wk",
        v="multi_head_attention.Wv",
        o="multi_head_attention.dense",
        up="ffn.0",
        down="ffn.2",
        norms=("layernorm1", "", "layernorm2", ""),
        final_norm="layernorm",
    )
    for name in ("embd_pdrop", "resid_pdrop"):
        fields.get(name)
    return Spec(
        **decoder_sizes(fields, **layer_norm_settings(fields, names=names))
        | {
            "inner_size": fields.dff,
            "activation": "relu",
            "eps": fields.layer_norm_epsilon,
            "embedding_scale": math.sqrt(fields.hidden_size),
            "positions": "ctrl",
            "head_bias": True,
        }
    )

"""Decoders whose configs and modules are named as GPT-2's."""

from __future__ import annotations

from typing import Any

from tfclm.models.families.fields import (
    Fields,
    decoder_sizes,
)
from tfclm.models.rope import rope
from tfclm.models.spec import Names, Spec

__all__ = ["codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "openai_gpt"]


def _names(**others: Any) -> Names:
    given = {
        "stem": "transformer",
        "embedding": "wte",
        "position_embedding": "wpe",
        "layer": "h",
        "qkv": "attn.c_attn",
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
        "norms": ("ln_1", "", "ln_2", ""),
        "final_norm": "ln_f",
    }
    return Names(**{**given, **others})


def _sizes_of_gpt2(fields: Fields, **others: Any) -> dict[str, Any]:
    """As GPT-2's config names them."""
    hidden, context = fields.hidden_size, fields.max_position_embeddings
    return decoder_sizes(
        fields,
        **{
            "inner_size": fields.get("n_inner", 4 * hidden),
            "activation": fields.activation_function,
            "norm": "layer",
            "eps": fields.layer_norm_epsilon,
            "gated": False,
            "qkv_bias": True,
            "o_bias": True,
            "mlp_bias": True,
            "positions": "learned",
            "position_rows": context,
            "attention_dropout": fields.get("attn_pdrop", 0.0),
            "embedding_dropout": fields.get("embd_pdrop", 0.0),
            "residual_dropout": fields.get("resid_pdrop", 0.0),
            **others,
        },
    )


def gpt2(fields: Fields) -> Spec:
    """The `Spec` of a config of the type gpt2."""
    sizes = _sizes_of_gpt2(fields, names=_names(), fused_qkv="parts", conv1d=True)
    if not fields.get("scale_attn_weights", True):
        sizes["attention_scale"] = 1.0
    fields.get("reorder_and_upcast_attn")  # the same in float32
    return Spec(**sizes, attention_scale_by_layer=bool(fields.get("scale_attn_by_inverse_layer_idx")))


def gpt_bigcode(fields: Fields) -> Spec:
    """The `Spec` of a config of the type gpt_bigcode."""
    for name in ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"):
        fields.get(name)  # the softmax is always computed in float32
    fields.get("num_key_value_heads")
    groups = 1 if fields.multi_query else fields.num_attention_heads
    sizes = _sizes_of_gpt2(fields, names=_names(), fused_qkv="groups", kv_heads=groups)
    if not fields.get("scale_attn_weights", True):
        sizes["attention_scale"] = 1.0
    return Spec(**sizes)


def gpt_neo(fields: Fields) -> Spec:
    """The `Spec` of a config of the type gpt_neo."""
    fields.get("attention_types")  # the class of the config makes `attention_layers` of it
    names = _names(
        q="attn.attention.q_proj", k="attn.attention.k_proj", v="attn.attention.v_proj", o="attn.attention.out_proj"
    )
    windows = tuple({"global": None, "local": fields.window_size}[kind] for kind in fields.attention_layers)
    return Spec(
        **_sizes_of_gpt2(
            fields,
            names=names,
            inner_size=fields.get("intermediate_size", 4 * fields.hidden_size),
            qkv_bias=False,
            windows=windows,
            attention_scale=1.0,
            attention_dropout=fields.get("attention_dropout", 0.0),
            embedding_dropout=fields.get("embed_dropout", 0.0),
            residual_dropout=fields.get("resid_dropout", 0.0),
        )
    )


def _gptj_like(fields: Fields, names: Names, **others: Any) -> Spec:
    """GPT-J and CodeGen: attention and feed-forward part in parallel, rotated neighbours."""
    sizes = _sizes_of_gpt2(
        fields,
        names=names,
        qkv_bias=False,
        o_bias=False,
        positions="none",
        parallel=True,
        interleaved=True,
        head_bias=True,
        **others,
    )
    rotated = rope(10000.0, fields.get("rotary_dim") or sizes["hidden_size"], None, sizes["context"])
    return Spec(**{**sizes, "ropes": (rotated,), "layer_ropes": (0,) * sizes["layers"]})


def gptj(fields: Fields) -> Spec:
    """The `Spec` of a config of the type gptj."""
    names = _names(
        q="attn.q_proj",
        k="attn.k_proj",
        v="attn.v_proj",
        o="attn.out_proj",
        up="mlp.fc_in",
        down="mlp.fc_out",
        norms=("ln_1", "", "ln_1", ""),
    )
    return _gptj_like(fields, names)


def codegen(fields: Fields) -> Spec:
    """The `Spec` of a config of the type codegen."""
    names = _names(
        qkv="attn.qkv_proj",
        o="attn.out_proj",
        up="mlp.fc_in",
        down="mlp.fc_out",
        norms=("ln_1", "", "ln_1", ""),
    )
    fields.get("n_ctx")
    return _gptj_like(fields, names, fused_qkv="codegen")


def openai_gpt(fields: Fields) -> Spec:
    """The `Spec` of a config of the type openai-gpt."""
    names = _names(
        embedding="tokens_embed", position_embedding="positions_embed", norms=("", "ln_1", "", "ln_2"), final_norm=""
    )
    # "gelu" is the approximation by tanh here.
    function = {"gelu": "gelu_new"}.get(fields.afn, fields.afn)
    sizes = _sizes_of_gpt2(fields, names=names, fused_qkv="parts", conv1d=True, post_norm=True, activation=function)
    return Spec(**sizes)

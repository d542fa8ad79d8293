"""Decoders that come from fairseq: BioGPT, OPT and XGLM."""

from __future__ import annotations

import math
from typing import Any

from tfclm.models.families.fields import (
    Fields,
    decoder_sizes,
    layer_norm_settings,
)
from tfclm.models.spec import Names, Spec

__all__ = ["biogpt", "opt", "xglm"]


def _names(**others: Any) -> Names:
    """The names of decoders that come from fairseq."""
    given = {
        "position_embedding": "embed_positions",
        "o": "self_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
        "norms": ("self_attn_layer_norm", "", "final_layer_norm", ""),
        "final_norm": "layer_norm",
    }
    return Names(**{**given, **others})


def biogpt(fields: Fields) -> Spec:
    """The `Spec` of a config of the type biogpt."""
    names = _names(stem="biogpt", head="output_projection")
    fields.get("layer_norm_eps")  # PyTorch's class does not read it
    given = layer_norm_settings(fields, names=names)
    return Spec(
        **decoder_sizes(fields, **given | {"eps": 1e-5})
        | {
            "embedding_scale": math.sqrt(fields.hidden_size) if fields.scale_embedding else 1.0,
            "positions": "learned",
            "position_rows": fields.max_position_embeddings + 2,
            "position_offset": 2,
            "positions_from_mask": True,
            "attention_dropout": fields.get("attention_probs_dropout_prob", 0.0),
            "embedding_dropout": fields.get("hidden_dropout_prob", 0.0),
            "residual_dropout": fields.get("hidden_dropout_prob", 0.0),
            "activation_dropout": fields.get("activation_dropout", 0.0),
        }
    )


def opt(fields: Fields) -> Spec:
    """The `Spec` of a config of the type opt."""
    before, hidden, width = bool(fields.do_layer_norm_before), fields.hidden_size, fields.word_embed_proj_dim
    prefix = "decoder."
    norms = ("self_attn_layer_norm", "", "final_layer_norm", "")
    names = _names(
        embedding=f"{prefix}embed_tokens",
        position_embedding=f"{prefix}embed_positions",
        layer=f"{prefix}layers",
        norms=norms if before else ("", norms[0], "", norms[2]),
        final_norm=f"{prefix}final_layer_norm" if before and not fields.get("_remove_final_layer_norm") else "",
        project_in=f"{prefix}project_in" if width != hidden else "",
        project_out=f"{prefix}project_out" if width != hidden else "",
    )
    for name in ("dropout", "layerdrop", "init_std"):
        fields.get(name)
    return Spec(
        **decoder_sizes(fields, **layer_norm_settings(fields, names=names))
        | {
            "inner_size": fields.ffn_dim,
            "activation": fields.activation_function,
            "eps": 1e-5,
            "embedding_size": width if width != hidden else None,
            "positions": "learned",
            "position_rows": fields.max_position_embeddings + 2,
            "position_offset": 2,
            "positions_from_mask": True,
            "post_norm": not before,
        }
    )


def xglm(fields: Fields) -> Spec:
    """The `Spec` of a config of the type xglm."""
    hidden = fields.hidden_size
    for name in ("dropout", "activation_dropout", "layerdrop", "init_std"):
        fields.get(name)
    return Spec(
        **decoder_sizes(fields, **layer_norm_settings(fields, names=_names()))
        | {
            "layers": fields.num_layers,
            "inner_size": fields.ffn_dim,
            "activation": fields.activation_function,
            "eps": 1e-5,
            "embedding_scale": math.sqrt(hidden) if fields.scale_embedding else 1.0,
            "positions": "sinusoidal",
            "position_offset": 2,
        }
    )

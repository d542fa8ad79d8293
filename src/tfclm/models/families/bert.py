"""Models like BERT that were trained as decoders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tfclm.models.families.fields import (
    Fields,
    decoder_sizes,
    layer_norm_settings,
)
from tfclm.models.spec import Names, Spec

__all__ = ["bert", "rembert", "roberta", "roberta_prelayernorm"]


def _bert_names(stem: str, **others: Any) -> Names:
    given = {
        "stem": stem,
        "embedding": "embeddings.word_embeddings",
        "position_embedding": "embeddings.position_embeddings",
        "token_types": "embeddings.token_type_embeddings",
        "embedding_norm": "embeddings.LayerNorm",
        "layer": "encoder.layer",
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norms": ("", "attention.output.LayerNorm", "", "output.LayerNorm"),
        "final_norm": "",
        "head_dense": "cls.predictions.transform.dense",
        "head_norm": "cls.predictions.transform.LayerNorm",
        "head": "cls.predictions.decoder",
        "head_bias": "cls.predictions",
    }
    return Names(**{**given, **others})


def _bert_spec(fields: Fields, names: Names, **others: Any) -> Spec:
    """A BERT that was trained as a decoder."""
    for name in ("is_decoder", "hidden_dropout_prob", "attention_probs_dropout_prob", "position_embedding_type"):
        fields.get(name)
    rows = fields.max_position_embeddings
    return Spec(
        **decoder_sizes(fields, **layer_norm_settings(fields, names=names))
        | {
            "positions": "learned",
            "position_rows": rows,
            "token_type_rows": fields.type_vocab_size,
            "post_norm": True,
            "head_bias": True,
            **others,
        }
    )


def bert(fields: Fields) -> Spec:
    """The `Spec` of a config of the type bert."""
    return _bert_spec(fields, _bert_names("bert"))


def _roberta_names(stem: str, **others: Any) -> Names:
    return _bert_names(
        stem,
        **{
            "head_dense": "lm_head.dense",
            "head_norm": "lm_head.layer_norm",
            "head": "lm_head.decoder",
            "head_bias": "lm_head",
            **others,
        },
    )


def roberta(fields: Fields) -> Spec:
    """The `Spec` of a config of the type roberta."""
    padding = fields.pad_token_id
    return replace(
        _bert_spec(fields, _roberta_names("roberta")),
        padding_id=padding,
        position_offset=padding + 1,
        context=fields.max_position_embeddings - padding - 1,
        activation=fields.hidden_act,
    )


def roberta_prelayernorm(fields: Fields) -> Spec:
    """The `Spec` of a config of the type roberta-prelayernorm."""
    names = _roberta_names(
        "roberta_prelayernorm", norms=("attention.LayerNorm", "", "intermediate.LayerNorm", ""), final_norm="LayerNorm"
    )
    return replace(roberta(fields), names=names, post_norm=False)


def rembert(fields: Fields) -> Spec:
    """The `Spec` of a config of the type rembert."""
    names = _bert_names(
        "rembert",
        project_in="encoder.embedding_hidden_mapping_in",
        head_dense="cls.predictions.dense",
        head_norm="cls.predictions.LayerNorm",
        head_bias="",
    )
    return _bert_spec(
        fields,
        names,
        embedding_size=fields.input_embedding_size,
        output_embedding_size=fields.output_embedding_size,
        project_in_bias=True,
        tied=False,
    )

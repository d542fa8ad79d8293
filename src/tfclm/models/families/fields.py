"""The fields of a config, and what most model types make of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tfclm.errors import InputError
from tfclm.models.rope import Rope, rope

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "Fields",
    "biases",
    "decoder_sizes",
    "layer_norm_settings",
    "layer_windows",
    "one_window",
    "rope_of",
    "rotated_sizes",
]


class Fields:
    """The fields of a config, which notes those that are read: the others must have no effect."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.read = {"model_type"}
        # PyTorch's classes read these three of any config, and others only of their own.
        others = {"head_dim", "original_max_position_embeddings", "rope_scaling"}
        self._known = {*type(config)().to_dict(), *config.attribute_map} | others

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value, or `default` if the config does not have it or it is None."""
        self.read.add(self.config.attribute_map.get(name, name))
        self.read.add(name)
        value = getattr(self.config, name, None) if name in self._known else None
        return default if value is None else value


def decoder_sizes(fields: Fields, **others: Any) -> dict[str, Any]:
    """The sizes of a decoder, and whether it is tied, under the names that most configs have."""
    heads, hidden = fields.num_attention_heads, fields.hidden_size
    head_dim = fields.get("head_dim") or hidden // heads
    return {
        "vocab_size": fields.vocab_size,
        "hidden_size": hidden,
        "layers": fields.num_hidden_layers,
        "heads": heads,
        "kv_heads": fields.get("num_key_value_heads", heads),
        "head_dim": head_dim,
        "inner_size": fields.get("intermediate_size", 4 * hidden),
        "context": fields.max_position_embeddings,
        "activation": fields.get("hidden_act"),
        "tied": bool(fields.tie_word_embeddings),
        "attention_scale": head_dim**-0.5,
        "attention_dropout": fields.get("attention_dropout", 0.0),
        "windows": (None,) * fields.num_hidden_layers,
        "layer_ropes": (None,) * fields.num_hidden_layers,
        **others,
    }


def rope_of(fields: Fields, size: int, base: float | None = None) -> Rope:
    """The rotary position embedding of `size` dimensions."""
    return rope(
        base if base is not None else fields.get("rope_theta", 10000.0),
        size,
        fields.get("rope_scaling"),
        fields.max_position_embeddings,
        fields.get("original_max_position_embeddings"),
    )


def rotated_sizes(fields: Fields, fraction: float = 1.0, **others: Any) -> dict[str, Any]:
    """The sizes, and one rope for all layers that rotates a fraction of a head's dimensions."""
    sizes = decoder_sizes(fields, **others)
    size = int(sizes["head_dim"] * fraction)
    return {**sizes, "ropes": (rope_of(fields, size),), "layer_ropes": (0,) * sizes["layers"], **others}


def biases(fields: Fields) -> dict[str, bool]:
    """The biases that `attention_bias` and `mlp_bias` ask for."""
    attention, mlp = bool(fields.get("attention_bias")), bool(fields.get("mlp_bias"))
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": mlp}


def layer_windows(fields: Fields) -> tuple[int | None, ...]:
    """The sliding window of each layer, by `layer_types`."""
    types = fields.get("layer_types") or ["full_attention"] * fields.num_hidden_layers
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise InputError(f"config.json has layer_types with {kind!r}: only full and sliding attention are known")
    window = fields.get("sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def one_window(fields: Fields) -> tuple[int | None, ...]:
    """The sliding window, which is that of every layer."""
    window: int | None = fields.get("sliding_window")
    return tuple(window for _ in range(fields.num_hidden_layers))


def layer_norm_settings(fields: Fields, **others: Any) -> dict[str, Any]:
    """A decoder with layer norms, biases and a feed-forward part without gate."""
    return {
        "norm": "layer",
        "eps": fields.get("layer_norm_eps", 1e-5),
        "gated": False,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "residual_dropout": fields.get("hidden_dropout", 0.0),
        **others,
    }

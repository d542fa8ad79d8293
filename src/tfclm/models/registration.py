"""The classes of our own decoders, one per model type, registered with `TFAutoModelForCausalLM`."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, TFAutoModelForCausalLM

from tfclm.compat import CAUSAL_LM_NAMES
from tfclm.models.causal_lm import DecoderForCausalLM
from tfclm.models.families import FAMILIES, OWN_CLASSES

__all__ = ["decoder_class", "register"]

_classes: dict[str, Any] = {}


def decoder_class(model_type: str) -> Any:
    """The class of our decoder for a model type, such as `TFLlamaForCausalLM`."""
    if model_type not in _classes:
        name = f"TF{CAUSAL_LM_NAMES[model_type]}"
        attributes = {
            "config_class": CONFIG_MAPPING[model_type],
            "base_model_prefix": FAMILIES[model_type].stem,
            "__module__": __name__,
            "__doc__": f"A {model_type} model with a language model's head; see `DecoderForCausalLM`.",
        }
        _classes[model_type] = globals()[name] = type(name, (DecoderForCausalLM,), attributes)
    return _classes[model_type]


def register() -> None:
    """Makes `TFAutoModelForCausalLM` use our classes, for Mistral in place of transformers' own."""
    for model_type in OWN_CLASSES:
        TFAutoModelForCausalLM.register(CONFIG_MAPPING[model_type], decoder_class(model_type), exist_ok=True)

"""How the config of each model type says what its decoder computes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from tfclm.errors import InputError
from tfclm.models.families import bert, fairseq, gpt2, layer_norm, llama
from tfclm.models.families.fields import Fields
from tfclm.models.spec import Spec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["FAMILIES", "OWN_CLASSES", "read_fields", "spec_of"]


class Family(NamedTuple):
    """A model type: the stem's name in PyTorch, and its `Spec` for a config."""

    stem: str
    spec: Callable[[Fields], Spec]


def spec_of(config: PretrainedConfig) -> Spec:
    """What the model of a config computes.

    Args:
        config: of transformers; rotary position embeddings as versions 4 or 5 write them.

    Raises:
        InputError: the model type is not a decoder of ours, or a field of the config asks for something that the
            decoder does not compute. The message names the field.

    Example:
        >>> spec_of(LlamaConfig(num_attention_heads=32, num_key_value_heads=8)).kv_heads
        8
    """
    model_type = config.model_type
    if model_type not in FAMILIES:
        raise InputError(f"model type {model_type} is not a decoder; supported: {', '.join(sorted(FAMILIES))}")
    fields = Fields(config)
    spec = FAMILIES[model_type].spec(fields)
    if spec.heads % spec.kv_heads:
        raise InputError(f"{spec.heads} heads must be a multiple of the {spec.kv_heads} key-value heads")
    _check_unread(fields)
    return spec


@functools.cache
def read_fields(model_type: str) -> frozenset[str]:
    """The fields of a config.json that the decoder of a model type reads."""
    from transformers import CONFIG_MAPPING

    fields = Fields(CONFIG_MAPPING[model_type]())
    FAMILIES[model_type].spec(fields)
    return frozenset(fields.read)


def _check_unread(fields: Fields) -> None:
    """Raises `InputError` for a field that has not been read, is not the default and may have an effect."""
    config = fields.config
    defaults = type(config)().to_dict()
    for name, value in config.to_dict().items():
        name = config.attribute_map.get(name, name)
        if name in fields.read or name in _fields_without_effect() or value == defaults.get(name, value):
            continue
        raise InputError(
            f"config.json has {name} {value!r}, which the {config.model_type} decoder does not compute; "
            f"only {defaults.get(name)!r} is supported"
        )


@functools.cache
def _fields_without_effect() -> frozenset[str]:
    """The fields that change no logits: most of those that all configs have, and settings of other tasks."""
    from transformers import PretrainedConfig

    with_effect = {"tie_word_embeddings", "is_encoder_decoder", "add_cross_attention", "pruned_heads"}
    others = {"initializer_range", "use_cache", "pretraining_tp", "classifier_dropout", "slow_but_exact", "layerdrop"}
    return frozenset({*PretrainedConfig().to_dict()} - with_effect | others)


# With classes of our own, registered with TFAutoModelForCausalLM.
_OWN = {
    "llama": Family("model", llama.llama),
    "mistral": Family("model", llama.mistral),
    "qwen2": Family("model", llama.qwen2),
    "qwen3": Family("model", llama.qwen3),
    "gemma": Family("model", llama.gemma),
    "gemma2": Family("model", llama.gemma2),
    "gemma3_text": Family("model", llama.gemma3_text),
    "smollm3": Family("model", llama.smollm3),
    "phi3": Family("model", llama.phi3),
    "olmo2": Family("model", llama.olmo2),
    "granite": Family("model", llama.granite),
    "gpt_neox": Family("gpt_neox", layer_norm.gpt_neox),
    "gpt_neo": Family("transformer", gpt2.gpt_neo),
    "gpt_bigcode": Family("transformer", gpt2.gpt_bigcode),
    "bloom": Family("transformer", layer_norm.bloom),
    "falcon": Family("transformer", layer_norm.falcon),
    "mpt": Family("transformer", layer_norm.mpt),
    "codegen": Family("transformer", gpt2.codegen),
    "persimmon": Family("model", layer_norm.persimmon),
    "phi": Family("model", layer_norm.phi),
    "stablelm": Family("model", layer_norm.stablelm),
    "biogpt": Family("biogpt", fairseq.biogpt),
}


OWN_CLASSES = tuple(_OWN)


FAMILIES: Mapping[str, Family] = {
    **_OWN,
    "gpt2": Family("transformer", gpt2.gpt2),
    "gpt-sw3": Family("transformer", gpt2.gpt2),
    "opt": Family("model", fairseq.opt),
    "gptj": Family("transformer", gpt2.gptj),
    "xglm": Family("model", fairseq.xglm),
    "ctrl": Family("transformer", layer_norm.ctrl),
    "openai-gpt": Family("transformer", gpt2.openai_gpt),
    "bert": Family("bert", bert.bert),
    "roberta": Family("roberta", bert.roberta),
    "camembert": Family("roberta", bert.roberta),
    "xlm-roberta": Family("roberta", bert.roberta),
    "roberta-prelayernorm": Family("roberta_prelayernorm", bert.roberta_prelayernorm),
    "rembert": Family("rembert", bert.rembert),
}

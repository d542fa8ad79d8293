"""config.json: read from any version of transformers, refused where TensorFlow would compute something else, written.

transformers 4.54 keeps keys that it does not know and ignores them, and TensorFlow's classes ignore some keys that
PyTorch's honour. Either way the model would silently compute something else, so every key is accounted for: it is
translated, it is harmless, it has the one value that is computed, or it is refused by name.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm.checkpoint.kinds import explain
from tfclm.checkpoint.locating import read_object
from tfclm.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DECODERS = ("ctrl", "gpt-sw3", "gpt2", "gptj", "mistral", "openai-gpt", "opt", "xglm")
# These read in both directions unless their config says is_decoder. Left out on purpose, though transformers lists
# them: roformer and xlnet (later tokens change earlier logits), xlm and transfo-xl (broken or gone in TensorFlow).
ENCODERS = ("bert", "camembert", "rembert", "roberta", "roberta-prelayernorm", "xlm-roberta")

# Keys that change what is computed, in PyTorch or in some version of transformers, with the one value that is computed.
COMPUTED: dict[str, dict[str, Any]] = {
    # PyTorch's goes by it in the last norm alone, TensorFlow's in all of them.
    "ctrl": {"layer_norm_epsilon": 1e-6},
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    "gptj": {"rotary": True, "scale_attn_weights": True},
    "mistral": {"rope_scaling": None, "attention_bias": False, "mlp_bias": False},
    "opt": {"enable_bias": True, "layer_norm_elementwise_affine": True},
    **{encoder: {"position_embedding_type": "absolute"} for encoder in ("bert", "rembert")},
    # Their positions begin behind that of the padding, which TensorFlow takes for 1.
    **{
        encoder: {"position_embedding_type": "absolute", "pad_token_id": 1}
        for encoder in ("camembert", "roberta", "roberta-prelayernorm", "xlm-roberta")
    },
}
COMPUTED["gpt-sw3"] = COMPUTED["gpt2"]
EVERYWHERE: dict[str, Any] = {"is_encoder_decoder": False, "pruned_heads": {}}
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "type_vocab_size",
    "sliding_window",
)

# The form of a model's output, not its values; the callers in tfclm rely on this one.
CALLING = {
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "torchscript": False,
    "use_cache": True,
}

# Keys that the config classes do not have and that change nothing: names, versions, quantities for training alone.
HARMLESS = re.compile(
    r"""
    .*(dropout|pdrop|dropout_prob|layerdrop) | initializer_range | initializer_factor | init_std | init_device
    | .*gradient_checkpointing.* | total_flos | pretraining_tp | model_parallel | device_map | use_cache
    | _?attn_implementation.* | _?(use_)?flash_attn.* | use_flash_attention.* | _attn_implementation_autoset
    | _?name_or_path | _?model_name.* | base_model | _commit_hash | _auto_class | .*_version | unsloth_.* | pipeline_tag
    | custom_pipelines | language | license | tags | keys_to_ignore_at_inference | trust_remote_code | use_fast
    | chat_template | (bos|eos|pad|unk|sep|cls|mask)_token(_id)? | _?num_labels | classifier_.* | summary_.* | pooler_.*
    | directionality | n_ctx | output_past | from_tf | predict_special_tokens | finetuning_task
    """,
    re.VERBOSE,
)


def read_config(where: str, folder: Path) -> PretrainedConfig:
    """The config of a checkpoint's folder, checked to be one that TensorFlow computes as PyTorch does.

    Raises `InputError` for a file that is missing or no config, for a type that is no causal LM in TensorFlow, and for
    a key or value that TensorFlow would ignore.
    """
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise InputError(
            explain(where, folder) or f"{where} has no config.json: give a checkpoint's folder or a Hub id"
        )
    fields = read_object(where, path)
    if not isinstance(fields.get("model_type"), str):
        raise InputError(
            explain(where, folder) or f"{where}: config.json has no model_type, so it is no config of transformers"
        )
    try:
        check_type(where, fields["model_type"], bool(fields.get("is_decoder")), fields)
    except InputError as error:
        raise InputError(explain(where, folder) or str(error)) from error
    return from_fields(where, fields)


def check_type(where: str, model_type: str, is_decoder: bool, fields: Mapping[str, Any] | None = None) -> None:
    """Raise `InputError` for a type that is no causal LM in TensorFlow; `fields` are what else is known of it."""
    if model_type in ENCODERS and not is_decoder:
        raise InputError(
            f"{where}: a {model_type} model is an encoder, no causal LM, unless it was trained as one and its config "
            f"has is_decoder; types that are: {', '.join(DECODERS)}"
        )
    if model_type not in DECODERS + ENCODERS:
        fields = fields or {}
        what = f"model type {model_type} is no causal LM in TensorFlow"
        if fields.get("is_encoder_decoder"):
            what = f"model type {model_type} is an encoder-decoder, which translates or summarizes a text, no causal LM"
        elif fields.keys() & {"vision_config", "audio_config", "image_size", "num_mel_bins", "patch_size"}:
            what = f"model type {model_type} is for images or sound, no causal LM of text alone"
        raise InputError(
            f"{where}: {what}; supported: {', '.join(DECODERS)} and, with is_decoder, {', '.join(ENCODERS)}"
        )


def from_fields(where: str, given: Mapping[str, Any]) -> PretrainedConfig:
    """The config of these fields of a config.json, whichever version wrote them; they stay as they are.

    Raises `InputError` for a field that our version would pass over or that TensorFlow would compute otherwise.
    """
    from transformers import CONFIG_MAPPING

    from tfclm.compat import global_generation_defaults

    fields = copy.deepcopy(dict(given))
    model_type = fields["model_type"]
    kind = CONFIG_MAPPING[model_type]
    defaults = kind().to_dict()
    known = {*defaults, *kind.attribute_map, *COMPUTED.get(model_type, {}), *EVERYWHERE}
    _check_quantization(where, fields)
    if "rope_theta" in known:
        _translate_rope(where, model_type, fields)
    if "dtype" in fields:
        dtype = fields.pop("dtype")
        fields.setdefault("torch_dtype", dtype)
    for key, value in fields.items():
        if key not in known and value not in (None, "", [], {}) and not HARMLESS.fullmatch(key):
            raise InputError(
                f"{where}: config.json has {key} {_short(value)}, which is unknown for {model_type} and may change "
                "what is computed: take it out if it does not"
            )
        if key not in global_generation_defaults():
            _check_value(where, key, value, defaults.get(kind.attribute_map.get(key, key)))
    for alias, name in kind.attribute_map.items():
        if alias in fields and name in fields and fields[alias] != fields[name]:
            raise InputError(
                f"{where}: config.json has {name} {fields[name]} and {alias} {fields[alias]}, which are the same: "
                "take out the wrong one"
            )
    fields.update((key, value) for key, value in CALLING.items() if key in known)
    try:
        config = kind.from_dict(fields)
    except Exception as error:  # a config class raises whatever its fields provoke
        raise InputError(f"{where}: config.json is no {model_type} config: {first_line(error)}") from error
    check_computed(where, config)
    return config


def check_computed(where: str, config: PretrainedConfig) -> None:
    """Raise `InputError` for a setting that TensorFlow's class would not go by."""
    computed = EVERYWHERE | COMPUTED.get(config.model_type, {})
    if getattr(config, "head_dim", None) is not None:
        computed["head_dim"] = config.hidden_size // config.num_attention_heads
    for setting, value in computed.items():
        given = getattr(config, setting, value)
        if setting == "rope_scaling" and _is_default_rope(given):
            given = config.rope_scaling = None
        if given != value and not (value is False and given is None):
            raise InputError(
                f"{where}: TensorFlow's {config.model_type} ignores {setting}={_short(given)} "
                f"and would compute something else; only {value!r} is supported"
            )
    for size in SIZES:
        if getattr(config, size, 1) is not None and getattr(config, size, 1) < 1:
            raise InputError(f"{where}: {size} {getattr(config, size)}: give 1 or more")
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if config.hidden_size % heads or heads % groups:
        raise InputError(
            f"{where}: no {config.model_type} model has this config: {heads} heads do not divide a width of "
            f"{config.hidden_size}, or are not divided by {groups} key-value heads"
        )
    rotated = getattr(config, "rotary_dim", None)
    if config.model_type == "gptj" and not (
        isinstance(rotated, int) and 0 < rotated <= config.hidden_size // heads and rotated % 2 == 0
    ):
        raise InputError(
            f"{where}: rotary_dim {rotated}: give an even number up to a head's width, {config.hidden_size // heads}"
        )


def config_json(config: PretrainedConfig, architecture: str, tied: bool) -> str:
    """The text of a config.json for float32 weights that transformers 4 and 5 read alike.

    Version 5 reads the keys of version 4, but prefers its own (`rope_parameters`, `dtype`), so those are left out.
    """
    config = copy.deepcopy(config)
    for key in ("rope_parameters", "dtype"):
        config.__dict__.pop(key, None)
    config.architectures = [architecture]
    config.tie_word_embeddings = tied
    config.torch_dtype = "float32"
    return str(config.to_json_string(use_diff=True))


def _check_quantization(where: str, fields: dict[str, Any]) -> None:
    for key in ("quantization_config", "quantization", "compression_config"):
        settings = fields.get(key)
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            bits = settings.get("bits") if isinstance(settings, dict) else None
            how = f"by {method}" if method else f"to {bits} bits" if bits else f"({key})"
            raise InputError(
                f"{where}: its weights are quantized {how}, which needs the library that made them: give the model "
                "before quantization, or dequantize it and save float32 or bfloat16"
            )
    if isinstance(fields.get("auto_map"), dict) and any("Model" in key for key in fields["auto_map"]):
        raise InputError(
            f"{where}: config.json has auto_map, so the model is computed by code of its own, which is not run here: "
            "take it out if the model is an ordinary one"
        )
    fields.pop("auto_map", None)  # of a config or tokenizer alone


def _translate_rope(where: str, model_type: str, fields: dict[str, Any]) -> None:
    """transformers 5's `rope_parameters` as 4's `rope_theta` and `rope_scaling`."""
    rope = fields.pop("rope_parameters", None)
    if rope is None:
        return
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise InputError(
            f"{where}: config.json has rope_parameters {_short(rope)}: {model_type} has one rope for all layers"
        )
    theta = rope.get("rope_theta")
    if theta is not None:
        if fields.get("rope_theta", theta) != theta:
            raise InputError(
                f"{where}: config.json has rope_theta {fields['rope_theta']} and, in rope_parameters, rope_theta "
                f"{theta}: take out the one that the model was not trained with"
            )
        fields["rope_theta"] = theta
    if not _is_default_rope(rope) or rope.get("partial_rotary_factor") not in (None, 1):
        raise InputError(
            f"{where}: TensorFlow's {model_type} ignores rope_parameters={_short(rope)} and would compute something "
            'else; only rope_type "default" is supported'
        )


def _is_default_rope(rope: Any) -> bool:
    return isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) == "default"


def _check_value(where: str, key: str, value: Any, default: Any) -> None:
    """Raise `InputError` for a value of another type than the class' default: "false" would be taken for true."""
    if value is None or default is None or key.endswith("_token_id"):
        return
    wanted = None
    if isinstance(default, bool):
        wanted = None if isinstance(value, bool) or value in (0, 1) else "true or false"
    elif isinstance(default, int):
        wanted = None if isinstance(value, int) and not isinstance(value, bool) else "a whole number"
    elif isinstance(default, float):
        wanted = None if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    elif isinstance(default, str):
        wanted = None if isinstance(value, str) else "a text"
    if wanted:
        raise InputError(f"{where}: config.json has {key} {_short(value)}: give {wanted}")


def _short(value: Any) -> str:
    try:
        text = json.dumps(value) if isinstance(value, dict | list) else repr(value)
    except TypeError:
        text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."

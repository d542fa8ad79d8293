"""Reads, checks and writes config.json files of any version of transformers.

transformers 4.54 ignores keys that it does not know, and its TensorFlow classes ignore some keys that PyTorch's apply.
Either way the model would silently compute something else. So every key is checked: it is translated, it has no
effect, the decoder reads it, it has the one value that TensorFlow's class supports, or it is an error.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm.checkpoint.diagnosis import explain
from tfclm.checkpoint.locating import read_object
from tfclm.errors import InputError, first_line
from tfclm.models.families import OWN_CLASSES, read_fields, spec_of
from tfclm.models.rope import translate_rope

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# With classes of transformers.
TRANSFORMERS_DECODERS = ("ctrl", "gpt-sw3", "gpt2", "gptj", "openai-gpt", "opt", "xglm")
DECODERS = (*OWN_CLASSES, *TRANSFORMERS_DECODERS)
# Bidirectional unless their config has is_decoder. Left out, though transformers lists them: roformer and xlnet (later
# tokens change earlier logits), xlm and transfo-xl (broken or removed in TensorFlow).
ENCODERS = ("bert", "camembert", "rembert", "roberta", "roberta-prelayernorm", "xlm-roberta")

# Keys that have an effect in PyTorch or in some version of transformers, with the one value that TensorFlow's class
# computes.
SUPPORTED: dict[str, dict[str, Any]] = {
    # PyTorch's class uses it in the last norm alone, TensorFlow's in all norms.
    "ctrl": {"layer_norm_epsilon": 1e-6},
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    "gptj": {"rotary": True, "scale_attn_weights": True},
    "mistral": {"attention_bias": False, "mlp_bias": False},
    "opt": {"enable_bias": True, "layer_norm_elementwise_affine": True},
    **{encoder: {"position_embedding_type": "absolute"} for encoder in ("bert", "rembert")},
    # Their positions start after pad_token_id, which TensorFlow's classes assume to be 1.
    **{
        encoder: {"position_embedding_type": "absolute", "pad_token_id": 1}
        for encoder in ("camembert", "roberta", "roberta-prelayernorm", "xlm-roberta")
    },
}
SUPPORTED["gpt-sw3"] = SUPPORTED["gpt2"]
# No config class has rope_interleaved; SmolLM's files have it, from the library that the models were trained with.
SUPPORTED_BY_ALL: dict[str, Any] = {"is_encoder_decoder": False, "pruned_heads": {}, "rope_interleaved": False}
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

# Keys of newer versions of transformers, with the value that means what the installed one computes.
ADDED_LATER = {"use_bidirectional_attention": False}

# The form of a model's output, on which tfclm relies; the values do not depend on it.
OUTPUT_FORM = {
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "torchscript": False,
    "use_cache": True,
}

# Keys that the config classes do not have and that have no effect: names, versions, settings of training alone.
NO_EFFECT = re.compile(
    r"""
    .*(dropout|pdrop|dropout_prob|layerdrop) | initializer_range | initializer_factor | init_std | init_device
    | .*gradient_checkpointing.* | total_flos | pretraining_tp | model_parallel | device_map | use_cache
    | _?attn_implementation.* | _?(use_)?flash_attn.* | use_flash_attention.* | _attn_implementation_autoset
    | _?name_or_path | _?model_name.* | base_model | _commit_hash | _auto_class | .*_version | unsloth_.* | pipeline_tag
    | custom_pipelines | language | license | tags | keys_to_ignore_at_inference | trust_remote_code | use_fast
    | chat_template | (bos|eos|pad|unk|sep|cls|mask)_token(_id)? | _?num_labels | classifier_.* | summary_.* | pooler_.*
    | directionality | n_ctx | output_past | from_tf | predict_special_tokens | finetuning_task | is_llama_config
    | transformers\.js_config
    """,
    re.VERBOSE,
)


def read_config(where: str, folder: Path) -> PretrainedConfig:
    """Reads the config of a checkpoint, and checks that TensorFlow computes it as PyTorch does.

    Args:
        where: the checkpoint's name, for messages.
        folder: its directory.

    Raises:
        InputError: config.json is missing or not a config, the model type is not a causal language model in
            TensorFlow, or TensorFlow would ignore a key or value.
    """
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise InputError(
            explain(where, folder) or f"{where} has no config.json: give a checkpoint directory or a Hub id"
        )
    fields = read_object(where, path)
    if not isinstance(fields.get("model_type"), str):
        raise InputError(
            explain(where, folder) or f"{where}: config.json has no model_type, so it is not a config of transformers"
        )
    try:
        check_type(where, fields["model_type"], bool(fields.get("is_decoder")), fields)
    except InputError as error:
        raise InputError(explain(where, folder) or str(error)) from error
    return from_fields(where, fields)


def check_type(where: str, model_type: str, is_decoder: bool, fields: Mapping[str, Any] | None = None) -> None:
    """Raises `InputError` for a type that is not a causal LM in TensorFlow; `fields` are the rest of its config."""
    if model_type in ENCODERS and not is_decoder:
        raise InputError(
            f"{where}: a {model_type} model is an encoder, not a causal LM, unless it was trained as one and its "
            f"config has is_decoder; causal LMs are: {', '.join(DECODERS)}"
        )
    if model_type not in DECODERS + ENCODERS:
        fields = fields or {}
        problem = f"model type {model_type} is not a causal LM in TensorFlow"
        if fields.get("is_encoder_decoder"):
            problem = f"model type {model_type} is an encoder-decoder, for example for translation, not a causal LM"
        elif fields.keys() & {"vision_config", "audio_config", "image_size", "num_mel_bins", "patch_size"}:
            problem = f"model type {model_type} is for images or sound, not a causal LM for text"
        raise InputError(
            f"{where}: {problem}; supported: {', '.join(DECODERS)} and, with is_decoder, {', '.join(ENCODERS)}"
        )


def from_fields(where: str, given: Mapping[str, Any]) -> PretrainedConfig:
    """The config for the fields of a config.json that any version of transformers wrote.

    Args:
        where: the checkpoint's name, for messages.
        given: the fields; not modified.

    Raises:
        InputError: the installed transformers or TensorFlow's class would ignore a field.
    """
    from transformers import CONFIG_MAPPING

    from tfclm.compat import global_generation_defaults

    fields = copy.deepcopy(dict(given))
    model_type = fields["model_type"]
    kind = CONFIG_MAPPING[model_type]
    defaults = kind().to_dict()
    _check_quantization(where, fields)
    if model_type in OWN_CLASSES:
        with _named(where):
            translate_rope(fields, by_layer_type="rope_local_base_freq" in defaults)
    if "dtype" in fields:
        dtype = fields.pop("dtype")
        fields.setdefault("torch_dtype", dtype)
    known = {*defaults, *kind.attribute_map, *SUPPORTED.get(model_type, {}), *SUPPORTED_BY_ALL}
    if model_type in OWN_CLASSES:
        known |= read_fields(model_type)
    for key, value in ADDED_LATER.items():
        if fields.get(key) == value:
            del fields[key]
    for key, value in fields.items():
        if key not in known and value not in (None, "", [], {}) and not NO_EFFECT.fullmatch(key):
            raise InputError(
                f"{where}: config.json has {key} {_short(value)}, which is unknown for {model_type} and may change "
                "what the model computes: remove it if it does not"
            )
        if key not in global_generation_defaults():
            _check_value(where, key, value, defaults.get(kind.attribute_map.get(key, key)))
    for alias, name in kind.attribute_map.items():
        if alias in fields and name in fields and fields[alias] != fields[name]:
            raise InputError(
                f"{where}: config.json has {name} {fields[name]} and {alias} {fields[alias]}, which are the "
                "same setting: remove the wrong one"
            )
    fields.update((key, value) for key, value in OUTPUT_FORM.items() if key in known)
    try:
        config = kind.from_dict(fields)
    except Exception as error:  # config classes raise errors of many types
        raise InputError(f"{where}: config.json is not a {model_type} config: {first_line(error)}") from error
    _check_supported(where, config)
    _check_sizes(where, config)
    if model_type in OWN_CLASSES:
        with _named(where):
            spec_of(config)
    return config


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Puts the checkpoint's name before the messages of errors."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _check_supported(where: str, config: PretrainedConfig) -> None:
    """Raises `InputError` for a setting that TensorFlow's class would ignore."""
    supported = SUPPORTED_BY_ALL | SUPPORTED.get(config.model_type, {})
    for setting, value in supported.items():
        given = getattr(config, setting, value)
        if given != value and not (value is False and given is None):
            raise InputError(
                f"{where}: TensorFlow's {config.model_type} ignores {setting}={_short(given)} "
                f"and would compute something else; only {value!r} is supported"
            )


def _check_sizes(where: str, config: PretrainedConfig) -> None:
    """Raises `InputError` for sizes that do not fit together."""
    for size in SIZES:
        if getattr(config, size, 1) is not None and getattr(config, size, 1) < 1:
            raise InputError(f"{where}: {size} {getattr(config, size)}: give 1 or more")
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    divides = config.hidden_size % heads == 0 or getattr(config, "head_dim", None)
    if not divides or heads % groups:
        raise InputError(
            f"{where}: no {config.model_type} model can have this config: {heads} heads must divide the hidden size "
            f"{config.hidden_size} and be a multiple of the {groups} key-value heads"
        )
    rotated = getattr(config, "rotary_dim", None)
    if config.model_type == "gptj" and not (
        isinstance(rotated, int) and 0 < rotated <= config.hidden_size // heads and rotated % 2 == 0
    ):
        raise InputError(
            f"{where}: rotary_dim {rotated}: give an even number up to the head size, {config.hidden_size // heads}"
        )


def config_json(config: PretrainedConfig, architecture: str, tied: bool) -> str:
    """The text of a config.json for float32 weights that means the same to transformers 4 and 5.

    Version 5 reads the keys of version 4 but prefers its own (`rope_parameters`, `dtype`), so these are left out.
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
                f"{where}: its weights are quantized {how} and need the library that made them: give the model "
                "before quantization, or dequantize it and save float32 or bfloat16"
            )
    if isinstance(fields.get("auto_map"), dict) and any("Model" in key for key in fields["auto_map"]):
        raise InputError(
            f"{where}: config.json has auto_map, so the model needs custom code, which is not run here: "
            "remove it if the model type itself is supported"
        )
    fields.pop("auto_map", None)  # code for the config or the tokenizer only


def _check_value(where: str, key: str, value: Any, default: Any) -> None:
    """Raises `InputError` if a value's type differs from the default's: "false" would count as true."""
    if value is None or default is None or key.endswith("_token_id"):
        return
    wanted = None
    if isinstance(default, bool):
        wanted = None if isinstance(value, bool) or value in (0, 1) else "true or false"
    elif isinstance(default, int) and key not in ("rope_theta", "rotary_emb_base"):
        wanted = None if isinstance(value, int) and not isinstance(value, bool) else "a whole number"
    elif isinstance(default, float):
        wanted = None if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    elif isinstance(default, str):
        wanted = None if isinstance(value, str) else "a string"
    if wanted:
        raise InputError(f"{where}: config.json has {key} {_short(value)}: give {wanted}")


def _short(value: Any) -> str:
    try:
        text = json.dumps(value) if isinstance(value, dict | list) else repr(value)
    except TypeError:
        text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."

"""config.json as each version of transformers writes it: the same logits, or a refusal that names the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config

from tfclm import checkpoint
from tfclm.checkpoint.configs import from_fields
from tfclm.errors import InputError

IDS = np.arange(7, 31, dtype=np.int32).reshape(2, 12)

# What transformers 5.24 writes for tiny models.
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 0,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "model_type": "mistral",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "5.24.0",
    "use_cache": True,
    "vocab_size": 512,
}
GPT2 = {
    "activation_function": "gelu_new",
    "add_cross_attention": False,
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 0,
    "dtype": "float32",
    "embd_pdrop": 0.1,
    "eos_token_id": 0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_embd": 32,
    "n_head": 2,
    "n_inner": None,
    "n_layer": 2,
    "n_positions": 64,
    "pad_token_id": None,
    "reorder_and_upcast_attn": False,
    "resid_pdrop": 0.1,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "tie_word_embeddings": True,
    "transformers_version": "5.24.0",
    "use_cache": True,
    "vocab_size": 512,
}


def logits(model: Any) -> np.ndarray:
    """[2, 12, vocabulary]."""
    return model(input_ids=IDS, attention_mask=np.ones_like(IDS)).logits.numpy()


def written(folder: Path) -> dict[str, Any]:
    """The fields of a folder's config.json."""
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def saved(make_model, tokenizer, tmp_path: Path):
    """`saved("mistral", rope_theta=1e6)`: a folder, of transformers 4, and the model that is in it."""

    def save(architecture: str, **config: Any) -> tuple[Path, Any]:
        model = make_model(architecture, layers=2, **config)
        generator = np.random.default_rng(0)
        for variable in model.weights:
            variable.assign(generator.normal(scale=0.3, size=variable.shape))
        checkpoint.save(model, tokenizer, tmp_path)
        return tmp_path, model

    return save


def test_a_mistral_of_transformers_5_has_its_own_theta(saved, make_model, tokenizer) -> None:
    """`rope_parameters` passed over: the model computed with a theta of 10000, and saved with both."""
    folder, model = saved("mistral", rope_theta=1e6)
    (folder / "config.json").write_text(json.dumps(MISTRAL))
    loaded, _ = checkpoint.load(folder)
    np.testing.assert_array_equal(logits(loaded), logits(model))
    usual = make_model("mistral", layers=2)
    for variable, value in zip(usual.weights, model.weights, strict=True):
        variable.assign(value)
    assert np.abs(logits(loaded) - logits(usual)).max() > 0.1

    checkpoint.save(loaded, tokenizer, folder)
    fields = written(folder)
    assert fields["rope_theta"] == 1e6
    assert fields["torch_dtype"] == "float32"
    assert not {"rope_parameters", "dtype"} & fields.keys()
    again, _ = checkpoint.load(folder)
    np.testing.assert_array_equal(logits(again), logits(model))


def test_a_gpt2_of_transformers_5_is_saved_as_float32(saved, tokenizer) -> None:
    """`dtype` bfloat16 kept with float32 weights, which transformers 5 then opens as bfloat16."""
    folder, model = saved("gpt2")
    (folder / "config.json").write_text(json.dumps(GPT2 | {"dtype": "bfloat16"}))
    loaded, _ = checkpoint.load(folder)
    np.testing.assert_array_equal(logits(loaded), logits(model))
    checkpoint.save(loaded, tokenizer, folder)
    assert written(folder)["torch_dtype"] == "float32"
    assert "dtype" not in written(folder)


def test_a_config_object_with_two_ropes_is_refused() -> None:
    """A config that transformers 4 has read from a file of transformers 5: it has put its own theta beside."""
    from transformers import AutoConfig

    with pytest.raises(InputError, match=r"rope_theta 10000\.0 and, in rope_parameters, rope_theta 1000000\.0"):
        checkpoint.create(AutoConfig.for_model(**MISTRAL))


def test_the_output_form_of_the_config_is_ignored(saved) -> None:
    """A traceback for configs that ask for tuples; a model that was trained without a cache refused by the exporter."""
    folder, model = saved("gpt2")
    asked = {"return_dict": False, "output_hidden_states": True, "output_attentions": True, "use_cache": False}
    (folder / "config.json").write_text(json.dumps(GPT2 | asked))
    loaded, _ = checkpoint.load(folder)
    np.testing.assert_array_equal(logits(loaded), logits(model))
    assert loaded.config.use_cache


def test_an_openai_gpt_has_the_activation_that_its_config_names() -> None:
    """TensorFlow's class, which takes the exact GELU for every model; PyTorch's takes what `afn` says."""
    from transformers import AutoConfig

    def numpy_gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    sizes = {"vocab_size": 512, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    x = np.linspace(-4, 4, 64, dtype=np.float32).reshape(2, 1, 32)
    for name, function in {
        "gelu": numpy_gelu,
        "relu": lambda x: np.maximum(x, 0),
        "silu": lambda x: x / (1 + np.exp(-x)),
    }.items():
        model = checkpoint.create(AutoConfig.for_model("openai-gpt", **sizes, afn=name))
        for block in model.transformer.h:
            fc, proj = block.mlp.c_fc, block.mlp.c_proj
            expected = function(x @ fc.weight.numpy() + fc.bias.numpy()) @ proj.weight.numpy() + proj.bias.numpy()
            np.testing.assert_allclose(block.mlp(x).numpy(), expected, atol=1e-6)
    with pytest.raises(InputError, match="mish"):
        checkpoint.create(AutoConfig.for_model("openai-gpt", **sizes, afn="mish"))


# Without building a model

ENCODER = {"model_type": "bert", "is_decoder": True}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (MISTRAL | {"rope_parameters": {"rope_type": "spiral", "factor": 4.0, "rope_theta": 1e6}}, "'spiral'"),
        (MISTRAL | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (MISTRAL | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one for all layers"),
        (MISTRAL | {"rope_parameters": [1e6]}, "rope_parameters [1000000.0]"),
        (MISTRAL | {"rope_theta": 10000.0}, "rope_theta 10000.0 and, in rope_parameters, rope_theta 1000000.0"),
        (MISTRAL | {"rope_scaling": {"type": "dynamic"}}, "dynamic lacks factor"),
        (MISTRAL | {"sliding_window": 0}, "sliding_window 0"),
        (MISTRAL | {"attention_bias": True}, "attention_bias=True"),
        (MISTRAL | {"rope_interleaved": True}, "rope_interleaved=True"),
        (MISTRAL | {"num_key_value_heads": 3}, "3 key-value heads"),
        (MISTRAL | {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types ["),
        (MISTRAL | {"rope_theta": "1e6", "rope_parameters": None}, "rope_theta '1e6': give a number"),
        (GPT2 | {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters {"),
        (GPT2 | {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0, which is unknown for gpt2"),
        (GPT2 | {"causal": False}, "causal False"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        (GPT2 | {"n_layer": "2"}, "n_layer '2': give a whole number"),
        (GPT2 | {"n_layer": 2.5}, "n_layer 2.5: give a whole number"),
        (GPT2 | {"n_layer": 0}, "num_hidden_layers 0: give 1 or more"),
        (GPT2 | {"tie_word_embeddings": "false"}, "tie_word_embeddings 'false': give true or false"),
        (GPT2 | {"hidden_size": 64}, "n_embd 32 and hidden_size 64"),
        (GPT2 | {"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        (GPT2 | {"pruned_heads": {"0": [1]}}, "pruned_heads={"),
        (GPT2 | {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "custom code"),
        (GPT2 | {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized by bitsandbytes"),
        (GPT2 | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized by gptq"),
        (GPT2 | {"quantization": {"group_size": 64, "bits": 4}}, "quantized to 4 bits"),
        ({"model_type": "ctrl", "layer_norm_epsilon": 1e-5}, "layer_norm_epsilon=1e-05"),
        ({"model_type": "gptj", "rotary": False}, "rotary=False"),
        ({"model_type": "gptj", "rotary_dim": 7}, "rotary_dim 7: give an even number"),
        ({"model_type": "opt", "enable_bias": False}, "enable_bias=False"),
        (ENCODER | {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        (ENCODER | {"model_type": "roberta", "pad_token_id": 0}, "pad_token_id=0"),
    ],
)
def test_settings_that_tensorflow_would_compute_differently_are_refused_by_name(
    fields: dict[str, Any], words: str
) -> None:
    """A key that our transformers or TensorFlow's class ignores: another model than the one that was trained."""
    with pytest.raises(InputError, match="FOLDER") as caught:
        from_fields("FOLDER", fields)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (MISTRAL, {"rope_theta": 1e6, "torch_dtype": "bfloat16"}),
        (MISTRAL | {"rope_parameters": {"rope_theta": 5e5, "type": "default"}}, {"rope_theta": 5e5}),
        (MISTRAL | {"rope_theta": 1e6}, {"rope_theta": 1e6}),
        (MISTRAL | {"rope_scaling": {"rope_type": "default"}}, {"rope_scaling": None}),
        (MISTRAL | {"rope_parameters": None, "rope_theta": 5e5}, {"rope_theta": 5e5}),
        (MISTRAL | {"attention_bias": False, "pretraining_tp": 1, "unsloth_version": "2025.1"}, {"head_dim": 8}),
        # What HuggingFaceTB/SmolLM2-135M-Instruct, as published, has beyond a Llama's settings.
        (
            MISTRAL
            | {"is_llama_config": True, "rope_interleaved": False}
            | {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
            {"head_dim": 8},
        ),
        # EleutherAI/gpt-j-6b, as published.
        (
            {
                "model_type": "gptj",
                "gradient_checkpointing": False,
                "rotary": True,
                "rotary_dim": 64,
                "scale_attn_weights": True,
                "summary_type": "cls_index",
                "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50, "temperature": 1.0}},
                "tokenizer_class": "GPT2Tokenizer",
                "n_embd": 4096,
                "n_head": 16,
            },
            {"rotary_dim": 64},
        ),
        # openai-community/gpt2, as published, and what fine-tuning scripts leave.
        (GPT2 | {"n_ctx": 64, "_num_labels": 1, "output_past": True, "attn_implementation": "sdpa"}, {"n_layer": 2}),
        (GPT2 | {"some_feature": None, "another": [], "auto_map": {"AutoTokenizer": "own.Tokenizer"}}, {"n_layer": 2}),
        (ENCODER | {"directionality": "bidi", "pooler_fc_size": 768, "classifier_dropout": None}, {"is_decoder": True}),
        ({"model_type": "opt", "prefix": "</s>", "activation_dropout": 0.1, "output_attentions": False}, {}),
    ],
)
def test_what_changes_nothing_passes(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    """A usable checkpoint refused for a name, a version or a quantity for training alone."""
    config = from_fields("FOLDER", fields)
    assert {key: getattr(config, key) for key in expected} == expected
    assert not {"rope_parameters", "dtype"} & config.to_dict().keys()


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "mistral"])
def test_every_config_of_transformers_4_passes(architecture: str) -> None:
    """A key of the config's own class taken for an unknown one."""
    config = tiny_config(architecture)
    assert from_fields("FOLDER", config.to_dict()).to_dict() == config.to_dict()
    assert from_fields("FOLDER", json.loads(config.to_json_string())).to_dict() == config.to_dict()

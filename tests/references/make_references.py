"""Write what PyTorch computes with tiny models of many types, for the tests of the decoder to compare with.

The tests read the files beside this script; only making them takes PyTorch, in an environment of its own:

    python -m venv .venv-references
    .venv-references/bin/pip install torch==2.13.0 transformers==4.54.1 numpy==2.4.6
    .venv-references/bin/python tests/references/make_references.py [CASE ...]

Without names it makes every case of the installed transformers: with a release of version 5 those called v5_..., whose
config.json is written as that version writes it. versions.json says what made the files that are here. A second run
with the same versions on the same machine writes the same bytes.

Each case is a folder with
    config.json    as `save_pretrained` writes it
    weights.json   {name: shape} of what `save_pretrained` would write into model.safetensors, without buffers;
                   weights.py computes the values
    reference.npz  ids [2, 24] int32, without special tokens
                   right, left [2, 24] int32: attention masks of texts padded on that side
                   plain [2, 24, V], right_logits, left_logits [2, 24, V], short [2, 12, V] float32: logits of `ids`, of
                   `ids` with each mask, of the first 12 ids. Where a mask is 0, the ids were the padding token and the
                   logits are written as 0.
                   greedy [2, 26] int32: the first 6 ids and 20 tokens of greedy generation with a cache, no end token
                   loss, grad_norm float64: of `ids` as labels, in training mode without dropout; the norm is over all
                   parameters, tied ones once
A padded text has positions of its own, from 0: `max(cumsum(mask) - 1, 0)`.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, modeling_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from weights import reference_weight

HERE = Path(__file__).parent
LENGTH, SHORT, PROMPT, NEW = 24, 12, 6, 20
VOCABULARY, PADDING = 53, 0
# A greedy choice that is closer than this to another one would depend on rounding.
MARGIN = 2e-4

Case = tuple[str, dict[str, Any]]


def tiny(model_type: str, **settings: Any) -> Case:
    """The settings that all types have."""
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PADDING, "bos_token_id": 1, "eos_token_id": 2}
    return model_type, {**tokens, **settings}


def sized(model_type: str, **settings: Any) -> Case:
    """The sizes that most types name alike."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "max_position_embeddings": 64}
    return tiny(model_type, **{**sizes, **settings})


def llama_like(model_type: str, **settings: Any) -> Case:
    """A type with the settings' names of Llama, and two heads for keys and values."""
    return sized(model_type, **{"intermediate_size": 80, "num_key_value_heads": 2, **settings})


def gpt2_like(model_type: str, **settings: Any) -> Case:
    """A type with the settings' names of GPT-2."""
    sizes = {"n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 6}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return tiny(model_type, **{**sizes, **dropout, **settings})


def bert_like(model_type: str, **settings: Any) -> Case:
    """A type with the settings' names of BERT."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return sized(model_type, **{"intermediate_size": 80, **dropout, **settings})


def roberta_like(model_type: str, **settings: Any) -> Case:
    """A type that takes the positions from the ids: the first is 1 + the padding token's id."""
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "max_position_embeddings": 66}
    return bert_like(model_type, is_decoder=True, **tokens, **settings)


def longrope(size: int) -> dict[str, Any]:
    """The scaling of `size` frequencies by one list for short texts and another one for long texts."""
    return {
        "type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(size)],
        "long_factor": [2.0 + 0.5 * i for i in range(size)],
    }


# None of these is a default, so that a test notices when one of them is not read.
UNUSUAL = {
    "rms_norm_eps": 1e-3,
    "layer_norm_eps": 1e-3,
    "layer_norm_epsilon": 1e-3,
    "rope_theta": 3000.0,
    "rotary_emb_base": 3000.0,
    "rope_local_base_freq": 500.0,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.8,
    "attention_multiplier": 0.5,
    "logits_scaling": 1.5,
}

CASES: dict[str, Case] = {
    "llama": llama_like("llama"),
    "llama_tied": llama_like("llama", attention_bias=True, mlp_bias=True, head_dim=12, tie_word_embeddings=True),
    "llama_linear": llama_like("llama", rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama_dynamic": llama_like(
        "llama", max_position_embeddings=16, rope_scaling={"rope_type": "dynamic", "factor": 2.0}
    ),
    "llama_llama3": llama_like("llama", rope_theta=500000.0, rope_scaling=LLAMA_3),
    "llama_yarn": llama_like(
        "llama", rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    ),
    "llama_yarn_plain": llama_like(
        "llama",
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.25, "attention_factor": 1.3},
    ),
    "mistral": llama_like("mistral", head_dim=16, sliding_window=8),
    "mistral_full": llama_like("mistral", sliding_window=None, num_key_value_heads=3, tie_word_embeddings=True),
    "qwen2": llama_like("qwen2", tie_word_embeddings=True),
    "qwen2_window": llama_like(
        "qwen2", num_hidden_layers=4, use_sliding_window=True, sliding_window=8, max_window_layers=2
    ),
    "qwen3": llama_like("qwen3", head_dim=16),
    "gemma": llama_like("gemma", head_dim=16, num_key_value_heads=1),
    "gemma2": llama_like("gemma2", num_hidden_layers=4, head_dim=16, sliding_window=8, query_pre_attn_scalar=20),
    "gemma3_text": llama_like(
        "gemma3_text", num_hidden_layers=7, head_dim=16, sliding_window=8, query_pre_attn_scalar=20
    ),
    "gemma3_text_linear": llama_like(
        "gemma3_text",
        num_hidden_layers=7,
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=16,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "smollm3": llama_like("smollm3", num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0]),
    # Only the layers without rope get the window.
    "smollm3_window": llama_like(
        "smollm3",
        num_hidden_layers=4,
        no_rope_layers=[1, 0, 1, 0],
        use_sliding_window=True,
        sliding_window=8,
        tie_word_embeddings=False,
    ),
    "phi3": llama_like("phi3", sliding_window=None),
    "phi3_window": llama_like("phi3", sliding_window=8),
    "phi3_partial": llama_like("phi3", partial_rotary_factor=0.75, tie_word_embeddings=True),
    "phi3_longrope": llama_like("phi3", original_max_position_embeddings=16, rope_scaling=longrope(4)),
    # Phi-4-mini has all three.
    "phi3_longrope_partial": llama_like(
        "phi3",
        original_max_position_embeddings=16,
        partial_rotary_factor=0.75,
        rope_scaling=longrope(3),
        tie_word_embeddings=True,
    ),
    "olmo2": llama_like("olmo2"),
    "granite": llama_like("granite", tie_word_embeddings=True, **MULTIPLIERS),
    # From here on, older types.
    # A quarter of smaller heads would be one frequency, which is 1 for every base.
    "gpt_neox": sized("gpt_neox", intermediate_size=80, num_attention_heads=3, rotary_pct=0.25),
    "gpt_neox_sequential": sized(
        "gpt_neox",
        intermediate_size=80,
        rotary_pct=0.5,
        use_parallel_residual=False,
        attention_bias=False,
        tie_word_embeddings=True,
    ),
    "gpt_neo": tiny(
        "gpt_neo",
        hidden_size=48,
        intermediate_size=80,
        num_layers=4,
        num_heads=6,
        attention_types=[[["global", "local"], 2]],
        window_size=8,
        max_position_embeddings=64,
    ),
    # ALiBi's slopes follow another rule where the number of heads is no power of two.
    "bloom": tiny("bloom", hidden_size=48, n_layer=3, n_head=6),
    "bloom_post": tiny("bloom", hidden_size=48, n_layer=3, n_head=4, apply_residual_connection_post_layernorm=True),
    "falcon_7b": sized("falcon", ffn_hidden_size=80),
    "falcon_40b": sized("falcon", num_kv_heads=2, new_decoder_architecture=True, tie_word_embeddings=False),
    "falcon_11b": sized(
        "falcon", num_kv_heads=2, new_decoder_architecture=True, num_ln_in_parallel_attn=1, ffn_hidden_size=80
    ),
    "falcon_rw": sized("falcon", alibi=True, parallel_attn=False, multi_query=False, bias=True, ffn_hidden_size=80),
    "mpt": tiny("mpt", d_model=48, n_layers=3, n_heads=6, max_seq_len=64),
    # MPT's class ignores `no_bias` and `alibi_bias_max`: it has no biases, and slopes down to 2**-8.
    "mpt_bias": tiny(
        "mpt",
        d_model=48,
        n_layers=3,
        n_heads=4,
        max_seq_len=64,
        no_bias=False,
        attn_config={"clip_qkv": 1.0, "softmax_scale": 0.4, "alibi_bias_max": 4},
        tie_word_embeddings=False,
    ),
    # Its fused projection has four parts of its own, so 8 heads are two in each.
    "codegen": gpt2_like("codegen", n_head=8, rotary_dim=4, n_inner=80, attn_pdrop=0.0),
    "persimmon": sized("persimmon", intermediate_size=80, qk_layernorm=True),
    "phi": llama_like("phi", partial_rotary_factor=0.5, num_key_value_heads=6),
    "phi_qk": llama_like("phi", partial_rotary_factor=0.5, qk_layernorm=True),
    "stablelm": llama_like("stablelm", num_attention_heads=3, num_key_value_heads=1),
    "stablelm_parallel": llama_like(
        "stablelm",
        partial_rotary_factor=0.5,
        use_parallel_residual=True,
        qk_layernorm=True,
        use_qkv_bias=True,
        tie_word_embeddings=True,
    ),
    # Its class ignores `layer_norm_eps`: it has PyTorch's default, 1e-5.
    "biogpt": bert_like("biogpt"),
    "gpt2": gpt2_like("gpt2", attn_pdrop=0.0),
    "gpt2_scaled": gpt2_like(
        "gpt2", scale_attn_by_inverse_layer_idx=True, n_inner=80, attn_pdrop=0.0, tie_word_embeddings=False
    ),
    "opt": sized("opt", ffn_dim=80, dropout=0.0),
    # As OPT-350m.
    "opt_post": sized("opt", ffn_dim=80, dropout=0.0, do_layer_norm_before=False, word_embed_proj_dim=32),
    "gptj": gpt2_like("gptj", rotary_dim=4, n_inner=80, attn_pdrop=0.0),
    "xglm": tiny(
        "xglm",
        d_model=48,
        ffn_dim=80,
        num_layers=3,
        attention_heads=6,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    # Its class has an epsilon of 1e-6 in the layers, whatever the setting says.
    "ctrl": gpt2_like("ctrl", dff=80, layer_norm_epsilon=1e-6),
    "openai_gpt": gpt2_like("openai-gpt", attn_pdrop=0.0),
    "bert": bert_like("bert", is_decoder=True),
    "roberta": roberta_like("roberta"),
    "camembert": roberta_like("camembert"),
    "xlm_roberta": roberta_like("xlm-roberta"),
    "roberta_prelayernorm": roberta_like("roberta-prelayernorm"),
    "rembert": bert_like("rembert", input_embedding_size=24, output_embedding_size=36, is_decoder=True),
}


def v5(model_type: str, theta: float = 3000.0, **settings: Any) -> Case:
    """A type whose rope is in `rope_parameters`."""
    return llama_like(model_type, rope_parameters={"rope_type": "default", "rope_theta": theta}, **settings)


# Their config.json has `rope_parameters` and `dtype`, for example.
V5_CASES: dict[str, Case] = {
    "v5_llama": v5("llama", 500000.0),
    "v5_qwen3": v5("qwen3", 1000000.0, head_dim=16),
    "v5_gemma3_text": llama_like(
        "gemma3_text",
        num_hidden_layers=7,
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=20,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "v5_mistral": v5("mistral", head_dim=16, sliding_window=8),
    "v5_smollm3": v5("smollm3", num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0]),
    "v5_granite": v5("granite", tie_word_embeddings=True, **MULTIPLIERS),
    "v5_phi3": v5("phi3", sliding_window=None),
    "v5_llama_llama3": llama_like("llama", rope_parameters={"rope_theta": 500000.0, **LLAMA_3}),
    # transformers 4.54.1 multiplies their attention scores by the root of the heads' size, where it should divide:
    # huggingface/transformers#40041.
    "v5_gpt_bigcode": gpt2_like("gpt_bigcode", multi_query=True, n_inner=80, attn_pdrop=0.0),
    "v5_gpt_bigcode_mha": gpt2_like("gpt_bigcode", multi_query=False, attn_pdrop=0.0, tie_word_embeddings=False),
}


def saved(model: Any, folder: Path) -> dict[str, list[int]]:
    """Writes config.json and weights.json; the shapes by name of the weights that a checkpoint has."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        shutil.copy(Path(place, "config.json"), folder / "config.json")
        with safe_open(Path(place, "model.safetensors"), "np") as tensors:
            names = parameters.keys() & set(tensors.keys())
    if missing := {id(p) for p in parameters.values()} - {id(parameters[name]) for name in names}:
        raise SystemExit(f"{folder.name}: {len(missing)} parameters are not in the checkpoint")
    shapes = {name: list(parameters[name].shape) for name in sorted(names)}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(shape)}" for name, shape in shapes.items())
    (folder / "weights.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    return shapes


def builder(case: Case, folder: Path) -> Callable[[], Any]:
    """A function that makes the model anew, because some ropes remember the longest text that they have seen."""
    model_type, settings = case
    config_class = CONFIG_MAPPING[model_type]
    known = inspect.signature(config_class).parameters
    unusual = {name: value for name, value in UNUSUAL.items() if name in known and name not in settings}
    # StableLM's initial values want a bias in every LayerNorm, which those of its heads do not have.
    unset = modeling_utils.no_init_weights if model_type == "stablelm" else contextlib.nullcontext
    # Falcon's eager attention adds ALiBi twice: once in the mask, once to the scores.
    attention = "sdpa" if settings.get("alibi") else "eager"

    def build() -> Any:
        config = config_class(**unusual, **settings)
        with unset():
            made = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        made.tie_weights()
        return made

    shapes = saved(build(), folder)

    def model() -> Any:
        made = build()
        parameters = dict(made.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, shape in shapes.items():
                parameters[name].copy_(torch.from_numpy(reference_weight(name, shape)))
        made.tie_weights()
        return made

    return model


def padded(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The logits of texts with padding, 0 in the padding."""
    extra = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        extra["position_ids"] = torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0))
    inputs = torch.from_numpy(np.where(mask, ids, model.config.pad_token_id))
    logits = model(inputs, attention_mask=torch.from_numpy(mask), **extra).logits.detach().numpy()
    return np.where(mask[..., None], logits, 0)


def greedy(model: Any, ids: np.ndarray, name: str) -> np.ndarray:
    """The prompt and the likeliest tokens after it."""
    model.generation_config.eos_token_id = None
    prompt = torch.from_numpy(ids[:, :PROMPT])
    answer = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=model.config.pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(answer.logits).topk(2).values
    margin = float((best[..., 0] - best[..., 1]).min())
    text = answer.sequences.numpy()
    if text.shape != (len(ids), PROMPT + NEW) or margin < MARGIN:
        raise SystemExit(f"{name}: greedy text of shape {text.shape}, with a choice by {margin}")
    return text


def make(name: str, case: Case) -> None:
    """Writes the files of one case."""
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    model = builder(case, folder)
    ids = np.random.RandomState(8).randint(3, VOCABULARY, (2, LENGTH))
    lengths = np.array([[18], [7]])
    right = (np.arange(LENGTH) < lengths).astype(np.int64)
    left = right[:, ::-1].copy()

    with torch.no_grad():
        arrays = {
            "plain": model()(torch.from_numpy(ids)).logits.numpy(),
            "short": model()(torch.from_numpy(ids[:, :SHORT])).logits.numpy(),
            "right_logits": padded(model(), ids, right),
            "left_logits": padded(model(), ids, left),
            "greedy": greedy(model(), ids, name).astype(np.int32),
        }
    trained = model().train()
    loss = trained(torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss
    loss.backward()
    squares = [float((p.grad.double() ** 2).sum()) for p in trained.parameters() if p.grad is not None]
    arrays |= {"ids": ids.astype(np.int32), "right": right.astype(np.int32), "left": left.astype(np.int32)}
    arrays |= {"loss": np.float64(loss.item()), "grad_norm": np.sqrt(np.float64(sum(squares)))}
    np.savez_compressed(folder / "reference.npz", **arrays)
    most, tokens = np.abs(arrays["plain"]).max(), len(np.unique(arrays["greedy"][:, PROMPT:]))
    print(
        f"{name}: {type(trained).__name__}, logits up to {most:.1f}, loss {loss.item():.3f}, {tokens} tokens by greedy"
    )


def main() -> None:
    """Makes the cases that the command line names, or all of this version of transformers."""
    major = transformers.__version__.split(".")[0]
    cases = V5_CASES if major == "5" else CASES
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"one of {', '.join(cases)}")
    names = parser.parse_args().cases or list(cases)
    if unknown := [name for name in names if name not in cases]:
        parser.error(f"no case of transformers {major}: {', '.join(unknown)}; there are {', '.join(cases)}")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    for name in names:
        make(name, cases[name])

    versions = {"python": platform.python_version(), "numpy": np.__version__}
    versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
    path = HERE / "versions.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[f"transformers {major}"] = versions
    path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

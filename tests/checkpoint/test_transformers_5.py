"""transformers 5 with PyTorch, in an environment of its own: it writes and we read, we write and it reads.

The environment is made for the tests, from PyPI; TFCLM_TRANSFORMERS_5_PYTHON names the Python of one that is there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tfclm import checkpoint

pytestmark = pytest.mark.long

IDS = np.arange(7, 31).reshape(2, 12)
GPT = {"vocab_size": 576, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
ENCODER = {
    "vocab_size": 576,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "is_decoder": True,
}
MISTRAL = {
    "vocab_size": 576,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": None,
}
OPT = {
    "vocab_size": 576,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "word_embed_proj_dim": 16,
}
XGLM = {
    "vocab_size": 576,
    "max_position_embeddings": 64,
    "d_model": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "attention_heads": 2,
}
THETA = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
# A name, the type, the config, and the type of the weights.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("gpt2", GPT, "bfloat16"),
    "mistral": ("mistral", MISTRAL | THETA, "bfloat16"),
    "tied mistral": ("mistral", MISTRAL | THETA | {"tie_word_embeddings": True, "dtype": "float32"}, "float32"),
    "windowed mistral": ("mistral", MISTRAL | {"sliding_window": 16}, "float16"),
    "gptj": ("gptj", GPT | {"rotary_dim": 8}, "float32"),
    "opt": ("opt", OPT, "float16"),
    "xglm": ("xglm", XGLM, "float32"),
    "ctrl": ("ctrl", GPT | {"dff": 48}, "float32"),
    "openai-gpt": ("openai-gpt", GPT, "float32"),
    "bert": ("bert", ENCODER, "float32"),
    "rembert": ("rembert", ENCODER | {"input_embedding_size": 16, "output_embedding_size": 24}, "float32"),
    "roberta": ("roberta", ENCODER, "bfloat16"),
    "camembert": ("camembert", ENCODER, "float32"),
    "roberta-prelayernorm": ("roberta-prelayernorm", ENCODER, "float32"),
    "xlm-roberta": ("xlm-roberta", ENCODER, "float32"),
}
TEXTS = ["The first <|user|>text<|endoftext|>", "  x = '六'\n\n"]

COMMON = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

root, request = Path(sys.argv[1]), json.loads(sys.argv[2])
ids = torch.tensor(request["ids"])

def logits(model):
    with torch.no_grad():
        return model.float().eval()(ids, attention_mask=torch.ones_like(ids)).logits.numpy()
"""
WRITE = """
tokenizer = AutoTokenizer.from_pretrained(request["tokenizer"])
tokenizer.add_special_tokens({"pad_token": "<pad>", "extra_special_tokens": ["<|user|>"]})
for name, (kind, config, dtype) in request["cases"].items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(root / name)
    tokenizer.save_pretrained(root / name)
    np.save(root / name / "logits.npy", logits(AutoModelForCausalLM.from_pretrained(root / name)))
print(json.dumps([tokenizer(text)["input_ids"] for text in request["texts"]]))
"""
READ = """
answers = {}
for name in request["names"]:
    model, report = AutoModelForCausalLM.from_pretrained(root / name, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(root / name)
    answers[name] = {
        "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "report": {key: sorted(map(str, value)) for key, value in report.items() if value},
        "ids": [tokenizer(text)["input_ids"] for text in request["texts"]],
    }
    np.save(root / name / "logits.npy", logits(model))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def python_5(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment with transformers 5 and PyTorch."""
    there = os.environ.get("TFCLM_TRANSFORMERS_5_PYTHON")
    if there:
        return there
    folder = tmp_path_factory.mktemp("environment")
    python = str(folder / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    wanted = ["transformers==5.24.0", "torch==2.13.0", "numpy", "sentencepiece"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True, timeout=1800)
    return python


def ask(python: str, script: str, root: Path, **request: Any) -> Any:
    """What a script prints in that environment, without anything of ours on its path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    run = subprocess.run(
        [python, "-c", COMMON + script, str(root), json.dumps({"ids": IDS.tolist(), "texts": TEXTS} | request)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def written(
    python_5: str, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[int]]]:
    """A folder with a checkpoint of each case as transformers 5 writes it, and the ids of the texts."""
    root = tmp_path_factory.mktemp("five")
    return root, ask(python_5, WRITE, root, cases=CASES, tokenizer=str(tokenizer_dir))


def error(model: Any, expected: np.ndarray) -> float:
    """The largest difference of the logits, relative to the largest of them."""
    ids = IDS.astype(np.int32)
    found = model(input_ids=ids, attention_mask=np.ones_like(ids)).logits.numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_we_read_what_transformers_5_writes(name: str, written: tuple[Path, list[list[int]]]) -> None:
    """Other logits, as with a rope that is passed over, or other ids, for a checkpoint of the newer version."""
    root, ids = written
    model, tokenizer = checkpoint.load(root / name)
    difference = error(model, np.load(root / name / "logits.npy"))
    print(f"{name}: relative error of the logits {difference:.1e}")
    assert difference < 2e-5
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == ids
    assert tokenizer.additional_special_tokens == ["<|user|>"]
    assert tokenizer.pad_token == "<pad>"


def test_transformers_5_reads_what_we_write(
    python_5: str, written: tuple[Path, list[list[int]]], tokenizer: Any, tmp_path: Path
) -> None:
    """Weights at random, a theta of 10000, float32 opened as bfloat16, or other ids, where the newer version reads."""
    root, ids = written
    models = {}
    for name in CASES:
        models[name], loaded = checkpoint.load(root / name)
        checkpoint.save(models[name], loaded, tmp_path / name)
    # And a tokenizer of version 4's own classes.
    models["class"] = models["gpt2"]
    checkpoint.save(models["class"], tokenizer, tmp_path / "class")
    answers = ask(python_5, READ, tmp_path, names=list(models))
    for name, model in models.items():
        assert answers[name]["dtypes"] == ["torch.float32"], name
        assert answers[name]["report"] == {}, name
        assert answers[name]["ids"] == (ids if name != "class" else [tokenizer(text)["input_ids"] for text in TEXTS]), (
            name
        )
        difference = error(model, np.load(tmp_path / name / "logits.npy"))
        print(f"{name}: relative error of the logits {difference:.1e}")
        assert difference < 2e-5, name

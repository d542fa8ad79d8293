"""What PyTorch makes of our checkpoints and we of PyTorch's; runs where torch is installed too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config

from tfclm import checkpoint

torch = pytest.importorskip("torch")

IDS = np.arange(7, 31).reshape(2, 12)
CASES = [
    ("gpt2", {}),
    ("opt", {"activation_function": "gelu"}),
    ("mistral", {"tie_word_embeddings": False}),
    ("mistral", {"tie_word_embeddings": True}),
]


def tensorflow_logits(model: Any) -> np.ndarray:
    """[2, 12, vocabulary]."""
    return model(input_ids=IDS.astype(np.int32), attention_mask=np.ones_like(IDS, np.int32)).logits.numpy()


def pytorch_logits(model: Any) -> np.ndarray:
    """[2, 12, vocabulary], without dropout."""
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS), attention_mask=torch.ones(IDS.shape, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize(("architecture", "config"), CASES)
def test_pytorch_opens_what_we_save(architecture: str, config: dict, tokenizer, tmp_path: Path) -> None:
    """A file from which PyTorch leaves parameters at random or on the meta device, or reads a matrix transposed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = checkpoint.create(tiny_config(architecture, **config))
    generator = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(generator.normal(scale=0.2, size=variable.shape))
    checkpoint.save(model, tokenizer, tmp_path)
    opened, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert {parameter.device.type for parameter in opened.parameters()} == {"cpu"}
    assert {parameter.dtype for parameter in opened.parameters()} == {torch.float32}
    np.testing.assert_allclose(pytorch_logits(opened), tensorflow_logits(model), atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(tokenizer)


@pytest.mark.parametrize("size", ["1GB", "40kB"])
@pytest.mark.parametrize(("architecture", "config"), CASES)
def test_we_open_what_pytorch_saves(architecture: str, config: dict, size: str, tokenizer, tmp_path: Path) -> None:
    """A PyTorch checkpoint, of one file or in shards, that gives other logits here."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path, max_shard_size=size)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() == (size == "1GB")
    loaded, _ = checkpoint.load(tmp_path)
    np.testing.assert_allclose(tensorflow_logits(loaded), pytorch_logits(model), atol=1e-4)


def test_pipeline_takes_the_folder_as_it_is(tokenizer, tmp_path: Path) -> None:
    """The guide's last step, word for word; without PyTorch transformers 4.54 needs `torch_dtype=None` beside it."""
    from transformers import pipeline

    checkpoint.save(checkpoint.create(tiny_config("gpt2")), tokenizer, tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path))
    assert generator("Python is", max_new_tokens=4)[0]["generated_text"].startswith("Python is")

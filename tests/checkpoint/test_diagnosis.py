"""What people give as a model that is none: one line that says what it is and what to give instead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tfclm import checkpoint
from tfclm.checkpoint.diagnosis import explain
from tfclm.errors import InputError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A small checkpoint, which is copied and spoilt."""
    from conftest import tiny_config
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("good")
    checkpoint.save(checkpoint.create(tiny_config("gpt2")), AutoTokenizer.from_pretrained(tokenizer_dir), folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def refused(given: Path | str) -> str:
    """The one line that says why it does not load."""
    with pytest.raises(InputError) as caught:
        checkpoint.load(given)
    message = str(caught.value)
    assert "\n" not in message
    assert str(given) in message
    return message


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "is an empty directory"),
        (
            ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"],
            "a LoRA adapter, which is not",
        ),
        (["saved_model.pb", "variables/variables.index", "fingerprint.pb"], "a SavedModel, which is for serving"),
        (["1/saved_model.pb", "2/saved_model.pb"], "a SavedModel, which is for serving"),
        (["model-Q4_K_M.gguf", "README.md"], "GGUF weights (llama.cpp)"),
        (["model_index.json", "unet/config.json", "vae/config.json"], "a diffusers pipeline"),
        (["modules.json", "config.json:bert", "model.safetensors"], "a sentence-transformers model"),
        (["config.json:none", "model.weights.h5", "task.json"], "a Keras or KerasHub model"),
        (["params.json", "consolidated.safetensors", "tekken.json"], "weights in their publisher's own format"),
        (
            ["model.ckpt.index", "model.ckpt.meta", "hparams.json"],
            "a TensorFlow checkpoint, which has weights but",
        ),
        (["blobs/0123", "refs/main", "snapshots/0123/config.json"], "the cache of a Hub model"),
        (["checkpoint-500/config.json", "checkpoint-1000/config.json"], "give one of them, such as checkpoint-1000"),
        (["resume/state.json"], "an incomplete run of tfclm.fit"),
        (["pytorch_model.bin"], "PyTorch's pickled weights"),
        (["onnx/model.onnx", "tokenizer.json"], "an ONNX model"),
        (["flax_model.msgpack"], "Flax (JAX) weights"),
        (["openvino_model.xml", "openvino_model.bin"], "converted for another runtime"),
        (["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"], "a tokenizer without a model"),
        (["train.jsonl", "test.jsonl"], "data, not a model"),
        (["model/config.json", "model/model.safetensors"], "its subdirectory model has one: give that"),
        (["config.json:t5"], "an encoder-decoder"),
        (["config.json:vit"], "for images or sound"),
        (["config.json:gpt2", "pytorch_model.bin"], "convert it with transformers where PyTorch is installed"),
        (["config.json:gpt2", "model.gguf"], "GGUF weights (llama.cpp)"),
        (["config.json:gpt2", "model.fp16.safetensors"], "holds model.fp16.safetensors, weights under a name"),
        (["model.safetensors", "onnx/model.onnx", "tokenizer.json"], "has no config.json"),
        (["config.json:rwkv", "model.safetensors", "onnx/model.onnx"], "model type rwkv is not a causal LM"),
        (["config.json:gpt2", "training_args.bin", "optimizer.pt"], "has no weights: expected one of"),
        (["config.json:gpt2", "tokenizer.json"], "has no weights: expected one of model.safetensors"),
        (["config.json:gpt2", "adapter_config.json", "model.safetensors"], "a LoRA adapter"),
        (["config.json:none", "model.bin", "shared_vocabulary.json"], "converted for another runtime"),
    ],
)
def test_a_folder_that_is_no_checkpoint_says_what_it_is(files: list[str], words: str, tmp_path: Path) -> None:
    """ "no config.json" or "no weights", which is true and helps nobody."""
    configs = {
        "none": {},
        "gpt2": {"model_type": "gpt2"},
        "rwkv": {"model_type": "rwkv"},
        "bert": {"model_type": "bert"},
        "t5": {"model_type": "t5", "is_encoder_decoder": True},
        "vit": {"model_type": "vit", "image_size": 224},
    }
    for file in files:
        name, _, kind = file.partition(":")
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(json.dumps(configs.get(kind, {})))
    assert words in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model-Q4_K_M.gguf", "a file that holds GGUF weights"),
        ("model.keras", "a file that holds a Keras"),
        ("weights.h5", "a file that holds weights.h5, Keras weights"),
        ("model.onnx", "a file that holds an ONNX model"),
        ("model.tar.gz", "a file that holds an archive, model.tar.gz: unpack it"),
        ("pytorch_model.bin", "a file that holds PyTorch's pickled weights"),
        ("model.safetensors", "is a file: give the directory that holds it"),
        ("config.json", "is a file: give the directory that holds it"),
    ],
)
def test_a_file_says_what_it_is(name: str, words: str, tmp_path: Path) -> None:
    """The folder asked for where no folder would do."""
    (tmp_path / name).touch()
    assert words in refused(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "the model's name is empty"),
        ("https://huggingface.co/openai-community/gpt2/tree/main", "give the Hub id, openai-community/gpt2"),
        ("hf://openai-community/gpt2", "give the Hub id, openai-community/gpt2"),
        ("gs://bucket/model", "copy the checkpoint to a local directory"),
        ("x" * 5000, "cannot be read"),
        ("~nobody-of-this-name/model", "cannot be read"),
    ],
)
def test_a_name_that_is_no_folder_says_why(name: str, words: str) -> None:
    """A traceback of Python's for a name that no file system takes, or the current folder for an empty variable."""
    assert words in refused(name)


def test_a_link_to_itself_is_no_folder(tmp_path: Path) -> None:
    """A broken link taken for a Hub id, which then "cannot be reached"."""
    (tmp_path / "loop").symlink_to("loop")
    assert "is a broken link to loop" in refused(tmp_path / "loop")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_file_that_cannot_be_read_says_why(name: str, folder: Path) -> None:
    """A traceback, or "there is no such file" for one that is there, in each of the files that are read."""
    path = folder / name
    content = path.read_bytes()
    states = {
        "it is a directory": lambda: path.mkdir(),
        f"it is a broken link to {name}": lambda: path.symlink_to(name),
        "it is empty": lambda: path.touch(),
        "git lfs pull": lambda: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "it is a web page": lambda: path.write_text("<!DOCTYPE html><html><body>Sign in</body></html>"),
    }
    for words, make in states.items():
        path.unlink()
        make()
        message = refused(folder)
        assert f"{name} cannot be read: " in message
        assert words in message
        if path.is_dir():
            path.rmdir()
            path.touch()
    path.write_bytes(content)
    checkpoint.load(folder)


def test_weights_of_another_type_are_refused(folder: Path) -> None:
    """Quantized integers cast to floating point: a model of whole numbers."""
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.0.mlp.c_fc.weight"] = tensors["transformer.h.0.mlp.c_fc.weight"].astype(np.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "transformer.h.0.mlp.c_fc.weight as int8, so its weights are quantized" in refused(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "model.safetensors.index.json is not a JSON object"),
        ("{}", "model.safetensors.index.json cannot be read"),
        ('{"weight_map": {"transformer.wte.weight": "../other.safetensors"}}', "other.safetensors cannot be read"),
        ('{"weight_map": {"transformer.wte.weight": 5}}', "model.safetensors.index.json cannot be read"),
    ],
)
def test_an_index_that_is_none_is_refused(content: str, words: str, folder: Path) -> None:
    """A traceback for an index of shards of another form, or a file read from outside of the checkpoint."""
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    assert words in refused(folder)


def test_a_hub_repository_is_explained_by_its_names() -> None:
    """Only folders explained: most adapters and GGUF files are found on the Hub."""
    assert "a LoRA adapter" in str(
        explain("me/lora", ["README.md", "adapter_config.json", "adapter_model.safetensors"])
    )
    assert "GGUF" in str(explain("me/gguf", ["README.md", "model-Q4_K_M.gguf"]))
    assert "diffusers" in str(explain("me/sd", ["model_index.json", "unet/config.json"]))
    assert explain("me/other", ["README.md"]) is None

"""Loading, tying, creating and saving checkpoints, on tiny models."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tfclm import checkpoint
from tfclm.errors import InputError

IDS = np.arange(7, 19, dtype=np.int32).reshape(2, 6)


def logits(model: Any) -> np.ndarray:
    """Of the fixed ids, [2, 6, vocabulary]."""
    return model(input_ids=IDS, attention_mask=np.ones_like(IDS)).logits.numpy()


def scatter(model: Any, seed: int = 0) -> Any:
    """Random values for every variable: the initial biases are zeros, which would hide a swap."""
    generator = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(generator.normal(scale=0.3, size=variable.shape))
    return model


def equal(first: Any, second: Any) -> bool:
    """Whether two models have the same weights, bit by bit."""
    return all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(first.weights, second.weights, strict=True))


def edit(file: Path, change: Callable[[dict], Any]) -> None:
    """Apply `change` to the tensors of a safetensors file, in place of it."""
    with safe_open(file, framework="np") as archive:
        metadata = archive.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def refused(folder: Path) -> str:
    """The one line that says why a checkpoint does not load."""
    with pytest.raises(InputError) as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def make_model(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """With two layers, whose weights can be taken for each other's."""
    return functools.partial(make_model, layers=2)


@pytest.fixture
def saved(tmp_path: Path, make_model, tokenizer) -> Callable[..., Path]:
    """`saved("opt")`: the folder of a checkpoint with random values."""

    def write(architecture: str = "gpt2", **config: Any) -> Path:
        folder = tmp_path / "checkpoint"
        model = scatter(make_model(architecture, **config))
        checkpoint.tie(model)
        checkpoint.save(model, tokenizer, folder)
        return folder

    return write


# Round trips

ENCODER = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "is_decoder": True,
}
GPT = {"vocab_size": 512, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
OPT = {
    "vocab_size": 512,
    "max_position_embeddings": 32,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
MISTRAL = {
    "vocab_size": 512,
    "max_position_embeddings": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
XGLM = {
    "vocab_size": 512,
    "max_position_embeddings": 32,
    "d_model": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "attention_heads": 2,
}


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("gpt2", GPT),
        ("opt", OPT | {"word_embed_proj_dim": 32}),
        ("opt", OPT | {"word_embed_proj_dim": 16}),
        ("opt", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
        ("mistral", MISTRAL | {"tie_word_embeddings": False}),
        ("mistral", MISTRAL | {"tie_word_embeddings": True}),
        ("gptj", GPT | {"rotary_dim": 8}),
        ("gptj", GPT | {"rotary_dim": 8, "tie_word_embeddings": True}),
        ("xglm", XGLM),
        ("xglm", XGLM | {"tie_word_embeddings": False}),
        ("ctrl", GPT | {"dff": 48}),
        ("openai-gpt", GPT),
        ("bert", ENCODER),
        ("camembert", ENCODER),
        ("rembert", ENCODER | {"input_embedding_size": 16, "output_embedding_size": 24}),
        ("roberta", ENCODER),
        ("roberta-prelayernorm", ENCODER),
        ("xlm-roberta", ENCODER),
    ],
)
def test_a_saved_model_loads_with_the_same_bits(model_type: str, fields: dict, tokenizer, tmp_path: Path) -> None:
    """A weight saved under another's name, transposed once too often, or left at random by loading."""
    from transformers import AutoConfig

    model = scatter(checkpoint.create(AutoConfig.for_model(model_type, **fields)))
    checkpoint.save(model, tokenizer, tmp_path)
    loaded, _ = checkpoint.load(tmp_path)
    assert equal(model, loaded)
    np.testing.assert_array_equal(logits(loaded), logits(model))
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model).__name__[2:]]


def test_the_folder_holds_exactly_what_save_says(saved, make_model, tokenizer) -> None:
    """A staging folder left behind, by this save or by one that was killed, or a file that nobody mentions."""
    folder = saved()
    (folder / checkpoint.STAGING).mkdir()
    (folder / checkpoint.STAGING / "half-written").touch()
    names = checkpoint.save(make_model(), tokenizer, folder)
    assert names == sorted(path.name for path in folder.iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(names)


def test_a_failing_save_leaves_the_old_checkpoint_alone(saved, make_model) -> None:
    """Files written straight to their final names, so that a failure leaves half of a new checkpoint."""

    class Full:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{")
            raise OSError(28, "No space left on device")

    folder = saved()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(make_model(seed=1), Full(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_save_refuses_a_folder_that_is_a_file(make_model, tokenizer, tmp_path: Path) -> None:
    """A traceback for a mistyped --output-dir."""
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        checkpoint.save(make_model(), tokenizer, tmp_path / "file")


# PyTorch's names and layouts


def gpt2_state(generator: np.random.Generator) -> dict[str, np.ndarray]:
    """GPT-2's state dict as in PyTorch: 2 layers, width 32, 512 entries, 64 positions; Conv1D weights are [in, out]."""
    shapes = {"wte.weight": (512, 32), "wpe.weight": (64, 32), "ln_f.weight": (32,), "ln_f.bias": (32,)}
    for layer in ("h.0", "h.1"):
        for part, (rows, columns) in {
            "attn.c_attn": (32, 96),
            "attn.c_proj": (32, 32),
            "mlp.c_fc": (32, 128),
            "mlp.c_proj": (128, 32),
        }.items():
            shapes |= {f"{layer}.{part}.weight": (rows, columns), f"{layer}.{part}.bias": (columns,)}
        for part in ("ln_1", "ln_2"):
            shapes |= {f"{layer}.{part}.weight": (32,), f"{layer}.{part}.bias": (32,)}
    return {f"transformer.{name}": generator.normal(scale=0.3, size=shape) for name, shape in shapes.items()}


def gpt2_forward(state: dict[str, np.ndarray], ids: np.ndarray, heads: int = 2) -> np.ndarray:
    """GPT-2 after its paper, in float64: ids [B, T] -> logits [B, T, vocabulary]."""
    weights = {name.removeprefix("transformer."): value for name, value in state.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    batch, length = ids.shape
    hidden = weights["wte.weight"][ids] + weights["wpe.weight"][:length]
    for layer in ("h.0", "h.1"):
        mixed = linear(norm(hidden, f"{layer}.ln_1"), f"{layer}.attn.c_attn")
        query, key, value = (
            part.reshape(batch, length, heads, -1).swapaxes(1, 2) for part in np.split(mixed, 3, axis=-1)
        )
        scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        joined = (attention @ value).swapaxes(1, 2).reshape(batch, length, -1)
        hidden = hidden + linear(joined, f"{layer}.attn.c_proj")
        inner = linear(norm(hidden, f"{layer}.ln_2"), f"{layer}.mlp.c_fc")
        inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
        hidden = hidden + linear(inner, f"{layer}.mlp.c_proj")
    return norm(hidden, "ln_f") @ weights["wte.weight"].T


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_a_state_dict_written_by_hand_gives_the_logits_of_a_numpy_gpt2(prefix: str, saved) -> None:
    """Names or layouts that only our own files have; or GPT-2's own file refused, whose names lack the prefix."""
    folder = saved()
    state = gpt2_state(np.random.default_rng(5))
    named = {prefix + name.removeprefix("transformer."): value.astype(np.float32) for name, value in state.items()}
    # The mask that PyTorch's GPT-2 used to store is no weight.
    mask = {f"{prefix}h.{layer}.attn.bias": np.ones((1, 1, 64, 64), np.float32) for layer in (0, 1)}
    save_file(named | mask, folder / "model.safetensors", metadata={"format": "pt"})
    model, tokenizer = checkpoint.load(folder)
    np.testing.assert_allclose(logits(model), gpt2_forward(state, IDS), atol=1e-4)
    checkpoint.save(model, tokenizer, folder)
    written = load_file(folder / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(np.array_equal(written[name], value.astype(np.float32)) for name, value in state.items())


@pytest.mark.parametrize(
    ("model_type", "fields", "shapes"),
    [
        (
            "mistral",
            MISTRAL | {"tie_word_embeddings": True, "num_hidden_layers": 1},
            {
                "model.embed_tokens.weight": [512, 32],
                "model.norm.weight": [32],
                "model.layers.0.input_layernorm.weight": [32],
                "model.layers.0.post_attention_layernorm.weight": [32],
                "model.layers.0.self_attn.q_proj.weight": [32, 32],
                "model.layers.0.self_attn.k_proj.weight": [16, 32],
                "model.layers.0.self_attn.v_proj.weight": [16, 32],
                "model.layers.0.self_attn.o_proj.weight": [32, 32],
                "model.layers.0.mlp.gate_proj.weight": [48, 32],
                "model.layers.0.mlp.up_proj.weight": [48, 32],
                "model.layers.0.mlp.down_proj.weight": [32, 48],
            },
        ),
        (
            "opt",
            OPT | {"word_embed_proj_dim": 16, "num_hidden_layers": 1},
            {
                "model.decoder.embed_tokens.weight": [512, 16],
                "model.decoder.embed_positions.weight": [34, 32],
                "model.decoder.project_in.weight": [32, 16],
                "model.decoder.project_out.weight": [16, 32],
                "model.decoder.final_layer_norm.weight": [32],
                "model.decoder.final_layer_norm.bias": [32],
                **{
                    f"model.decoder.layers.0.{name}.{part}": shape
                    for name, weight, bias in [
                        ("self_attn.q_proj", [32, 32], [32]),
                        ("self_attn.k_proj", [32, 32], [32]),
                        ("self_attn.v_proj", [32, 32], [32]),
                        ("self_attn.out_proj", [32, 32], [32]),
                        ("self_attn_layer_norm", [32], [32]),
                        ("final_layer_norm", [32], [32]),
                        ("fc1", [48, 32], [48]),
                        ("fc2", [32, 48], [32]),
                    ]
                    for part, shape in [("weight", weight), ("bias", bias)]
                },
            },
        ),
    ],
)
def test_the_file_has_pytorchs_names_and_shapes(
    model_type: str, fields: dict, shapes: dict, tokenizer, tmp_path: Path
) -> None:
    """An untransposed matrix, a tied matrix written twice, TensorFlow's names, or metadata that PyTorch passes over."""
    from transformers import AutoConfig

    model = checkpoint.create(AutoConfig.for_model(model_type, **fields))
    checkpoint.save(model, tokenizer, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="np") as archive:
        assert archive.metadata() == {"format": "pt"}
        keys = archive.keys()
        written = {name: archive.get_slice(name) for name in keys}
        assert {name: tensor.get_shape() for name, tensor in written.items()} == shapes
        assert {tensor.get_dtype() for tensor in written.values()} == {"F32"}


# Formats


def shard(folder: Path) -> None:
    """model.safetensors as two shards and an index, as PyTorch's save_pretrained splits a large model."""
    tensors = load_file(folder / "model.safetensors")
    files = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "model.safetensors").unlink()


def as_format(kind: str, folder: Path) -> None:
    """Turn a checkpoint of ours into another of the formats that transformers writes."""
    model, _ = checkpoint.load(folder)
    if kind == "pt shards":
        shard(folder)
    elif kind != "pt":
        (folder / "model.safetensors").unlink()
        size = "60kB" if kind.endswith("shards") else "1GB"
        model.save_pretrained(folder, safe_serialization=kind.startswith("tf"), max_shard_size=size)


def drop(folder: Path, word: str) -> None:
    """Remove the weights whose names contain `word` from the checkpoint's files, whatever their format."""
    import h5py

    for file in folder.glob("*.safetensors"):
        edit(file, lambda tensors: [tensors.pop(name) for name in list(tensors) if word in name])
    for file in folder.glob("*.h5"):
        names: list[str] = []
        with h5py.File(file, "r+") as archive:
            archive.visit(names.append)
            for name in names:
                if word in name and isinstance(archive[name], h5py.Dataset):
                    del archive[name]


FORMATS = {
    "pt": "model.safetensors",
    "pt shards": "model.safetensors.index.json",
    "tf": "model.safetensors",
    "tf shards": "model.safetensors.index.json",
    "h5": "tf_model.h5",
    "h5 shards": "tf_model.h5.index.json",
}


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "mistral"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_loads_and_none_with_a_weight_missing(kind: str, architecture: str, saved) -> None:
    """A format that does not load, or one that leaves a missing weight at random, as transformers does."""
    folder = saved(architecture)
    model, _ = checkpoint.load(folder)
    as_format(kind, folder)
    assert (folder / FORMATS[kind]).is_file()
    loaded, _ = checkpoint.load(folder)
    assert equal(model, loaded)
    drop(folder, {"gpt2": "c_fc/bias", "opt": "fc1/bias", "mistral": "up_proj/kernel"}[architecture])
    drop(folder, {"gpt2": "c_fc.bias", "opt": "fc1.bias", "mistral": "up_proj.weight"}[architecture])
    message = refused(folder)
    lost = {"gpt2": "transformer.h.1.mlp.c_fc.bias", "opt": "fc1.bias", "mistral": "layers.0.mlp.up_proj.weight"}
    assert f"{FORMATS[kind]} lacks " in message
    assert lost[architecture] in message


def test_the_names_of_old_tensorflow_files_load(saved) -> None:
    """Files of TensorFlow 2.0's days refused: they call GPT-2's embeddings "weight" and number the model."""
    import h5py

    folder = saved()
    model, _ = checkpoint.load(folder)
    as_format("h5", folder)
    with h5py.File(folder / "tf_model.h5", "r+") as archive:
        stem = archive["transformer"]
        (name,) = stem.keys()
        for table in ("wte", "wpe"):
            stem.move(f"{name}/transformer/{table}/embeddings:0", f"{name}/transformer/{table}/weight:0")
        stem.move(name, "tfgp_t2lm_head_model_1")
    loaded, _ = checkpoint.load(folder)
    assert equal(model, loaded)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_loads_as_float32(dtype: str, saved) -> None:
    """bfloat16, which NumPy lacks, refused or misread; or variables that are not float32."""
    import ml_dtypes

    folder = saved()
    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    exact = load_file(folder / "model.safetensors")
    edit(folder / "model.safetensors", lambda t: t.update({name: value.astype(kind) for name, value in t.items()}))
    model, _ = checkpoint.load(folder)
    assert {variable.dtype.name for variable in model.weights} == {"float32"}
    table = exact["transformer.wte.weight"].astype(kind).astype(np.float32)
    np.testing.assert_array_equal(model.transformer.wte.embeddings.numpy(), table)


# Weights that do not fit


def test_another_shape_is_refused(saved) -> None:
    """A matrix of the same number of elements reshaped silently, as transformers does."""
    folder = saved("mistral")
    name = "model.layers.0.mlp.up_proj.weight"
    edit(folder / "model.safetensors", lambda tensors: tensors.update({name: np.zeros((32, 64), np.float32)}))
    assert f"{name} [64, 32] instead of [32, 64]" in refused(folder)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("mistral", "model.layers.0.self_attn.q_proj.bias"),
        ("mistral", "model.layers.2.input_layernorm.weight"),
        ("mistral", "lm_head.bias"),
        ("gpt2", "lm_head.bias"),
    ],
)
def test_a_weight_without_a_place_is_refused(architecture: str, name: str, saved) -> None:
    """A model with biases, or with more layers than its config says, loaded without them: fluent nonsense."""
    folder = saved(architecture)
    edit(folder / "model.safetensors", lambda tensors: tensors.update({name: np.ones(32, np.float32)}))
    assert f"weights that the model does not have: {name}" in refused(folder)


def test_other_heads_and_constants_do_no_harm(saved) -> None:
    """A usable checkpoint refused for its value head, or for the constant tables of old versions."""
    folder = saved("mistral")
    extra = {"v_head.weight": np.ones(32, np.float32), "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)}
    edit(folder / "model.safetensors", lambda tensors: tensors.update(extra))
    checkpoint.load(folder)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(make_model, tokenizer, tmp_path: Path) -> None:
    """Ids past the embeddings: an error deep inside on a CPU, zeros on a GPU."""
    checkpoint.save(make_model(vocab_size=500), tokenizer, tmp_path)
    message = refused(tmp_path)
    assert "512" in message
    assert "500" in message


def test_a_padded_vocabulary_loads(saved) -> None:
    """The check turned round: vocabularies padded to a round size are common."""
    model, tokenizer = checkpoint.load(saved(vocab_size=576))
    assert (len(tokenizer), model.config.vocab_size) == (512, 576)


# Tied embeddings


def test_a_tied_mistral_computes_with_its_embeddings(saved) -> None:
    """A model that ignores tie_word_embeddings: its lm_head stays random and the model writes garbage."""
    folder = saved("mistral", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model, _ = checkpoint.load(folder)
    assert not [variable.name for variable in model.weights if "lm_head" in variable.name]
    hidden = model.model(input_ids=IDS, attention_mask=np.ones_like(IDS), return_dict=True).last_hidden_state.numpy()
    expected = hidden @ model.model.embed_tokens.weight.numpy().T
    np.testing.assert_allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_both_uses_of_a_tied_matrix_reach_its_gradient(jit_compile: bool, saved) -> None:
    """A head that reads a copy: training moves one of two matrices, and saving keeps the other."""
    import tensorflow as tf

    folder = saved("mistral", tie_word_embeddings=False)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit(folder / "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": table}))
    untied, _ = checkpoint.load(folder)
    settings = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(settings))
    tied, _ = checkpoint.load(folder)

    def gradients(model: Any) -> dict[str, np.ndarray]:
        @tf.function(jit_compile=jit_compile)
        def step() -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                loss = model(input_ids=tf.constant(IDS), labels=tf.constant(IDS), training=True).loss
            found = tape.gradient(loss, model.trainable_variables)
            return [tf.convert_to_tensor(gradient) for gradient in found]

        names = [variable.name.split("/", 1)[1] for variable in model.trainable_variables]
        return dict(zip(names, [gradient.numpy() for gradient in step()], strict=True))

    one, two = gradients(tied), gradients(untied)
    both = two.pop("model/embed_tokens/weight:0") + two.pop("lm_head/kernel:0").T
    np.testing.assert_allclose(one.pop("model/embed_tokens/weight:0"), both, atol=1e-5)
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        np.testing.assert_allclose(gradient, two[name], atol=1e-5)


def test_a_tied_mistral_generates_what_its_logits_say(saved) -> None:
    """A head that works on whole sequences only, or a cache that goes past it."""
    import tensorflow as tf

    model, _ = checkpoint.load(saved("mistral", tie_word_embeddings=True, eos_token_id=None))
    ids = IDS[:1]
    for _ in range(5):
        best = model(input_ids=ids, attention_mask=np.ones_like(ids)).logits[:, -1].numpy().argmax(-1)
        ids = np.concatenate([ids, best[:, None].astype(np.int32)], axis=1)
    out = model.generate(tf.constant(IDS[:1]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    np.testing.assert_array_equal(out.numpy(), ids)


def test_an_output_matrix_that_contradicts_the_config_is_refused(saved) -> None:
    """Half of a checkpoint thrown away because the config says that two different matrices are one."""
    folder = saved("mistral", tie_word_embeddings=True)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit(folder / "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": table.copy()}))
    checkpoint.load(folder)
    edit(folder / "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": table + 1}))
    assert refused(folder).endswith("in lm_head.weight")


def test_an_untied_checkpoint_without_output_matrix_says_what_the_config_lacks(saved) -> None:
    """The same checkpoint, tied in truth, given up without a way out."""
    folder = saved("mistral", tie_word_embeddings=False)
    drop(folder, "lm_head")
    message = refused(folder)
    assert "lm_head.weight" in message
    assert "tie_word_embeddings" in message


def test_a_class_that_always_ties_refuses_an_untied_checkpoint(tokenizer, tmp_path: Path) -> None:
    """TFGPT2 ignoring an output matrix of its own, or its config telling PyTorch that there should be one."""
    from transformers import TFAutoModelForCausalLM

    model = TFAutoModelForCausalLM.from_config(tiny_config("gpt2", tie_word_embeddings=False))
    model.build_in_name_scope()
    checkpoint.save(model, tokenizer, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).get("tie_word_embeddings", True)
    head = {"lm_head.weight": np.ones((512, 32), np.float32)}
    edit(tmp_path / "model.safetensors", lambda tensors: tensors.update(head))
    assert "lm_head.weight" in refused(tmp_path)


def test_tying_a_built_model_keeps_the_bias(make_model, tokenizer, tmp_path: Path) -> None:
    """GPT-J's output bias reset, or lost from the file, because its layer was replaced."""
    from transformers import AutoConfig

    model = scatter(checkpoint.create(AutoConfig.for_model("gptj", **GPT, rotary_dim=8)))
    bias = model.lm_head.bias.numpy()
    model.config.tie_word_embeddings = True
    checkpoint.tie(model)
    checkpoint.save(model, tokenizer, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(written["lm_head.bias"], bias)
    assert "lm_head.weight" not in written


# Creating


def test_create_depends_on_the_seed_alone() -> None:
    """Two runs with one seed that begin with different weights."""
    import tf_keras

    models = []
    for seed in (3, 3, 4):
        tf_keras.utils.set_random_seed(seed)
        models.append(checkpoint.create(tiny_config("mistral", tie_word_embeddings=True)))
    assert equal(models[0], models[1])
    assert not equal(models[0], models[2])


@pytest.mark.parametrize(
    ("model_type", "fields", "words"),
    [
        ("rwkv", {}, "supported: llama"),
        ("roformer", {"is_decoder": True}, "not a causal LM in TensorFlow"),
        ("bert", {}, "is_decoder"),
        ("gpt2", {"n_embd": 30, "n_head": 4}, "no gpt2 model can have this config"),
        ("gpt2", GPT | {"tie_word_embeddings": False}, "tie_word_embeddings to true"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("opt", OPT | {"enable_bias": False}, "enable_bias"),
        ("roberta", ENCODER | {"pad_token_id": 0}, "pad_token_id=0"),
        ("mistral", MISTRAL | {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "'spiral'"),
    ],
)
def test_create_refuses_what_tensorflow_would_compute_differently(model_type: str, fields: dict, words: str) -> None:
    """A model of another architecture than its config says, or a traceback."""
    from transformers import AutoConfig

    with pytest.raises(InputError, match=words) as caught:
        checkpoint.create(AutoConfig.for_model(model_type, **fields))
    assert "\n" not in str(caught.value)


# Variables of every kind


def test_a_subclass_under_a_mixed_policy_saves_float32_and_its_architecture(tokenizer, tmp_path: Path) -> None:
    """What training makes of a model, saved as bfloat16 or under the name of no PyTorch class; a head in float32."""
    import tf_keras
    from transformers import AutoConfig

    exact = scatter(checkpoint.create(AutoConfig.for_model("gptj", **GPT, rotary_dim=8, tie_word_embeddings=True)))
    checkpoint.save(exact, tokenizer, tmp_path)
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model, _ = checkpoint.load(tmp_path)
        model.__class__ = type(type(model).__name__, (type(model),), {})
        output = model(input_ids=IDS, attention_mask=np.ones_like(IDS)).logits
        assert output.dtype.name == "bfloat16"
        np.testing.assert_allclose(output.numpy().astype(np.float32), logits(exact), atol=0.3)
        checkpoint.save(model, tokenizer, tmp_path / "mixed")
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    loaded, _ = checkpoint.load(tmp_path / "mixed")
    assert equal(loaded, exact)
    assert loaded.config.architectures == ["GPTJForCausalLM"]


def test_a_distributed_model_loads_and_saves(saved, tokenizer, tmp_path: Path) -> None:
    """Mirrored variables that cannot be assigned or read."""
    import tensorflow as tf

    folder = saved("mistral", tie_word_embeddings=True)
    exact, _ = checkpoint.load(folder)
    with tf.distribute.MirroredStrategy(["cpu:0"]).scope():
        model, _ = checkpoint.load(folder)
    assert isinstance(model.weights[0], tf.distribute.DistributedValues)
    checkpoint.save(model, tokenizer, tmp_path / "mirrored")
    loaded, _ = checkpoint.load(tmp_path / "mirrored")
    assert equal(loaded, exact)


# Generation settings


def test_generation_settings_survive_even_those_that_transformers_will_not_save(saved) -> None:
    """Settings lost with PyTorch weights, as transformers does, or a save that fails after hours of training."""
    folder = saved()
    settings = {"do_sample": False, "top_k": 7, "temperature": 0.5, "eos_token_id": [0, 5]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model, tokenizer = checkpoint.load(folder)
    checkpoint.save(model, tokenizer, folder)
    again, _ = checkpoint.load(folder)
    for name, value in settings.items():
        assert getattr(again.generation_config, name) == value


# Folders that are no checkpoint


def write(name: str, text: str) -> Callable[[Path], Any]:
    """Other content for a file."""
    return lambda folder: (folder / name).write_text(text)


def remove(*names: str) -> Callable[[Path], Any]:
    """No such files."""
    return lambda folder: [(folder / name).unlink() for name in names]


def truncate(folder: Path) -> None:
    """An interrupted download."""
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


def leave_pytorch_bin(folder: Path) -> None:
    """Weights in a pickle."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate_h5(folder: Path) -> None:
    """An interrupted download of TensorFlow's format."""
    as_format("h5", folder)
    os.truncate(folder / "tf_model.h5", (folder / "tf_model.h5").stat().st_size // 2)


def lose_a_shard(folder: Path) -> None:
    """An index that names a file which is not there."""
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def only_slow(folder: Path) -> None:
    """A tokenizer that has no fast version."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer"}')


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (remove("config.json"), "has no config.json"),
        (write("config.json", "{"), "config.json cannot be read: it is not JSON: line 1, column 2"),
        (write("config.json", "[]"), "config.json is not a JSON object"),
        (write("config.json", "{}"), "config.json has no model_type"),
        (
            write("config.json", '{"model_type": "rwkv"}'),
            "type rwkv is not a causal LM in TensorFlow; supported",
        ),
        (write("config.json", '{"model_type": "bert"}'), "a bert model is an encoder"),
        (write("generation_config.json", '{"max_new_tokens": -1}'), "generation_config.json cannot be used"),
        (remove("tokenizer.json", "vocab.json", "merges.txt"), "no tokenizer can be read"),
        (write("tokenizer.json", "{"), "tokenizer.json cannot be read: it is not JSON"),
        (write("tokenizer.json", "{}"), "no tokenizer can be read"),
        (only_slow, "CTRLTokenizer has no fast version"),
        (remove("model.safetensors"), "has no weights: expected one of model.safetensors"),
        (leave_pytorch_bin, "has only pytorch_model.bin, which needs PyTorch: convert it"),
        (truncate, "model.safetensors cannot be read"),
        (write("model.safetensors", "version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
        (truncate_h5, "tf_model.h5 cannot be read"),
        (lose_a_shard, "model-00002-of-00002.safetensors cannot be read: there is no such file"),
    ],
)
def test_a_damaged_directory_is_refused_in_one_line(spoil: Callable[[Path], Any], words: str, saved) -> None:
    """A traceback of transformers, safetensors or h5py in place of what is wrong and what would be right."""
    folder = saved()
    spoil(folder)
    message = refused(folder)
    assert words in message
    assert str(folder) in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no/such/folder", "there is no directory no/such/folder, and a Hub id looks like owner/name"),
        ("someone/something", "the Hub cannot be reached"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name: str, words: str) -> None:
    """A mistyped folder, or a machine without network, answered with a traceback of the Hub's client."""
    with pytest.raises(InputError, match=words) as caught:
        checkpoint.load(name)
    assert "\n" not in str(caught.value)
    assert "Max retries exceeded" not in str(caught.value)  # but what the network said


def test_a_file_or_a_revision_of_a_folder_is_refused(saved) -> None:
    """A revision ignored without a word."""
    folder = saved()
    with pytest.raises(InputError, match="Hub ids only"):
        checkpoint.load(folder, revision="v1")
    assert "give the directory" in refused(folder / "config.json")


# Quiet, and the Hub


def test_logging_and_warnings_are_as_before(saved) -> None:
    """A library that silences its user's own logs."""
    from transformers.utils import logging

    folder = saved()
    usual = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    filters = list(warnings.filters)
    try:
        checkpoint.load(folder)
        refused(folder / "config.json")
        assert logging.get_verbosity() == logging.INFO
        assert list(warnings.filters) == filters
    finally:
        logging.set_verbosity(usual)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A Hub that serves the folder `repo` as someone/tiny until asked for /down; its address, and what it gave."""
    commit = "0123456789" * 4
    given: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        up = True

        def log_message(self, *args: Any) -> None:
            """No log."""

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            """Only what the client needs to list and fetch files."""
            path = urllib.parse.urlsplit(self.path).path
            repo = tmp_path / "repo"
            names = sorted(file.name for file in repo.iterdir())
            if path == "/down":
                Handler.up = False
            if not Handler.up:
                return self.answer(500)
            if path == "/api/models/someone/tiny/tree/main":
                tree = [{"type": "file", "path": name, "size": 1, "oid": name} for name in names]
                return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            if path == "/api/models/someone/tiny/revision/main":
                info = {"id": "someone/tiny", "sha": commit, "siblings": [{"rfilename": name} for name in names]}
                return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            name = path.rsplit("/", 1)[1]
            if path.startswith("/someone/tiny/resolve/") and name in names:
                if self.command == "GET":
                    given.append(name)
                return self.answer(200, (repo / name).read_bytes(), ETag=f'"{name}"', X_Repo_Commit=commit)
            return self.answer(404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", given
    server.shutdown()


SCRIPT = """
import os, sys, urllib.request
import tensorflow as tf
import tfclm.checkpoint
from tfclm.errors import InputError
tf.constant(0)
print("--- from here on", file=sys.stderr, flush=True)
model, tokenizer = tfclm.checkpoint.load("someone/tiny")
print(type(model).__name__, len(tokenizer), model.config.name_or_path)
try:
    tfclm.checkpoint.load("someone/else")
except InputError as error:
    print(error)
try:
    urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/down")
except OSError:
    pass
again, _ = tfclm.checkpoint.load("someone/tiny")
print(all((a.numpy() == b.numpy()).all() for a, b in zip(model.weights, again.weights, strict=True)))
"""


def test_a_sharded_hub_model_loads_quietly_then_from_the_cache(saved, hub, tmp_path: Path) -> None:
    """Sharded safetensors, which transformers takes from folders only; needless downloads; chatter on stderr."""
    address, given = hub
    folder = saved()
    shard(folder)
    shutil.copytree(folder, tmp_path / "repo")
    for name in ("pytorch_model.bin", "flax_model.msgpack", "tf_model.h5", "picture.png"):
        (tmp_path / "repo" / name).write_bytes(b"unwanted")
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(Path(checkpoint.__file__).parents[2]),
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.stdout.splitlines() == [
        "TFGPT2LMHeadModel 512 someone/tiny",
        "there is no directory someone/else and no such model on the Hub, or it is private",
        "True",
    ], run.stderr
    assert run.stderr.split("--- from here on\n")[1] == ""
    assert sorted(given) == sorted(path.name for path in folder.iterdir())


def test_importing_the_module_imports_no_tensorflow() -> None:
    """`--help` that takes five seconds because of an import at the top."""
    code = "import sys, tfclm.checkpoint; print('tensorflow' in sys.modules, 'transformers' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(checkpoint.__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]

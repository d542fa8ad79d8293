"""Our decoders as models of transformers: found, loaded, trained, resized, generated with and saved as any other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from transformers import AutoConfig, TFAutoModelForCausalLM

from tfclm import checkpoint
from tfclm.models.families import OWN_CLASSES

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def make(model_type: str = "llama", seed: int = 0, **fields: Any) -> Any:
    """A tiny model of a type, with weights that depend on the seed."""
    tf_keras.utils.set_random_seed(seed)
    return checkpoint.create(AutoConfig.for_model(model_type, **SIZES | fields))


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path) -> Path:
    """A Llama checkpoint as PyTorch's, with its tokenizer."""
    checkpoint.save(make(tie_word_embeddings=True), tokenizer, tmp_path / "model")
    return tmp_path / "model"


PROGRAM = """
import sys
{imports}
assert "tensorflow" not in sys.modules or {early}
from transformers import TFAutoModelForCausalLM
model = TFAutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model).__name__, model(model.dummy_inputs["input_ids"]).logits.shape)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("imports", "early"),
    [
        ("import tfclm", False),
        ("from transformers import TFAutoModelForCausalLM\nimport tfclm", True),
        pytest.param("import tfclm\nfrom transformers import TFPreTrainedModel", True, marks=pytest.mark.long),
    ],
    ids=["before", "after", "base class first"],
)
def test_transformers_knows_our_classes(imports: str, early: bool, folder: Path) -> None:
    """A class that transformers finds only if it is imported before, or after, tfclm; TensorFlow imported by tfclm."""
    code = PROGRAM.format(imports=imports, early=early)
    command = [sys.executable, "-c", code, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.split()[0] == "TFLlamaForCausalLM"


@pytest.mark.parametrize("model_type", OWN_CLASSES)
def test_every_type_is_created_and_found(model_type: str) -> None:
    """A type that is documented, and whose class is missing or is transformers' own."""
    assert TFAutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(model_type))].__module__.startswith("tfclm.")


def test_transformers_loads_what_was_saved(folder: Path) -> None:
    """A weight that transformers does not find under its name in PyTorch, or loads transposed."""
    own, _ = checkpoint.load(folder)
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    theirs, info = TFAutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == info["mismatched_keys"] == []
    np.testing.assert_array_equal(theirs(ids).logits, own(ids).logits)


def test_keras_trains_it(folder: Path, tokenizer: Any) -> None:
    """A model that `prepare_tf_dataset`, `compile` or `fit` do not accept, or whose gradients do not flow."""
    from datasets import Dataset
    from transformers import AdamWeightDecay, DataCollatorForLanguageModeling

    model = TFAutoModelForCausalLM.from_pretrained(folder)
    rows = Dataset.from_dict({"input_ids": [list(range(n, n + 16)) for n in range(8)]})
    tokenizer.pad_token = tokenizer.eos_token
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False, return_tensors="tf")
    data = model.prepare_tf_dataset(rows, shuffle=False, batch_size=4, collate_fn=collator)
    model.compile(optimizer=AdamWeightDecay(learning_rate=1e-2))
    losses = model.fit(data, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision(policy: str) -> None:
    """A mask that overflows in half precision, or a sum of two types."""
    exact = make("gemma3_text", sliding_window=4, head_dim=8, num_hidden_layers=6)
    ids = np.arange(12, dtype=np.int32).reshape(1, 12)
    tf_keras.mixed_precision.set_global_policy(policy)
    try:
        half = make("gemma3_text", sliding_window=4, head_dim=8, num_hidden_layers=6)
        logits = half(ids, attention_mask=np.array([[0] * 3 + [1] * 9])).logits.numpy()
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    assert logits.dtype == np.float32
    expected = exact(ids, attention_mask=np.array([[0] * 3 + [1] * 9])).logits.numpy()
    np.testing.assert_allclose(logits[:, 3:], expected[:, 3:], atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [520, 500])
def test_resized_embeddings(tied: bool, size: int, tokenizer: Any, tmp_path: Path) -> None:
    """Rows lost, an output matrix that keeps its old size, or a model that can no longer be saved or trained."""
    model = make(tie_word_embeddings=tied)
    ids = np.arange(6, dtype=np.int32)[None]
    before = model(ids).logits.numpy()
    model.resize_token_embeddings(size)
    after = model(ids, labels=ids)
    assert after.logits.shape[-1] == model.config.vocab_size == size
    common = min(size, 512)
    np.testing.assert_allclose(after.logits[..., :common], before[..., :common], atol=1e-6)
    assert len(model.trainable_variables) == len(make(tie_word_embeddings=tied).trainable_variables)
    checkpoint.save(model, tokenizer, tmp_path)
    if size > 512:
        loaded, _ = checkpoint.load(tmp_path)
        np.testing.assert_array_equal(loaded(ids).logits, after.logits)


def test_initial_weights_differ_by_layer() -> None:
    """One initializer for all layers, which gives them the same values."""
    first, second = make().model.layers
    assert not np.array_equal(first.mlp.up_proj.kernel, second.mlp.up_proj.kernel)
    assert not np.array_equal(first.mlp.up_proj.kernel, first.mlp.gate_proj.kernel)


def test_a_layer_can_be_frozen() -> None:
    """Layers that Keras does not see as such, so that `trainable` has no effect."""
    model = make()
    count = len(model.trainable_variables)
    model.model.layers[0].trainable = False
    assert len(model.trainable_variables) == count - 9


def test_dropout_is_applied_in_training_alone() -> None:
    """A rate of the config that training ignores, or that an evaluation applies."""
    model = make("phi", resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5)
    ids = np.arange(6, dtype=np.int32)[None]
    np.testing.assert_array_equal(model(ids).logits, model(ids).logits)
    assert np.abs(model(ids, training=True).logits - model(ids, training=True).logits).max() > 1e-3
    exact = make("phi", resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0)
    np.testing.assert_array_equal(model(ids).logits, exact(ids).logits)


def test_outputs_of_layers() -> None:
    """Hidden states or attentions of the wrong layer, or none."""
    model = make("gpt_neox", hidden_size=32)
    ids = np.arange(6, dtype=np.int32)[None]
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3
    assert [each.shape for each in out.attentions] == [(1, 4, 6, 6)] * 2
    np.testing.assert_allclose(tf.reduce_sum(out.attentions[0], -1), np.ones([1, 4, 6]), atol=1e-5)
    np.testing.assert_array_equal(model.head(out.hidden_states[-1]), out.logits)


def test_generate_with_padding_equals_each_prompt_alone() -> None:
    """Positions that count the padding of shorter prompts."""
    model = make("qwen3", head_dim=16)
    model.set_weights([5 * weight for weight in model.get_weights()])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompts = [[5, 6, 7, 8, 9], [11, 12]]
    padded = tf.constant([[0] * (5 - len(prompt)) + prompt for prompt in prompts])
    mask = tf.constant([[0] * (5 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    together = model.generate(padded, attention_mask=mask, **options).numpy()[:, 5:]
    for row, prompt in enumerate(prompts):
        alone = model.generate(tf.constant([prompt]), **options).numpy()[0, len(prompt) :]
        assert together[row].tolist() == alone.tolist()

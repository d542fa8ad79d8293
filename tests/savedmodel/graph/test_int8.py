"""The products with int8 weights, held against integers, and the networks and versions that are made of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from transformers import AutoTokenizer, MistralConfig

from tfclm.checkpoint import create
from tfclm.savedmodel import saving
from tfclm.savedmodel.graph import int8
from tfclm.savedmodel.graph.network import Network
from tfclm.savedmodel.graph.signatures import GenerationModule
from tfclm.savedmodel.publishing import canary
from tfclm.savedmodel.settings import ServableSettings
from tfclm.server.session import Session

Array = np.ndarray[Any, Any]


def make_matrix(outputs: int, inputs: int) -> int8.Matrix:
    """A quantized matrix of random weights."""
    weights = np.random.default_rng(0).normal(0, 0.02, [inputs, outputs]).astype(np.float32)
    return int8.Matrix(*map(tf.constant, int8.quantize(weights)))


def make_product(matrix: int8.Matrix, *, small_batch: bool) -> Callable[[Array], Array]:
    """The product of rows and a matrix, in a graph of its own."""
    spec = tf.TensorSpec([None, matrix.values.shape[0]])
    traced = tf.function(lambda rows: int8.product(rows, matrix, small_batch=small_batch), input_signature=[spec])
    return lambda rows: traced(tf.constant(rows, tf.float32)).numpy()


def reference(rows: Array, matrix: int8.Matrix) -> Array:
    """The product in exact arithmetic: the rows rounded to 14 bits, the weights as they are stored."""
    largest = np.abs(rows).max(1, keepdims=True)
    values = matrix.values.numpy().astype(np.float64)
    rounded = np.rint(rows.astype(np.float64) / largest * 63 * 128)
    return rounded @ values * matrix.scale.numpy() * largest / 63 / 128


KERNELS = pytest.mark.parametrize("small_batch", [True, False])


@KERNELS
@pytest.mark.parametrize(("outputs", "inputs"), [(300, 768), (48, 51)])
def test_product_is_that_of_the_rounded_numbers(outputs: int, inputs: int, small_batch: bool) -> None:
    """Another scale per output or row, a zero point that is left in, or a last column that is dropped."""
    matrix = make_matrix(outputs, inputs)
    rows = np.random.default_rng(1).normal(0, 1, [20, inputs]).astype(np.float32) * np.logspace(-9, 9, 20)[:, None]
    rows = rows.astype(np.float32)
    given = make_product(matrix, small_batch=small_batch)(rows)
    exact = rows @ (matrix.values.numpy() * matrix.scale.numpy())
    # A value in the middle of two integers may be rounded to either.
    for expected, tolerance in ((reference(rows, matrix), 1e-4), (exact, 5e-4)):
        largest = np.abs(expected).max(1, keepdims=True)
        np.testing.assert_allclose(given / largest, expected / largest, rtol=0, atol=tolerance)


@KERNELS
@pytest.mark.parametrize("rows", [1, 2, 8, 33])
def test_sums_do_not_saturate(rows: int, small_batch: bool) -> None:
    """Sums of 16 bits in a processor's instructions that are cut off where weights and inputs are all large."""
    weights = np.ones([256, 16], np.float32)
    weights[:, 1::2] = -1
    matrix = int8.Matrix(*map(tf.constant, int8.quantize(weights)))
    for sign in (1, -1):
        given = make_product(matrix, small_batch=small_batch)(np.full([rows, 256], sign))
        np.testing.assert_allclose(given, np.broadcast_to(sign * weights.sum(0), [rows, 16]), rtol=1e-5)


@KERNELS
@pytest.mark.parametrize(("outputs", "inputs"), [(2304, 768), (48, 51)])
def test_a_row_depends_on_itself_alone(outputs: int, inputs: int, small_batch: bool) -> None:
    """A scale of the whole batch, or kernels for several rows that add floating-point numbers in another order."""
    matrix = make_matrix(outputs, inputs)
    rows = np.random.default_rng(1).normal(0, 1, [65, inputs]).astype(np.float32)
    rows *= np.geomspace(1e-6, 1e6, 65, dtype=np.float32)[:, None]
    product = make_product(matrix, small_batch=small_batch)
    together = product(rows)
    for count in (1, 2, 3, 5, 8, 17, 64):
        for start in (0, 7, 65 - count):
            chosen = slice(start, start + count)
            assert (product(rows[chosen]) == together[chosen]).all()


@KERNELS
def test_rows_of_zeros_and_of_nan(small_batch: bool) -> None:
    """A division by zero, or a diverged model whose perplexity is a number."""
    given = make_product(make_matrix(3, 4), small_batch=small_batch)(np.array([[0.0] * 4, [np.nan] * 4]))
    assert (given[0] == 0).all()
    assert np.isnan(given[1]).all()


def make_mistral() -> Any:
    """A model with an output matrix of its own, whose layers q, k, v and gate, up are joined."""
    config = MistralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    return create(config)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "mistral"])
def test_networks(make_model: Any, architecture: str) -> None:
    """Layers that are joined in another order than split, a bias or table that is left out, or weights as float32."""
    model = make_mistral() if architecture == "mistral" else make_model(architecture, context=32, layers=2)
    # Initial biases are zero.
    rng = np.random.default_rng(0)
    model.set_weights([weight + rng.normal(0, 0.05, weight.shape) for weight in model.get_weights()])
    network = Network(model, "int8")
    ids = tf.constant(rng.integers(2, 300, [2, 20]), tf.int32)
    expected = model(ids).logits.numpy()
    np.testing.assert_allclose(network.model(ids).logits, expected, rtol=0, atol=0.03 * np.ptp(expected))
    stored = [variable for variable in network.variables if variable.dtype == tf.int8]
    assert len({id(variable) for variable in network.variables}) == len(network.variables)
    matrices = sum(int(tf.size(weight)) for weight in model.weights if weight.shape.rank == 2 and 1 not in weight.shape)
    assert sum(int(tf.size(variable)) for variable in stored) == matrices
    assert all(variable.shape.rank == 1 for variable in network.variables if variable.dtype != tf.int8)


@pytest.mark.slow
def test_version(make_model: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Weights that are stored as float32 or twice, tokens of another model, or a row that its neighbours change."""
    model = make_model("gpt2", context=32)
    model.set_weights([5 * weight for weight in model.get_weights()])
    settings = ServableSettings(weights="int8", max_new_tokens_limit=6, temperature=0.0)
    module = GenerationModule(model, AutoTokenizer.from_pretrained(tokenizer_dir), settings)
    saving.write(module, tmp_path)
    weights = sum(int(tf.size(weight)) for weight in model.weights)
    assert sum(path.stat().st_size for path in tmp_path.glob("variables/*.data*")) < 0.5 * 4 * weights
    prompts = canary.make_prompts(module.network.model, 512, 32, [0], 6, module.network.rounding)
    canary.validate(tmp_path, prompts, xla=False)
    # In a session, as servers run it.
    texts = np.array([b"The first text", b"of"], object)
    expected = module.signatures()["serving_default"](prompt=tf.constant(texts))["generated_text"].numpy().tolist()
    session = Session(tmp_path, ["serve"], 0, 0)
    signature = session.signatures["serving_default"]
    names = signature.inputs["prompt"].name, signature.outputs["generated_text"].name
    (given,) = session.step({names[0]: texts}, [names[1]])(0, 0)
    assert given.tolist() == expected
    session.close()
    # A build without the op: its name is replaced by one of the same length.
    file = tmp_path / "saved_model.pb"
    file.write_bytes(file.read_bytes().replace(int8.OPS[0].encode(), b"_QuantizedMatMux"))
    message = "cannot be served: this build of TensorFlow lacks the op _QuantizedMatMux"
    with pytest.raises(canary.CanaryFailed, match=re.escape(message)):
        canary.validate(tmp_path, prompts, xla=False)

"""What the training of a decoder keeps in memory from the forward pass, and its gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from transformers import LlamaConfig

from tfclm import checkpoint
from tfclm.models.decoder import activation, layer_norm, rms_norm
from tfclm.models.gradients import recomputed

ROWS, LENGTH, HIDDEN, INNER, LAYERS = 2, 5, 8, 28, 3
# These hold no tensor of their own, but weights or another tensor's values.
SHARED = {"ReadVariableOp", "Reshape", "Identity", "IdentityN", "ExpandDims", "Squeeze"}


def kept_shapes(compute: Callable[[], Any], variables: Callable[[], Any]) -> Counter[tuple[int | None, ...]]:
    """How many tensors of each shape the gradient's operations read that the forward pass has computed."""
    kept = set()

    @tf.function(autograph=False)
    def step() -> Any:
        graph = tf.compat.v1.get_default_graph()
        with tf.GradientTape() as tape:
            loss = compute()
        forward = set(graph.get_operations())
        gradients = [tf.convert_to_tensor(each) for each in tape.gradient(loss, variables())]

        def own(tensor: Any) -> Any:
            while tensor.op.type in SHARED and tensor.op.inputs:
                tensor = tensor.op.inputs[tensor.value_index]
            return tensor

        for operation in set(graph.get_operations()) - forward:
            sources = [own(tensor) for tensor in operation.inputs if tensor.op in forward or own(tensor).op in forward]
            kept.update(each.ref() for each in sources if each.op in forward and each.op.type not in ("Const", "Shape"))
        return gradients

    step.get_concrete_function()
    return Counter(tuple(each.deref().shape) for each in kept if each.deref().dtype != tf.resource)


def test_layers_keep_the_inputs_of_their_products() -> None:
    """Normalized values before their weight kept too, or activations; the table of embeddings copied for each use."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = checkpoint.create(config)
    ids = np.arange(ROWS * LENGTH, dtype=np.int32).reshape([ROWS, LENGTH])
    kept = kept_shapes(lambda: model(ids, labels=ids, training=True).loss, lambda: model.trainable_variables)
    # The gate, the other branch, and what the last product reads.
    assert kept[ROWS, LENGTH, INNER] + kept[ROWS * LENGTH, INNER] == 3 * LAYERS, kept
    # Two residuals, two norms and the attention of each layer; a residual and a norm before the head.
    assert kept[ROWS, LENGTH, HIDDEN] + kept[ROWS * LENGTH, HIDDEN] <= 5 * LAYERS + 2, kept
    # Gathering from a variable makes TensorFlow copy it at each later reading.
    step = tf.function(lambda: model(ids, training=True).logits).get_concrete_function()
    assert "ResourceGather" not in {node.op for node in step.graph.as_graph_def().node}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["rms", "rms_plus_one", "layer", "silu", "gelu_new", "relu2"])
def test_values_and_gradients_are_those_of_the_plain_formula(name: str, dtype: str) -> None:
    """A gradient for the wrong input, or one that leaves out the rounding of mixed precision."""
    rng = np.random.default_rng(0)
    x, weight, bias, up, upstream = (
        tf.cast(rng.normal(size=shape), dtype) for shape in ([4, 6], [6], [6], [4, 6], [4, 6])
    )
    norms: dict[str, Any] = {
        "rms": (lambda x, weight: rms_norm(x, weight, 1e-5), [x, weight]),
        "rms_plus_one": (lambda x, weight: rms_norm(x, weight, 1e-5, plus_one=True), [x, weight]),
        "layer": (lambda x, weight, bias: layer_norm(x, weight, bias, 1e-5), [x, weight, bias]),
    }
    function, inputs = norms.get(name) or (lambda x, up: activation(name)(x) * up, [x, up])

    def differentiate(function: Callable[..., Any]) -> list[Any]:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            output = function(*inputs)
        return [output, *tape.gradient(output, inputs, output_gradients=upstream)]

    plain = differentiate(function)
    for expected, found in zip(plain, differentiate(recomputed(function)), strict=True):
        np.testing.assert_array_equal(found, expected)
    traced = tf.function(lambda: differentiate(recomputed(function)), autograph=False)
    if dtype == "float32":  # in a graph, TensorFlow leaves out some of the rounding to bfloat16
        for expected, found in zip(plain, traced(), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)

"""The architectures that can be exported, called through `Network` as the engine does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from transformers import (
    BertConfig,
    CamembertConfig,
    CTRLConfig,
    GPTJConfig,
    MistralConfig,
    OpenAIGPTConfig,
    OPTConfig,
    Phi3Config,
    RemBertConfig,
    RobertaPreLayerNormConfig,
    RoFormerConfig,
    TFAutoModelForCausalLM,
    XGLMConfig,
)

from tfclm.checkpoint import context_size, create
from tfclm.errors import InputError
from tfclm.savedmodel.graph.engine import Completions, Engine, EngineLimits
from tfclm.savedmodel.graph.network import Network
from tfclm.savedmodel.graph.sampling import SamplingParams

VOCABULARY = {"vocab_size": 300}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | VOCABULARY
BERT: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": 64, "is_decoder": True, "pad_token_id": 1},
} | VOCABULARY
CONFIGS: dict[str, Any] = {
    "gptj": lambda: GPTJConfig(rotary_dim=4, **GPT),
    # transformers' class has no cache.
    "openai-gpt": lambda: OpenAIGPTConfig(**GPT),
    "ctrl": lambda: CTRLConfig(dff=64, **GPT),
    "xglm": lambda: XGLMConfig(
        d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, max_position_embeddings=64, **VOCABULARY
    ),
    # Its embeddings have another size than its layers.
    "opt": lambda: OPTConfig(
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        **VOCABULARY,
    ),
    "bert": lambda: BertConfig(**BERT),
    "rembert": lambda: RemBertConfig(input_embedding_size=16, output_embedding_size=16, **BERT),
    "camembert": lambda: CamembertConfig(**BERT),
    "roberta-prelayernorm": lambda: RobertaPreLayerNormConfig(**BERT),
}


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "dtype"), [*((each, "float32") for each in CONFIGS), ("xglm", "bfloat16")])
def test_cached_logits_are_the_models_own(architecture: str, dtype: str) -> None:
    """A layer that uses its kernel, its past or its positions in an unsupported way; `Network` compares the logits."""
    network = Network(create(CONFIGS[architecture]()), dtype, transposed=dtype != "float32")
    stored = {variable.dtype for variable in network.variables}
    assert stored == {tf.float32, tf.as_dtype(dtype)}


def test_the_context_excludes_reserved_positions() -> None:
    """A prompt as long as max_position_embeddings, which reads beyond RoBERTa's table of positions."""
    model = create(RobertaPreLayerNormConfig(**BERT | {"max_position_embeddings": 24}))
    network = Network(model)
    assert network.context == context_size(model) == 22
    ids = tf.random.stateless_uniform([1, 22], [0, 1], 2, 300, tf.int32)
    weights = network.weights()
    zero, count, lengths = map(tf.constant, (0, 21, [22]))
    _, buffers = network.extend(ids, zero, count, lengths, network.buffers(1, 22), weights)
    logits, _ = network.step(ids[:, 21], tf.constant([21]), buffers, weights)
    np.testing.assert_allclose(logits, model(ids).logits[:, -1], atol=1e-4)
    with pytest.raises(tf.errors.InvalidArgumentError):
        model(tf.concat([ids, ids[:, :1]], 1))


def test_padding_ids_within_a_text_are_not_counted() -> None:
    """A score of a text with <pad> in it that differs from its perplexity."""
    model = create(RobertaPreLayerNormConfig(**BERT))
    network = Network(model)
    ids = np.array([[5, 1, 1, 7, 8, 1], [9, 8, 7, 6, 5, 4]], np.int32)
    weights = network.weights()
    zero, six = tf.constant(0), tf.constant(6)
    hidden, _ = network.extend(tf.constant(ids), zero, six, tf.constant([6, 6]), network.buffers(2, 6), weights)
    np.testing.assert_allclose(network.logits(hidden, weights, small_batch=False), model(ids).logits, atol=1e-4)
    # With a cache, the next token's position is the text's length.
    cached = model(ids[:, :5], use_cache=True).past_key_values
    own = model(ids[:, 5:], past_key_values=cached).logits[:, 0]
    lengths, buffers = tf.constant([5, 5]), network.buffers(2, 7)
    for start, count in ((0, 2), (2, 3)):
        rows, start, count = tf.constant(ids[:, :5]), tf.constant(start), tf.constant(count)
        _, buffers = network.extend(rows, start, count, lengths, buffers, weights)
    after, _ = network.step(tf.constant(ids[:, 5]), lengths, buffers, weights)
    np.testing.assert_allclose(after, own, atol=1e-4)


# RemBERT's table of positions is BERT's, and CamemBERT's that of RoBERTa.
@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=pytest.mark.long) if name in ("rembert", "camembert") else name for name in CONFIGS],
)
def test_rows_of_any_length_reach_the_end_of_the_context(architecture: str) -> None:
    """A table that is shorter than the cache, so that a row at the end of the context fails, and its batch with it."""
    tf_keras.utils.set_random_seed(0)
    config = CONFIGS[architecture]()
    config.num_hidden_layers = 1  # of equal tables; a second layer takes as long again
    model = create(config)
    network = Network(model, transposed=True)  # as for XLA; the tests above use the other layout
    context = network.context
    ids = tf.random.stateless_uniform([2, context - 3], [0, 2], 2, 300, tf.int32)
    lengths = tf.constant([context - 3, 5])

    engine = Engine(network, EngineLimits(2, 20, 2 * context), eos_ids=[], pad_id=0)

    def traced(ids: tf.Tensor, lengths: tf.Tensor) -> Completions:
        ones, no = tf.ones([2]), tf.zeros([2], tf.int32)
        params = SamplingParams(tf.constant([9, 20]), 0 * ones, no, ones, ones, tf.zeros([2], tf.int64))
        return engine.complete(ids, lengths, params)

    specs = [tf.TensorSpec([2, None], tf.int32), tf.TensorSpec([2], tf.int32)]
    decoded = tf.function(traced, autograph=False, input_signature=specs)(ids, lengths)
    assert decoded.count.numpy().tolist() == [3, 20]
    for row, (length, count) in enumerate([(context - 3, 3), (5, 20)]):
        whole = tf.concat([ids[row, :length], decoded.output_ids[row, :count]], 0)
        logits = model(whole[None], training=False).logits[0, length - 1 : -1].numpy()
        given = np.take_along_axis(logits, whole.numpy()[length:, None], 1)[:, 0]
        # Each is the likeliest token, up to rounding.
        np.testing.assert_allclose(given, logits.max(-1), atol=1e-4)


def test_a_type_that_is_not_a_decoder_is_refused() -> None:
    """An export of a model whose computation is not known."""
    model = TFAutoModelForCausalLM.from_config(RoFormerConfig(**BERT | {"num_hidden_layers": 1}))
    with pytest.raises(InputError, match="a model of type roformer cannot be exported"):
        Network(model)


def test_logits_that_differ_are_refused(make_model) -> None:
    """A model whose class computes something else than its config says."""
    model = make_model("gpt2", layers=2)
    model.transformer.h[1].mlp.act = tf.nn.relu
    with pytest.raises(InputError, match="after 8 tokens, the logits of the exported decoder differ"):
        Network(model)


@pytest.mark.parametrize("kind", ["window", "rope"])
def test_long_texts_are_checked(kind: str) -> None:
    """A window or rope that differs only in texts that are longer than those which are usually compared."""
    sizes: dict[str, Any] = {"num_key_value_heads": 2, "sliding_window": None} | BERT | {"is_decoder": False}
    factors = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    longrope = {"rope_scaling": factors, "original_max_position_embeddings": 30}
    config = {
        "window": lambda: MistralConfig(**sizes),
        "rope": lambda: Phi3Config(**sizes | longrope),
    }[kind]()
    model = create(config)
    model.set_weights([5 * weight for weight in model.get_weights()])
    Network(model)
    if kind == "window":
        model.config.sliding_window = 20  # but the model computes without it
    else:
        model.config.rope_scaling = factors | {"long_factor": [1.0] * 4}
    length = {"window": 22, "rope": 32}[kind]
    with pytest.raises(InputError, match=f"after {length} tokens"):
        Network(model)

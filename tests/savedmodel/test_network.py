"""Every architecture that can be exported, through the network that the decoding loop calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from transformers import (
    BertConfig,
    CamembertConfig,
    CTRLConfig,
    GPTJConfig,
    OpenAIGPTConfig,
    OPTConfig,
    RemBertConfig,
    RobertaPreLayerNormConfig,
    XGLMConfig,
)

from tfclm.checkpoint import context_size, create
from tfclm.errors import InputError
from tfclm.savedmodel.network import Network

VOCABULARY = {"vocab_size": 300}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | VOCABULARY
BERT: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": 64, "is_decoder": True, "pad_token_id": 1},
} | VOCABULARY
CONFIGS: dict[str, Any] = {
    "gptj": lambda: GPTJConfig(rotary_dim=4, **GPT),
    "ctrl": lambda: CTRLConfig(dff=64, **GPT),
    "xglm": lambda: XGLMConfig(
        d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, max_position_embeddings=64, **VOCABULARY
    ),
    # Embeddings of another size than the layers.
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
    """A layer that takes its kernel, its past or its positions in a way of its own: making the network compares."""
    kept = {variable.dtype for variable in Network(create(CONFIGS[architecture]()), dtype).variables}
    assert kept == {tf.float32, tf.as_dtype(dtype)}


def test_the_context_begins_behind_the_padding() -> None:
    """Prompts that fit by the config and read positions beyond RoBERTa's table, whatever its padding id is."""
    for padding in (1, 0):
        model = create(RobertaPreLayerNormConfig(**BERT | {"pad_token_id": padding, "max_position_embeddings": 24}))
        network = Network(model)
        assert network.context == context_size(model) == 22
        ids = tf.random.stateless_uniform([1, 22], [0, 1], 2, 300, tf.int32)
        logits, _ = network.prefill(ids, tf.constant([22]), 22, network.weights())
        np.testing.assert_allclose(logits, model(ids).logits[:, -1], atol=1e-4)
        with pytest.raises(tf.errors.InvalidArgumentError):
            model(tf.concat([ids, ids[:, :1]], 1))


def test_a_model_without_a_cache_is_refused() -> None:
    """An export whose every step would read the whole text again."""
    with pytest.raises(InputError, match="has no cache and cannot be exported"):
        Network(create(OpenAIGPTConfig(**GPT)))

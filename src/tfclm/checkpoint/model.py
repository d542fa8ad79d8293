"""Builds a model from its config, with the errors of TensorFlow's classes corrected and embeddings tied."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from tfclm.checkpoint.configs import check_type, from_fields
from tfclm.checkpoint.weights import HEADS, layout
from tfclm.errors import InputError, first_line
from tfclm.models.families import OWN_CLASSES, spec_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, TFPreTrainedModel


def build(where: str, config: PretrainedConfig) -> TFPreTrainedModel:
    """Builds a model with all its variables.

    Args:
        where: the checkpoint's name, for messages.
        config: its config; the model gets a copy whose `tie_word_embeddings` says what the model does.

    Raises:
        InputError: the model type is not supported, or its sizes do not fit together.
    """
    from transformers import TFAutoModelForCausalLM

    from tfclm.models.registration import register

    register()
    check_type(where, config.model_type, bool(getattr(config, "is_decoder", False)))
    config = from_fields(where, config.to_dict())
    try:
        model = TFAutoModelForCausalLM.from_config(config)
        tie(model)
        _fix_openai_gpt_activation(model)
        model.build_in_name_scope()
    except Exception as error:  # layers raise errors of many types for sizes that do not fit
        raise InputError(f"{where}: no {config.model_type} model can have this config: {first_line(error)}") from error
    model.config.tie_word_embeddings = is_tied(model)
    return model


def tie(model: TFPreTrainedModel) -> None:
    """Ties the output matrix to the input embeddings, in place, if the config says `tie_word_embeddings`.

    For classes that ignore the setting and have a separate `lm_head` (XGLM, GPT-J): afterwards there is one
    variable, [vocab_size, hidden], which gets the gradients of both uses. The values of `lm_head` are dropped, its bias
    is kept. Other models stay as they are. Call this before you build an optimizer.

    Example:
        >>> model = TFXGLMForCausalLM(XGLMConfig(tie_word_embeddings=True))
        >>> tie(model)
    """
    import tensorflow as tf
    import tf_keras

    old = getattr(model, "lm_head", None)
    if not (model.config.tie_word_embeddings and isinstance(old, tf_keras.layers.Dense)):
        return
    stem = getattr(model, model.base_model_prefix)
    embedding = stem.embed_tokens if hasattr(stem, "embed_tokens") else stem.wte
    model.lm_head = new = _tied_head()(embedding, use_bias=old.use_bias, name=old.name)
    if old.built:
        with tf.name_scope(f"{model.name}/{new.name}"):
            new.build(None)
        if old.use_bias:
            new.bias.assign(old.bias)


def _fix_openai_gpt_activation(model: TFPreTrainedModel) -> None:
    """Sets the activation that `afn` names: TensorFlow's OpenAI-GPT always uses the exact GELU."""
    from tfclm.compat import get_tf_activation

    if model.config.model_type == "openai-gpt":
        names = {"gelu": "gelu_new", "relu": "relu", "silu": "silu", "swish": "swish"}
        for block in model.transformer.h:
            block.mlp.act = get_tf_activation(names[model.config.afn])


def first_position(model: TFPreTrainedModel) -> int:
    """The position id of the first token: 0, or 2 for RoBERTa and models like it, which start after the padding's."""
    embeddings = getattr(getattr(model, model.base_model_prefix, None), "embeddings", None)
    return int(getattr(embeddings, "padding_idx", -1)) + 1


def context_size(model: TFPreTrainedModel) -> int | None:
    """The model's context length in tokens; None if the architecture has no limit.

    Example:
        >>> context_size(tfclm.load("distilgpt2")[0])
        1024
    """
    if getattr(model.config, "model_type", None) in OWN_CLASSES:
        return spec_of(model.config).context
    positions = getattr(model.config, "max_position_embeddings", None)
    return positions - first_position(model) if positions else None


def is_tied(model: TFPreTrainedModel) -> bool:
    """Whether the model has one matrix for input and output, whatever its config says."""
    return not any(name in HEADS for _, name, _ in layout(model))


@functools.cache
def _tied_head() -> Any:
    """The class of a tied output layer; defined on first use, so that importing this module imports no TensorFlow."""
    import tensorflow as tf
    import tf_keras

    class TiedHead(tf_keras.layers.Layer):
        """Computes logits with the transposed embeddings: [..., hidden] -> [..., vocab_size]."""

        def __init__(self, embedding: Any, use_bias: bool, **options: Any) -> None:
            super().__init__(**options)
            self.embedding = embedding
            self.use_bias = use_bias

        def build(self, input_shape: Any) -> None:
            if self.use_bias:
                size = getattr(self.embedding, "vocab_size", None) or self.embedding.input_dim
                self.bias = self.add_weight(name="bias", shape=(size,), initializer="zeros")
            super().build(input_shape)

        def call(self, hidden: Any) -> Any:
            table = self.embedding.weight if hasattr(self.embedding, "weight") else self.embedding.embeddings
            # As a matrix product: the gradient of a batched one would hold a matrix per row.
            flat = tf.matmul(tf.reshape(hidden, (-1, hidden.shape[-1])), table, transpose_b=True)
            if self.use_bias:
                flat = flat + self.bias
            logits = tf.reshape(flat, tf.concat([tf.shape(hidden)[:-1], tf.shape(flat)[-1:]], axis=0))
            return tf.ensure_shape(logits, hidden.shape[:-1] + table.shape[:1])

    return TiedHead

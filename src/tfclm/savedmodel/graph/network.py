"""A causal language model as the decoding loop calls it: first the prompts, then one token per row and step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras
from transformers import TFAutoModelForCausalLM

from tfclm import checkpoint
from tfclm.compat import TFConv1D, get_tf_activation, xla_optimization_barrier
from tfclm.errors import InputError
from tfclm.savedmodel.graph import key_value_cache
from tfclm.savedmodel.graph.products import Kernel, product

__all__ = ["Network", "Weights"]

Tensor = Any


class Weights(NamedTuple):
    """Weights that are read once per call, in the type that they are stored in; None where the model reads them."""

    embedding: Tensor | None  # [V, D], or [D, V] if the head shares it
    head: Tensor | None  # [D, V], or [V, D] if matrices are transposed
    layers: list[Tensor]  # of the stem's layers; dense kernels as [in, out], or [out, in] if transposed


class Network:
    """A causal LM of transformers, called with prompts padded on the right and a cache that is written in place.

    Each row has its own length; the causal mask hides the padding after it. With a `dtype` smaller than float32, the
    embeddings, dense layers and head are stored in it and cast where they are used; `model` is then a copy with
    rounded weights. With `transposed`, matrices are stored as [out, in], which is faster when compiled by XLA.
    `autograph` tells whether functions that call the network must be traced with AutoGraph.

    Raises:
        InputError: the model has no cache, or its logits with the cache differ from those without.
    """

    def __init__(self, model: Any, dtype: str = "float32", *, transposed: bool = False) -> None:
        self.dtype = tf.as_dtype(dtype)
        self._transposed = transposed
        self.model = model if dtype == "float32" else _copy(model)
        self.vocab_size: int = model.config.vocab_size
        self.context: int = checkpoint.context_size(model) or 2048
        self._stem = getattr(self.model, model.base_model_prefix)
        accepted = inspect.signature(self._stem.call).parameters
        if "past_key_values" not in accepted or not getattr(model.config, "use_cache", True):
            raise InputError(f"a model of type {model.config.model_type} has no cache and cannot be exported")
        self._takes_positions = "position_ids" in accepted
        self._first_position = checkpoint.first_position(model)
        # TensorFlow's Mistral has no get_input_embeddings.
        embedding = _matrix(getattr(self._stem, "embed_tokens", None) or self.model.get_input_embeddings())
        self._stored: dict[int, Any] = {}  # by the id of the float32 variable that each replaces
        head = _head(self.model, embedding)
        # Tied embeddings and head share one matrix, in the head's layout.
        self._embedding_transposed = head.matrix is embedding and not transposed
        if head.matrix is not None:
            head = head._replace(matrix=self._store(head.matrix, transpose=head.transposed != transposed))
        self._head = head
        self._embedding = head.matrix if self._embedding_transposed else self._store(embedding)
        self._attributes = list(_variable_attributes(self._stem, embedding))
        self._layers = [
            self._store(layer[name], transpose=transposed) if dense else layer[name]
            for layer, name, dense in self._attributes
        ]
        self._functions = list(_replacement_functions(self._stem))
        self.autograph = False
        # The model looks its embeddings up itself if it does more than that, such as scaling them.
        self._looks_up_embeddings = True
        if not self._matches_uncached():
            self._looks_up_embeddings = False
            if not self._matches_uncached():
                raise InputError(
                    f"a model of type {model.config.model_type} cannot be exported: its logits with a cache differ "
                    "from those without"
                )

    @property
    def variables(self) -> list[Any]:
        """All variables that the graph reads."""
        # A model that looks its embeddings up itself reads its own variable.
        unread = {
            key for key, stored in self._stored.items() if self._looks_up_embeddings or stored is not self._embedding
        }
        return [weight for weight in self.model.weights if id(weight) not in unread] + list(self._stored.values())

    def weights(self) -> Weights:
        """The weights, read once: inside a loop, each read of a variable that is gathered from copies it."""
        return Weights(
            embedding=self._embedding.read_value() if self._looks_up_embeddings else None,
            head=None if self._head.matrix is None else self._head.matrix.read_value(),
            layers=[variable.read_value() for variable in self._layers],
        )

    def logits(self, hidden: Tensor, weights: Weights, *, small_batch: bool, xla: bool = False) -> Tensor:
        """Logits float32 [..., V] of hidden states [..., D].

        `small_batch`: the hidden states are a few rows. `xla`: XLA compiles the call.
        """
        if weights.head is None:
            return tf.cast(_apply_head(self._head.layer, hidden), tf.float32)
        rows = tf.reshape(hidden, [-1, hidden.shape[-1]])
        logits = product(rows, weights.head, transposed=self._transposed, small_batch=small_batch, compiled=xla)
        if self._head.bias is not None:
            logits += self._head.bias
        if xla:
            # Without the barrier, XLA may choose a layout of the logits that swaps the product's operands back.
            (logits,) = xla_optimization_barrier(input=[tf.reshape(logits, [-1])])
        result = tf.reshape(logits, tf.concat([tf.shape(hidden)[:-1], [self.vocab_size]], 0))
        result.set_shape([*hidden.shape[:-1], self.vocab_size])
        return tf.cast(result, tf.float32)

    def hidden(self, ids: Tensor, weights: Weights) -> Any:
        """The stem's output for ids int32 [B, L]: last_hidden_state [B, L, D], and past_key_values for the cache."""
        positions = tf.range(tf.shape(ids)[1])[None]
        if self._first_position:
            # RoBERTa and models like it do not count padding ids, wherever they are.
            positions = tf.cumsum(tf.cast(ids != self._first_position - 1, tf.int32), 1) - 1
        return self._call(ids, weights, use_cache=True, **self._position_ids(ids, positions))

    def prefill(
        self, ids: Tensor, lengths: Tensor, capacity: Tensor, weights: Weights, *, xla: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits float32 [B, V] after prompts `ids` int32 [B, L] of `lengths` [B], and the cache's buffers.

        `xla`: XLA compiles the call.
        """
        out = self.hidden(ids, weights)
        last = tf.gather(out.last_hidden_state, lengths - 1, batch_dims=1)
        pairs = (
            layer[:2] if isinstance(layer, tuple | list) else tf.unstack(layer, 2) for layer in out.past_key_values
        )
        logits = self.logits(last, weights, small_batch=True, xla=xla)
        return logits, [key_value_cache.allocate(present, capacity) for pair in pairs for present in pair]

    def step(
        self, tokens: Tensor, positions: Tensor, buffers: Sequence[Tensor], weights: Weights, *, xla: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits float32 [B, V] after one more token [B] per row, at `positions` [B], and the updated buffers.

        The given buffers must not be used afterwards. `xla`: XLA compiles the step.
        """
        slots = tf.range(tf.shape(buffers[0])[2])[None]
        # The current position is written to the last slot, where this step reads it, and to its own for later steps.
        visible = (slots < positions[:, None]) | (slots == slots[:, -1:])
        with key_value_cache.as_past(buffers, positions, xla=xla) as (past, updated):
            out = self._call(
                tokens[:, None],
                weights,
                small_batch=True,
                xla=xla,
                past_key_values=past,
                attention_mask=tf.cast(visible, tf.int32),
                use_cache=False,
                **self._position_ids(tokens[:, None], positions[:, None]),
            )
        return self.logits(out.last_hidden_state[:, 0], weights, small_batch=True, xla=xla), updated

    def _position_ids(self, ids: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """The argument `position_ids` for positions counted from 0, if the model has it."""
        if not self._takes_positions:
            return {}
        position_ids = positions + self._first_position
        if self._first_position:
            position_ids = tf.where(ids == self._first_position - 1, ids, position_ids)
        return {"position_ids": position_ids}

    def _call(
        self, ids: Tensor, weights: Weights, *, small_batch: bool = False, xla: bool = False, **options: Any
    ) -> Any:
        """The stem's output, computed with the given weights."""
        matrices = [
            (layer, name, Kernel(small_batch, xla, tensor) if dense and self._transposed else tensor)
            for (layer, name, dense), tensor in zip(self._attributes, weights.layers, strict=True)
        ]
        with _replaced([*matrices, *self._functions]):
            if weights.embedding is None:
                return self._stem(ids, training=False, **options)
            if self._embedding_transposed:
                embeds = tf.transpose(tf.gather(weights.embedding, ids, axis=1), [1, 2, 0])
            else:
                embeds = tf.gather(weights.embedding, ids)
            embeds = tf.cast(embeds, tf.float32)
            return self._stem(None, inputs_embeds=embeds, training=False, **options)

    def _store(self, variable: Any, *, transpose: bool = False) -> Any:
        """The variable in the type and layout that the graph stores; rounding changes the model's own variable too."""
        if self.dtype == tf.float32 and not transpose:
            return variable
        if id(variable) not in self._stored:
            rounded = tf.cast(variable, self.dtype)
            variable.assign(tf.cast(rounded, variable.dtype))
            self._stored[id(variable)] = tf.Variable(tf.transpose(rounded) if transpose else rounded, trainable=False)
        return self._stored[id(variable)]

    def _matches_uncached(self) -> bool:
        """Whether the logits with the cache equal the model's own without it, for rows of different lengths."""
        size = max(2, min(9, self.context - 2))
        ids = np.random.default_rng(0).integers(0, self.vocab_size, [2, size]).astype(np.int32)
        # After a padding id, RoBERTa's own positions depend on whether it is called with a cache.
        ids[ids == self._first_position - 1] = self.vocab_size - 1
        lengths = np.array([size - 1, size // 2], np.int32)

        def cached(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            weights = self.weights()
            first, buffers = self.prefill(ids, lengths, tf.shape(ids)[1] + 2, weights)
            second, _ = self.step(tf.gather(ids, lengths, batch_dims=1), lengths, buffers, weights)
            return first, second

        # Unknown shapes, as in the exported graph.
        specs = [tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None], tf.int32)]

        def traced() -> tuple[Tensor, Tensor]:
            function = tf.function(cached, autograph=self.autograph, input_signature=specs)
            logits: tuple[Tensor, Tensor] = function(tf.constant(ids), tf.constant(lengths))
            return logits

        try:
            first, second = traced()
        except tf.errors.OperatorNotAllowedInGraphError:
            if self.autograph:
                raise
            # The model's code branches on tensors. Only such models use AutoGraph, which makes the export slower.
            self.autograph = True
            first, second = traced()
        for row, length in enumerate(lengths):
            own = self.model(tf.constant(ids[row : row + 1, : length + 1]), training=False).logits[0]
            for ours, theirs in ((first[row], own[length - 1]), (second[row], own[length])):
                if not np.allclose(ours, tf.cast(theirs, tf.float32), rtol=1e-3, atol=1e-3):
                    return False
        return True


def _causal_mask(keys: Tensor, queries: Tensor) -> Tensor:
    """Which keys each query, at one of the last positions, may attend to; bool [1, 1, queries, keys]."""
    return (tf.range(keys)[None] <= (keys - queries + tf.range(queries))[:, None])[None, None]


def _gelu_new(inputs: Tensor) -> Tensor:
    """transformers' activation of that name, with products in place of the slow power."""
    return 0.5 * inputs * (1 + tf.tanh(math.sqrt(2 / math.pi) * (inputs + 0.044715 * inputs * inputs * inputs)))


def _matrix(layer: Any) -> Any:
    """The variable [V, D] of an embedding layer."""
    return layer.embeddings if hasattr(layer, "embeddings") else layer.weight


class _Head(NamedTuple):
    matrix: Any  # the variable; None if the layer is called instead
    transposed: bool  # [V, D], not [D, V]
    bias: Any
    layer: Any


def _head(model: Any, embedding: Any) -> _Head:
    """The part of the model that computes the logits."""
    layer = next((getattr(model, name) for name in ("lm_head", "cls", "mlm") if hasattr(model, name)), None)
    bias = layer.bias if layer is not None and getattr(layer, "use_bias", False) else None
    if layer is None:
        return _Head(embedding, True, None, None)
    if isinstance(layer, tf_keras.layers.Dense):
        return _Head(layer.kernel, False, bias, layer)
    if model.config.tie_word_embeddings and hasattr(layer, "use_bias"):
        return _Head(embedding, True, bias, layer)
    return _Head(None, False, None, layer)


def _variable_attributes(stem: Any, embedding: Any) -> Iterator[tuple[dict[str, Any], str, bool]]:
    """The layers' attributes that are variables, without the input embeddings.

    Each as the layer's attributes, the name among them, and whether it is a dense layer's kernel.
    """
    for layer in (stem, *stem.submodules):
        for name, value in vars(layer).items():
            if isinstance(value, tf.Variable) and value is not embedding:
                dense = (type(layer), name) in ((tf_keras.layers.Dense, "kernel"), (TFConv1D, "weight"))
                yield vars(layer), name, dense


def _replacement_functions(stem: Any) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The layers' functions that are replaced: the layer's attributes, the name among them, and the replacement."""
    slow = get_tf_activation("gelu_new")
    for layer in stem.submodules:
        yield from ((vars(layer), name, _gelu_new) for name, value in vars(layer).items() if value is slow)
        if hasattr(layer, "lower_triangle_mask"):
            # GPT-J slices its mask from a table as long as the context, and a cache has one slot more.
            yield vars(layer), "get_causal_mask", _causal_mask


@contextmanager
def _replaced(attributes: Sequence[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Replaces attributes of layers within the context, without their __setattr__, which would track the values."""
    originals = [layer.get(name) for layer, name, _ in attributes]
    try:
        for layer, name, replacement in attributes:
            layer[name] = replacement
        yield
    finally:
        for (layer, name, _), value in zip(attributes, originals, strict=True):
            if value is None:  # an attribute of the class
                layer.pop(name, None)
            else:
                layer[name] = value


def _copy(model: Any) -> Any:
    """A copy of the model with its own variables."""
    copy = TFAutoModelForCausalLM.from_config(model.config)
    checkpoint.tie(copy)
    copy.build_in_name_scope()
    for old, new in zip(model.weights, copy.weights, strict=True):
        if old.shape != new.shape:
            raise ValueError(f"{old.name} {old.shape} and {new.name} {new.shape} are not the same weight")
        new.assign(old)
    copy.generation_config = model.generation_config
    return copy


def _apply_head(layer: Any, hidden: Tensor) -> Tensor:
    """Calls a head that takes [B, L, D] with hidden states [B, D] or [B, L, D]."""
    return layer(hidden[:, None])[:, 0] if len(hidden.shape) == 2 else layer(hidden)

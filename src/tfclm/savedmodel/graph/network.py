"""A causal language model as the decoding loop needs it: a prompt in, then one token a row at a time."""

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
    """What is read once a call, in the type that it is kept in; None where the model reads it itself."""

    embedding: Tensor | None  # [V, D], or [D, V] where that is the head
    head: Tensor | None  # [D, V], or [V, D] if matrices are turned
    layers: list[Tensor]  # of the stem's layers; kernels of dense ones as [in, out], or [out, in] if turned


class Network:
    """A causal LM of transformers, called with prompts padded on the right and a cache that is written in place.

    Each row has a length of its own; what stands behind it is hidden by the causal mask. With a `dtype` smaller than
    float32, embeddings, dense layers and head are kept in it and cast where they are used: `model` is then a copy
    whose weights are rounded. Raises `InputError` if the model's own uncached logits do not come out.

    With `turned`, matrices are kept as [out, in], as is best where the calls are to be compiled.
    `autograph` tells whether what calls it is to be traced with AutoGraph.
    """

    def __init__(self, model: Any, dtype: str = "float32", *, turned: bool = False) -> None:
        self.dtype = tf.as_dtype(dtype)
        self._turned = turned
        self.model = model if dtype == "float32" else _copy(model)
        self.vocab_size: int = model.config.vocab_size
        self.context: int = checkpoint.context_size(model) or 2048
        self._stem = getattr(self.model, model.base_model_prefix)
        accepted = inspect.signature(self._stem.call).parameters
        if "past_key_values" not in accepted or not getattr(model.config, "use_cache", True):
            raise InputError(f"a model of type {model.config.model_type} has no cache and cannot be exported")
        self._takes_positions = "position_ids" in accepted
        self._first_position = checkpoint.first_position(model)
        # TensorFlow's Mistral does not tell its embeddings.
        embedding = _matrix(getattr(self._stem, "embed_tokens", None) or self.model.get_input_embeddings())
        self._kept: dict[int, Any] = {}  # by the id of the float32 variable that each stands for
        head = _head(self.model, embedding)
        # One matrix serves both where they are tied, lying as the head wants it.
        self._columns = head.matrix is embedding and not turned
        if head.matrix is not None:
            head = head._replace(matrix=self._keep(head.matrix, turned=head.turned != turned))
        self._head = head
        self._embedding = head.matrix if self._columns else self._keep(embedding)
        self._slots = list(_slots(self._stem, embedding))
        self._layers = [
            self._keep(layer[name], turned=turned) if dense else layer[name] for layer, name, dense in self._slots
        ]
        self._functions = list(_functions(self._stem))
        self.autograph = False
        # Embeddings that are scaled, say, are left to the model.
        self._embeds = True
        if not self._agrees():
            self._embeds = False
            if not self._agrees():
                raise InputError(
                    f"a model of type {model.config.model_type} cannot be exported: its cached logits are not its own"
                )

    @property
    def variables(self) -> list[Any]:
        """All that the graph reads."""
        # The model looks its embeddings up itself where they are not given to it.
        unread = {key for key, kept in self._kept.items() if self._embeds or kept is not self._embedding}
        return [weight for weight in self.model.weights if id(weight) not in unread] + list(self._kept.values())

    def weights(self) -> Weights:
        """Embeddings and matrices, read once: inside of a loop, each read of a gathered variable copies it."""
        return Weights(
            embedding=self._embedding.read_value() if self._embeds else None,
            head=None if self._head.matrix is None else self._head.matrix.read_value(),
            layers=[variable.read_value() for variable in self._layers],
        )

    def logits(self, hidden: Tensor, weights: Weights, *, few: bool, xla: bool = False) -> Tensor:
        """From hidden states [..., D], of `few` rows or of many, to logits float32 [..., V]."""
        if weights.head is None:
            return tf.cast(_as_rows(self._head.layer, hidden), tf.float32)
        rows = tf.reshape(hidden, [-1, hidden.shape[-1]])
        logits = product(rows, weights.head, turned=self._turned, few=few, compiled=xla)
        if self._head.bias is not None:
            logits += self._head.bias
        if xla:
            # Or XLA would choose the logits' layout so that the product's order is the other one after all.
            (logits,) = xla_optimization_barrier(input=[tf.reshape(logits, [-1])])
        result = tf.reshape(logits, tf.concat([tf.shape(hidden)[:-1], [self.vocab_size]], 0))
        result.set_shape([*hidden.shape[:-1], self.vocab_size])
        return tf.cast(result, tf.float32)

    def hidden(self, ids: Tensor, weights: Weights) -> Any:
        """The stem's output for ids int32 [B, L]: last_hidden_state [B, L, D] and what a cache starts with."""
        places = tf.range(tf.shape(ids)[1])[None]
        if self._first_position:
            # RoBERTa and its kin do not count padding ids, wherever they stand.
            places = tf.cumsum(tf.cast(ids != self._first_position - 1, tf.int32), 1) - 1
        return self._call(ids, weights, use_cache=True, **self._positions(ids, places))

    def prefill(
        self, ids: Tensor, lengths: Tensor, capacity: Tensor, weights: Weights, *, xla: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits float32 [B, V] behind prompts ids int32 [B, L] of `lengths` [B], and the cache's buffers.

        `xla`: the call is to be compiled.
        """
        out = self.hidden(ids, weights)
        last = tf.gather(out.last_hidden_state, lengths - 1, batch_dims=1)
        pairs = (
            layer[:2] if isinstance(layer, tuple | list) else tf.unstack(layer, 2) for layer in out.past_key_values
        )
        logits = self.logits(last, weights, few=True, xla=xla)
        return logits, [key_value_cache.allocate(present, capacity) for pair in pairs for present in pair]

    def step(
        self, tokens: Tensor, positions: Tensor, buffers: Sequence[Tensor], weights: Weights, *, xla: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits float32 [B, V] behind one more token [B] a row, at `positions` [B], and the buffers after it.

        The given buffers are used up. `xla`: the step is to be compiled.
        """
        slots = tf.range(tf.shape(buffers[0])[2])[None]
        # The present position stands in the last slot too, where it is looked at; its own is for later.
        seen = (slots < positions[:, None]) | (slots == slots[:, -1:])
        with key_value_cache.as_past(buffers, positions, xla=xla) as (past, after):
            out = self._call(
                tokens[:, None],
                weights,
                few=True,
                xla=xla,
                past_key_values=past,
                attention_mask=tf.cast(seen, tf.int32),
                use_cache=False,
                **self._positions(tokens[:, None], positions[:, None]),
            )
        return self.logits(out.last_hidden_state[:, 0], weights, few=True, xla=xla), after

    def _positions(self, ids: Tensor, places: Tensor) -> dict[str, Tensor]:
        if not self._takes_positions:
            return {}
        positions = places + self._first_position
        if self._first_position:
            positions = tf.where(ids == self._first_position - 1, ids, positions)
        return {"position_ids": positions}

    def _call(self, ids: Tensor, weights: Weights, *, few: bool = False, xla: bool = False, **options: Any) -> Any:
        matrices = [
            (layer, name, Kernel(few, xla, tensor) if dense and self._turned else tensor)
            for (layer, name, dense), tensor in zip(self._slots, weights.layers, strict=True)
        ]
        with _replaced([*matrices, *self._functions]):
            if weights.embedding is None:
                return self._stem(ids, training=False, **options)
            if self._columns:
                embeds = tf.transpose(tf.gather(weights.embedding, ids, axis=1), [1, 2, 0])
            else:
                embeds = tf.gather(weights.embedding, ids)
            embeds = tf.cast(embeds, tf.float32)
            return self._stem(None, inputs_embeds=embeds, training=False, **options)

    def _keep(self, variable: Any, *, turned: bool = False) -> Any:
        """A variable as the graph keeps it, in its type and layout; what is rounded is so in the model too."""
        if self.dtype == tf.float32 and not turned:
            return variable
        if id(variable) not in self._kept:
            small = tf.cast(variable, self.dtype)
            variable.assign(tf.cast(small, variable.dtype))
            self._kept[id(variable)] = tf.Variable(tf.transpose(small) if turned else small, trainable=False)
        return self._kept[id(variable)]

    def _agrees(self) -> bool:
        """Whether cached logits equal the model's own uncached ones, for rows of different lengths."""
        size = max(2, min(9, self.context - 2))
        ids = np.random.default_rng(0).integers(0, self.vocab_size, [2, size]).astype(np.int32)
        # Behind a padding id, RoBERTa's own positions depend on whether there is a key_value_cache.
        ids[ids == self._first_position - 1] = self.vocab_size - 1
        lengths = np.array([size - 1, size // 2], np.int32)

        def cached(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            weights = self.weights()
            first, buffers = self.prefill(ids, lengths, tf.shape(ids)[1] + 2, weights)
            second, _ = self.step(tf.gather(ids, lengths, batch_dims=1), lengths, buffers, weights)
            return first, second

        # Shapes are open, as in what is exported.
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
            # Its code branches on tensors. AutoGraph takes as long as the rest of an export: others go without.
            self.autograph = True
            first, second = traced()
        for row, length in enumerate(lengths):
            own = self.model(tf.constant(ids[row : row + 1, : length + 1]), training=False).logits[0]
            for ours, theirs in ((first[row], own[length - 1]), (second[row], own[length])):
                if not np.allclose(ours, tf.cast(theirs, tf.float32), rtol=1e-3, atol=1e-3):
                    return False
        return True


def _causal_mask(keys: Tensor, queries: Tensor) -> Tensor:
    """Which of the keys the last ones, the queries, may see; bool [1, 1, queries, keys]."""
    return (tf.range(keys)[None] <= (keys - queries + tf.range(queries))[:, None])[None, None]


def _gelu_new(inputs: Tensor) -> Tensor:
    """transformers' activation of that name, without its power, which takes a twelfth of a step of 8 rows."""
    return 0.5 * inputs * (1 + tf.tanh(math.sqrt(2 / math.pi) * (inputs + 0.044715 * inputs * inputs * inputs)))


def _matrix(layer: Any) -> Any:
    """The variable [V, D] of an embedding layer."""
    return layer.embeddings if hasattr(layer, "embeddings") else layer.weight


class _Head(NamedTuple):
    matrix: Any  # the variable; None where the layer is called as it is
    turned: bool  # [V, D], not [D, V]
    bias: Any
    layer: Any


def _head(model: Any, embedding: Any) -> _Head:
    """What gives the logits."""
    layer = next((getattr(model, name) for name in ("lm_head", "cls", "mlm") if hasattr(model, name)), None)
    bias = layer.bias if layer is not None and getattr(layer, "use_bias", False) else None
    if layer is None:
        return _Head(embedding, True, None, None)
    if isinstance(layer, tf_keras.layers.Dense):
        return _Head(layer.kernel, False, bias, layer)
    if model.config.tie_word_embeddings and hasattr(layer, "use_bias"):
        return _Head(embedding, True, bias, layer)
    return _Head(None, False, None, layer)


def _slots(stem: Any, embedding: Any) -> Iterator[tuple[dict[str, Any], str, bool]]:
    """The layers' attributes that are variables: of which layer, its name, and whether it is a dense layer's kernel.

    The input embeddings are left out, which are read apart.
    """
    for layer in (stem, *stem.submodules):
        for name, value in vars(layer).items():
            if isinstance(value, tf.Variable) and value is not embedding:
                dense = (type(layer), name) in ((tf_keras.layers.Dense, "kernel"), (TFConv1D, "weight"))
                yield vars(layer), name, dense


def _functions(stem: Any) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The layers' functions that others stand in for: of which layer, the name, and the other one."""
    slow = get_tf_activation("gelu_new")
    for layer in stem.submodules:
        yield from ((vars(layer), name, _gelu_new) for name, value in vars(layer).items() if value is slow)
        if hasattr(layer, "lower_triangle_mask"):
            # GPT-J cuts its mask out of a table that ends with the context, and a cache has more slots.
            yield vars(layer), "get_causal_mask", _causal_mask


@contextmanager
def _replaced(attributes: Sequence[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Gives layers other attributes for a while, past their own __setattr__, which would keep track of it."""
    own = [layer.get(name) for layer, name, _ in attributes]
    try:
        for layer, name, other in attributes:
            layer[name] = other
        yield
    finally:
        for (layer, name, _), value in zip(attributes, own, strict=True):
            if value is None:  # the class has it
                layer.pop(name, None)
            else:
                layer[name] = value


def _copy(model: Any) -> Any:
    """The same model with variables of its own."""
    copy = TFAutoModelForCausalLM.from_config(model.config)
    checkpoint.tie(copy)
    copy.build_in_name_scope()
    for old, new in zip(model.weights, copy.weights, strict=True):
        if old.shape != new.shape:
            raise ValueError(f"{old.name} {old.shape} and {new.name} {new.shape} are not the same weight")
        new.assign(old)
    copy.generation_config = model.generation_config
    return copy


def _as_rows(layer: Any, hidden: Tensor) -> Tensor:
    """A head that wants [B, L, D], given [B, D] or [B, L, D]."""
    return layer(hidden[:, None])[:, 0] if len(hidden.shape) == 2 else layer(hidden)

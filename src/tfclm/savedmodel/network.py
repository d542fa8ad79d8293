"""A causal language model as the decoding loop needs it: a prompt in, then one token a row at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from tfclm.errors import InputError
from tfclm.savedmodel import cache

__all__ = ["Network"]

Tensor = Any

# Positions of these types begin behind the padding id.
OFFSET_POSITIONS = ("camembert", "roberta", "roberta-prelayernorm", "xlm-roberta")


class Network:
    """A causal LM of transformers, called with prompts padded on the right and a cache that is written in place.

    Each row has a length of its own; what stands behind it is hidden by the causal mask. Raises `InputError` if the
    model's own uncached logits do not come out.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vocab_size: int = model.config.vocab_size
        self.context: int = getattr(model.config, "max_position_embeddings", None) or 2048
        self._stem = getattr(model, model.base_model_prefix)
        accepted = inspect.signature(self._stem.call).parameters
        if "past_key_values" not in accepted or not getattr(model.config, "use_cache", True):
            raise InputError(f"a model of type {model.config.model_type} has no cache and cannot be exported")
        self._takes_positions = "position_ids" in accepted
        offset = model.config.model_type in OFFSET_POSITIONS
        self._first_position = model.config.pad_token_id + 1 if offset else 0
        # TensorFlow's Mistral does not tell its embeddings.
        self._embedding = _matrix(getattr(self._stem, "embed_tokens", None) or model.get_input_embeddings())
        self._head = _head(model, self._embedding)
        # Embeddings that are scaled, say, are left to the model.
        self._embeds = True
        if not self._agrees():
            self._embeds = False
            if not self._agrees():
                raise InputError(
                    f"a model of type {model.config.model_type} cannot be exported: its cached logits are not its own"
                )

    def weights(self) -> Weights:
        """Embeddings and output matrix, read once: inside of a loop, each read of a gathered variable copies it."""
        return Weights(
            embedding=self._embedding.read_value() if self._embeds else None,
            head=self._head(),
        )

    def hidden(self, ids: Tensor, weights: Weights) -> Any:
        """The stem's output for ids int32 [B, L]: last_hidden_state [B, L, D] and what a cache starts with."""
        return self._call(ids, weights, use_cache=True, **self._positions(tf.range(tf.shape(ids)[1])[None]))

    def prefill(self, ids: Tensor, lengths: Tensor, capacity: Tensor, weights: Weights) -> tuple[Tensor, list[Tensor]]:
        """Logits float32 [B, V] behind prompts ids int32 [B, L] of `lengths` [B], and the cache's buffers."""
        out = self.hidden(ids, weights)
        last = tf.gather(out.last_hidden_state, lengths - 1, batch_dims=1)
        pairs = (
            layer[:2] if isinstance(layer, tuple | list) else tf.unstack(layer, 2) for layer in out.past_key_values
        )
        return weights.head(last), [cache.allocate(present, capacity) for pair in pairs for present in pair]

    def step(
        self, tokens: Tensor, positions: Tensor, buffers: Sequence[Tensor], weights: Weights, *, xla: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits float32 [B, V] behind one more token [B] a row, at `positions` [B], and the buffers after it.

        The given buffers are used up. `xla`: the step is to be compiled.
        """
        slots = tf.range(tf.shape(buffers[0])[2])[None]
        # The present position stands in the last slot too, where it is looked at; its own is for later.
        seen = (slots < positions[:, None]) | (slots == slots[:, -1:])
        with cache.as_past(buffers, positions, xla=xla) as (past, after):
            out = self._call(
                tokens[:, None],
                weights,
                past_key_values=past,
                attention_mask=tf.cast(seen, tf.int32),
                use_cache=False,
                **self._positions(positions[:, None]),
            )
        return weights.head(out.last_hidden_state[:, 0]), after

    def _positions(self, positions: Tensor) -> dict[str, Tensor]:
        return {"position_ids": positions + self._first_position} if self._takes_positions else {}

    def _call(self, ids: Tensor, weights: Weights, **options: Any) -> Any:
        if weights.embedding is not None:
            embeds = tf.cast(tf.gather(weights.embedding, ids), tf.float32)
            return self._stem(None, inputs_embeds=embeds, training=False, **options)
        return self._stem(ids, training=False, **options)

    def _agrees(self) -> bool:
        """Whether cached logits equal the model's own uncached ones, for rows of different lengths."""
        size = max(2, min(9, self.context - 2))
        ids = np.random.default_rng(0).integers(0, self.vocab_size, [2, size]).astype(np.int32)
        # RoBERTa's own positions skip padding ids, wherever they stand.
        ids[ids == self.model.config.pad_token_id] = self.vocab_size - 1
        lengths = np.array([size - 1, size // 2], np.int32)

        def cached(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            weights = self.weights()
            first, buffers = self.prefill(ids, lengths, tf.shape(ids)[1] + 2, weights)
            second, _ = self.step(tf.gather(ids, lengths, batch_dims=1), lengths, buffers, weights)
            return first, second

        first, second = tf.function(cached)(tf.constant(ids), tf.constant(lengths))
        for row, length in enumerate(lengths):
            own = self.model(tf.constant(ids[row : row + 1, : length + 1]), training=False).logits[0]
            for ours, theirs in ((first[row], own[length - 1]), (second[row], own[length])):
                if not np.allclose(ours, tf.cast(theirs, tf.float32), rtol=1e-3, atol=1e-3):
                    return False
        return True


class Weights:
    """What is read once a call: the input embeddings [V, D], if they are given to the stem, and the head."""

    def __init__(self, embedding: Tensor | None, head: Callable[[Tensor], Tensor]) -> None:
        self.embedding, self.head = embedding, head


def _matrix(layer: Any) -> Any:
    """The variable [V, D] of an embedding layer."""
    return layer.embeddings if hasattr(layer, "embeddings") else layer.weight


def _head(model: Any, embedding: Any) -> Callable[[], Callable[[Tensor], Tensor]]:
    """From hidden states [..., D] to logits float32 [..., V]: a function that reads the weights and gives another."""
    layer = next((getattr(model, name) for name in ("lm_head", "cls", "mlm") if hasattr(model, name)), None)

    def dense(matrix: Any, bias: Any, transposed: bool) -> Callable[[], Callable[[Tensor], Tensor]]:
        def read() -> Callable[[Tensor], Tensor]:
            stored = matrix.read_value()

            def logits(hidden: Tensor) -> Tensor:
                flat = tf.reshape(hidden, [-1, hidden.shape[-1]])
                # Cast where it is used: the smaller type is what is read from memory.
                weight = tf.cast(stored, flat.dtype)
                # Few rows against a large matrix: this order of the product is the faster one.
                product = (
                    tf.transpose(tf.matmul(weight, flat, transpose_b=True)) if transposed else tf.matmul(flat, weight)
                )
                shape = tf.concat([tf.shape(hidden)[:-1], [-1]], 0)
                result = tf.reshape(product if bias is None else product + bias, shape)
                result.set_shape([*hidden.shape[:-1], model.config.vocab_size])
                return tf.cast(result, tf.float32)

            return logits

        return read

    if layer is None:
        return dense(embedding, None, True)
    if isinstance(layer, tf_keras.layers.Dense):
        return dense(layer.kernel, layer.bias if layer.use_bias else None, False)
    if model.config.tie_word_embeddings and hasattr(layer, "use_bias"):
        return dense(embedding, layer.bias if layer.use_bias else None, True)
    return lambda: lambda hidden: tf.cast(_as_rows(layer, hidden), tf.float32)


def _as_rows(layer: Any, hidden: Tensor) -> Tensor:
    """A head that wants [B, L, D], given [B, D] or [B, L, D]."""
    return layer(hidden[:, None])[:, 0] if len(hidden.shape) == 2 else layer(hidden)

"""The computation of a decoder, from token ids to logits, for a `Spec` and any provider of its weights.

The Keras model calls it with its layers, the exported graph with the weights that it stores; so both compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import tensorflow as tf

from tfclm.compat import get_tf_activation
from tfclm.models.positions import Rotation, alibi_bias, attention_bias, counted, sinusoids
from tfclm.models.shapes import sizes
from tfclm.models.spec import Spec

__all__ = ["Cache", "Decoded", "Weights", "decode_tokens", "head_logits", "layer_norm", "rms_norm"]

Tensor = Any
Pair = tuple[Tensor, Tensor]
Function = Callable[..., Tensor]


class Weights(Protocol):
    """What computes with the weights of a decoder's modules, which are named as in PyTorch."""

    def embed(self, name: str, ids: Tensor) -> Tensor:
        """Rows [..., D] of an embedding for ids [...]."""

    def dense(self, names: Sequence[str], inputs: Tensor) -> list[Tensor]:
        """The outputs [..., out] of dense layers that have the same inputs [..., in]."""

    def norm(self, name: str, inputs: Tensor) -> Tensor:
        """The normalized inputs [..., D]."""

    def logits(self, inputs: Tensor) -> Tensor:
        """The product [..., V] of hidden states with the output matrix, and its bias."""

    def dropout(self, kind: str, inputs: Tensor) -> Tensor:
        """The inputs, some of which are dropped in training; `kind` is a field of `Spec` without `_dropout`."""


class Cache(NamedTuple):
    """The keys and values of earlier tokens, and where those of the new ones are put.

    Attributes:
        pairs: keys and values of each layer, [B, key-value heads, capacity, head size].
        slots: int32 [B, L] or [1, L], the slots of the new tokens; a token attends to its own slot and earlier ones.
        key_slots: int32 [B, keys] or [1, keys], the slots of all keys once the new tokens are in the cache.
        append: takes such a buffer and the new keys or values [B, key-value heads, L, head size]; returns the buffer
            that holds both, or a tuple of buffers that hold them together.
    """

    pairs: Sequence[Pair]
    slots: Tensor
    key_slots: Tensor
    append: Callable[[Any, Tensor], Any]


class Decoded(NamedTuple):
    """What a decoder computes before the head.

    Attributes:
        hidden: float [B, L, D], after the last norm.
        pairs: keys and values of each layer, [B, key-value heads, tokens, head size].
        hidden_states: the input of each layer, and `hidden`.
        attentions: the attention's weights of each layer, [B, heads, L, tokens].
    """

    hidden: Tensor
    pairs: tuple[Pair, ...]
    hidden_states: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...]


def decode_tokens(
    spec: Spec,
    weights: Weights,
    ids: Tensor,
    *,
    embeddings: Tensor | None = None,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    lengths: Tensor | None = None,
    cache: Cache | None = None,
    elementwise: Callable[[Function], Function] = lambda function: function,
) -> Decoded:
    """Computes the hidden states of tokens that attend to themselves, earlier ones and the cache.

    Args:
        spec: the decoder.
        weights: its weights.
        ids: int32 [B, L]; None if `embeddings` are given.
        embeddings: float [B, L, D], in place of those of `ids`, unscaled.
        mask: [B, tokens], with those of the cache; 0 for padding.
        positions: int32 [B, L] or [1, L]; by default, all tokens are counted from 0, after those of the cache.
        lengths: int32 [B], tokens of each text if they are padded on the right, for rotations that depend on the
            length; by default, that of the last position. The cache keeps the rotation that keys were computed with.
        cache: keys and values of earlier tokens.
        elementwise: wraps the functions between dense layers, such as `tfclm.models.gradients.recomputed` for training.
    """
    x = weights.embed(spec.names.embedding, ids) if embeddings is None else embeddings
    length = sizes(x)[1]
    slots = tf.range(length)[None] if cache is None else cache.slots
    key_slots = slots if cache is None else cache.key_slots
    if positions is None:
        positions = slots
        if spec.positions_from_mask and mask is not None:
            positions = tf.gather(counted(mask), tf.broadcast_to(slots, tf.shape(x)[:2]), batch_dims=1)
        if spec.padding_id is not None and ids is not None:
            # These models do not count padding, wherever it is.
            positions = slots[:, :1] + tf.cumsum(tf.cast(ids != spec.padding_id, tf.int32), 1) - 1
    x = _embed(spec, weights, x, ids, positions)
    rotation = Rotation(spec, positions, lengths, x.dtype)
    biases = {
        window: attention_bias(slots, key_slots, window, mask, x.dtype) for window in sorted(set(spec.windows), key=str)
    }
    if spec.alibi:
        alibi = alibi_bias(spec, key_slots, mask, x.dtype)
        biases = {window: bias + alibi for window, bias in biases.items()}
    if x.shape[1] == 1:
        # The heads of a group take the place of the queries.
        biases = {window: tf.squeeze(bias, 3) for window, bias in biases.items()}
    hidden_states, attentions, pairs = [], [], []
    for index in range(spec.layers):
        hidden_states.append(x)
        past = None if cache is None else cache.pairs[index]
        layer = _Layer(spec, weights, index, rotation, biases[spec.windows[index]], elementwise)
        x, attention, pair = layer.call(x, past, None if cache is None else cache.append)
        attentions.append(attention)
        pairs.append(pair)
    if spec.names.final_norm:
        x = weights.norm(spec.names.final_norm, x)
    if spec.names.project_out:
        (x,) = weights.dense([spec.names.project_out], x)
    return Decoded(x, tuple(pairs), (*hidden_states, x), tuple(attentions))


def head_logits(spec: Spec, weights: Weights, hidden: Tensor) -> Tensor:
    """The logits float32 [..., V] of hidden states [..., D], as `Decoded.hidden`."""
    if spec.names.head_dense:
        (hidden,) = weights.dense([spec.names.head_dense], hidden)
        hidden = weights.norm(spec.names.head_norm, activation(spec.activation)(hidden))
    logits = tf.cast(weights.logits(hidden), tf.float32)
    if spec.logit_scale != 1:
        logits *= spec.logit_scale
    if spec.logit_cap is not None:
        logits = spec.logit_cap * tf.tanh(logits / spec.logit_cap)
    return logits


def rms_norm(inputs: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False) -> Tensor:
    """Inputs [..., D] divided by their root mean square, times `weight` [D], or 1 + `weight`; computed in float32."""
    exact = tf.cast(inputs, tf.float32)
    exact *= tf.math.rsqrt(tf.reduce_mean(tf.square(exact), -1, keepdims=True) + eps)
    if plus_one:
        return tf.cast(exact * (1 + tf.cast(weight, tf.float32)), inputs.dtype)
    return tf.cast(exact, inputs.dtype) * tf.cast(weight, inputs.dtype)


def layer_norm(inputs: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Inputs [..., D] with mean 0 and variance 1, times `weight` [D] plus `bias` [D]; computed in float32."""
    exact = tf.cast(inputs, tf.float32)
    exact -= tf.reduce_mean(exact, -1, keepdims=True)
    scale = tf.math.rsqrt(tf.reduce_mean(tf.square(exact), -1, keepdims=True) + eps) * tf.cast(weight, tf.float32)
    exact *= scale
    if bias is not None:
        exact += tf.cast(bias, tf.float32)
    return tf.cast(exact, inputs.dtype)


def activation(name: str) -> Function:
    """The activation function that transformers calls by this name."""
    if name in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
        return _gelu_tanh
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": lambda inputs: tf.nn.gelu(inputs, approximate=False),
        "relu": tf.nn.relu,
        "relu2": lambda inputs: tf.square(tf.nn.relu(inputs)),
        # Not tf.nn.silu, whose gradient would compute the sigmoid once more.
        "silu": lambda inputs: inputs * tf.sigmoid(inputs),
        "swish": lambda inputs: inputs * tf.sigmoid(inputs),
    }
    if name in functions:
        return functions[name]
    function: Callable[[Tensor], Tensor] = get_tf_activation(name)
    return function


def _gelu_tanh(inputs: Tensor) -> Tensor:
    """The approximation of GELU by tanh, as a sigmoid, because sigmoid(2x) = (1 + tanh(x)) / 2 takes fewer passes."""
    scale = 2 * math.sqrt(2 / math.pi)
    return inputs * tf.sigmoid(inputs * (scale + 0.044715 * scale * tf.square(inputs)))


def _embed(spec: Spec, weights: Weights, x: Tensor, ids: Tensor | None, positions: Tensor) -> Tensor:
    """What the first layer reads."""
    names = spec.names
    if spec.embedding_scale != 1:
        x *= tf.cast(spec.embedding_scale, x.dtype)
    before_norm = bool(names.embedding_norm)
    if before_norm:
        x = weights.norm(names.embedding_norm, _add_positions(spec, weights, x, ids, positions))
    x = weights.dropout("embedding", x)
    if names.project_in:
        (x,) = weights.dense([names.project_in], x)
    return x if before_norm else _add_positions(spec, weights, x, ids, positions)


def _add_positions(spec: Spec, weights: Weights, x: Tensor, ids: Tensor | None, positions: Tensor) -> Tensor:
    if spec.names.token_types:
        x += weights.embed(spec.names.token_types, tf.zeros([1, 1], tf.int32))
    if spec.positions == "none":
        return x
    rows = positions + spec.position_offset
    if spec.padding_id is not None and ids is not None:
        rows = tf.where(ids == spec.padding_id, spec.padding_id, rows)
    if spec.positions == "learned":
        return x + weights.embed(spec.names.position_embedding, rows)
    return x + tf.cast(tf.gather(tf.constant(sinusoids(spec)), rows), x.dtype)


class _Layer:
    """One layer: attention and feed-forward part with their norms and residuals."""

    def __init__(
        self,
        spec: Spec,
        weights: Weights,
        index: int,
        rotation: Rotation,
        bias: Tensor,
        elementwise: Callable[[Function], Function],
    ) -> None:
        self._spec, self._weights, self._index, self._rotation, self._bias = spec, weights, index, rotation, bias
        self._elementwise = elementwise

    def call(
        self, x: Tensor, past: Pair | None, append: Callable[[Tensor, Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor, Pair]:
        """The layer's output [B, L, D], its attention's weights, and its keys and values."""
        spec = self._spec
        before, after, before_mlp, after_mlp = spec.names.norms
        inputs = self._norm(before, x)
        output, attention, pair = self._attend(inputs, past, append)
        output = self._weights.dropout("residual", output)
        if spec.parallel:
            read = inputs if before_mlp == before else self._norm(before_mlp, x)
            fed = self._weights.dropout("residual", self._feed_forward(read))
            return x + self._scaled(output + fed), attention, pair
        x = self._add(inputs if spec.residual_from_norm else x, output, after)
        inputs = self._norm(before_mlp, x)
        output = self._weights.dropout("residual", self._feed_forward(inputs))
        return self._add(inputs if spec.residual_from_norm else x, output, after_mlp), attention, pair

    def _add(self, residual: Tensor, output: Tensor, norm: str) -> Tensor:
        if self._spec.post_norm:
            return self._norm(norm, residual + output)
        return residual + self._scaled(self._norm(norm, output))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self._spec.residual_scale == 1 else x * self._spec.residual_scale

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return self._weights.norm(self._spec.layer(self._index, name), x) if name else x

    def _dense(self, names: Sequence[str], x: Tensor) -> list[Tensor]:
        return self._weights.dense([self._spec.layer(self._index, name) for name in names], x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        spec, names = self._spec, self._spec.names
        function = activation(spec.activation)
        if not spec.gated:
            (up,) = self._dense([names.up], x)
            inner = self._elementwise(function)(up)
        else:
            if spec.fused_gate_up:
                (fused,) = self._dense([names.gate_up], x)
                gate, up = tf.split(fused, 2, -1)
            else:
                gate, up = self._dense([names.gate, names.up], x)
            inner = self._elementwise(lambda gate, up: function(gate) * up)(gate, up)
        (output,) = self._dense([names.down], self._weights.dropout("activation", inner))
        return output

    def _attend(
        self, x: Tensor, past: Pair | None, append: Callable[[Tensor, Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor, Pair]:
        spec, rotation, rope = self._spec, self._rotation, self._spec.layer_ropes[self._index]
        batch, length, _ = sizes(x)
        q, k, v = self._split_heads(x, batch, length)
        q, k = rotation.rotate(q, rope), rotation.rotate(k, rope)
        if past is not None and append is not None:
            k, v = append(past[0], k), append(past[1], v)
        pair = (k, v)
        scale = spec.attention_scale / (self._index + 1 if spec.attention_scale_by_layer else 1)
        # The heads that share keys and values are rows of one product, so that these are not repeated.
        group, keys = spec.heads // spec.kv_heads, sum(sizes(part)[2] for part in _parts(k))
        q = tf.reshape(q * tf.cast(scale, q.dtype), [batch, spec.kv_heads, group * length, spec.head_dim])
        scores = _joined([_product(q, part, adj_y=True) for part in _parts(k)])
        if spec.attention_cap is not None:
            scores = spec.attention_cap * tf.tanh(scores / spec.attention_cap)
        if x.shape[1] != 1:
            scores = tf.reshape(scores, [batch, spec.kv_heads, group, length, keys])
        scores += self._bias
        attention = tf.cast(tf.nn.softmax(tf.cast(scores, tf.float32)), q.dtype)
        attention = self._weights.dropout("attention", attention)
        if x.shape[1] != 1:
            attention = tf.reshape(attention, [batch, spec.kv_heads, group * length, keys])
        mixed = _mixed(attention, _parts(v))
        mixed = _swap_heads(tf.reshape(mixed, [batch, spec.heads, length, spec.head_dim]))
        (output,) = self._dense([spec.names.o], tf.reshape(mixed, [batch, length, spec.heads * spec.head_dim]))
        return output, tf.reshape(attention, [batch, spec.heads, length, keys]), pair

    def _split_heads(self, x: Tensor, batch: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, L, head size], not yet rotated."""
        spec, names = self._spec, self._spec.names
        heads, groups, size = spec.heads, spec.kv_heads, spec.head_dim
        if not spec.fused_qkv:
            q, k, v = self._dense([names.q, names.k, names.v], x)
        else:
            (fused,) = self._dense([names.qkv], x)
            if spec.fused_qkv == "parts":
                q, k, v = tf.split(fused, [heads * size, groups * size, groups * size], -1)
            elif spec.fused_qkv == "groups":
                # Each group of heads is followed by its key and its value.
                grouped = tf.reshape(fused, [batch, length, groups, heads // groups + 2, size])
                q, k, v = tf.split(grouped, [heads // groups, 1, 1], 3)
            else:
                # CodeGen was trained on 4 processors, each of which has a part of queries, values and keys.
                parts = tf.reshape(fused, [batch, length, 4, 3, heads // 4 * size])
                q, v, k = tf.unstack(parts, axis=3)
        if spec.qkv_limit is not None:
            q, k, v = (tf.clip_by_value(part, -spec.qkv_limit, spec.qkv_limit) for part in (q, k, v))
        q_norm, k_norm = (spec.layer(self._index, name) for name in (names.q_norm, names.k_norm))
        if spec.qk_norm == "whole":
            q, k = self._weights.norm(q_norm, q), self._weights.norm(k_norm, k)
        q, k, v = (
            _swap_heads(tf.reshape(part, [batch, length, count, size]))
            for part, count in ((q, heads), (k, groups), (v, groups))
        )
        if spec.qk_norm == "head":
            q, k = self._weights.norm(q_norm, q), self._weights.norm(k_norm, k)
        return q, k, v


def _parts(buffers: Any) -> tuple[Tensor, ...]:
    return buffers if isinstance(buffers, tuple) else (buffers,)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else tf.concat(parts, -1)


def _mixed(attention: Tensor, values: Sequence[Tensor]) -> Tensor:
    """The values [B, heads, keys, size], in parts, weighted by the attention [B, heads, L, keys]."""
    if len(values) == 1:
        return _product(attention, values[0])
    weights = tf.split(attention, [sizes(part)[2] for part in values], -1)
    return tf.add_n([_product(weight, part) for weight, part in zip(weights, values, strict=True)])


def _product(x: Tensor, y: Tensor, *, adj_y: bool = False) -> Tensor:
    """The products of batches of matrices, of which `adj_y` transposes the second.

    For a single row, the kernel of oneDNN takes twice as long as TensorFlow's own, which only the third version of the
    op keeps.
    """
    if x.shape[-2] == 1 and x.dtype == tf.float32:
        return tf.raw_ops.BatchMatMulV3(x=x, y=y, adj_y=adj_y, Tout=tf.float32)
    return tf.matmul(x, y, transpose_b=adj_y)


def _swap_heads(x: Tensor) -> Tensor:
    """[B, L, heads, size] to [B, heads, L, size], or back."""
    if 1 in x.shape[1:3]:
        return tf.reshape(x, [sizes(x)[number] for number in (0, 2, 1, 3)])
    return tf.transpose(x, [0, 2, 1, 3])

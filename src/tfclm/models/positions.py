"""What depends on the positions of tokens: constant embeddings, rotations, and the biases of the attention's scores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

from tfclm.models.rope import Rope
from tfclm.models.shapes import sizes
from tfclm.models.spec import Spec

__all__ = ["Rotation", "alibi_bias", "attention_bias", "counted", "sinusoids"]

Tensor = Any
Pair = tuple[Tensor, Tensor]


def counted(mask: Tensor) -> Tensor:
    """The positions int32 [B, tokens] of tokens, padding not counted."""
    present = tf.cast(mask, tf.int32)
    return tf.maximum(tf.cumsum(present, 1) - 1, 0)


def sinusoids(spec: Spec) -> np.ndarray[Any, Any]:
    """Constant position embeddings float32 [rows, D]: sines in the first half, cosines in the second."""
    size = spec.hidden_size
    rows = np.arange((spec.context or 0) + spec.position_offset, dtype=np.float32)[:, None]
    if spec.positions == "ctrl":
        powers = 1 / np.power(np.float32(10000), 2 * np.arange(size // 2, dtype=np.float32) / np.float32(size))
    else:
        powers = np.exp(np.arange(size // 2, dtype=np.float32) * np.float32(-math.log(10000) / (size // 2 - 1)))
    angles = rows * powers[None].astype(np.float32)
    table = np.concatenate([np.sin(angles), np.cos(angles), np.zeros([len(rows), size % 2])], 1).astype(np.float32)
    if spec.positions == "sinusoidal" and spec.padding_id is None and spec.position_offset:
        table[1] = 0  # the padding's
    return table


def attention_bias(
    slots: Tensor, key_slots: Tensor, window: int | None, mask: Tensor | None, dtype: tf.DType
) -> Tensor:
    """What hides later tokens, padding and those before the window, added to the scores; [B or 1, 1, 1, L, keys]."""
    key = key_slots[:, None]
    visible = key <= slots[:, :, None]
    if window is not None:
        visible &= key > slots[:, :, None] - window
    if mask is not None:
        visible &= tf.cast(mask, tf.bool)[:, None]
    # Half of the lowest number, because a score is added to it.
    return tf.where(visible, tf.zeros([], dtype), tf.constant(dtype.min / 2, dtype))[:, None, None]


def alibi_bias(spec: Spec, key_slots: Tensor, mask: Tensor | None, dtype: tf.DType) -> Tensor:
    """What is added to the scores for the distance of keys, [B or 1, key-value heads, group, 1, keys].

    It grows with the key's position: softmax is the same for scores that differ by a constant per query.
    """
    positions = key_slots if mask is None else counted(mask) * tf.cast(mask, tf.int32)
    slopes = tf.constant(spec.alibi, tf.float32)
    if spec.alibi_bfloat16:
        product = tf.cast(slopes, tf.bfloat16)[None, :, None] * tf.cast(positions, tf.bfloat16)[:, None]
        biases = tf.cast(product, tf.float32) * spec.attention_scale
    else:
        biases = slopes[None, :, None] * tf.cast(positions, tf.float32)[:, None]
    shape = [sizes(positions)[0], spec.kv_heads, spec.heads // spec.kv_heads, 1, sizes(positions)[1]]
    return tf.cast(tf.reshape(biases, shape), dtype)


class Rotation:
    """The rotary position embeddings of one call, for all layers."""

    def __init__(self, spec: Spec, positions: Tensor, lengths: Tensor | None, dtype: tf.DType) -> None:
        self._interleaved = spec.interleaved
        if lengths is None:
            lengths = tf.reduce_max(positions, 1) + 1
        self._angles = [
            _angles(rope, _frequencies(rope, lengths), positions, dtype, spec.interleaved) for rope in spec.ropes
        ]

    def rotate(self, x: Tensor, rope: int | None) -> Tensor:
        """Queries or keys [B, heads, L, head size] of the new tokens, rotated."""
        return x if rope is None else _rotate(x, *self._angles[rope], self._interleaved)


def _frequencies(rope: Rope, lengths: Tensor) -> Tensor:
    """Radians per position, [1, pairs], or [B, pairs] if they depend on the lengths [B] of the texts."""
    frequencies = tf.constant(rope.frequencies)[None]
    if rope.long_frequencies is not None:
        return tf.where(lengths[:, None] > rope.threshold, tf.constant(rope.long_frequencies)[None], frequencies)
    if rope.dynamic is not None:
        base, factor, context = rope.dynamic
        size = 2 * len(rope.frequencies)
        length = tf.cast(tf.maximum(lengths, context), tf.float32)[:, None]
        base *= (factor * length / context - (factor - 1)) ** (size / (size - 2))
        return 1 / base ** tf.constant(np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    return frequencies


def _angles(rope: Rope, frequencies: Tensor, positions: Tensor, dtype: tf.DType, interleaved: bool) -> Pair:
    """What numbers are multiplied by, and what the other ones of their pairs are; [B or 1, 1, L, 2 x pairs] each."""
    angles = tf.cast(positions, tf.float32)[:, None, :, None] * frequencies[:, None, None]
    cos, sin = tf.cos(angles), tf.sin(angles)
    if rope.factor != 1:
        cos, sin = cos * rope.factor, sin * rope.factor
    if interleaved:
        cos, sin = tf.repeat(cos, 2, -1), tf.reshape(tf.stack([-sin, sin], -1), [*sizes(sin)[:3], 2 * sin.shape[-1]])
    else:
        cos, sin = tf.concat([cos, cos], -1), tf.concat([-sin, sin], -1)
    return tf.cast(cos, dtype), tf.cast(sin, dtype)


def _rotate(x: Tensor, own: Tensor, other: Tensor, interleaved: bool) -> Tensor:
    """x [B, heads, L, size] with its first dimensions rotated."""
    size, rest = own.shape[-1], None
    if size < x.shape[-1]:
        x, rest = tf.split(x, [size, x.shape[-1] - size], -1)
    if interleaved:
        pairs = tf.reshape(x, [*sizes(x)[:3], size // 2, 2])
        swapped = tf.reshape(tf.reverse(pairs, [-1]), sizes(x))
    else:
        first, second = tf.split(x, 2, -1)
        swapped = tf.concat([second, first], -1)
    rotated = x * own + swapped * other
    return rotated if rest is None else tf.concat([rotated, rest], -1)

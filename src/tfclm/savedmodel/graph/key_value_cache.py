"""The key-value cache of a decoding loop: one buffer per layer for keys and one for values, written in place."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

__all__ = ["allocate", "write"]

Tensor = Any


def allocate(prompt: Tensor, capacity: Tensor) -> Tensor:
    """A buffer [B, heads, capacity, size] that begins with the keys or values of prompts, [B, heads, L, size]."""
    free = capacity - tf.shape(prompt)[2]
    return tf.pad(prompt, [[0, 0], [0, 0], [0, free], [0, 0]])


def write(buffer: Tensor, new: Tensor, slots: Tensor, *, xla: bool = False) -> Tensor:
    """Writes keys or values of one token per row into a buffer, in place.

    Args:
        buffer: [B, heads, capacity, size]; it must not be used afterwards.
        new: [B, heads, 1, size].
        slots: int32 [B], where each row's go.
        xla: whether XLA compiles the call.
    """
    batch, heads, capacity, size = (
        static if static is not None else dynamic
        for static, dynamic in zip(buffer.shape, tf.unstack(tf.shape(buffer), 4), strict=True)
    )
    indices = tf.reshape((tf.range(batch)[:, None] * heads + tf.range(heads)) * capacity + slots[:, None], [-1])
    flat = tf.reshape(buffer, [batch * heads * capacity, size])
    values = tf.reshape(new, [batch * heads, size])
    if xla:
        # XLA has no InplaceUpdate; it compiles the scatter to an update in place.
        flat = tf.tensor_scatter_nd_update(flat, indices[:, None], values)
    else:
        # A scatter would copy the buffer. Only the shape of the old buffer is read after this.
        flat = tf.raw_ops.InplaceUpdate(x=flat, i=indices, v=values)
    return tf.reshape(flat, [batch, heads, capacity, size])

"""The key-value cache of a decoding loop: one buffer per layer for keys and one for values, written in place."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

__all__ = ["Writer", "allocate"]

Tensor = Any


def allocate(prompt: Tensor, capacity: Tensor) -> Tensor:
    """A buffer [B, heads, capacity, size] that begins with the keys or values of prompts, [B, heads, L, size]."""
    free = capacity - tf.shape(prompt)[2]
    return tf.pad(prompt, [[0, 0], [0, 0], [0, free], [0, 0]])


class Writer:
    """Writes keys and values of one token per row into buffers of one shape.

    Args:
        buffer: one of the buffers, [B, heads, capacity, size].
        slots: int32 [B], where each row's go.
        xla: whether XLA compiles the call.
    """

    def __init__(self, buffer: Tensor, slots: Tensor, *, xla: bool = False) -> None:
        self._xla, self._size = xla, buffer.shape[-1]
        dynamic = tf.shape(buffer)
        batch, heads, capacity, _ = (
            size if size is not None else dynamic[index] for index, size in enumerate(buffer.shape)
        )
        self._shape = buffer.shape if buffer.shape.is_fully_defined() else dynamic
        rows = (tf.range(batch)[:, None] * heads + tf.range(heads)) * capacity + slots[:, None]
        self._rows = tf.reshape(rows, [-1])

    def write(self, buffer: Tensor, new: Tensor) -> Tensor:
        """The buffer with `new` [B, heads, 1, size] in it, written in place; `buffer` must not be used afterwards."""
        flat = tf.reshape(buffer, [-1, self._size])
        values = tf.reshape(new, [-1, self._size])
        if self._xla:
            # XLA has no InplaceUpdate; it compiles the scatter to an update in place.
            flat = tf.tensor_scatter_nd_update(flat, self._rows[:, None], values)
        else:
            # A scatter would copy the buffer. Only the shape of the old buffer is read after this.
            flat = tf.raw_ops.InplaceUpdate(x=flat, i=self._rows, v=values)
        written = tf.reshape(flat, self._shape)
        written.set_shape(buffer.shape)
        return written

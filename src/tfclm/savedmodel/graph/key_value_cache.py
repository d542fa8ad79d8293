"""The key-value cache of rows that are decoded together: one buffer per layer for keys and one for values.

Tokens are written into the buffers in place. The buffers are made anew when rows join or leave, or need more slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

__all__ = ["Writer", "padded", "rearranged", "row_of", "zeros"]

Tensor = Any


def zeros(shape: Sequence[Tensor | int]) -> Tensor:
    """Zeros float32 [B, heads, capacity, size] in a tensor of their own, which may be written to.

    TensorFlow makes equal tensors of `tf.zeros` one.
    """
    static = [size if isinstance(size, int) else None for size in shape]
    return tf.ensure_shape(tf.raw_ops.Empty(shape=tf.stack(shape), dtype=tf.float32, init=True), static)


def padded(part: Tensor, capacity: Tensor) -> Tensor:
    """Keys or values [B, heads, L, size] with `capacity` [] slots, L or more; those after the first L are free."""
    return tf.pad(part, [[0, 0], [0, 0], [0, capacity - tf.shape(part)[2]], [0, 0]])


def row_of(buffer: Tensor, slot: Tensor, length: Tensor) -> Tensor:
    """The first `length` [] slots of one row of a buffer, [1, heads, length, size]."""
    return tf.slice(buffer, [slot, 0, 0, 0], [1, -1, length, -1])


def rearranged(
    buffers: Sequence[Tensor],
    staying: Tensor,
    joining: Tensor,
    parts_of: Callable[[Tensor], Sequence[Tensor]],
    batch: Tensor,
    capacity: Tensor,
) -> tuple[Tensor, ...]:
    """New buffers [batch, heads, capacity, size].

    Args:
        buffers: the old ones.
        staying: int32 [S], the rows of the old buffers that become the first rows of the new ones.
        joining: int32 [J], what `parts_of` is called with for each of the next rows.
        parts_of: returns the keys and values [1, heads, L, size] of a row, one for each buffer.
        batch: int32 [], S + J or more.
        capacity: int32 [].
    """
    count = tf.size(staying)
    free = batch - count

    def extended(buffer: Tensor) -> Tensor:
        kept = tf.gather(buffer[:, :, :capacity], staying)
        return tf.pad(kept, [[0, free], [0, 0], [0, capacity - tf.shape(kept)[2]], [0, 0]])

    def join(index: Tensor, *new: Tensor) -> tuple[Tensor, ...]:
        parts = parts_of(joining[index])
        at = (count + index)[None]
        return index + 1, *(
            tf.raw_ops.InplaceUpdate(x=buffer, i=at, v=padded(part, capacity))
            for buffer, part in zip(new, parts, strict=True)
        )

    new = [extended(buffer) for buffer in buffers]
    specs = [buffer.shape for buffer in buffers]
    for buffer, spec in zip(new, specs, strict=True):
        buffer.set_shape(spec)
    _, *new = tf.while_loop(
        lambda index, *_: index < tf.size(joining),
        join,
        (0, *new),
        shape_invariants=(tf.TensorShape([]), *specs),
        parallel_iterations=1,
    )
    return tuple(new)


class Writer:
    """Writes keys and values of new tokens into buffers of one shape.

    Args:
        buffer: one of the buffers, [B, heads, capacity, size].
        slots: int32 [B, L], where those of each token go.
    """

    def __init__(self, buffer: Tensor, slots: Tensor) -> None:
        self._size = buffer.shape[-1]
        dynamic = tf.shape(buffer)
        batch, heads, capacity, _ = (
            size if size is not None else dynamic[index] for index, size in enumerate(buffer.shape)
        )
        self._shape = buffer.shape if buffer.shape.is_fully_defined() else dynamic
        rows = (tf.range(batch)[:, None] * heads + tf.range(heads)) * capacity
        self._rows = tf.reshape(rows[:, :, None] + slots[:, None], [-1])

    def write(self, buffer: Tensor, new: Tensor) -> Tensor:
        """The buffer with `new` [B, heads, L, size] in it, written in place; `buffer` must not be used afterwards."""
        flat = tf.reshape(buffer, [-1, self._size])
        values = tf.reshape(new, [-1, self._size])
        # A scatter would copy the buffer. Only the shape of the old buffer is read after this.
        flat = tf.raw_ops.InplaceUpdate(x=flat, i=self._rows, v=values)
        written = tf.reshape(flat, self._shape)
        written.set_shape(buffer.shape)
        return written

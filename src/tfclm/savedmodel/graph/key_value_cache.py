"""The key-value cache of rows that are decoded together: one buffer per layer for keys and one for values.

Tokens are written into the buffers in place. The buffers are made anew when rows join or leave, or need more slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

__all__ = ["CompiledSizes", "Writer", "fitted", "rearranged", "row_of", "zeros"]

Tensor = Any


class CompiledSizes(NamedTuple):
    """The sizes of the key-value cache that XLA compiles for, ascending."""

    rows: Sequence[int]
    capacities: Sequence[int]


def zeros(shape: Sequence[Tensor | int], count: int) -> list[Tensor]:
    """`count` tensors of zeros, float32 [B, heads, capacity, size], each with its own memory, which may be written to.

    TensorFlow merges equal tensors of `tf.zeros`.
    """
    static = [size if isinstance(size, int) else None for size in shape]
    dynamic = tf.stack(shape)
    return [tf.ensure_shape(tf.raw_ops.Empty(shape=dynamic, dtype=tf.float32, init=True), static) for _ in range(count)]


def fitted(parts: Sequence[Tensor], length: Tensor, capacity: Tensor) -> list[Tensor]:
    """The first `length` [] slots of keys and values [B, heads, L, size], with `capacity` [] slots, `length` or more.

    The other slots are free. If there are none, these may be the given tensors themselves.
    """
    size, paddings = tf.stack([-1, -1, length, -1]), _at_the_end(capacity - length)
    return [_as_before(tf.pad(tf.slice(part, [0] * 4, size), paddings), part) for part in parts]


def row_of(buffers: Sequence[Tensor], slot: Tensor, length: Tensor) -> list[Tensor]:
    """A copy of the first `length` [] slots of one row of each buffer, [1, heads, length, size]."""
    begin, size = tf.stack([slot, 0, 0, 0]), tf.stack([1, -1, length, -1])
    parts = [tf.slice(buffer, begin, size) for buffer in buffers]
    # The slice of a whole row has the memory of the buffer, and would keep the rows beside it there.
    is_whole = length == tf.shape(buffers[0])[2]
    copies = tf.cond(is_whole, lambda: [tf.raw_ops.DeepCopy(x=part) for part in parts], lambda: parts)
    return [_as_before(part, buffer, 1) for part, buffer in zip(copies, buffers, strict=True)]


def _at_the_end(slots: Tensor) -> Tensor:
    """Paddings that add `slots` [] slots at the end."""
    return tf.scatter_nd([[2, 1]], slots[None], [4, 2])


def _as_before(changed: Tensor, part: Tensor, batch: int | None = None) -> Tensor:
    """Sets the static shape of keys or values whose slots have changed."""
    changed.set_shape([batch, part.shape[1], None, part.shape[3]])
    return changed


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
    kept = tf.minimum(tf.shape(buffers[0])[2], capacity)
    size = tf.stack([-1, -1, kept, -1])
    paddings = tf.scatter_nd([[0, 1], [2, 1]], tf.stack([batch - count, capacity - kept]), [4, 2])

    def extended(buffer: Tensor) -> Tensor:
        return tf.pad(tf.gather(tf.slice(buffer, [0] * 4, size), staying), paddings)

    def join(index: Tensor, *new: Tensor) -> tuple[Tensor, ...]:
        parts = parts_of(joining[index])
        at, free = (count + index)[None], _at_the_end(capacity - tf.shape(parts[0])[2])
        return index + 1, *(
            tf.raw_ops.InplaceUpdate(x=buffer, i=at, v=tf.pad(part, free))
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

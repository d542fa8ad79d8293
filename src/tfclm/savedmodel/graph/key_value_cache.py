"""The key-value cache of a decoding loop, passed to the layers of transformers as their past.

Those layers append to their past with `tf.concat`, which copies all of it at every step. A `Past` looks one position
shorter than its buffer, and `tf.concat` of it with a new position writes into the buffer in place: into the row's own
slot, for later steps, and into the last slot, where the layers expect the current position. So one loop serves every
architecture, each row has its own length, and no op needs XLA.
"""

# No postponed annotations here: TensorFlow's dispatch reads the real ones.

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Union

import tensorflow as tf

__all__ = ["Past", "allocate", "as_past"]

Tensor = Any


class Past(tf.experimental.ExtensionType):
    """Keys or values of one layer: `buffer` [B, heads, capacity, size], whose last slot is the current position's.

    `slots` int32 [B] are the slots in which the rows store the current position. `index` is the buffer's place among
    all layers' buffers. `compiled`: XLA compiles the call.
    """

    index: int
    compiled: bool
    buffer: tf.Tensor
    slots: tf.Tensor

    @property
    def shape(self) -> "_Shape":
        """The shape that a layer sees: one position less than the buffer's."""
        return _Shape(self)

    @property
    def dtype(self) -> tf.DType:
        """The buffer's type."""
        return self.buffer.dtype


class _Shape:
    """A static shape whose unknown sizes are tensors, for layers that read sizes from `shape` only."""

    def __init__(self, past: Past) -> None:
        self._past = past

    def as_list(self) -> list[int | None]:
        batch, heads, capacity, size = self._past.buffer.shape
        return [batch, heads, None if capacity is None else capacity - 1, size]

    def __getitem__(self, dimension: int) -> Any:
        static = self.as_list()[dimension]
        return tf.shape(self._past)[dimension] if static is None else static


_updated_buffers: list[dict[int, Tensor]] = []  # by index, for each call of `as_past` that is in progress


def allocate(prompt: Tensor, capacity: Tensor) -> Tensor:
    """A buffer [B, heads, capacity, size] that begins with the keys or values of prompts, [B, heads, L, size]."""
    free = capacity - tf.shape(prompt)[2]
    return tf.pad(prompt, [[0, 0], [0, 0], [0, free], [0, 0]])


@contextlib.contextmanager
def as_past(
    buffers: Sequence[Tensor], slots: Tensor, *, xla: bool = False
) -> Iterator[tuple[tuple[tuple[Past, ...], ...], list[Tensor]]]:
    """The past for one call of a model, one (keys, values) per layer, and a list for the updated buffers.

    The list is filled when the context ends; the given buffers must not be used afterwards. `xla`: XLA compiles the
    call.
    """
    pasts = [Past(index, xla, buffer, slots) for index, buffer in enumerate(buffers)]
    updated: list[Tensor] = []
    _updated_buffers.append({})
    try:
        yield tuple(tuple(pasts[first : first + 2]) for first in range(0, len(pasts), 2)), updated
        by_index = _updated_buffers[-1]
        if len(by_index) != len(pasts):
            raise ValueError(f"the model's layers used {len(by_index)} of {len(pasts)} tensors of the past")
        updated.extend(by_index[index] for index in range(len(pasts)))
    finally:
        _updated_buffers.pop()


@tf.experimental.dispatch_for_api(tf.shape, {"input": Past})
def _shape(input: Past, out_type: tf.DType = tf.int32, name: str | None = None) -> Tensor:
    return tf.shape(input.buffer, out_type) - tf.constant([0, 0, 1, 0], out_type)


@tf.experimental.dispatch_for_api(tf.unstack, {"value": list[Past]})
def _unstack(value: Any, num: int | None = None, axis: int = 0, name: str = "unstack") -> list[Past]:
    return list(value)


# TensorFlow's dispatch does not support unions written with |.
@tf.experimental.dispatch_for_api(tf.concat, {"values": list[Union[Past, tf.Tensor]]})  # noqa: UP007
def _concat(values: Any, axis: int, name: str = "concat") -> Tensor:
    past, current = values
    batch, heads, capacity, size = (
        static if static is not None else dynamic
        for static, dynamic in zip(past.buffer.shape, tf.unstack(tf.shape(past.buffer), 4), strict=True)
    )
    first = (tf.range(batch)[:, None] * heads + tf.range(heads)) * capacity
    indices = tf.stack([first + past.slots[:, None], first + capacity - 1], -1)
    flat = tf.reshape(past.buffer, [batch * heads * capacity, size])
    indices = tf.reshape(indices, [-1])
    values = tf.reshape(tf.repeat(current, 2, 2), [-1, size])
    if past.compiled:
        # XLA has no InplaceUpdate; it compiles the scatter to an update in place.
        flat = tf.tensor_scatter_nd_update(flat, indices[:, None], values)
    else:
        # A scatter would copy the buffer. Only the shape of the old buffer is read after this.
        flat = tf.raw_ops.InplaceUpdate(x=flat, i=indices, v=values)
    buffer = tf.reshape(flat, [batch, heads, capacity, size])
    _updated_buffers[-1][past.index] = buffer
    return buffer

"""The key-value cache of a decoding loop, handed to the layers of transformers as the past that they expect.

Those layers append to their past by `tf.concat`, which copies all of it at every step. What is handed to them here
looks like a past of one position less than its capacity, and `tf.concat` of it with a new position writes in place
instead: into the row's own slot, for the steps to come, and into the last slot, where the layers look for the present
one. So one loop serves every architecture, each row may have a length of its own, and no op needs XLA.
"""

# No postponed annotations here: the dispatch of TensorFlow reads the real ones.

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Union

import tensorflow as tf

__all__ = ["Past", "allocate", "as_past"]

Tensor = Any


class Past(tf.experimental.ExtensionType):
    """Keys or values of one layer: buffer [B, heads, capacity, size], whose last slot is the present position's.

    `slots` int32 [B] is where each row keeps the present position.
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
    """A static shape which gives a tensor for a size that is not known: some layers take sizes from here only."""

    def __init__(self, past: Past) -> None:
        self._past = past

    def as_list(self) -> list[int | None]:
        batch, heads, capacity, size = self._past.buffer.shape
        return [batch, heads, None if capacity is None else capacity - 1, size]

    def __getitem__(self, dimension: int) -> Any:
        static = self.as_list()[dimension]
        return tf.shape(self._past)[dimension] if static is None else static


_written: list[dict[int, Tensor]] = []  # what the calls of `as_past` that are under way have had written


def allocate(present: Tensor, capacity: Tensor) -> Tensor:
    """A buffer [B, heads, capacity, size] that begins with the keys or values of a prompt, [B, heads, L, size]."""
    free = capacity - tf.shape(present)[2]
    return tf.pad(present, [[0, 0], [0, 0], [0, free], [0, 0]])


@contextlib.contextmanager
def as_past(
    buffers: Sequence[Tensor], slots: Tensor, *, xla: bool = False
) -> Iterator[tuple[tuple[tuple[Past, ...], ...], list[Tensor]]]:
    """The past for one call of a model, ((keys, values) a layer, ...), and a list.

    The list has the buffers as they are after the call, once the context is left; the given ones are gone by then.
    `xla`: the call is to be compiled.
    """
    pasts = [Past(index, xla, buffer, slots) for index, buffer in enumerate(buffers)]
    after: list[Tensor] = []
    _written.append({})
    try:
        yield tuple(tuple(pasts[first : first + 2]) for first in range(0, len(pasts), 2)), after
        written = _written[-1]
        if len(written) != len(pasts):
            raise ValueError(f"the model's layers took {len(written)} of {len(pasts)} tensors of the past")
        after.extend(written[index] for index in range(len(pasts)))
    finally:
        _written.pop()


@tf.experimental.dispatch_for_api(tf.shape, {"input": Past})
def _shape(input: Past, out_type: tf.DType = tf.int32, name: str | None = None) -> Tensor:
    return tf.shape(input.buffer, out_type) - tf.constant([0, 0, 1, 0], out_type)


@tf.experimental.dispatch_for_api(tf.unstack, {"value": list[Past]})
def _unstack(value: Any, num: int | None = None, axis: int = 0, name: str = "unstack") -> list[Past]:
    return list(value)


# The dispatch does not know the other way to write a union.
@tf.experimental.dispatch_for_api(tf.concat, {"values": list[Union[Past, tf.Tensor]]})  # noqa: UP007
def _concat(values: Any, axis: int, name: str = "concat") -> Tensor:
    past, present = values
    batch, heads, capacity, size = (
        static if static is not None else dynamic
        for static, dynamic in zip(past.buffer.shape, tf.unstack(tf.shape(past.buffer), 4), strict=True)
    )
    first = (tf.range(batch)[:, None] * heads + tf.range(heads)) * capacity
    places = tf.stack([first + past.slots[:, None], first + capacity - 1], -1)
    flat = tf.reshape(past.buffer, [batch * heads * capacity, size])
    places = tf.reshape(places, [-1])
    values = tf.reshape(tf.repeat(present, 2, 2), [-1, size])
    if past.compiled:
        flat = tf.tensor_scatter_nd_update(
            flat, places[:, None], values
        )  # XLA, which lacks the other, does it in place
    else:
        # A scatter would copy the buffer. Of what it was before, nobody looks at more than the shape.
        flat = tf.raw_ops.InplaceUpdate(x=flat, i=places, v=values)
    whole = tf.reshape(flat, [batch, heads, capacity, size])
    _written[-1][past.index] = whole
    return whole

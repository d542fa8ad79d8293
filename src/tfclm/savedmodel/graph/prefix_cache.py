"""The prefix cache: keys and values of prompts and of rows that ended, from which prompts that begin alike start.

It holds a fixed number of entries. The list of their tensors is a value like any other: who changes it makes a new one,
which shares the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import tensorflow as tf

__all__ = ["Entries", "PrefixCache"]

Tensor = Any

MIN_MATCH = 8  # tokens; fewer are not worth a copy


class Entries(NamedTuple):
    """The entries of the cache."""

    tokens: Tensor  # int32 [E, context + 1]
    length: Tensor  # int32 [E], tokens whose keys and values the entry holds; 0 = empty
    used: Tensor  # int64 [E], the pass that used the entry last
    busy: Tensor  # bool [E], whether a row's prompt is being read into the entry
    lists: Tensor  # variant [], a list of E x parts tensors [1, key-value heads, tokens, head size]


class PrefixCache:
    """What can be done with `Entries`.

    Args:
        size: the number of entries.
        width: the tokens of a row, context + 1.
        parts: tensors per entry, keys and values of each layer.
        heads: key-value heads.
        head_dim: their size.
        enabled: whether prompts may start from other rows' keys and values.
    """

    def __init__(self, size: int, width: int, parts: int, heads: int, head_dim: int, *, enabled: bool) -> None:
        self._size, self._width, self._parts = size, width, parts
        self._shape, self._enabled = [1, heads, None, head_dim], enabled
        self._empty_shape = [1, heads, 0, head_dim]

    def empty(self) -> Entries:
        """A cache without entries."""
        return Entries(
            tokens=tf.zeros([self._size, self._width], tf.int32),
            length=tf.zeros([self._size], tf.int32),
            used=tf.fill([self._size], tf.constant(-1, tf.int64)),
            busy=tf.zeros([self._size], tf.bool),
            lists=tf.raw_ops.TensorListReserve(
                element_shape=-1, num_elements=self._size * self._parts, element_dtype=tf.float32
            ),
        )

    def read(self, entries: Entries, index: Tensor) -> list[Tensor]:
        """The keys and values of an entry that is busy, or not empty."""
        parts = [
            tf.raw_ops.TensorListGetItem(
                input_handle=entries.lists,
                index=place,
                element_shape=-1,
                element_dtype=tf.float32,
            )
            for place in self._places(index)
        ]
        for part in parts:
            part.set_shape(self._shape)
        return parts

    def write(self, entries: Entries, index: Tensor, parts: Sequence[Tensor]) -> Entries:
        """The cache with other keys and values in an entry."""
        lists = entries.lists
        for place, part in zip(self._places(index), parts, strict=True):
            lists = tf.raw_ops.TensorListSetItem(input_handle=lists, index=place, item=part)
        return entries._replace(lists=lists)

    def _places(self, index: Tensor) -> list[Tensor]:
        """Where the parts of an entry are in the list."""
        return cast("list[Tensor]", tf.unstack(index * self._parts + tf.range(self._parts)))

    def longest_match(self, entries: Entries, tokens: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """The entry that shares the most tokens with the beginning of `tokens` int32 [width], and how many.

        At most `limit` [] tokens; 0 if too few to be of use.
        """
        if not self._enabled:
            return tf.constant(0), tf.constant(0)
        common = self._common(entries, tokens, limit)
        best = tf.argmax(common, output_type=tf.int32)
        count = common[best]
        return best, tf.where(count >= MIN_MATCH, count, 0)

    def add(self, entries: Entries, number: Tensor, tokens: Tensor, parts: Sequence[Tensor], length: Tensor) -> Entries:
        """The cache with the keys and values of a row, `length` [] tokens of `tokens` int32 [width], that has ended.

        They replace an entry that the row begins with, if there is one, else the one that was used least recently. If
        all are busy, nothing is added.
        """
        if not self._enabled:
            return entries

        def added() -> Entries:
            common = self._common(entries, tokens, length)
            contained = (common == entries.length) & (entries.length > 0) & ~entries.busy
            index = tf.where(
                tf.reduce_any(contained),
                tf.argmax(tf.where(contained, entries.length, -1), output_type=tf.int32),
                self._least_recent(entries),
            )
            return self._placed(self.write(entries, index, parts), index, number, tokens, length, busy=False)

        useless = tf.reduce_all(entries.busy) | (length < MIN_MATCH)
        return cast("Entries", tf.cond(useless, lambda: entries, added))

    def begin(
        self, entries: Entries, number: Tensor, tokens: Tensor, parts: Sequence[Tensor], length: Tensor
    ) -> tuple[Entries, Tensor]:
        """The cache with a busy entry for a row's prompt, of which `length` [] tokens are read, and its index.

        Not all entries may be busy.
        """
        index = self._least_recent(entries)
        entries = self.write(entries, index, parts)
        return self._placed(entries, index, number, tokens, length, busy=True), index

    def release(self, entries: Entries, indices: Tensor) -> Entries:
        """The cache after the prompts have been read into the entries at `indices` int32 [M]."""
        if not self._enabled:
            return self.remove(entries, indices)
        no = tf.zeros_like(indices, tf.bool)
        return entries._replace(busy=tf.tensor_scatter_nd_update(entries.busy, indices[:, None], no))

    def remove(self, entries: Entries, indices: Tensor) -> Entries:
        """The cache without the entries at `indices` int32 [M], busy or not."""
        nothing, no = tf.zeros(self._empty_shape), tf.zeros_like(indices, tf.bool)

        def clear(position: Tensor, lists: Tensor) -> tuple[Tensor, Tensor]:
            changed = self.write(entries._replace(lists=lists), indices[position], [nothing] * self._parts)
            return position + 1, changed.lists

        _, lists = tf.while_loop(
            lambda position, lists: position < tf.size(indices), clear, (0, entries.lists), parallel_iterations=1
        )
        return entries._replace(
            lists=lists,
            length=tf.tensor_scatter_nd_update(entries.length, indices[:, None], tf.zeros_like(indices)),
            busy=tf.tensor_scatter_nd_update(entries.busy, indices[:, None], no),
        )

    def within(self, entries: Entries, tokens: Tensor) -> Entries:
        """The cache without the entries that were used least recently, so that it holds at most `tokens` [] tokens.

        Those that are busy stay, and are not counted.
        """

        def held(entries: Entries) -> Tensor:
            return tf.reduce_sum(tf.where(entries.busy, 0, entries.length))

        def without_oldest(entries: Entries) -> tuple[Entries]:
            oldest = tf.where(entries.busy | (entries.length == 0), tf.int64.max, entries.used)
            return (self.remove(entries, tf.argmin(oldest, output_type=tf.int32)[None]),)

        (entries,) = tf.while_loop(
            lambda entries: held(entries) > tokens, without_oldest, (entries,), parallel_iterations=1
        )
        return entries

    def _placed(
        self, entries: Entries, index: Tensor, number: Tensor, tokens: Tensor, length: Tensor, *, busy: bool
    ) -> Entries:
        at = index[None, None]
        return entries._replace(
            tokens=tf.tensor_scatter_nd_update(entries.tokens, at, tokens[None]),
            length=tf.tensor_scatter_nd_update(entries.length, at, length[None]),
            used=tf.tensor_scatter_nd_update(entries.used, at, number[None]),
            busy=tf.tensor_scatter_nd_update(entries.busy, at, [busy]),
        )

    def _least_recent(self, entries: Entries) -> Tensor:
        used = tf.where(entries.length > 0, entries.used, -1)
        return tf.argmin(tf.where(entries.busy, tf.int64.max, used), output_type=tf.int32)

    def _common(self, entries: Entries, tokens: Tensor, limit: Tensor) -> Tensor:
        """The tokens int32 [E] that each entry shares with the beginning of `tokens`, at most `limit`."""
        limits = tf.minimum(entries.length, limit)
        same = (entries.tokens == tokens[None]) & (tf.range(self._width)[None] < limits[:, None])
        # The first position that differs; the column after the last one always does.
        return tf.argmin(tf.pad(tf.cast(same, tf.int32), [[0, 0], [0, 1]]), 1, output_type=tf.int32)

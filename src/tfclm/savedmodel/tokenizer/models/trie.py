"""Finds the entries of a vocabulary in words, at all positions at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from tfclm.savedmodel.tokenizer.character_classes import Tensor
from tfclm.savedmodel.tokenizer.models.words import hash_table

__all__ = ["VECTOR", "Trie", "reachable"]

NONE = -1  # no node, or a node without an entry
VECTOR = tf.TensorShape([None])


class Trie(tf.Module):
    """Vocabularies (entry -> id) as trees of code points; the root of each vocabulary is its index."""

    def __init__(self, vocabularies: Sequence[Mapping[str, int]]) -> None:
        super().__init__()
        children: dict[int, int] = {}
        ids = [NONE] * len(vocabularies)
        for root, vocabulary in enumerate(vocabularies):
            for entry, number in vocabulary.items():
                node = root
                for character in entry:
                    node = children.setdefault(node << 21 | ord(character), len(ids))
                    if node == len(ids):
                        ids.append(NONE)
                if entry:
                    ids[node] = number
        self._children = hash_table(
            np.array(list(children), np.int64), np.array(list(children.values()), np.int32), missing=NONE
        )
        self._ids = tf.constant(ids, tf.int32)
        self.depth = max((len(entry) for vocabulary in vocabularies for entry in vocabulary), default=1) or 1

    def matches(self, points: Tensor, roots: Tensor, remaining: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Finds every entry that begins at any code point.

        Args:
            points: int32 [N].
            roots: int32 [N], the vocabulary to search at each position.
            remaining: int32 [N], the code points of the word from each position on.

        Returns:
            Position, length in code points and id of each entry, int32 [K] each, shorter entries first.
        """
        found = [
            tf.TensorArray(tf.int32, 1, dynamic_size=True, element_shape=VECTOR, infer_shape=False) for _ in range(3)
        ]

        def step(size: Tensor, position: Tensor, node: Tensor, *found: tf.TensorArray) -> tuple[Tensor, ...]:
            inside = tf.gather(remaining, position) > size
            position, node = tf.boolean_mask(position, inside), tf.boolean_mask(node, inside)
            key = tf.cast(node, tf.int64) * (1 << 21) | tf.cast(tf.gather(points, position + size), tf.int64)
            node = self._children.lookup(key)
            position, node = tf.boolean_mask(position, node != NONE), tf.boolean_mask(node, node != NONE)
            number = tf.gather(self._ids, node)
            ends = number != NONE
            positions = tf.boolean_mask(position, ends)
            values = positions, tf.fill(tf.shape(positions), size + 1), tf.boolean_mask(number, ends)
            written = tuple(array.write(size, value) for array, value in zip(found, values, strict=True))
            return size + 1, position, node, *written

        _, _, _, *found = tf.while_loop(
            lambda size, position, *_: (size == 0) | (tf.size(position) > 0),
            step,
            (0, tf.range(tf.size(points)), roots, *found),
            shape_invariants=(tf.TensorShape([]), VECTOR, VECTOR, None, None, None),
        )
        positions, sizes, numbers = (array.concat() for array in found)
        return positions, sizes, numbers


def reachable(links: Tensor, begin: Tensor) -> Tensor:
    """Which positions are reached from `begin` int32 [W] along `links` int32 [N], which end with -1: bool [N]."""
    reached = tf.TensorArray(tf.int32, 1, dynamic_size=True, element_shape=VECTOR, infer_shape=False)

    def step(round: Tensor, position: Tensor, reached: tf.TensorArray) -> tuple[Tensor, ...]:
        reached = reached.write(round, position)
        position = tf.gather(links, position)
        return round + 1, tf.boolean_mask(position, position != NONE), reached

    _, _, reached = tf.while_loop(
        lambda round, position, _: (round == 0) | (tf.size(position) > 0),
        step,
        (0, begin, reached),
        shape_invariants=(tf.TensorShape([]), VECTOR, None),
    )
    positions = reached.concat()[:, None]
    return tf.scatter_nd(positions, tf.ones_like(positions[:, 0]), tf.shape(links)) > 0

"""Where the entries of a vocabulary stand in words, found at all places at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from tfclm.savedmodel.tokenizer.character_classes import Tensor
from tfclm.savedmodel.tokenizer.models.words import table

__all__ = ["Trie", "follow"]

NONE = -1
ONE = tf.TensorShape([None])


class Trie(tf.Module):
    """Vocabularies (entry -> id) as trees of code points with a root each, numbered as they are given."""

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
        self._children = table(
            np.array(list(children), np.int64), np.array(list(children.values()), np.int32), missing=NONE
        )
        self._ids = tf.constant(ids, tf.int32)
        self.depth = max((len(entry) for vocabulary in vocabularies for entry in vocabulary), default=1) or 1

    def matches(self, points: Tensor, roots: Tensor, left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every entry that begins at a code point, [K] each: place, length in code points, id; the shorter first.

        `points` int32 [N]; below which root to look, [N]; how many code points the word has from here on, [N].
        """
        found = [tf.TensorArray(tf.int32, 1, dynamic_size=True, element_shape=ONE, infer_shape=False) for _ in range(3)]

        def step(size: Tensor, place: Tensor, node: Tensor, *found: tf.TensorArray) -> tuple[Tensor, ...]:
            there = place < tf.size(points)
            there = tf.gather(left, place) > size
            place, node = tf.boolean_mask(place, there), tf.boolean_mask(node, there)
            key = tf.cast(node, tf.int64) * (1 << 21) | tf.cast(tf.gather(points, place + size), tf.int64)
            node = self._children.lookup(key)
            place, node = tf.boolean_mask(place, node != NONE), tf.boolean_mask(node, node != NONE)
            number = tf.gather(self._ids, node)
            ends = number != NONE
            places = tf.boolean_mask(place, ends)
            values = places, tf.fill(tf.shape(places), size + 1), tf.boolean_mask(number, ends)
            written = tuple(array.write(size, value) for array, value in zip(found, values, strict=True))
            return size + 1, place, node, *written

        _, _, _, *found = tf.while_loop(
            lambda size, place, *_: (size == 0) | (tf.size(place) > 0),
            step,
            (0, tf.range(tf.size(points)), roots, *found),
            shape_invariants=(tf.TensorShape([]), ONE, ONE, None, None, None),
        )
        places, sizes, numbers = (array.concat() for array in found)
        return places, sizes, numbers


def follow(links: Tensor, begin: Tensor) -> Tensor:
    """What is reached from `begin` int32 [W] by going along `links` int32 [N], which end with -1: bool [N]."""
    reached = tf.TensorArray(tf.int32, 1, dynamic_size=True, element_shape=ONE, infer_shape=False)

    def step(round: Tensor, place: Tensor, reached: tf.TensorArray) -> tuple[Tensor, ...]:
        reached = reached.write(round, place)
        place = tf.gather(links, place)
        return round + 1, tf.boolean_mask(place, place != NONE), reached

    _, _, reached = tf.while_loop(
        lambda round, place, _: (round == 0) | (tf.size(place) > 0),
        step,
        (0, begin, reached),
        shape_invariants=(tf.TensorShape([]), ONE, None),
    )
    places = reached.concat()[:, None]
    return tf.scatter_nd(places, tf.ones_like(places[:, 0]), tf.shape(links)) > 0

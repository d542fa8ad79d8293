"""WordPiece in the graph: the longest entry that a word begins with, then the longest that goes on, and so forth."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.character_classes import Tensor
from tfclm.savedmodel.tokenizer.models.trie import Trie, follow
from tfclm.savedmodel.tokenizer.text import decode

__all__ = ["WordPiece"]


class WordPiece(tf.Module):
    """The model of a tokenizer.json, type WordPiece. Raises `InputError` for a vocabulary without its unknown token."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        vocabulary: dict[str, int] = model["vocab"]
        if model["unk_token"] not in vocabulary:
            raise InputError(f"the tokenizer's vocabulary lacks its unk_token {model['unk_token']!r}")
        self._unknown = vocabulary[model["unk_token"]]
        self._longest = model["max_input_chars_per_word"]
        prefix = model["continuing_subword_prefix"]
        inner = {token[len(prefix) :]: number for token, number in vocabulary.items() if token.startswith(prefix)}
        self._trie = Trie([vocabulary, inner])

    def spelling(self, token: str) -> bytes:
        """The entry itself."""
        return token.encode()

    def __call__(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Ids int32 [T] of words (strings [W], none empty), and where each word's begin: int64 [W + 1]."""
        splits, points = decode(words)
        splits = tf.cast(splits, tf.int32)
        sizes = splits[1:] - splits[:-1]
        word = tf.repeat(tf.range(tf.size(sizes)), sizes)
        place = tf.range(tf.size(points))
        first = place == tf.gather(splits, word)
        # In a word that is too long nothing is looked for.
        left = tf.where(tf.gather(sizes, word) > self._longest, 0, tf.gather(splits, word + 1) - place)
        places, lengths, ids = self._trie.matches(points, tf.where(first, 0, 1), left)
        # The longest one: the last.
        last = tf.math.unsorted_segment_max(tf.range(tf.size(places)), places, tf.size(points))
        found = last >= 0
        last = tf.maximum(last, 0)
        # An array may be empty: one entry more.
        size = tf.where(found, tf.gather(tf.concat([lengths, [0]], 0), last), left)
        reached = follow(tf.where(size < left, place + size, -1), splits[:-1])
        bad = tf.math.segment_max(tf.cast(reached & ~found, tf.int32), word) > 0
        bad = tf.gather(bad, word)
        kept = tf.where(bad, first, reached)
        ids = tf.where(bad, self._unknown, tf.gather(tf.concat([ids, [0]], 0), last))
        counts = tf.math.segment_sum(tf.cast(kept, tf.int64), word)
        return tf.boolean_mask(ids, kept), tf.concat([[0], tf.cumsum(counts)], 0)

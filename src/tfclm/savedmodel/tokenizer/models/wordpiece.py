"""WordPiece in the graph: the longest entry at the start of each word, then the longest one after it, and so on."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.character_classes import Tensor
from tfclm.savedmodel.tokenizer.models.trie import Trie, reachable
from tfclm.savedmodel.tokenizer.text import decode

__all__ = ["WordPiece"]


class WordPiece(tf.Module):
    """The model of a tokenizer.json, type WordPiece.

    Raises:
        InputError: the vocabulary lacks its unknown token.
    """

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        vocabulary: dict[str, int] = model["vocab"]
        if model["unk_token"] not in vocabulary:
            raise InputError(f"the tokenizer's vocabulary lacks its unk_token {model['unk_token']!r}")
        self._unknown = vocabulary[model["unk_token"]]
        self._max_characters = model["max_input_chars_per_word"]
        prefix = model["continuing_subword_prefix"]
        inner = {token[len(prefix) :]: number for token, number in vocabulary.items() if token.startswith(prefix)}
        self._trie = Trie([vocabulary, inner])

    def to_word(self, token: str) -> bytes:
        """The word that an entry of the vocabulary stands for: itself."""
        return token.encode()

    def __call__(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Ids int32 [T] of words (strings [W], none empty), and the words' row splits int64 [W + 1]."""
        splits, points = decode(words)
        splits = tf.cast(splits, tf.int32)
        sizes = splits[1:] - splits[:-1]
        word = tf.repeat(tf.range(tf.size(sizes)), sizes)
        position = tf.range(tf.size(points))
        first = position == tf.gather(splits, word)
        # Words that are too long are not searched.
        too_long = tf.gather(sizes, word) > self._max_characters
        remaining = tf.where(too_long, 0, tf.gather(splits, word + 1) - position)
        positions, lengths, ids = self._trie.matches(points, tf.where(first, 0, 1), remaining)
        # The longest entry at each position is the last one found.
        last = tf.math.unsorted_segment_max(tf.range(tf.size(positions)), positions, tf.size(points))
        found = last >= 0
        last = tf.maximum(last, 0)
        # One element is appended, because the arrays may be empty.
        size = tf.where(found, tf.gather(tf.concat([lengths, [0]], 0), last), remaining)
        reached = reachable(tf.where(size < remaining, position + size, -1), splits[:-1])
        unknown = tf.math.segment_max(tf.cast(reached & ~found, tf.int32), word) > 0
        unknown = tf.gather(unknown, word)
        kept = tf.where(unknown, first, reached)
        ids = tf.where(unknown, self._unknown, tf.gather(tf.concat([ids, [0]], 0), last))
        counts = tf.math.segment_sum(tf.cast(kept, tf.int64), word)
        return tf.boolean_mask(ids, kept), tf.concat([[0], tf.cumsum(counts)], 0)

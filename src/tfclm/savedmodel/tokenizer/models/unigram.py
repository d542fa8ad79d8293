"""Unigram in the graph: the segmentation of each word with the best score, for all words at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.character_classes import Tensor
from tfclm.savedmodel.tokenizer.models.trie import VECTOR, Trie, reachable
from tfclm.savedmodel.tokenizer.models.words import BYTE_FALLBACK, OMIT, byte_tokens, expand_byte_fallback
from tfclm.savedmodel.tokenizer.text import decode

__all__ = ["Unigram"]

UNKNOWN_PENALTY = 10.0  # an unknown character's score is the lowest score minus this


class Unigram(tf.Module):
    """The model of a tokenizer.json, type Unigram.

    Scores are added in float64 and in the order of the text, as in the fast tokenizer: equal sums are common (`aa a`
    and `a aa`), and rounding decides between them.

    Raises:
        InputError: a vocabulary that the graph cannot handle exactly.
    """

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        entries: list[tuple[str, float]] = model["vocab"]
        if model["unk_id"] is None:
            raise InputError("the tokenizer's model Unigram without unk_id is unsupported")
        self._unknown: int = model["unk_id"]
        unknown = entries[self._unknown][0]
        scores = np.array([score for _, score in entries], np.float64)
        if not np.isfinite(scores).all() or scores.min() > 0:
            raise InputError("the tokenizer's model Unigram has scores that are unsupported: infinite or all positive")
        # Unknown tokens in a row are fused to one, whose text must not be another entry. Text with an unknown character
        # in it never is, because that entry would have had a better score.
        around = [entry for entry, _ in entries if unknown in entry and unknown != entry]
        if around and (scores[self._unknown] > 0 or not all(entry.replace(unknown, "") for entry in around)):
            raise InputError(f"the tokenizer's vocabulary has entries around its unk token {unknown!r}: unsupported")
        vocabulary = {entry: number for number, (entry, _) in enumerate(entries)}
        # Two more "ids": of an unknown character, and of no entry.
        self._unknown_character, self._no_entry = len(entries), len(entries) + 1
        self._scores = tf.constant([*scores, scores.min() - UNKNOWN_PENALTY, -np.inf], tf.float64)
        self._trie = Trie([vocabulary])
        self._byte_fallback = bool(model["byte_fallback"])
        self._byte_ids = tf.constant(byte_tokens(vocabulary) if self._byte_fallback else np.full(256, OMIT, np.int32))

    def to_word(self, token: str) -> bytes:
        """The word that an entry of the vocabulary stands for: itself."""
        return token.encode()

    def __call__(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Ids int32 [T] of words (strings [W], none empty), and the words' row splits int64 [W + 1]."""
        splits, points = decode(words)
        splits = tf.cast(splits, tf.int32)
        word = tf.repeat(tf.range(tf.size(splits) - 1), splits[1:] - splits[:-1])
        position = tf.range(tf.size(points))
        ending = self._entries_by_end(points, tf.gather(splits, word + 1) - position)
        size = self._best_sizes(ending, splits)
        links = position - size
        reached = reachable(tf.where(links >= tf.gather(splits, word), links, -1), splits[1:] - 1)

        end = tf.where(reached)[:, 0]
        owner = tf.gather(word, end)
        ids = tf.gather_nd(ending, tf.stack([tf.cast(end, tf.int32), self._trie.depth - tf.gather(size, end)], 1))
        unknown = (ids == self._unknown_character) | (ids == self._unknown)
        same = tf.concat([[False], unknown[:-1] & (owner[1:] == owner[:-1])], 0)
        fused = unknown & same[: tf.size(unknown)]
        # The unknown token's own text is an entry, unless it was fused with other characters.
        alone = (ids == self._unknown) & ~fused & ~tf.concat([fused[1:], [False]], 0)[: tf.size(fused)]
        ids = tf.where(fused, OMIT, tf.where(unknown, self._unknown, ids))

        token = tf.cumsum(tf.cast(reached, tf.int32), exclusive=True)
        begins = tf.concat([[True], reached[:-1]], 0)[: tf.size(reached)]
        own = tf.where(begins, tf.gather(ids, token), OMIT)
        if self._byte_fallback:
            own = tf.where(tf.gather(unknown & ~alone, token), BYTE_FALLBACK, own)
        raw = tf.cast(tf.io.decode_raw(tf.strings.reduce_join(words), tf.uint8), tf.int32)
        ids, character = expand_byte_fallback(raw, own, self._byte_ids)
        counts = tf.math.unsorted_segment_sum(
            tf.ones_like(character, tf.int64), tf.gather(word, character), tf.size(words)
        )
        return ids, tf.concat([[0], tf.cumsum(counts)], 0)

    def _entries_by_end(self, points: Tensor, remaining: Tensor) -> Tensor:
        """The entries that end with each code point, int32 [N, depth], the longest first."""
        depth = self._trie.depth
        start, size, ids = self._trie.matches(points, tf.zeros_like(points), remaining)
        indices = tf.stack([start + size - 1, depth - size], 1)
        single = tf.scatter_nd(start[:, None], tf.cast(size == 1, tf.int32), tf.shape(points))
        column = tf.where(single > 0, self._no_entry, self._unknown_character)
        table = tf.concat([tf.fill([tf.size(points), depth - 1], self._no_entry), column[:, None]], 1)
        ending: Tensor = tf.tensor_scatter_nd_update(table, indices, ids)
        return ending

    def _best_sizes(self, ending: Tensor, splits: Tensor) -> Tensor:
        """The size of the last entry of the best segmentation of each word up to each code point, int32 [N]."""
        depth = self._trie.depth
        sizes = splits[1:] - splits[:-1]
        # Longer words first, so that the words that are still active in a step are the first ones.
        order = tf.argsort(-sizes)
        begin = tf.gather(splits[:-1], order)
        longest = tf.reduce_max(tf.concat([[0], sizes], 0))
        counts = tf.scatter_nd(sizes[:, None], tf.ones_like(sizes), longest[None] + 1)
        active = tf.cumsum(counts, exclusive=True, reverse=True)
        positions, best = (tf.TensorArray(tf.int32, longest, element_shape=VECTOR, infer_shape=False) for _ in range(2))

        def step(time: Tensor, window: Tensor, positions: tf.TensorArray, best: tf.TensorArray) -> tuple[Tensor, ...]:
            rows = active[time]
            position = begin[:rows] + time
            scores = window[:rows] + tf.gather(self._scores, tf.gather(ending, position))
            top = tf.reduce_max(scores, 1, keepdims=True)
            # Of equal scores, that with the longest last entry wins, as in the fast tokenizer.
            size = tf.reduce_max(tf.where(scores == top, tf.range(depth, 0, -1), 0), 1)
            window = tf.concat([window[:rows, 1:], top], 1)
            return time + 1, window, positions.write(time, position), best.write(time, size)

        # The scores of the best segmentations up to each of the last `depth` positions.
        start = tf.constant([[-np.inf] * (depth - 1) + [0.0]], tf.float64)
        window = tf.repeat(start, tf.size(sizes), 0)
        *_, positions, best = tf.while_loop(
            lambda time, *_: time < longest,
            step,
            (0, window, positions, best),
            shape_invariants=(tf.TensorShape([]), tf.TensorShape([None, None]), None, None),
            parallel_iterations=1,
        )
        sizes = tf.scatter_nd(positions.concat()[:, None], best.concat(), tf.shape(ending)[:1])
        return sizes

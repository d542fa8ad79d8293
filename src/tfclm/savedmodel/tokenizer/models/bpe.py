"""Byte-pair encoding in the graph: words in, token ids out, all words at once.

The fast tokenizer merges, in each word, the pair of the best rank, the leftmost first, until none is left. Here every
round merges the best pair of every word, wherever it occurs. Long words are cut into blocks so wide that what happens
in one cannot reach beyond its neighbours, and a block goes ahead when neither neighbour has a better pair: the same
merges in another order, in time that grows with the length and not with its square.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.character_classes import Array, Tensor
from tfclm.savedmodel.tokenizer.models.symbols import END_ID, ByteSymbols, CharacterSymbols
from tfclm.savedmodel.tokenizer.models.words import table
from tfclm.savedmodel.tokenizer.normalizers.normalizing import Step

__all__ = ["Merger"]

NEVER = np.iinfo(np.int32).max  # the rank of two symbols that are no pair


class Merger(tf.Module):
    """The model of a tokenizer.json, type BPE. Its first symbols are bytes, if `spelled`, or else characters.

    Raises `InputError` for settings that the graph has nothing for.
    """

    def __init__(self, model: dict[str, Any], spelled: bool) -> None:
        super().__init__()
        for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(setting):
                raise InputError(f"the tokenizer's model BPE with {setting} {model[setting]!r} is unsupported")
        self._symbols = ByteSymbols(model) if spelled else CharacterSymbols(model)
        self.spelling = self._symbols.spelling
        self.cut: Step | None = self._symbols.cut
        pairs, merged, reach = _merges(model)
        keys = np.array([left << 32 | right for left, right in pairs], np.int64)
        self._ranks = table(keys, np.array(list(pairs.values()), np.int32), missing=NEVER)
        self._merged = tf.constant(merged)
        self._width = 2 * reach  # of a block: see `limits`
        late = order_sensitive(pairs, merged)
        self.order_sensitive = tf.constant(late) if late.any() else None

    def __call__(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Ids int32 [T] of words (strings [W]), and where each word's begin: int64 [W + 1]; of no word, one more."""
        symbols = self._symbols(words)
        ends = tf.cast(symbols == END_ID, tf.int32)
        word = tf.cumsum(ends, exclusive=True)
        last = tf.cast(tf.where(ends > 0)[:, 0], tf.int32)
        first = tf.concat([[0], last[:-1] + 1], 0)
        blocks = (last - first) // self._width + 1
        place = tf.range(tf.size(symbols))
        block = tf.gather(tf.cumsum(blocks, exclusive=True), word) + (place - tf.gather(first, word)) // self._width
        owner = tf.math.segment_max(word, block)
        inside = owner[1:] == owner[:-1]

        def limits(keys: Tensor, block: Tensor) -> Tensor:
            """The best key of each block and its neighbours in the same word.

            A pair may be merged if nothing better is near. To take one of its symbols away, a neighbour must first
            become another token, which spans `reach` symbols at most and begins with a merge that is better still: so
            there is nothing to look for farther than twice `reach`.
            """
            least = tf.math.segment_min(keys, block)
            never = tf.constant(keys.dtype.max, keys.dtype)
            after = tf.concat([tf.where(inside, least[1:], never), [never]], 0)
            before = tf.concat([[never], tf.where(inside, least[:-1], never)], 0)
            return tf.minimum(least, tf.minimum(before, after))

        def merge(symbols: Tensor, block: Tensor, place: Tensor, rank: Tensor) -> tuple[Tensor, ...]:
            keys = self._keys(rank, place)
            best = (keys == tf.gather(limits(keys, block), block)) & (rank != NEVER)
            begins = best & ~tf.concat([[False], best[:-1]], 0)
            # Equal pairs overlap in a run of one symbol: every second one is merged, counted from where the run truly
            # begins, which may be in a block that has to wait.
            begin = tf.where(begins)[:, 0]
            true = tf.gather(keys, begin) != tf.gather(tf.concat([tf.constant([-1], keys.dtype), keys], 0), begin)
            run = tf.maximum(tf.cumsum(tf.cast(begins, tf.int32)) - 1, 0)
            even = (tf.range(tf.size(symbols, tf.int64)) - tf.gather(begin, run)) % 2 == 0
            chosen = best & even & tf.gather(true, run)
            symbols = tf.where(chosen, tf.gather(self._merged, tf.where(chosen, rank, 0)), symbols)
            kept = tf.where(~tf.concat([[False], chosen[:-1]], 0))[:, 0]
            symbols = tf.gather(symbols, kept)
            return symbols, tf.gather(block, kept), tf.gather(place, kept), self._rank(symbols)

        symbols, *_ = tf.while_loop(
            lambda _symbols, _block, _place, rank: tf.reduce_any(rank != NEVER),
            merge,
            (symbols, block, place, self._rank(symbols)),
            shape_invariants=(tf.TensorShape([None]),) * 4,
        )
        ends = symbols == END_ID
        last = tf.where(ends)[:, 0]
        splits = tf.concat([[0], last - tf.range(tf.size(last, tf.int64))], 0)
        return tf.boolean_mask(symbols, ~ends), splits

    def _rank(self, symbols: Tensor) -> Tensor:
        """The rank of the pair that begins at each symbol; `NEVER` where there is none, as at the end of a word."""
        wide = tf.cast(symbols, tf.int64)
        return tf.concat([self._ranks.lookup(wide[:-1] * (1 << 32) | wide[1:]), [NEVER]], 0)

    def _keys(self, rank: Tensor, place: Tensor) -> Tensor:
        """What the pairs are merged in the order of: their ranks; equal ones together unless that could differ."""
        if self.order_sensitive is None:
            return rank
        late = (rank != NEVER) & tf.gather(self.order_sensitive, tf.where(rank != NEVER, rank, 0))
        return tf.cast(rank, tf.int64) * (1 << 32) + tf.cast(tf.where(late, place, 0), tf.int64)


def _merges(model: dict[str, Any]) -> tuple[dict[tuple[int, int], int], Array, int]:
    """(left id, right id) -> rank; the id that each rank makes, int32 [ranks + 1]; the symbols of the longest."""
    vocabulary = model["vocab"]
    pairs: dict[tuple[int, int], int] = {}
    merged, reach = [], 1
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        pairs[vocabulary[left], vocabulary[right]] = rank  # of a pair that is given twice, the last counts
        merged.append(vocabulary[left + right])
        reach = max(reach, len(left + right))
    return pairs, np.array([*merged, 0], np.int32), reach


def order_sensitive(pairs: dict[tuple[int, int], int], merged: Array) -> Array:
    """Which ranks make a token that is also part of a better pair, bool like `merged`.

    Merging one occurrence of such a pair can bring about something that goes before the next occurrence.
    """
    best = np.full(max([merged.max(), *(max(pair) for pair in pairs)]) + 1, NEVER)
    for pair, rank in pairs.items():
        for part in pair:
            best[part] = min(best[part], rank)
    late: Array = best[merged] < np.arange(len(merged))
    late[-1] = False
    return late

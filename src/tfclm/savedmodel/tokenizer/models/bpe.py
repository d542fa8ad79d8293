"""Byte-pair encoding in the graph: words in, token ids out, all words at once.

The fast tokenizer merges, in each word, the pair with the best rank, the leftmost first, until none is left. Here each
round merges the best pair of every word, wherever it occurs. Long words are divided into blocks, wide enough that a
merge in one affects its neighbours at most; a block merges its best pair in rounds in which neither neighbour has a
better one. The merges are the same in another order, in time that grows linearly with the length of a word, unless
merges have to wait for each other from one end of it to the other (`order_sensitive`).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.character_classes import Array, Tensor
from tfclm.savedmodel.tokenizer.models.symbols import WORD_END_ID, ByteSymbols, CharacterSymbols
from tfclm.savedmodel.tokenizer.models.words import hash_table
from tfclm.savedmodel.tokenizer.normalizers.normalizing import Step

__all__ = ["BPE"]

NO_PAIR = np.iinfo(np.int32).max  # the rank of two symbols that never merge

_Neighbors = dict[int, list[tuple[int, int]]]  # token -> ranks and other tokens of its pairs, the best first


class BPE(tf.Module):
    """The model of a tokenizer.json, type BPE; it starts from bytes if it is `byte_level`, else from characters.

    Raises:
        InputError: a setting that the graph does not support.
    """

    def __init__(self, model: dict[str, Any], byte_level: bool) -> None:
        super().__init__()
        for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(setting):
                raise InputError(f"the tokenizer's model BPE with {setting} {model[setting]!r} is unsupported")
        self._symbols = ByteSymbols(model) if byte_level else CharacterSymbols(model)
        self.to_word = self._symbols.to_word
        self.split_step: Step | None = self._symbols.split_step
        pairs, merged, reach = _merges(model)
        keys = np.array([left << 32 | right for left, right in pairs], np.int64)
        self._ranks = hash_table(keys, np.array(list(pairs.values()), np.int32), missing=NO_PAIR)
        self._merged = tf.constant(merged)
        self._block_size = 2 * reach  # see `_best_nearby`
        sensitive = order_sensitive(pairs, merged)
        self.order_sensitive = tf.constant(sensitive) if sensitive.any() else None

    def __call__(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Ids int32 [T] of words (strings [W]), and the words' row splits int64 [W + 1]; W = 0 gives one empty word."""
        symbols = self._symbols(words)
        block, position, continues = self._divide(symbols)
        symbols, *_ = tf.while_loop(
            lambda _symbols, _block, _position, rank: tf.reduce_any(rank != NO_PAIR),
            lambda *state: self._merge(continues, *state),
            (symbols, block, position, self._rank(symbols)),
            shape_invariants=(tf.TensorShape([None]),) * 4,
        )
        ends = symbols == WORD_END_ID
        last = tf.where(ends)[:, 0]
        splits = tf.concat([[0], last - tf.range(tf.size(last, tf.int64))], 0)
        return tf.boolean_mask(symbols, ~ends), splits

    def _divide(self, symbols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block and the position of each symbol, int32 [S] each, and which blocks continue in the next, bool."""
        ends = tf.cast(symbols == WORD_END_ID, tf.int32)
        word = tf.cumsum(ends, exclusive=True)
        last = tf.cast(tf.where(ends > 0)[:, 0], tf.int32)
        first = tf.concat([[0], last[:-1] + 1], 0)
        blocks = (last - first) // self._block_size + 1
        position = tf.range(tf.size(symbols))
        offset = (position - tf.gather(first, word)) // self._block_size
        block = tf.gather(tf.cumsum(blocks, exclusive=True), word) + offset
        word_of_block = tf.math.segment_max(word, block)
        return block, position, word_of_block[1:] == word_of_block[:-1]

    def _merge(
        self, continues: Tensor, symbols: Tensor, block: Tensor, position: Tensor, rank: Tensor
    ) -> tuple[Tensor, ...]:
        """One round: the symbols that are left, with their blocks and positions, and the ranks of their pairs."""
        keys = self._keys(rank, position)
        best = (keys == tf.gather(_best_nearby(keys, block, continues), block)) & (rank != NO_PAIR)
        begins = best & ~tf.concat([[False], best[:-1]], 0)
        # Equal pairs overlap in a run of one symbol: every second one is merged, counted from the true beginning of
        # the run, which may be in a block that has to wait.
        begin = tf.where(begins)[:, 0]
        true = tf.gather(keys, begin) != tf.gather(tf.concat([tf.constant([-1], keys.dtype), keys], 0), begin)
        run = tf.maximum(tf.cumsum(tf.cast(begins, tf.int32)) - 1, 0)
        even = (tf.range(tf.size(symbols, tf.int64)) - tf.gather(begin, run)) % 2 == 0
        chosen = best & even & tf.gather(true, run)
        symbols = tf.where(chosen, tf.gather(self._merged, tf.where(chosen, rank, 0)), symbols)
        kept = tf.where(~tf.concat([[False], chosen[:-1]], 0))[:, 0]
        symbols = tf.gather(symbols, kept)
        return symbols, tf.gather(block, kept), tf.gather(position, kept), self._rank(symbols)

    def _rank(self, symbols: Tensor) -> Tensor:
        """The rank of the pair that begins at each symbol; `NO_PAIR` if there is none, as at the end of a word."""
        wide = tf.cast(symbols, tf.int64)
        return tf.concat([self._ranks.lookup(wide[:-1] * (1 << 32) | wide[1:]), [NO_PAIR]], 0)

    def _keys(self, rank: Tensor, position: Tensor) -> Tensor:
        """Keys that order the merges: the ranks, and the positions too for pairs that must be merged in turn."""
        if self.order_sensitive is None:
            return rank
        sensitive = (rank != NO_PAIR) & tf.gather(self.order_sensitive, tf.where(rank != NO_PAIR, rank, 0))
        return tf.cast(rank, tf.int64) * (1 << 32) + tf.cast(tf.where(sensitive, position, 0), tf.int64)


def _best_nearby(keys: Tensor, block: Tensor, continues: Tensor) -> Tensor:
    """The lowest key of each block and its neighbours in the same word.

    A pair may be merged if no better one is near. To take one of its symbols away, a neighbour must first become
    another token, which spans at most as many symbols as the longest one and begins with a better merge. So twice that
    length is far enough to look.
    """
    lowest = tf.math.segment_min(keys, block)
    no_pair = tf.constant(keys.dtype.max, keys.dtype)
    after = tf.concat([tf.where(continues, lowest[1:], no_pair), [no_pair]], 0)
    before = tf.concat([[no_pair], tf.where(continues, lowest[:-1], no_pair)], 0)
    return tf.minimum(lowest, tf.minimum(before, after))


def _merges(model: dict[str, Any]) -> tuple[dict[tuple[int, int], int], Array, int]:
    """(left id, right id) -> rank; the merged id of each rank, int32 [ranks + 1]; symbols of the longest token."""
    vocabulary = model["vocab"]
    pairs: dict[tuple[int, int], int] = {}
    merged, reach = [], 1
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        pairs[vocabulary[left], vocabulary[right]] = rank  # the last rank of a pair that occurs twice
        merged.append(vocabulary[left + right])
        reach = max(reach, len(left + right))
    return pairs, np.array([*merged, 0], np.int32), reach


def order_sensitive(pairs: dict[tuple[int, int], int], merged: Array) -> Array:
    """Which ranks have to be merged one occurrence after the other, from left to right: bool like `merged`.

    A token that is part of better pairs takes its neighbours before the next occurrence is merged, again and again.
    That makes no difference unless it could take a part of another occurrence, one that has grown in the same way, or a
    symbol that another one could take.
    """
    best = np.full(max([merged.max(), *(max(pair) for pair in pairs)]) + 1, NO_PAIR)
    takes: tuple[_Neighbors, _Neighbors] = (defaultdict(list), defaultdict(list))  # those after a token, before it
    for (left, right), rank in sorted(pairs.items(), key=lambda item: item[1]):
        takes[0][left].append((rank, right))
        takes[1][right].append((rank, left))
        for part in (left, right):
            best[part] = min(best[part], rank)
    grows = best[merged] < np.arange(len(merged))
    sensitive = np.zeros_like(grows)
    for (left, right), rank in pairs.items():
        if grows[rank]:
            after, before, grown = _growth(int(merged[rank]), rank, takes, merged)
            sensitive[rank] = left in after or right in before or bool(after & (before | grown))
    return sensitive


def _growth(token: int, rank: int, takes: tuple[_Neighbors, _Neighbors], merged: Array) -> tuple[set[int], ...]:
    """What a token takes in pairs better than `rank`, after itself and before itself, and what it becomes."""
    taken: tuple[set[int], set[int]] = (set(), set())
    grown, left = {token}, [token]
    while left:
        current = left.pop()
        for neighbors, symbols in zip(takes, taken, strict=True):
            for better, symbol in neighbors.get(current, ()):
                if better >= rank:
                    break
                symbols.add(symbol)
                if merged[better] not in grown:
                    grown.add(int(merged[better]))
                    left.append(int(merged[better]))
    return *taken, grown

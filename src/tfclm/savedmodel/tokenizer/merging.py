"""Byte-level BPE in the graph: words in, token ids out, all words at once.

The fast tokenizer merges, in each word, the pair of the best rank, the leftmost first, until none is left. Here every
round merges the best pair of every word, wherever it occurs. Long words are cut into blocks so wide that what happens
in one cannot reach beyond its neighbours, and a block goes ahead when neither neighbour has a better pair: the same
merges in another order, in time that grows with the length and not with its square.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.classes import Array, Tensor

__all__ = ["Merger", "ragged_gather", "to_bytes"]

NEVER = np.iinfo(np.int32).max  # the rank of two symbols that are no pair
END = 0xFF  # follows each word; UTF-8 does not have this byte
END_ID, DROPPED = -1, -2


def _alphabet() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the other bytes are U+0100 and on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTES = _alphabet()


def to_bytes(token: str) -> bytes | None:
    """What an entry of the vocabulary stands for; None if it is not spelled in the byte-level alphabet."""
    try:
        return bytes(BYTES[character] for character in token)
    except KeyError:
        return None


def ragged_gather(values: Tensor, splits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows `rows` [R] of ragged values (`splits` int64, one more than rows): values, splits [R + 1]."""
    gathered = tf.raw_ops.RaggedGather(
        params_nested_splits=[splits], params_dense_values=values, indices=rows, OUTPUT_RAGGED_RANK=1
    )
    return gathered.output_dense_values, gathered.output_nested_splits[0]


class Merger(tf.Module):
    """The model of a tokenizer.json, type BPE; `tokenize` is the fast tokenizer's own method for a word.

    Raises `InputError` for settings that the graph has nothing for.
    """

    def __init__(self, model: dict[str, Any], tokenize: Callable[[str], list[Any]]) -> None:
        super().__init__()
        _check(model)
        vocabulary: dict[str, int] = model["vocab"]
        self._byte_ids = tf.constant(_byte_ids(model))
        self._words = _table(*_whole_words(vocabulary, tokenize), missing=-1)
        pairs, merged, reach = _merges(model)
        keys = np.array([left << 32 | right for left, right in pairs], np.int64)
        self._ranks = _table(keys, np.array(list(pairs.values()), np.int32), missing=NEVER)
        self._merged = tf.constant(merged)
        self._width = 2 * reach  # of a block: see `limits`
        late = _late(pairs, merged)
        self._late = tf.constant(late) if late.any() else None

    def __call__(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Ids int32 [T] of the words (strings [W] of valid UTF-8), and where each word's begin: int64 [W + 1]."""
        # Most words of a text are one token: no merging.
        whole = self._words.lookup(words)
        known = whole >= 0
        ids, splits = self._merge(tf.boolean_mask(words, ~known))
        single = tf.boolean_mask(whole, known)
        broken, total = tf.size(splits) - 1, splits[-1]
        splits = tf.concat([splits, total + 1 + tf.range(tf.size(single, tf.int64))], 0)
        known = tf.cast(known, tf.int32)
        rows = tf.where(known > 0, broken + tf.cumsum(known), tf.cumsum(1 - known)) - 1
        return ragged_gather(tf.concat([ids, single], 0), splits, rows)

    def _merge(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and splits of words that are not in the table; of no word, one empty row."""
        end = tf.constant(bytes([END]))
        text = tf.strings.reduce_join(words, separator=bytes([END])) + end
        symbols = tf.gather(self._byte_ids, tf.cast(tf.io.decode_raw(text, tf.uint8), tf.int32))
        symbols = tf.boolean_mask(symbols, symbols != DROPPED)
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
            become another token, which spans `reach` bytes at most and begins with a merge that is better still: so
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
        if self._late is None:
            return rank
        late = (rank != NEVER) & tf.gather(self._late, tf.where(rank != NEVER, rank, 0))
        return tf.cast(rank, tf.int64) * (1 << 32) + tf.cast(tf.where(late, place, 0), tf.int64)


def _check(model: dict[str, Any]) -> None:
    if model["type"] != "BPE":
        raise InputError(f"the tokenizer's model {model['type']} is unsupported in the graph: byte-level BPE is")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise InputError(f"the tokenizer's model BPE with {setting} {model[setting]!r} is unsupported")


def _byte_ids(model: dict[str, Any]) -> Array:
    """The id of each byte, int32 [256]. As in the fast tokenizer, bytes that the vocabulary lacks are left out."""
    ids = np.full(256, DROPPED, np.int32)
    for character, byte in BYTES.items():
        ids[byte] = model["vocab"].get(character, DROPPED)
    used = np.r_[0:0xC0, 0xC2:0xF5]
    if (ids[used] == DROPPED).any() and (model.get("unk_token") is not None or model.get("byte_fallback")):
        raise InputError("the tokenizer's vocabulary lacks some bytes: with unk_token or byte_fallback, unsupported")
    ids[END] = END_ID
    return ids


def _whole_words(vocabulary: dict[str, int], tokenize: Callable[[str], list[Any]]) -> tuple[list[bytes], Array]:
    """The words that are one token, and its id."""
    words, ids = [], []
    for token, number in vocabulary.items():
        text = to_bytes(token)
        if text and _is_text(text) and [found.id for found in tokenize(token)] == [number]:
            words.append(text)
            ids.append(number)
    return words, np.array(ids, np.int32)


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _merges(model: dict[str, Any]) -> tuple[dict[tuple[int, int], int], Array, int]:
    """(left id, right id) -> rank; the id that each rank makes, int32 [ranks + 1]; the bytes of the longest."""
    vocabulary = model["vocab"]
    pairs: dict[tuple[int, int], int] = {}
    merged, reach = [], 1
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        pairs[vocabulary[left], vocabulary[right]] = rank  # of a pair that is given twice, the last counts
        merged.append(vocabulary[left + right])
        reach = max(reach, len(left + right))
    return pairs, np.array([*merged, 0], np.int32), reach


def _late(pairs: dict[tuple[int, int], int], merged: Array) -> Array:
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


def _table(keys: Any, values: Array, missing: int) -> Any:
    # A table may not be empty: this key is neither a word nor a pair.
    if not len(keys):
        keys, values = ([b""] if isinstance(keys, list) else np.array([-1], np.int64)), np.array([missing], np.int32)
    return tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(tf.constant(keys), tf.constant(values)), missing
    )

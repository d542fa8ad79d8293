"""The symbols that byte-pair encoding starts from: the bytes or characters of words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.character_classes import NUM_CODE_POINTS, CodePointTable, Tensor
from tfclm.savedmodel.tokenizer.models.words import BYTE_FALLBACK, OMIT, byte_tokens, expand_byte_fallback, hash_table
from tfclm.savedmodel.tokenizer.normalizers.normalizing import Step
from tfclm.savedmodel.tokenizer.text import Text, decode

__all__ = ["BYTE_ALPHABET", "WORD_END_ID", "ByteSymbols", "CharacterSymbols", "to_bytes"]

WORD_END = 0xFF  # the byte put after each word; UTF-8 never contains it
WORD_END_ID = -1  # its symbol
UNKNOWN = -4  # stands for a character without a token
MAX_RUN_SIZE = 256  # characters in a token of a run


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte: printable Latin-1 stands for itself, the other bytes are U+0100 and on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


def to_bytes(token: str) -> bytes | None:
    """The bytes of an entry of the vocabulary; None if it has characters outside the byte-level alphabet."""
    try:
        return bytes(BYTE_ALPHABET[character] for character in token)
    except KeyError:
        return None


class ByteSymbols(tf.Module):
    """Bytes, as characters of the byte-level alphabet; bytes that the vocabulary lacks are omitted."""

    split_step: Step | None = None

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        ids = np.full(256, OMIT, np.int32)
        for character, byte in BYTE_ALPHABET.items():
            ids[byte] = model["vocab"].get(character, OMIT)
        used = np.r_[0:0xC0, 0xC2:0xF5]
        if (ids[used] == OMIT).any() and (model.get("unk_token") is not None or model.get("byte_fallback")):
            raise InputError(
                "the tokenizer's vocabulary lacks some bytes: with unk_token or byte_fallback, unsupported"
            )
        ids[WORD_END] = WORD_END_ID
        self._ids = tf.constant(ids)

    def to_word(self, token: str) -> bytes | None:
        """The word that an entry of the vocabulary stands for; None if its bytes are not UTF-8."""
        word = to_bytes(token)
        try:
            return word if word is None or word.decode() is not None else None
        except UnicodeDecodeError:
            return None

    def __call__(self, words: Tensor) -> Tensor:
        """Symbols int32 [S] of words (strings [W]), `WORD_END_ID` after each; for W = 0, one `WORD_END_ID`."""
        symbols = tf.gather(self._ids, _word_bytes(words))
        return tf.boolean_mask(symbols, symbols != OMIT)


class CharacterSymbols(tf.Module):
    """Characters. One that the vocabulary lacks becomes its bytes (`byte_fallback`), the unknown token, or nothing."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        vocabulary: dict[str, int] = model["vocab"]
        self._unknown, self._fuse = OMIT, bool(model["fuse_unk"])
        byte_ids = np.full(256, OMIT, np.int32)
        if model["byte_fallback"]:
            self._unknown, byte_ids = BYTE_FALLBACK, byte_tokens(vocabulary)
        elif model["unk_token"] is not None:
            if model["unk_token"] not in vocabulary:
                raise InputError(f"the tokenizer's vocabulary lacks its unk_token {model['unk_token']!r}")
            self._unknown = vocabulary[model["unk_token"]]
        self._byte_ids = tf.constant(byte_ids)
        ids = np.full(NUM_CODE_POINTS, UNKNOWN, np.int32)
        for token, number in vocabulary.items():
            if len(token) == 1:
                ids[ord(token)] = number
        self._ids = CodePointTable(ids)
        self.split_step: Step | None = None
        merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        parts = {vocabulary[part] for merge in merges for part in merge}
        if not model["ignore_merges"] and not parts & {self._unknown, *byte_ids.tolist()}:
            keys = {ord(left[-1]) << 21 | ord(right[0]) for left, right in merges if left and right}
            self._mergeable = hash_table(np.array(sorted(keys), np.int64), np.ones(len(keys), np.int32), missing=0)
            run_sizes = np.zeros(NUM_CODE_POINTS, np.int32)
            for character, size in _run_sizes(merges).items():
                run_sizes[ord(character)] = size
            self._run_sizes = CodePointTable(run_sizes) if run_sizes.any() else None
            self.split_step = self._split

    def to_word(self, token: str) -> bytes:
        """The word that an entry of the vocabulary stands for: itself."""
        return token.encode()

    def __call__(self, words: Tensor) -> Tensor:
        """Symbols int32 [S] of words (strings [W]), `WORD_END_ID` after each; for W = 0, one `WORD_END_ID`."""
        raw = _word_bytes(words)
        # The same code points, with a NUL for each word's end.
        _, points = decode(tf.strings.reduce_join(words, separator="\0")[None] + "\0")
        ids = tf.where(
            tf.boolean_mask(raw, tf.bitwise.bitwise_and(raw, 0xC0) != 0x80) == WORD_END, WORD_END_ID, self._ids(points)
        )
        unknown = ids == UNKNOWN
        ids = tf.where(unknown, self._unknown, ids)
        if self._fuse and self._unknown >= 0:
            ids = tf.where(unknown & tf.concat([[False], unknown[:-1]], 0), OMIT, ids)
        return expand_byte_fallback(raw, ids, self._byte_ids)[0]

    def _split(self, text: Text) -> Text:
        """Splits pieces between characters that no merge joins, because short words need fewer rounds of merges."""
        unknown = self._ids(text.points) == UNKNOWN
        before = tf.concat([text.points[:1], text.points[:-1]], 0)
        mergeable = self._mergeable.lookup(tf.cast(before, tf.int64) * (1 << 21) | tf.cast(text.points, tf.int64)) > 0
        unknown_before = tf.concat([unknown[:1], unknown[:-1]], 0)
        if self._unknown == OMIT:  # the characters around it become neighbours
            mergeable |= unknown | unknown_before
        elif self._unknown != BYTE_FALLBACK:  # unknown characters in a row are fused
            mergeable |= unknown & unknown_before
        starts = text.starts | (text.is_ordinary & ~mergeable)
        if self._run_sizes is not None:
            begins = starts | (text.points != before)
            first = tf.gather(tf.where(begins)[:, 0], tf.cumsum(tf.cast(begins, tf.int32)) - 1)
            offset = tf.range(tf.size(text.points)) - tf.cast(first, tf.int32)
            size = tf.where(text.is_ordinary & tf.gather(starts, first), self._run_sizes(text.points), 0)
            starts |= (size > 0) & (offset % tf.maximum(size, 1) == 0)
        return text._replace(starts=starts)


def _run_sizes(merges: list[Sequence[str]]) -> dict[str, int]:
    """Characters whose runs, at the beginning of a word, become tokens of one size: character -> that size.

    A run can be divided between such tokens. What follows it takes its last character at most.
    """
    ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
    parts = {part for merge in merges for part in merge}
    joined = {right[:1] for left, right in merges if left == right[:1] * len(left) and right != right[:1] * len(right)}
    doubled = [left for left, right in merges if left == right and len(left) == 1 and left not in joined]
    sizes = {character: _run_size(character, ranks, parts) for character in doubled}
    return {character: size for character, size in sizes.items() if size > 2}


def _run_size(character: str, ranks: dict[tuple[str, str], int], parts: set[str]) -> int:
    """The size of the tokens of a run, which are part of no pair; 0 if it has no such tokens."""
    tokens: list[str] = []
    while sum(map(len, tokens)) < MAX_RUN_SIZE:
        tokens.append(2 * character)
        while True:
            pairs = list(zip(tokens, [*tokens[1:], character], strict=True))
            rank, first = min((ranks.get(pair, len(ranks)), index) for index, pair in enumerate(pairs))
            if rank >= ranks[character, character]:
                break
            tokens[first : first + 2] = ["".join(pairs[first])]
        if len(tokens) == 1 and tokens[0] not in parts:
            return len(tokens[0])
    return 0


def _word_bytes(words: Tensor) -> Tensor:
    """The bytes of words, `WORD_END` after each, int32 [N]."""
    end = bytes([WORD_END])
    text = tf.strings.reduce_join(words, separator=end) + tf.constant(end)
    return tf.cast(tf.io.decode_raw(text, tf.uint8), tf.int32)

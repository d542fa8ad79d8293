"""What byte-pair encoding begins with: the first symbols of words, bytes or characters."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.character_classes import POINTS, Table, Tensor
from tfclm.savedmodel.tokenizer.models.words import BYTE_FALLBACK, OMIT, byte_tokens, expand_byte_fallback, table
from tfclm.savedmodel.tokenizer.normalizers.normalizing import Step
from tfclm.savedmodel.tokenizer.text import Text, decode

__all__ = ["END_ID", "ByteSymbols", "CharacterSymbols", "to_bytes"]

END = 0xFF  # the byte that follows each word; UTF-8 does not have it
END_ID = -1  # and its symbol
UNKNOWN = -4


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


class ByteSymbols(tf.Module):
    """Bytes, which the vocabulary spells in the byte-level alphabet; those that it lacks are left out."""

    cut: Step | None = None

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        ids = np.full(256, OMIT, np.int32)
        for character, byte in BYTES.items():
            ids[byte] = model["vocab"].get(character, OMIT)
        used = np.r_[0:0xC0, 0xC2:0xF5]
        if (ids[used] == OMIT).any() and (model.get("unk_token") is not None or model.get("byte_fallback")):
            raise InputError(
                "the tokenizer's vocabulary lacks some bytes: with unk_token or byte_fallback, unsupported"
            )
        ids[END] = END_ID
        self._ids = tf.constant(ids)

    def spelling(self, token: str) -> bytes | None:
        """The word that is spelled so in the byte-level alphabet, if that is text."""
        word = to_bytes(token)
        try:
            return word if word is None or word.decode() is not None else None
        except UnicodeDecodeError:
            return None

    def __call__(self, words: Tensor) -> Tensor:
        """Symbols int32 [S] of words (strings [W]), `END_ID` after each; of no word, one `END_ID`."""
        symbols = tf.gather(self._ids, _raw(words))
        return tf.boolean_mask(symbols, symbols != OMIT)


class CharacterSymbols(tf.Module):
    """Characters; one that the vocabulary lacks is its bytes (`byte_fallback`), the unknown token, or nothing."""

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
        ids = np.full(POINTS, UNKNOWN, np.int32)
        for token, number in vocabulary.items():
            if len(token) == 1:
                ids[ord(token)] = number
        self._ids = Table(ids)
        self.cut: Step | None = None
        merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        parts = {vocabulary[part] for merge in merges for part in merge}
        if not model["ignore_merges"] and not parts & {self._unknown, *byte_ids.tolist()}:
            keys = {ord(left[-1]) << 21 | ord(right[0]) for left, right in merges if left and right}
            self._joints = table(np.array(sorted(keys), np.int64), np.ones(len(keys), np.int32), missing=0)
            self.cut = self._cut

    def spelling(self, token: str) -> bytes:
        """The entry itself."""
        return token.encode()

    def __call__(self, words: Tensor) -> Tensor:
        """Symbols int32 [S] of words (strings [W]), `END_ID` after each; of no word, one `END_ID`."""
        raw = _raw(words)
        # The same with a character in the place of each end.
        _, points = decode(tf.strings.reduce_join(words, separator="\0")[None] + "\0")
        ids = tf.where(
            tf.boolean_mask(raw, tf.bitwise.bitwise_and(raw, 0xC0) != 0x80) == END, END_ID, self._ids(points)
        )
        unknown = ids == UNKNOWN
        ids = tf.where(unknown, self._unknown, ids)
        if self._fuse and self._unknown >= 0:
            ids = tf.where(unknown & tf.concat([[False], unknown[:-1]], 0), OMIT, ids)
        return expand_byte_fallback(raw, ids, self._byte_ids)[0]

    def _cut(self, text: Text) -> Text:
        """Pieces cut where no merge ever joins what stands there: short words are merged sooner than long ones."""
        unknown = self._ids(text.points) == UNKNOWN
        before = tf.concat([text.points[:1], text.points[:-1]], 0)
        joint = self._joints.lookup(tf.cast(before, tf.int64) * (1 << 21) | tf.cast(text.points, tf.int64)) > 0
        other = tf.concat([unknown[:1], unknown[:-1]], 0)
        if self._unknown == OMIT:  # its neighbours may meet
            joint |= unknown | other
        elif self._unknown != BYTE_FALLBACK:  # it is fused with another
            joint |= unknown & other
        return text._replace(starts=text.starts | (text.plain & ~joint))


def _raw(words: Tensor) -> Tensor:
    """The bytes of words, `END` after each, int32 [N]."""
    end = bytes([END])
    text = tf.strings.reduce_join(words, separator=end) + tf.constant(end)
    return tf.cast(tf.io.decode_raw(text, tf.uint8), tf.int32)

"""The model of a tokenizer.json in the graph: words in, token ids out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.character_classes import Array, Tensor
from tfclm.savedmodel.tokenizer.text import ragged_gather

__all__ = ["BYTE_FALLBACK", "OMIT", "Model", "Words", "byte_tokens", "expand_byte_fallback", "table"]

OMIT, BYTE_FALLBACK = -2, -3  # what stands for a character in place of an id: nothing; the ids of its bytes


class Model(Protocol):
    """BPE, WordPiece or Unigram."""

    def __call__(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Ids int32 [T] of words (strings [W], none empty), and where each word's begin: int64 [W + 1]."""

    def spelling(self, token: str) -> bytes | None:
        """The word that an entry of the vocabulary is spelled as; None if no word is."""


class Words(tf.Module):
    """Most words of a text are one token: they are looked up, and the others are left to the model.

    `tokenize` is the fast tokenizer's own method for a word, asked for each entry of the vocabulary.
    """

    def __init__(self, model: Model, vocabulary: dict[str, int], tokenize: Callable[[str], list[Any]]) -> None:
        super().__init__()
        self._model = model
        whole = {
            word: number
            for token, number in vocabulary.items()
            if (word := model.spelling(token)) and [found.id for found in tokenize(token)] == [number]
        }
        self._whole = table(list(whole), np.array(list(whole.values()), np.int32), missing=-1)

    def __call__(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Ids int32 [T] of the words (strings [W] of valid UTF-8), and where each word's begin: int64 [W + 1]."""
        whole = self._whole.lookup(words)
        known = whole >= 0
        ids, splits = self._model(tf.boolean_mask(words, ~known))
        single = tf.boolean_mask(whole, known)
        broken, total = tf.size(splits) - 1, splits[-1]
        splits = tf.concat([splits, total + 1 + tf.range(tf.size(single, tf.int64))], 0)
        known = tf.cast(known, tf.int32)
        rows = tf.where(known > 0, broken + tf.cumsum(known), tf.cumsum(1 - known)) - 1
        return ragged_gather(tf.concat([ids, single], 0), splits, rows)


def table(keys: Any, values: Array, missing: int) -> Any:
    """A hash table of strings or int64 to int32."""
    # It may not be empty: this key is neither a word nor a pair.
    if not len(keys):
        keys, values = ([b""] if isinstance(keys, list) else np.array([-1], np.int64)), np.array([missing], np.int32)
    return tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(tf.constant(keys), tf.constant(values)), missing
    )


def byte_tokens(vocabulary: dict[str, int]) -> Array:
    """The ids of the tokens <0x00> to <0xFF>, int32 [256], which `byte_fallback` spells unknown characters with."""
    ids = np.array([vocabulary.get(f"<0x{byte:02X}>", OMIT) for byte in range(256)], np.int32)
    if (ids[np.r_[0:0xC0, 0xC2:0xF5]] == OMIT).any():
        raise InputError("the tokenizer's model with byte_fallback lacks tokens of some bytes: unsupported")
    return ids


def expand_byte_fallback(raw: Tensor, ids: Tensor, byte_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [T] of the bytes `raw` int32 [N] of characters with `ids` [C], and the character of each, [T]."""
    lead = tf.bitwise.bitwise_and(raw, 0xC0) != 0x80
    character = tf.cumsum(tf.cast(lead, tf.int32)) - 1
    own = tf.gather(ids, character)
    spelled = tf.where(own == BYTE_FALLBACK, tf.gather(byte_ids, raw), tf.where(lead, own, OMIT))
    kept = spelled != OMIT
    return tf.boolean_mask(spelled, kept), tf.boolean_mask(character, kept)

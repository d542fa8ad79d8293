"""The model of a tokenizer.json in the graph: words in, token ids out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.character_classes import Array, Tensor
from tfclm.savedmodel.tokenizer.text import ragged_gather

__all__ = ["BYTE_FALLBACK", "OMIT", "Model", "WordEncoder", "byte_tokens", "expand_byte_fallback", "hash_table"]

# In place of a character's id: no id; the ids of its bytes.
OMIT, BYTE_FALLBACK = -2, -3


class Model(Protocol):
    """BPE, WordPiece or Unigram."""

    def __call__(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Ids int32 [T] of words (strings [W], none empty), and the words' row splits int64 [W + 1]."""

    def to_word(self, token: str) -> bytes | None:
        """The word that an entry of the vocabulary stands for; None if it is not text."""


class WordEncoder(tf.Module):
    """Looks up words that are one token, as most are, and passes the others to the model.

    Args:
        model: encodes the other words.
        vocabulary: token -> id.
        tokenize: the fast tokenizer's method for a word, called once for each entry of the vocabulary.
    """

    def __init__(self, model: Model, vocabulary: dict[str, int], tokenize: Callable[[str], list[Any]]) -> None:
        super().__init__()
        self._model = model
        ids = {
            word: number
            for token, number in vocabulary.items()
            if (word := model.to_word(token)) and [found.id for found in tokenize(token)] == [number]
        }
        self._single_token_words = hash_table(list(ids), np.array(list(ids.values()), np.int32), missing=-1)

    def __call__(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Ids int32 [T] of the words (strings [W] of valid UTF-8), and the words' row splits int64 [W + 1]."""
        word_ids = self._single_token_words.lookup(words)
        single = word_ids >= 0
        ids, splits = self._model(tf.boolean_mask(words, ~single))
        single_ids = tf.boolean_mask(word_ids, single)
        others, total = tf.size(splits) - 1, splits[-1]
        splits = tf.concat([splits, total + 1 + tf.range(tf.size(single_ids, tf.int64))], 0)
        single = tf.cast(single, tf.int32)
        rows = tf.where(single > 0, others + tf.cumsum(single), tf.cumsum(1 - single)) - 1
        return ragged_gather(tf.concat([ids, single_ids], 0), splits, rows)


def hash_table(keys: Any, values: Array, missing: int) -> Any:
    """A hash table of strings or int64 to int32."""
    # A table must not be empty; this key is neither a word nor a pair.
    if not len(keys):
        keys, values = ([b""] if isinstance(keys, list) else np.array([-1], np.int64)), np.array([missing], np.int32)
    return tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(tf.constant(keys), tf.constant(values)), missing
    )


def byte_tokens(vocabulary: dict[str, int]) -> Array:
    """The ids of the tokens <0x00> to <0xFF>, int32 [256], which encode unknown characters with `byte_fallback`."""
    ids = np.array([vocabulary.get(f"<0x{byte:02X}>", OMIT) for byte in range(256)], np.int32)
    # The byte of a character that has a token of its own is not needed, such as Gemma's tab.
    needed = [byte for byte in (*range(0xC0), *range(0xC2, 0xF5)) if byte > 0x7F or chr(byte) not in vocabulary]
    if (ids[needed] == OMIT).any():
        raise InputError("the tokenizer's model with byte_fallback lacks tokens of some bytes: unsupported")
    return ids


def expand_byte_fallback(raw: Tensor, ids: Tensor, byte_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Expands characters whose id is `BYTE_FALLBACK` to the ids of their bytes, and drops those with `OMIT`.

    Args:
        raw: int32 [N], the bytes of the characters.
        ids: int32 [C], the characters' ids.
        byte_ids: int32 [256], the ids of bytes.

    Returns:
        Ids int32 [T], and the index of the character of each.
    """
    lead = tf.bitwise.bitwise_and(raw, 0xC0) != 0x80
    character = tf.cumsum(tf.cast(lead, tf.int32)) - 1
    own = tf.gather(ids, character)
    expanded = tf.where(own == BYTE_FALLBACK, tf.gather(byte_ids, raw), tf.where(lead, own, OMIT))
    kept = expanded != OMIT
    return tf.boolean_mask(expanded, kept), tf.boolean_mask(character, kept)

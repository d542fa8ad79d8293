"""Sets of code points, as the fast tokenizer's own engine defines them, and tables of them for the graph.

RE2, Python and Rust each have a different version of Unicode. So, when a tokenizer is exported, every code point is
passed once through the engine that the graph must agree with.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import tensorflow as tf
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

__all__ = [
    "NUM_CODE_POINTS",
    "PAGE_SIZE",
    "Array",
    "CodePointTable",
    "Tensor",
    "all_code_points",
    "digit_code_points",
    "distinct_pages",
    "isolated_and_removed",
    "matching_code_points",
    "normalized_code_points",
    "word_code_points",
]

Tensor = Any  # tf.Tensor, whose module is not typed
Array = np.ndarray[Any, Any]

NUM_CODE_POINTS = 0x110000
PAGE_SIZE = 256


@functools.cache
def all_code_points() -> str:
    """Every code point that text can contain, in order: all except the surrogates."""
    return "".join(map(chr, [*range(0xD800), *range(0xE000, NUM_CODE_POINTS)]))


@functools.cache
def matching_code_points(pattern: str) -> Array:
    """Which code points a regular expression for one character matches in tokenizers, bool [NUM_CODE_POINTS]."""
    matching: Array
    if len(pattern) == 1 and pattern != ".":
        matching = np.arange(NUM_CODE_POINTS) == ord(pattern)
        return matching
    others = normalizers.Replace(Regex(pattern), "").normalize_str(all_code_points())
    matching = np.ones(NUM_CODE_POINTS, bool)
    matching[0xD800:0xE000] = False
    matching[np.frombuffer(others.encode("utf-32-le"), np.uint32)] = False
    return matching


@functools.cache
def digit_code_points() -> Array:
    """Which code points the pre-tokenizer Digits treats as digits, bool [NUM_CODE_POINTS]."""
    return isolated_and_removed(pre_tokenizers.Digits(individual_digits=True))[0]


def isolated_and_removed(pre_tokenizer: Any) -> tuple[Array, Array]:
    """Which code points a pre-tokenizer makes pieces, and which it removes, bool [NUM_CODE_POINTS] each."""
    # After an x, a code point starts a piece only if it is isolated.
    text = "x" + "x".join(all_code_points())
    isolated, kept = np.zeros(NUM_CODE_POINTS, bool), np.zeros(len(text), bool)
    for _, (start, end) in pre_tokenizer.pre_tokenize_str(text):
        kept[start:end] = True
        if start % 2:
            isolated[ord(text[start])] = True
    removed = np.zeros(NUM_CODE_POINTS, bool)
    removed[[ord(text[index]) for index in np.flatnonzero(~kept)]] = True
    return isolated, removed


@functools.cache
def normalized_code_points(kind: str, *settings: bool) -> tuple[Array, tuple[str, ...]]:
    """The effect of a normalizer on each code point alone.

    Args:
        kind: the normalizer's class.
        settings: its arguments.

    Returns:
        The row of each code point, int32 [NUM_CODE_POINTS], -1 if it is unchanged, and the texts of the rows.
    """
    normalize = getattr(normalizers, kind)(*settings).normalize_str
    rows = np.full(NUM_CODE_POINTS, -1, np.int32)
    texts: dict[str, int] = {}
    for start in range(0, len(all_code_points()), PAGE_SIZE):
        page = all_code_points()[start : start + PAGE_SIZE]
        if normalize(page) != page:
            for character in page:
                if (text := normalize(character)) != character:
                    rows[ord(character)] = texts.setdefault(text, len(texts))
    return rows, tuple(texts)


@functools.cache
def word_code_points() -> Array:
    """Which code points, next to an added token with `single_word`, prevent a match, bool [NUM_CODE_POINTS]."""
    prober = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    prober.add_tokens([AddedToken("xx", single_word=True, normalized=False)])
    members = np.zeros(NUM_CODE_POINTS, bool)
    for start in range(0, len(all_code_points()), PAGE_SIZE**2):
        characters = all_code_points()[start : start + PAGE_SIZE**2]
        encodings = prober.encode_batch([f"{character}xx" for character in characters])
        members[
            [ord(character) for character, found in zip(characters, encodings, strict=True) if len(found.ids) == 1]
        ] = True
    return members


def distinct_pages(values: Array) -> tuple[Array, Array]:
    """Values of all code points as pages, most of which are equal.

    Returns:
        The distinct pages [pages, PAGE_SIZE], and the number of each page, int32 [NUM_CODE_POINTS / PAGE_SIZE].
    """
    numbers: dict[bytes, int] = {}
    index = [numbers.setdefault(page.tobytes(), len(numbers)) for page in values.reshape(-1, PAGE_SIZE)]
    return np.frombuffer(b"".join(numbers), values.dtype).reshape(-1, PAGE_SIZE), np.array(index, np.int32)


class CodePointTable:
    """A value for every code point, stored in pages, most of which are equal."""

    def __init__(self, values: Array) -> None:
        pages, index = distinct_pages(values.astype(np.int32))
        self._pages = tf.constant(pages.reshape(-1))
        self._offsets = tf.constant(index * PAGE_SIZE)

    def __call__(self, points: Tensor) -> Tensor:
        """The values of code points, int32, any shape."""
        page = tf.gather(self._offsets, tf.bitwise.right_shift(points, 8))
        return tf.gather(self._pages, page + tf.bitwise.bitwise_and(points, PAGE_SIZE - 1))

"""Sets of code points, found by asking the fast tokenizer's own engine, and tables of them for the graph.

Unicode grows: RE2's, Python's and Rust's idea of a letter each come from another version. So every code point is put to
the very engine that the graph has to agree with, once, when the tokenizer is exported.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import tensorflow as tf
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

__all__ = ["POINTS", "Array", "Table", "Tensor", "everything", "matched", "numeric", "respelled", "split_apart", "word"]

Tensor = Any  # tf.Tensor, whose module is not typed
Array = np.ndarray[Any, Any]

POINTS = 0x110000
PAGE = 256


@functools.cache
def everything() -> str:
    """Every code point that text can hold, in order: all but the surrogates."""
    return "".join(map(chr, [*range(0xD800), *range(0xE000, POINTS)]))


@functools.cache
def matched(pattern: str) -> Array:
    """Which code points match a regular expression for one character, bool [POINTS]; by tokenizers' regex engine."""
    kept = normalizers.Replace(Regex(pattern), "").normalize_str(everything())
    members = np.ones(POINTS, bool)
    members[0xD800:0xE000] = False
    members[np.frombuffer(kept.encode("utf-32-le"), np.uint32)] = False
    return members


@functools.cache
def numeric() -> Array:
    """What the pre-tokenizer Digits takes for a digit, bool [POINTS]."""
    return split_apart(pre_tokenizers.Digits(individual_digits=True))[0]


def split_apart(pre_tokenizer: Any) -> tuple[Array, Array]:
    """What a pre-tokenizer makes a piece of its own, and what it leaves out, each bool [POINTS]."""
    # An x before each: whatever starts a piece of its own there stands apart.
    text = "x" + "x".join(everything())
    alone, kept = np.zeros(POINTS, bool), np.zeros(len(text), bool)
    for _, (start, end) in pre_tokenizer.pre_tokenize_str(text):
        kept[start:end] = True
        if start % 2:
            alone[ord(text[start])] = True
    removed = np.zeros(POINTS, bool)
    removed[[ord(text[place]) for place in np.flatnonzero(~kept)]] = True
    return alone, removed


@functools.cache
def respelled(kind: str, *settings: bool) -> tuple[Array, tuple[str, ...]]:
    """What a normalizer that looks at each code point alone makes of it: which of the texts, or -1 for itself.

    int32 [POINTS], and the texts; `kind` and `settings` make the normalizer.
    """
    normalize = getattr(normalizers, kind)(*settings).normalize_str
    rows = np.full(POINTS, -1, np.int32)
    texts: dict[str, int] = {}
    for start in range(0, len(everything()), PAGE):
        page = everything()[start : start + PAGE]
        if normalize(page) != page:
            for point in page:
                if (new := normalize(point)) != point:
                    rows[ord(point)] = texts.setdefault(new, len(texts))
    return rows, tuple(texts)


@functools.cache
def word() -> Array:
    """What keeps an added token with `single_word` from being one when it stands beside it, bool [POINTS]."""
    prober = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    prober.add_tokens([AddedToken("xx", single_word=True, normalized=False)])
    members = np.zeros(POINTS, bool)
    for start in range(0, len(everything()), PAGE**2):
        points = everything()[start : start + PAGE**2]
        encodings = prober.encode_batch([f"{point}xx" for point in points])
        members[[ord(point) for point, found in zip(points, encodings, strict=True) if len(found.ids) == 1]] = True
    return members


class Table:
    """A value for every code point, in pages because most pages are alike."""

    def __init__(self, values: Array) -> None:
        pages, index = np.unique(values.astype(np.int32).reshape(-1, PAGE), axis=0, return_inverse=True)
        self._pages = tf.constant(pages.reshape(-1))
        self._offsets = tf.constant((index.reshape(-1) * PAGE).astype(np.int32))

    def __call__(self, points: Tensor) -> Tensor:
        """The values of code points, int32, any shape."""
        page = tf.gather(self._offsets, tf.bitwise.right_shift(points, 8))
        return tf.gather(self._pages, page + tf.bitwise.bitwise_and(points, PAGE - 1))

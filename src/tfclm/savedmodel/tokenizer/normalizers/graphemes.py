"""Grapheme clusters in the graph: which code points stand together, by the fast tokenizer's own Unicode.

Its normalizer `Precompiled` replaces a cluster of few bytes as a whole, and a longer one code point by code point. With
a table that has an entry for every first byte, this tells where clusters end: by how much is left of a text.
"""

from __future__ import annotations

import functools

import numpy as np
import tensorflow as tf
from tokenizers import normalizers

from tfclm.savedmodel.tokenizer.character_classes import POINTS, Array, Table, Tensor
from tfclm.savedmodel.tokenizer.text import Text

__all__ = ["LONG", "Clusters"]

LONG = 6  # bytes of a cluster that is not replaced as a whole

# What a code point is to the one before it: a mark, which all but controls take into their cluster; what only few take;
# a part of a Hangul syllable; a line feed. Times `TAKES`: what it takes itself. Controls are nothing and take nothing.
MARK, OTHER, LEAD, VOWEL, TAIL, FEED = (1 << bit for bit in range(6))
SHIFT = 6
TAKES = 1 << SHIFT
# What it is to those farther away: pictographs are joined to pictographs, and consonants are linked to consonants.
PICTOGRAPH, EXTENDING, JOINER, CONSONANT, LINKING, BETWEEN = (1 << bit for bit in range(12, 18))

PARTS = {LEAD: "\u1100", VOWEL: "\u1161", TAIL: "\u11a8"}
CHUNK = 4096  # a longer text takes the engine more time by the code point


class Clusters(tf.Module):
    """Finds the clusters in plain pieces."""

    def __init__(self) -> None:
        super().__init__()
        self._features = Table(_features())

    def suspect(self, text: Text) -> Tensor:
        """Whether there may be a cluster of more than one code point and less than `LONG` bytes, bool []."""
        return tf.reduce_any(_has(self._features(text.points), MARK | (OTHER | FEED) * TAKES) & text.plain)

    def joined(self, text: Text) -> Tensor:
        """Which code points are in one cluster with the one before, bool [N].

        The halves of a flag are not: with either of them, no cluster of two has less than `LONG` bytes.
        """
        features = self._features(text.points)
        before = tf.concat([features[:1], features[:-1]], 0)
        joined = _has(tf.bitwise.right_shift(before, SHIFT), tf.bitwise.bitwise_and(features, TAKES - 1))
        joined |= tf.cond(
            tf.reduce_any(_has(features, JOINER | LINKING)),
            lambda: _joined_from_afar(features, text.starts),
            lambda: tf.zeros_like(joined),
        )
        return joined & ~text.starts & text.plain


def _joined_from_afar(features: Tensor, starts: Tensor) -> Tensor:
    """Which pictographs and consonants others far before them are joined or linked to, bool [N]."""

    def base(mask: int) -> Tensor:
        """The last place, up to each, of a code point that has nothing of `mask` or begins a piece."""
        found = ~_has(features, mask) | starts
        return tf.gather(tf.cast(tf.where(found)[:, 0], tf.int32), tf.cumsum(tf.cast(found, tf.int32)) - 1)

    here = tf.range(tf.size(features))
    before, second = tf.maximum(here - 1, 0), tf.maximum(here - 2, 0)
    # A pictograph and what extends it, a joiner, and another one.
    joiner = _has(tf.gather(features, before), JOINER) & ~tf.gather(starts, before)
    picture = _has(tf.gather(features, tf.gather(base(EXTENDING), second)), PICTOGRAPH)
    # A consonant and marks, of which one links, and another one.
    letter = tf.gather(base(LINKING | BETWEEN), before)
    links = tf.cumsum(tf.cast(_has(features, LINKING), tf.int32))
    linked = _has(tf.gather(features, letter), CONSONANT) & (tf.gather(links, before) > tf.gather(links, letter))
    return (joiner & picture & _has(features, PICTOGRAPH)) | (linked & _has(features, CONSONANT))


def _has(features: Tensor, mask: Tensor) -> Tensor:
    return tf.bitwise.bitwise_and(features, mask) != 0


@functools.cache
def _features() -> Array:
    """What is to be known of each code point, int32 [POINTS]: the bits above."""
    # The other planes have ideographs, private use, or nothing. NUL, which no table replaces, parts the questions.
    points = np.r_[1:0xD800, 0xE000:0x20000, 0xE0000:0xF0000]
    features = np.full(POINTS, OTHER | MARK * TAKES, np.int32)
    replace = _every_byte().normalize_str

    def ask(form: str, expected: int, points: Array = points) -> Array:
        """Of which points `expected` replacements are made, when they stand in `form`."""
        before, after = form.split("{}")
        chunks = (map(chr, points[start : start + CHUNK]) for start in range(0, len(points), CHUNK))
        texts = (before + f"{after}\0{before}".join(chunk) + after for chunk in chunks)
        return points[[len(answer) == expected for text in texts for answer in replace(text).split("\0")]]

    # A longer cluster is replaced code point by code point: by the marks behind, one is told from two.
    marks = ask("a{}", 1)
    features[marks] = MARK | MARK * TAKES
    for part, letter in PARTS.items():
        features[ask(f"{{}}{letter}\u0300", 3)] |= part * TAKES
    syllables = np.flatnonzero(features & (LEAD | VOWEL | TAIL) * TAKES)
    features[ask("{}a", 1)] |= OTHER * TAKES
    syllables = syllables[features[syllables] & OTHER * TAKES == 0]
    for part, letter in PARTS.items():  # a vowel follows a lead as well, and a tail a vowel
        following = ask(f"\u0600{letter}{{}}", 3, syllables)
        features[following] = features[following] // TAKES * TAKES | part
    features[ask("{}\u0300\u0300", 2)] = 0
    features[[0, ord("\n"), ord("\r")]] = 0, FEED, FEED * TAKES

    features[ask("{}\u200d\xa9\u0300", 4)] |= PICTOGRAPH
    features[ask("\xa9{}\u200d\xa9\u0300", 5, marks)] |= EXTENDING
    features[0x200D] |= JOINER
    features[ask("{}\u094d\u0958\u0300", 4)] |= CONSONANT
    features[ask("\u0915{}\u0958\u0300", 4, marks)] |= LINKING
    features[ask("\u0915\u094d{}\u0958\u0300", 5, marks)] |= BETWEEN
    return features


def _every_byte() -> normalizers.Precompiled:
    """A normalizer whose table has one and the same replacement for whatever begins with any byte but NUL."""
    units = np.zeros(768, np.uint32)  # the root, all first bytes, all that could come after them, and does not
    first = np.arange(1, 256)
    units[0] = 256 << 10
    units[256 + first] = (256 + first ^ 512) << 10 | 1 << 8 | first
    units[512] = 1 << 31
    return normalizers.Precompiled(units.nbytes.to_bytes(4, "little") + units.astype("<u4").tobytes() + b"x\0")

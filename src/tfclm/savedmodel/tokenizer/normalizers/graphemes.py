"""Grapheme clusters in the graph: which code points belong together in the fast tokenizer's version of Unicode.

Its normalizer `Precompiled` replaces a short cluster as a whole, and a longer one code point by code point. With a
table that has an entry for every first byte, the number of replacements shows where clusters end.
"""

from __future__ import annotations

import functools

import numpy as np
import tensorflow as tf
from tokenizers import normalizers

from tfclm.savedmodel.tokenizer.character_classes import NUM_CODE_POINTS, Array, CodePointTable, Tensor
from tfclm.savedmodel.tokenizer.text import Text

__all__ = ["SHORT_CLUSTER_LIMIT", "Clusters"]

SHORT_CLUSTER_LIMIT = 6  # clusters of fewer bytes are replaced as a whole

# Bits of a code point's class: a mark, which joins any code point except a control; another code point, which joins
# only a few; a part of a Hangul syllable; a line feed. A class times `ACCEPTS`: the code point accepts that class after
# it. Controls have no class and accept none.
MARK, OTHER, LEAD, VOWEL, TAIL, LINE_FEED = (1 << bit for bit in range(6))
CLASS_BITS = 6
ACCEPTS = 1 << CLASS_BITS
# Bits for clusters that depend on more than the code point before: emoji sequences and conjuncts.
PICTOGRAPH, EMOJI_EXTEND, JOINER, CONSONANT, LINKER, CONJUNCT_EXTEND = (1 << bit for bit in range(12, 18))

HANGUL_PARTS = {LEAD: "\u1100", VOWEL: "\u1161", TAIL: "\u11a8"}
CHUNK = 4096  # code points per text; the engine is slower per code point in longer texts


class Clusters(tf.Module):
    """Finds the clusters in ordinary pieces."""

    def __init__(self) -> None:
        super().__init__()
        self._features = CodePointTable(_features())

    def may_be_short(self, text: Text) -> Tensor:
        """Whether there may be a cluster of several code points and fewer than `SHORT_CLUSTER_LIMIT` bytes, bool []."""
        return tf.reduce_any(_has(self._features(text.points), MARK | (OTHER | LINE_FEED) * ACCEPTS) & text.is_ordinary)

    def joins_previous(self, text: Text) -> Tensor:
        """Which code points are in the cluster of the one before, bool [N].

        The halves of a flag are left apart: a cluster with one of them has `SHORT_CLUSTER_LIMIT` bytes or more.
        """
        features = self._features(text.points)
        before = tf.concat([features[:1], features[:-1]], 0)
        joined = _has(tf.bitwise.right_shift(before, CLASS_BITS), tf.bitwise.bitwise_and(features, ACCEPTS - 1))
        joined |= tf.cond(
            tf.reduce_any(_has(features, JOINER | LINKER)),
            lambda: _joins_distant(features, text.starts),
            lambda: tf.zeros_like(joined),
        )
        return joined & ~text.starts & text.is_ordinary


def _joins_distant(features: Tensor, starts: Tensor) -> Tensor:
    """Which pictographs and consonants are joined or linked to one that is not directly before them, bool [N]."""

    def base(mask: int) -> Tensor:
        """The last position, up to each one, of a code point that has no bit of `mask` or begins a piece."""
        found = ~_has(features, mask) | starts
        return tf.gather(tf.cast(tf.where(found)[:, 0], tf.int32), tf.cumsum(tf.cast(found, tf.int32)) - 1)

    position = tf.range(tf.size(features))
    before, second = tf.maximum(position - 1, 0), tf.maximum(position - 2, 0)
    # An emoji sequence: a pictograph and its extenders, a joiner, and another pictograph.
    joiner = _has(tf.gather(features, before), JOINER) & ~tf.gather(starts, before)
    picture = _has(tf.gather(features, tf.gather(base(EMOJI_EXTEND), second)), PICTOGRAPH)
    # A conjunct: a consonant and marks, at least one of them a linker, and another consonant.
    letter = tf.gather(base(LINKER | CONJUNCT_EXTEND), before)
    links = tf.cumsum(tf.cast(_has(features, LINKER), tf.int32))
    linked = _has(tf.gather(features, letter), CONSONANT) & (tf.gather(links, before) > tf.gather(links, letter))
    return (joiner & picture & _has(features, PICTOGRAPH)) | (linked & _has(features, CONSONANT))


def _has(features: Tensor, mask: Tensor) -> Tensor:
    return tf.bitwise.bitwise_and(features, mask) != 0


@functools.cache
def _features() -> Array:
    """The bits above of each code point, int32 [NUM_CODE_POINTS]."""
    # The other planes have ideographs, private use, or nothing. NUL, which no table replaces, separates the probes.
    points = np.r_[1:0xD800, 0xE000:0x20000, 0xE0000:0xF0000]
    features = np.full(NUM_CODE_POINTS, OTHER | MARK * ACCEPTS, np.int32)
    replace = _replacing_normalizer().normalize_str

    def probe(form: str, expected: int, points: Array = points) -> Array:
        """The points for which `form` becomes `expected` replacements."""
        before, after = form.split("{}")
        chunks = (map(chr, points[start : start + CHUNK]) for start in range(0, len(points), CHUNK))
        texts = (before + f"{after}\0{before}".join(chunk) + after for chunk in chunks)
        return points[[len(result) == expected for text in texts for result in replace(text).split("\0")]]

    # A long cluster is replaced code point by code point. Trailing marks make a cluster long, which tells one cluster
    # from two.
    marks = probe("a{}", 1)
    features[marks] = MARK | MARK * ACCEPTS
    for part, letter in HANGUL_PARTS.items():
        features[probe(f"{{}}{letter}\u0300", 3)] |= part * ACCEPTS
    syllables = np.flatnonzero(features & (LEAD | VOWEL | TAIL) * ACCEPTS)
    features[probe("{}a", 1)] |= OTHER * ACCEPTS
    syllables = syllables[features[syllables] & OTHER * ACCEPTS == 0]
    for part, letter in HANGUL_PARTS.items():  # a lead accepts a vowel too, and a vowel accepts a tail
        following = probe(f"\u0600{letter}{{}}", 3, syllables)
        features[following] = features[following] // ACCEPTS * ACCEPTS | part
    features[probe("{}\u0300\u0300", 2)] = 0
    features[[0, ord("\n"), ord("\r")]] = 0, LINE_FEED, LINE_FEED * ACCEPTS

    features[probe("{}\u200d\xa9\u0300", 4)] |= PICTOGRAPH
    features[probe("\xa9{}\u200d\xa9\u0300", 5, marks)] |= EMOJI_EXTEND
    features[0x200D] |= JOINER
    features[probe("{}\u094d\u0958\u0300", 4)] |= CONSONANT
    features[probe("\u0915{}\u0958\u0300", 4, marks)] |= LINKER
    features[probe("\u0915\u094d{}\u0958\u0300", 5, marks)] |= CONJUNCT_EXTEND
    return features


def _replacing_normalizer() -> normalizers.Precompiled:
    """A normalizer with the same replacement for all text that begins with any byte except NUL."""
    units = np.zeros(768, np.uint32)  # the root, its children for all first bytes, and no further ones
    first = np.arange(1, 256)
    units[0] = 256 << 10
    units[256 + first] = (256 + first ^ 512) << 10 | 1 << 8 | first
    units[512] = 1 << 31
    return normalizers.Precompiled(units.nbytes.to_bytes(4, "little") + units.astype("<u4").tobytes() + b"x\0")

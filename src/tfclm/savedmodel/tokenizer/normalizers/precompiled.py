"""SentencePiece's own normalizer in the graph: a table that comes with the model, applied as by the fast tokenizer."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.character_classes import NUM_CODE_POINTS, Tensor
from tfclm.savedmodel.tokenizer.models.trie import Trie
from tfclm.savedmodel.tokenizer.normalizers.code_point_map import CodePointMap
from tfclm.savedmodel.tokenizer.normalizers.graphemes import SHORT_CLUSTER_LIMIT, Clusters
from tfclm.savedmodel.tokenizer.text import UNCHANGED, Text

__all__ = ["Precompiled"]

BYTES = np.arange(1, 256)
# Bits of a unit of the table: the byte that leads to it, whether an entry ends there, the offset of its replacement.
LABEL, LEAF, VALUE = 1 << 31 | 0xFF, 1 << 8, (1 << 31) - 1
REMOVED = 0  # the row of code points that are removed


class Precompiled(tf.Module):
    """The normalizer of a tokenizer.json, type Precompiled, with its table.

    A grapheme cluster of fewer than `SHORT_CLUSTER_LIMIT` bytes that begins with an entry is replaced as a whole by the
    entry's replacement; all other code points are replaced one by one. In most text each code point is a cluster.

    Raises:
        InputError: the table cannot be read.
    """

    def __init__(self, charsmap: bytes) -> None:
        super().__init__()
        entries = _parse_charsmap(charsmap)
        texts = ["", *dict.fromkeys(entries.values())]
        numbers = {text: number for number, text in enumerate(texts)}
        numbers[""] = REMOVED
        rows = np.full(NUM_CODE_POINTS, UNCHANGED, np.int32)
        for entry, text in entries.items():
            if len(entry) == 1 and entry != text:
                rows[ord(entry)] = numbers[text]
        self._code_point_map = CodePointMap(rows, texts)
        self._trie = Trie([{entry: numbers[text] for entry, text in entries.items()}])
        self._clusters = Clusters()

    def __call__(self, text: Text) -> Text:
        """Normalizes the ordinary pieces."""
        normalized: Text = tf.cond(
            self._clusters.may_be_short(text), lambda: self._replace_clusters(text), lambda: self._code_point_map(text)
        )
        return normalized

    def _replace_clusters(self, text: Text) -> Text:
        first = ~self._clusters.joins_previous(text)
        cluster = tf.cumsum(tf.cast(first, tf.int32)) - 1
        size, length = (tf.math.segment_sum(x, cluster) for x in (tf.ones_like(cluster), _utf8_length(text.points)))
        short = tf.gather(tf.where(length < SHORT_CLUSTER_LIMIT, size, 1), cluster)
        # No entry begins with another one, so there is at most one match.
        position, _, row = self._trie.matches(
            text.points, tf.zeros_like(short), tf.where(first & (short > 1), short, 0)
        )
        rows = tf.tensor_scatter_nd_update(tf.fill(tf.shape(short), UNCHANGED), position[:, None], row)
        head = tf.gather(tf.boolean_mask(rows, first), cluster)
        return self._code_point_map(text, tf.where(~first & (head != UNCHANGED), REMOVED, rows))


def _utf8_length(points: Tensor) -> Tensor:
    """The number of bytes of code points in UTF-8, int32 [N]."""
    return 1 + tf.add_n([tf.cast(points >= first, tf.int32) for first in (0x80, 0x800, 0x10000)])


def _parse_charsmap(charsmap: bytes) -> dict[str, str]:
    """Entry -> replacement of a table; entries that begin with another one never match and are left out.

    The table consists of the size in bytes of a double-array trie, the trie, and the replacements, each ended by a NUL.
    """
    size = int.from_bytes(charsmap[:4], "little") // 4 * 4
    units = np.frombuffer(charsmap[4 : 4 + size], "<u4").astype(np.int64)
    replacements = charsmap[4 + size :] + b"\0"
    found: dict[str, str] = {}
    try:
        paths = [(b"", _offset(units[0]))]
        while paths:
            path, base = paths.pop()
            children = base ^ BYTES
            for index in children[units[children] & LABEL == BYTES].tolist():
                child, child_base = path + bytes([index ^ base]), index ^ _offset(units[index])
                if units[index] & LEAF:
                    start = int(units[child_base] & VALUE)
                    found[child.decode()] = replacements[start : replacements.index(0, start)].decode()
                elif len(child) < SHORT_CLUSTER_LIMIT - 1:
                    paths.append((child, child_base))
    except (IndexError, ValueError) as error:
        raise InputError(
            "the tokenizer's normalizer Precompiled has a table that is unsupported: damaged, or not text"
        ) from error
    return found


def _offset(unit: int) -> int:
    """The number whose exclusive or with a unit's index is the base of its children."""
    return int(unit >> 10 << ((unit & 1 << 9) >> 6))

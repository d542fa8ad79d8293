"""SentencePiece's own normalizer in the graph: a table that comes with the model, read as the fast tokenizer does."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.character_classes import POINTS, Tensor
from tfclm.savedmodel.tokenizer.models.trie import Trie
from tfclm.savedmodel.tokenizer.normalizers.code_point_map import CodePointMap
from tfclm.savedmodel.tokenizer.normalizers.graphemes import LONG, Clusters
from tfclm.savedmodel.tokenizer.text import KEEP, Text

__all__ = ["Precompiled"]

BYTES = np.arange(1, 256)
LABEL, LEAF, VALUE = 1 << 31 | 0xFF, 1 << 8, (1 << 31) - 1  # of a unit: the byte that leads to it; an entry ends; where
GONE = 0  # the row of what is left of a cluster that is replaced


class Precompiled(tf.Module):
    """The normalizer of a tokenizer.json, type Precompiled, with its table.

    A grapheme cluster of less than `LONG` bytes that begins with an entry is replaced by what the entry has, with all
    that comes behind; everything else code point by code point. In most text each is a cluster of its own. Raises
    `InputError` for a table that cannot be read.
    """

    def __init__(self, charsmap: bytes) -> None:
        super().__init__()
        entries = _entries(charsmap)
        texts = ["", *dict.fromkeys(entries.values())]
        numbers = {text: number for number, text in enumerate(texts)}
        numbers[""] = GONE
        rows = np.full(POINTS, KEEP, np.int32)
        for entry, text in entries.items():
            if len(entry) == 1 and entry != text:
                rows[ord(entry)] = numbers[text]
        self._respeller = CodePointMap(rows, texts)
        self._trie = Trie([{entry: numbers[text] for entry, text in entries.items()}])
        self._clusters = Clusters()

    def __call__(self, text: Text) -> Text:
        """Each plain piece normalized."""
        normalized: Text = tf.cond(
            self._clusters.suspect(text), lambda: self._replace_clusters(text), lambda: self._respeller(text)
        )
        return normalized

    def _replace_clusters(self, text: Text) -> Text:
        first = ~self._clusters.joined(text)
        cluster = tf.cumsum(tf.cast(first, tf.int32)) - 1
        size, length = (tf.math.segment_sum(x, cluster) for x in (tf.ones_like(cluster), _width(text.points)))
        short = tf.gather(tf.where(length < LONG, size, 1), cluster)
        # No entry begins with another one: there is one match at most.
        place, _, row = self._trie.matches(text.points, tf.zeros_like(short), tf.where(first & (short > 1), short, 0))
        rows = tf.tensor_scatter_nd_update(tf.fill(tf.shape(short), KEEP), place[:, None], row)
        head = tf.gather(tf.boolean_mask(rows, first), cluster)
        return self._respeller(text, tf.where(~first & (head != KEEP), GONE, rows))


def _width(points: Tensor) -> Tensor:
    """How many bytes code points have in UTF-8, int32 [N]."""
    return 1 + tf.add_n([tf.cast(points >= least, tf.int32) for least in (0x80, 0x800, 0x10000)])


def _entries(charsmap: bytes) -> dict[str, str]:
    """What a table replaces, and by what; without entries that begin with another one, which are never reached.

    The table is the size of a double array in bytes, the array, and the replacements, each ended by a NUL. The units of
    the array lead from byte to byte; what leads nowhere from the root on is not looked at.
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
            for place in children[units[children] & LABEL == BYTES].tolist():
                longer, below = path + bytes([place ^ base]), place ^ _offset(units[place])
                if units[place] & LEAF:
                    start = int(units[below] & VALUE)
                    found[longer.decode()] = replacements[start : replacements.index(0, start)].decode()
                elif len(longer) < LONG - 1:
                    paths.append((longer, below))
    except (IndexError, ValueError) as error:
        raise InputError(
            "the tokenizer's normalizer Precompiled has a table that is unsupported: damaged, or not of characters"
        ) from error
    return found


def _offset(unit: int) -> int:
    """What a unit's place is to be combined with for the place of what follows."""
    return int(unit >> 10 << ((unit & 1 << 9) >> 6))

"""Code points put as something else in the graph, each looked at alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfclm.savedmodel.tokenizer.character_classes import POINTS, Array, Table, Tensor
from tfclm.savedmodel.tokenizer.text import KEEP, Text

__all__ = ["CodePointMap"]


class CodePointMap(tf.Module):
    """Puts one of `texts` for each code point: `rows` int32 [POINTS] says which, or `KEEP`."""

    def __init__(self, rows: Array, texts: Sequence[str]) -> None:
        super().__init__()
        # Differences, as most of their pages are alike; what is not one code point is respelled.
        codes = np.array([ord(text) if len(text) == 1 else -1 for text in texts] + [-1])[rows]
        self._shifts = Table(np.where(codes < 0, 0, codes - np.arange(POINTS)))
        self._rows = Table(np.where(codes < 0, rows, KEEP))
        self._parts = tf.constant([ord(c) for text in texts for c in text], tf.int32)
        self._splits = tf.constant(np.cumsum([0, *map(len, texts)]), tf.int64)

    def __call__(self, text: Text, given: Tensor = KEEP) -> Text:
        """Each plain code point as something else, or as nothing; `given`, int32 [N], says otherwise, or `KEEP`."""
        free = text.plain & (given == KEEP)
        rows = tf.where(free, self._rows(text.points), given)
        text = text._replace(points=text.points + tf.where(free, self._shifts(text.points), 0))
        spelled: Text = tf.cond(
            tf.reduce_any(rows != KEEP), lambda: text.respell(rows, self._parts, self._splits), lambda: text
        )
        return spelled

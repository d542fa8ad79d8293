"""Replaces code points in the graph, each on its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfclm.savedmodel.tokenizer.character_classes import NUM_CODE_POINTS, Array, CodePointTable, Tensor
from tfclm.savedmodel.tokenizer.text import UNCHANGED, Text

__all__ = ["CodePointMap"]


class CodePointMap(tf.Module):
    """Replaces each code point by one of `texts`: its row in `rows` int32 [NUM_CODE_POINTS], or `UNCHANGED`."""

    def __init__(self, rows: Array, texts: Sequence[str]) -> None:
        super().__init__()
        # A single code point is stored as a difference, because most pages of differences are equal.
        codes = np.array([ord(text) if len(text) == 1 else -1 for text in texts] + [-1])[rows]
        self._shifts = CodePointTable(np.where(codes < 0, 0, codes - np.arange(NUM_CODE_POINTS)))
        self._rows = CodePointTable(np.where(codes < 0, rows, UNCHANGED))
        self._parts = tf.constant([ord(c) for text in texts for c in text], tf.int32)
        self._splits = tf.constant(np.cumsum([0, *map(len, texts)]), tf.int64)

    def __call__(self, text: Text, overrides: Tensor = UNCHANGED) -> Text:
        """Replaces the ordinary code points; `overrides` int32 [N] are rows that take precedence, or `UNCHANGED`."""
        mapped = text.is_ordinary & (overrides == UNCHANGED)
        rows = tf.where(mapped, self._rows(text.points), overrides)
        text = text._replace(points=text.points + tf.where(mapped, self._shifts(text.points), 0))
        replaced: Text = tf.cond(
            tf.reduce_any(rows != UNCHANGED),
            lambda: text.replace_code_points(rows, self._parts, self._splits),
            lambda: text,
        )
        return replaced

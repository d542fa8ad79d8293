"""Finds stop strings in the bytes of generated tokens, as integers, which XLA can compile, unlike strings."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

__all__ = ["MAX_STOPS", "MAX_STOP_BYTES", "Stop", "StopFinder"]

Tensor = Any

MAX_STOPS = 4  # stop strings per row
MAX_STOP_BYTES = 64  # bytes of the longest stop string
ANY = -1  # matches every byte
NONE = -2  # matches no byte


class Stop(NamedTuple):
    """The state of the search in each row."""

    pattern: Tensor  # int32 [B, MAX_STOPS, MAX_STOP_BYTES], the stop strings' bytes, padded on the left with ANY
    size: Tensor  # int32 [B, MAX_STOPS], bytes of each stop string; 0 = none
    window: Tensor  # int32 [B, MAX_STOP_BYTES - 1 + longest piece], the text's last bytes, padded on the left with NONE
    found: Tensor  # bool [B]
    length: Tensor  # int32 [B], bytes of the text so far; once a stop string is found, bytes before it


class StopFinder(tf.Module):
    """Finds stop strings in generated text. `pieces` are the bytes that each token adds to the text, by id.

    The one whose last byte comes first is found, of several that end together the longest one, so that the text before
    it holds none.
    """

    def __init__(self, pieces: list[bytes]) -> None:
        super().__init__()
        sizes = np.array([len(piece) for piece in pieces], np.int32)
        table = np.zeros([len(pieces), max(1, sizes.max())], np.uint8)
        for row, piece in zip(table, pieces, strict=True):
            row[: len(piece)] = np.frombuffer(piece, np.uint8)
        self._sizes = tf.Variable(sizes, trainable=False, name="piece_sizes")
        # uint8, because a table of a large vocabulary as int32 would take four times the memory.
        self._table = tf.Variable(table, trainable=False, name="pieces")
        self._width = table.shape[1]

    def begin(self, stops: Tensor) -> Stop:
        """The state before the first token, for stop strings [B, up to MAX_STOPS]; "" = none.

        XLA cannot compile this.
        """
        batch, count = tf.unstack(tf.shape(stops))
        size = tf.pad(tf.strings.length(stops), [[0, 0], [0, MAX_STOPS - count]])
        size = tf.ensure_shape(size, [None, MAX_STOPS])
        raw = tf.cast(tf.io.decode_raw(stops, tf.uint8, fixed_length=MAX_STOP_BYTES), tf.int32)
        raw = tf.pad(raw, [[0, 0], [0, MAX_STOPS - count], [0, 0]])
        indices = tf.range(MAX_STOP_BYTES) - (MAX_STOP_BYTES - size)[:, :, None]
        pattern = tf.where(indices >= 0, tf.gather(raw, tf.maximum(indices, 0), batch_dims=2), ANY)
        window = tf.fill([batch, MAX_STOP_BYTES - 1 + self._width], NONE)
        return Stop(pattern, size, window, tf.zeros([batch], tf.bool), tf.zeros([batch], tf.int32))

    def find(self, state: Stop, token: Tensor, running: Tensor, early: Tensor | None = None) -> Stop:
        """The state after one more token int32 [B]; only rows that are `running` bool [B] get theirs.

        A stop string that ends in this token is ignored in rows that are too short to end, `early` bool [B].
        """

        def advance() -> Stop:
            ids = tf.minimum(token, self._table.shape[0] - 1)
            size = tf.where(running, tf.gather(self._sizes, ids), 0)
            piece = tf.cast(tf.gather(self._table, ids), tf.int32)
            extended = tf.concat([state.window, piece], 1)
            width = state.window.shape[1]
            window = tf.gather(extended, size[:, None] + tf.range(width), batch_dims=1)
            windows = tf.gather(window, np.arange(self._width)[:, None] + np.arange(MAX_STOP_BYTES), axis=1)
            # The windows that end in this token.
            new = (tf.range(self._width) >= self._width - size[:, None]) & (running if early is None else ~early)[
                :, None
            ]
            pattern = state.pattern[:, :, None]
            match = tf.reduce_all((windows[:, None] == pattern) | (pattern == ANY), -1)
            match &= (state.size > 0)[:, :, None] & new[:, None]
            ends = tf.reduce_any(match, 1)
            found = tf.reduce_any(ends, 1) & running
            first = tf.argmax(ends, 1, output_type=tf.int32)
            longest = tf.reduce_max(tf.where(tf.gather(match, first, axis=2, batch_dims=1), state.size, 0), 1)
            end = state.length + size - (self._width - 1) + first
            length = tf.where(found, end - longest, state.length + size)
            return Stop(state.pattern, state.size, window, state.found | found, length)

        return Stop(*tf.cond(tf.reduce_any(state.size > 0), lambda: tuple(advance()), lambda: tuple(state)))

"""Stop strings, looked for in the bytes of the tokens, in integers, so that compiled and other loops share one way."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

__all__ = ["LONGEST", "Stop", "StopFinder"]

Tensor = Any

LONGEST = 64  # bytes of a stop string
ANY = -1
NONE = -2


class Stop(NamedTuple):
    """Where the search stands, a row each."""

    pattern: Tensor  # int32 [B, LONGEST], bytes on the right, ANY before them
    size: Tensor  # int32 [B], 0 for no stop string
    window: Tensor  # int32 [B, LONGEST - 1 + longest piece], the last bytes of the text, NONE before them
    found: Tensor  # bool [B]
    length: Tensor  # int32 [B], bytes of the text so far; of the text before the stop string, once that was found


class StopFinder(tf.Module):
    """Finds stop strings in generated text. `pieces` are the bytes of each token in the text, by id."""

    def __init__(self, pieces: list[bytes]) -> None:
        super().__init__()
        sizes = np.array([len(piece) for piece in pieces], np.int32)
        table = np.zeros([len(pieces), max(1, sizes.max())], np.uint8)
        for row, piece in zip(table, pieces, strict=True):
            row[: len(piece)] = np.frombuffer(piece, np.uint8)
        self._sizes = tf.Variable(sizes, trainable=False, name="piece_sizes")
        # On the CPU an integer variable may be of any type; a table of 50,000 pieces has some MB.
        self._table = tf.Variable(table, trainable=False, name="pieces")
        self._width = table.shape[1]

    def begin(self, stops: Tensor) -> Stop:
        """The state before the first token, for stop strings [B]; "" is none. Not for compiled functions."""
        size = tf.strings.length(stops)
        raw = tf.cast(tf.io.decode_raw(stops, tf.uint8, fixed_length=LONGEST), tf.int32)
        places = tf.range(LONGEST)[None] - (LONGEST - size)[:, None]
        pattern = tf.where(places >= 0, tf.gather(raw, tf.maximum(places, 0), batch_dims=1), ANY)
        window = tf.fill([tf.size(size), LONGEST - 1 + self._width], NONE)
        return Stop(pattern, size, window, size < 0, tf.zeros_like(size))

    @staticmethod
    def state(parts: tuple[Tensor, ...]) -> Stop:
        """What `begin` gave, after it went through a function as tensors."""
        return Stop(*parts)

    def find(self, state: Stop, token: Tensor, running: Tensor) -> Stop:
        """The state after one more token int32 [B] of the rows that are running."""

        def look() -> Stop:
            ids = tf.minimum(token, self._table.shape[0] - 1)
            size = tf.where(running, tf.gather(self._sizes, ids), 0)
            piece = tf.cast(tf.gather(self._table, ids), tf.int32)
            longer = tf.concat([state.window, piece], 1)
            width = state.window.shape[1]
            window = tf.gather(longer, size[:, None] + tf.range(width), batch_dims=1)
            windows = tf.gather(window, np.arange(self._width)[:, None] + np.arange(LONGEST), axis=1)
            pattern = state.pattern[:, None]
            match = tf.reduce_all((windows == pattern) | (pattern == ANY), -1) & (state.size > 0)[:, None]
            now = tf.reduce_any(match, 1) & running
            end = state.length + size - (self._width - 1) + tf.argmax(match, 1, output_type=tf.int32)
            length = tf.where(now, end - state.size, state.length + size)
            return Stop(state.pattern, state.size, window, state.found | now, length)

        return Stop(*tf.cond(tf.reduce_any(state.size > 0), lambda: tuple(look()), lambda: tuple(state)))

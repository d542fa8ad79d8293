"""A batch of texts as one sequence of code points, divided into pieces, and the ways in which steps change it."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from tfclm.savedmodel.tokenizer.character_classes import Tensor

__all__ = ["ORDINARY", "TEXT_END", "UNCHANGED", "Text", "decode", "encode", "ragged_gather"]

ORDINARY = -1  # the kind of text that is not an added token
TEXT_END = 0  # the kind of the NUL that follows each text
UNCHANGED = -1  # the row of a code point that is not replaced


class Text(NamedTuple):
    """Code points, where pieces start, and what each code point is part of.

    The code points of a piece are of one kind. Steps change ordinary pieces only.
    """

    points: Tensor  # int32 [N]
    starts: Tensor  # bool [N]
    kinds: Tensor  # int32 [N]: ORDINARY, TEXT_END, or the number of an added token

    @property
    def is_ordinary(self) -> Tensor:
        """Which code points steps may change, bool [N]."""
        return self.kinds == ORDINARY

    @property
    def piece_index(self) -> Tensor:
        """The piece of each code point, int32 [N], counted from 0."""
        return tf.cumsum(tf.cast(self.starts, tf.int32)) - 1

    def pieces(self) -> Tensor:
        """The pieces as UTF-8 strings."""
        return encode(self.points, self.starts)

    def replace_code_points(self, rows: Tensor, parts: Tensor, splits: Tensor) -> Text:
        """Each code point replaced by a row of ragged code points.

        A row may be empty; a piece without code points disappears.

        Args:
            rows: int32 [N], or `UNCHANGED`.
            parts: int32, the ragged values.
            splits: int64, one more than rows.
        """
        indices = tf.range(tf.size(self.points))
        rows = tf.where(rows == UNCHANGED, tf.size(splits) - 1 + indices, rows)
        splits = tf.concat([splits, splits[-1] + 1 + tf.cast(indices, tf.int64)], 0)
        points, splits = ragged_gather(tf.concat([parts, self.points], 0), splits, rows)
        return self.derive(points, _row_ids(splits[:-1], tf.size(points, tf.int64)))

    def select(self, mask: Tensor) -> Text:
        """Only the code points where `mask`, bool [N]."""
        source = tf.where(mask)[:, 0]
        return self.derive(tf.gather(self.points, source), source)

    def insert_before(self, mask: Tensor, point: int) -> Text:
        """With a code point inserted before those where `mask`, bool [N], which start ordinary pieces."""
        inserted = tf.cast(mask, tf.int64)
        indices = tf.range(tf.size(self.points, tf.int64))
        source = _row_ids(indices + tf.cumsum(inserted, exclusive=True), indices[-1] + 1 + tf.reduce_sum(inserted))
        moved = (indices + tf.cumsum(inserted))[:, None]
        points = tf.tensor_scatter_nd_update(tf.fill(tf.shape(source), point), moved, self.points)
        return self.derive(points, source)

    def replace_pieces(self, pieces: Tensor) -> Text:
        """Each ordinary piece replaced by one of `pieces`, as many UTF-8 strings as there are pieces of any kind."""
        kinds = tf.boolean_mask(self.kinds, self.starts)
        splits, points = decode(tf.where(kinds == ORDINARY, pieces, self.pieces()))
        piece = _row_ids(splits[:-1], tf.size(points, tf.int64))
        return Text(points, _run_starts(piece), tf.gather(kinds, piece))

    def derive(self, points: Tensor, source: Tensor) -> Text:
        """A text of new code points, each with the index of the one that it came from."""
        return Text(points, _run_starts(tf.gather(self.piece_index, source)), tf.gather(self.kinds, source))


def encode(points: Tensor, starts: Tensor) -> Tensor:
    """The pieces of code points [N] that start at `starts`, bool [N], as UTF-8 strings."""
    splits = tf.concat([tf.where(starts)[:, 0], tf.size(points, tf.int64)[None]], 0)
    return tf.raw_ops.UnicodeEncode(input_values=points, input_splits=splits, output_encoding="UTF-8")


def decode(texts: Tensor) -> tuple[Tensor, Tensor]:
    """Row splits int64 [B + 1] and code points int32 [N] of texts (string [B]); U+FFFD for invalid UTF-8."""
    decoded = tf.raw_ops.UnicodeDecode(
        input=texts, input_encoding="UTF-8", errors="replace", replacement_char=0xFFFD, Tsplits=tf.int64
    )
    return decoded.row_splits, decoded.char_values


def ragged_gather(values: Tensor, splits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows `rows` [R] of ragged values with row splits int64: their values, and row splits [R + 1]."""
    gathered = tf.raw_ops.RaggedGather(
        params_nested_splits=[splits], params_dense_values=values, indices=rows, OUTPUT_RAGGED_RANK=1
    )
    return gathered.output_dense_values, gathered.output_nested_splits[0]


def _row_ids(begin: Tensor, size: Tensor) -> Tensor:
    """The row of each of `size` values, int64; rows begin at `begin` int64 [R], and the last one is not empty."""
    return tf.cumsum(tf.scatter_nd(begin[:, None], tf.ones_like(begin), size[None])) - 1


def _run_starts(values: Tensor) -> Tensor:
    """Where a value differs from the one before, bool like `values`; True for the first."""
    return tf.concat([[True], values[1:] != values[:-1]], 0)

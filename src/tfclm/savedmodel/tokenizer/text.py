"""A batch of texts as one run of code points, in pieces, and the ways in which steps change it."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from tfclm.savedmodel.tokenizer.character_classes import Tensor

__all__ = ["END", "KEEP", "PLAIN", "Text", "decode", "encode", "ragged_gather"]

PLAIN = -1  # the kind of text that is no added token
END = 0  # the kind of the NUL that is put after each text
KEEP = -1  # the row of a code point that stays as it is


class Text(NamedTuple):
    """Code points, where the pieces start that they are in, and what each is part of."""

    points: Tensor  # int32 [N]
    starts: Tensor  # bool [N]
    kinds: Tensor  # int32 [N]: PLAIN, or what no step may change: an added token or the end of a text

    @property
    def plain(self) -> Tensor:
        """Which code points may be changed, bool [N]."""
        return self.kinds == PLAIN

    @property
    def piece(self) -> Tensor:
        """The piece of each code point, int32 [N], counted from 0."""
        return tf.cumsum(tf.cast(self.starts, tf.int32)) - 1

    def pieces(self) -> Tensor:
        """The pieces as UTF-8 strings."""
        return encode(self.points, self.starts)

    def respell(self, rows: Tensor, parts: Tensor, splits: Tensor) -> Text:
        """Each code point replaced by a row (`rows` int32 [N], or `KEEP`) of the ragged int32 `parts`, int64 `splits`.

        A row may be empty; a piece of which nothing is left is gone.
        """
        here = tf.range(tf.size(self.points))
        rows = tf.where(rows == KEEP, tf.size(splits) - 1 + here, rows)
        splits = tf.concat([splits, splits[-1] + 1 + tf.cast(here, tf.int64)], 0)
        points, splits = ragged_gather(tf.concat([parts, self.points], 0), splits, rows)
        return self._taken(points, _owners(splits[:-1], tf.size(points, tf.int64)))

    def keep(self, kept: Tensor) -> Text:
        """Only the code points where `kept`, bool [N]."""
        source = tf.where(kept)[:, 0]
        return self._taken(tf.gather(self.points, source), source)

    def prepend(self, where: Tensor, point: int) -> Text:
        """A code point put before those where `where`, bool [N], which begin a plain piece."""
        wanting = tf.cast(where, tf.int64)
        here = tf.range(tf.size(self.points, tf.int64))
        source = _owners(here + tf.cumsum(wanting, exclusive=True), here[-1] + 1 + tf.reduce_sum(wanting))
        place = (here + tf.cumsum(wanting))[:, None]
        points = tf.tensor_scatter_nd_update(tf.fill(tf.shape(source), point), place, self.points)
        return self._taken(points, source)

    def replace(self, pieces: Tensor) -> Text:
        """Each plain piece replaced by one of `pieces`, as many UTF-8 strings as there are."""
        kinds = tf.boolean_mask(self.kinds, self.starts)
        splits, points = decode(tf.where(kinds == PLAIN, pieces, self.pieces()))
        piece = _owners(splits[:-1], tf.size(points, tf.int64))
        return Text(points, _changes(piece), tf.gather(kinds, piece))

    def _taken(self, points: Tensor, source: Tensor) -> Text:
        """New code points, each with the index of one that it came from."""
        return Text(points, _changes(tf.gather(self.piece, source)), tf.gather(self.kinds, source))


def encode(points: Tensor, starts: Tensor) -> Tensor:
    """The pieces of code points [N] that start at `starts`, bool [N], as UTF-8 strings."""
    splits = tf.concat([tf.where(starts)[:, 0], tf.size(points, tf.int64)[None]], 0)
    return tf.raw_ops.UnicodeEncode(input_values=points, input_splits=splits, output_encoding="UTF-8")


def decode(texts: Tensor) -> tuple[Tensor, Tensor]:
    """Where each text (string [B]) begins, int64 [B + 1], and all code points, int32 [N]; U+FFFD for invalid UTF-8."""
    decoded = tf.raw_ops.UnicodeDecode(
        input=texts, input_encoding="UTF-8", errors="replace", replacement_char=0xFFFD, Tsplits=tf.int64
    )
    return decoded.row_splits, decoded.char_values


def ragged_gather(values: Tensor, splits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows `rows` [R] of ragged values (`splits` int64, one more than rows): values, splits [R + 1]."""
    gathered = tf.raw_ops.RaggedGather(
        params_nested_splits=[splits], params_dense_values=values, indices=rows, OUTPUT_RAGGED_RANK=1
    )
    return gathered.output_dense_values, gathered.output_nested_splits[0]


def _owners(begin: Tensor, size: Tensor) -> Tensor:
    """The row of each of `size` values, int64; rows begin at `begin` int64 [R], and the last one is not empty."""
    return tf.cumsum(tf.scatter_nd(begin[:, None], tf.ones_like(begin), size[None])) - 1


def _changes(piece: Tensor) -> Tensor:
    """Where the piece is another than before, bool like `piece`."""
    return tf.concat([[True], piece[1:] != piece[:-1]], 0)

"""Counts and sums over some of the rows of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

__all__ = ["any_before", "at_least", "largest", "number_of", "total", "wide"]

Tensor = Any


def number_of(rows: Tensor) -> Tensor:
    """The number int32 [] of `rows` bool [N] that are true."""
    return tf.reduce_sum(tf.cast(rows, tf.int32))


def largest(values: Tensor, rows: Tensor) -> Tensor:
    """The largest of the values int32 [N] of `rows` bool [N]; 0 if there is none above."""
    return tf.reduce_max(tf.pad(tf.where(rows, values, 0), [[0, 1]]))


def wide(values: Tensor) -> Tensor:
    """The values as int64: sums and products over many rows may be large."""
    return tf.cast(values, tf.int64)


def total(values: Tensor, rows: Tensor) -> Tensor:
    """The sum int64 [] of the values int32 [N] of `rows` bool [N]."""
    return tf.reduce_sum(wide(tf.where(rows, values, 0)))


def any_before(rows: Tensor) -> Tensor:
    """For each row, whether it or an earlier one is among `rows` bool [N]."""
    return tf.cumsum(tf.cast(rows, tf.int32)) > 0


def at_least(sizes: Sequence[int], size: Tensor) -> Tensor:
    """The smallest of the ascending `sizes` that is `size` [] or more."""
    return tf.reduce_min(tf.boolean_mask(tf.constant(sizes), tf.constant(sizes) >= size))

"""Shapes of tensors whose batch and length may be unknown when a graph is made."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

__all__ = ["sizes"]

Tensor = Any


def sizes(x: Tensor) -> list[Any]:
    """The sizes of a tensor, to reshape others with: int where they are static, and -1 for a batch that alone is not.

    In a decoding step, the ops that compute dynamic sizes would take more time than the reshaping.
    """
    first, *rest = x.shape
    if None not in rest:
        return [-1 if first is None else first, *rest]
    dynamic = tf.unstack(tf.shape(x), len(x.shape))
    return [size if static is None else static for size, static in zip(dynamic, x.shape, strict=True)]

"""Bits per byte, which compares models whose tokenizers differ."""

from __future__ import annotations

import math


def bits_per_byte(loss: float, tokens: int, size: int | None) -> float | None:
    """The summed negative log-likelihood in bits, divided by the UTF-8 bytes of the text that was scored.

    Args:
        loss: mean negative log-likelihood per token, in nats.
        tokens: number of tokens that were scored.
        size: bytes of the text that they stand for; None if these are not known.

    Returns:
        The bits per byte; None if the bytes are not known, or if there are none.

    Example:
        >>> bits_per_byte(math.log(256), tokens=1000, size=1000)  # a uniform model of bytes
        8.0
    """
    return loss * tokens / math.log(2) / size if size else None

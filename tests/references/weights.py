"""The weights of the reference models: every test computes them, so that no file has to hold them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np


def reference_weight(name: str, shape: Sequence[int]) -> np.ndarray:
    """The value of a parameter, from its name in PyTorch's state dict and its shape; float32.

    Vectors are 0.1 x normal; the weights of norms are around 1. Matrices are scaled so that a product with a vector of
    independent elements of size 1 has elements of about 1.5: logits are of the order of 1 to 10, attention is neither
    uniform nor on one token.

        reference_weight("lm_head.weight", (53, 48)).std()  # 0.22
    """
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if len(shape) > 1:
        values *= 1.5 / np.sqrt(shape[-1])
    elif name.endswith(".weight") and any(part in name.lower() for part in ("norm", "ln_")):
        values = 1 + 0.2 * values
    else:
        values *= 0.1
    return values.astype(np.float32)

"""The matrix products of the decoding loop, as XLA compiles them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import tensorflow as tf

from tfclm.savedmodel.graph.products import product


def test_smaller_weights_are_cast_in_loops_of_their_own() -> None:
    """Rows that are computed again for each output of a layer, because XLA fuses them into the product's loop."""
    matrix = tf.cast(tf.random.stateless_normal([768, 3072], [0, 1], stddev=0.02), tf.bfloat16)
    heads = tf.random.stateless_normal([12, 256], [0, 2])

    def layer(heads: Any, matrix: Any) -> Any:
        rows = tf.tanh(tf.reshape(heads, [1, 3072])) * 0.5 + 1
        return product(rows, matrix, transposed=True, small_batch=True, compiled=True)

    compiled = tf.function(layer, jit_compile=True)
    program = compiled.experimental_get_compiler_ir(heads, matrix)(stage="optimized_hlo")
    (loop,) = (part for part in program.split("\n\n") if " dot(" in part)
    assert sorted(re.findall(r" = (\S+\]).* ([a-z-]+)\(", loop)) == [
        ("bf16[768,3072]", "parameter"),
        ("f32[3072]", "parameter"),  # flat, not as [12, 256]
        ("f32[768,3072]", "convert"),
        ("f32[768]", "dot"),
    ]
    # Sums of 3,072 float32 numbers in another order.
    np.testing.assert_allclose(compiled(heads, matrix), layer(heads, matrix), rtol=1e-4, atol=1e-4)

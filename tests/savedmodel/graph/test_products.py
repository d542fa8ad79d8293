"""The matrix products of the decoding loop, as XLA compiles them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import tensorflow as tf

from tfclm.savedmodel.graph.decoding import CompiledDecoder, DecodingRows
from tfclm.savedmodel.graph.network import Network
from tfclm.savedmodel.graph.products import product
from tfclm.savedmodel.graph.sampling import SamplingParams, no_extras
from tfclm.savedmodel.graph.stopping import Stop


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


def test_smaller_weights_are_read_at_each_step_of_one_row() -> None:
    """A cast of all weights that XLA moves out of the loop, so that each step reads float32."""
    from conftest import tiny_config

    from tfclm.checkpoint import create

    network = Network(create(tiny_config("gpt2")), "bfloat16", transposed=True)
    one, zero, no = tf.ones([1], tf.int32), tf.zeros([1]), tf.zeros([1], tf.bool)
    stop = Stop(one, one, one, no, one)
    rows = DecodingRows(tf.zeros([1, 33], tf.int32), one, one, no, no, stop, tuple(network.buffers(1, 32)))
    params = SamplingParams(4 * one, zero, 0 * one, zero + 1, zero + 1, tf.zeros([1], tf.int64))
    limits = (9 * one, tf.zeros([1, 4], tf.float64), tf.constant(4))
    compiled = CompiledDecoder(network, [], None).compiled
    hlo = compiled.experimental_get_compiler_ir(rows, params, no_extras(1), *limits, network.weights())
    program = hlo(stage="optimized_hlo")
    (loop,) = re.findall(r" = (\(.*\)) while\(", program.partition("\nENTRY ")[2])
    matrices = set(re.findall(r"\w+\[\d{2,},32\]", loop))
    assert "bf16[512,32]" in matrices
    assert not [each for each in matrices if each.startswith("f32")]

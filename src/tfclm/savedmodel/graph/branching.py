"""A branch that TensorFlow optimizes as a function of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import tensorflow as tf

__all__ = ["apply_if"]

Structure = TypeVar("Structure")

# Functions are optimized with the graph that calls them, so they need not be optimized again at their first call.
CONFIG = tf.compat.v1.ConfigProto()
CONFIG.graph_options.rewrite_options.disable_meta_optimizer = True


def apply_if(condition: Any, function: Callable[[Structure], Structure], values: Structure) -> Structure:
    """`function(values)` if the condition bool [] holds, else `values`; for large functions.

    `tf.cond` means the same, but its branches become part of the graph around them. The time that Grappler needs grows
    faster than the size of the graph, and it optimizes a branch once more for each branch around it.

    Example:
        >>> apply_if(tf.constant(True), lambda pair: (pair[0] + 1, pair[1]), (tf.constant(1), tf.constant(2)))
        (<tf.Tensor: shape=(), dtype=int32, numpy=2>, <tf.Tensor: shape=(), dtype=int32, numpy=2>)
    """
    inputs = tf.nest.flatten(values)
    specs = [tf.TensorSpec(each.shape, each.dtype) for each in inputs]

    def flat(*inputs: Any) -> list[Any]:
        changed: list[Any] = tf.nest.flatten(function(tf.nest.pack_sequence_as(values, inputs)))
        return changed

    separate = tf.function(flat, autograph=False, experimental_attributes={"_noinline": True})
    called = separate.get_concrete_function(*specs)

    # A branch of `If` lacks the kernels of oneDNN, a function that is called has them.
    def call(*inputs: Any) -> Any:
        return tf.raw_ops.StatefulPartitionedCall(
            args=inputs, Tout=[spec.dtype for spec in specs], f=called, config_proto=CONFIG.SerializeToString()
        )

    def keep(*inputs: Any) -> Any:
        return inputs[: len(specs)]

    captured = called.captured_inputs
    all_specs = specs + [tf.TensorSpec(each.shape, each.dtype) for each in captured]
    outputs = tf.raw_ops.If(
        cond=condition,
        input=[*inputs, *captured],
        Tout=[spec.dtype for spec in specs],
        then_branch=tf.function(call, autograph=False).get_concrete_function(*all_specs),
        else_branch=tf.function(keep, autograph=False).get_concrete_function(*all_specs),
    )
    for output, spec, changed in zip(outputs, specs, called.outputs, strict=True):
        output.set_shape(spec.shape.most_specific_compatible_shape(changed.shape))
    result: Structure = tf.nest.pack_sequence_as(values, outputs)
    return result

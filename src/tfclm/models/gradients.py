"""A gradient that takes less memory, because less is kept from the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

__all__ = ["recomputed"]

Tensor = Any


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, whose gradient computes it again instead of keeping what lies between its inputs and output.

    For functions of tensors that are cheap to compute. Values are the same; gradients are the same up to rounding.

    Args:
        function: takes tensors, all of which may have a gradient, and returns one tensor.
    """

    @tf.custom_gradient
    def call(*inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], Any]]:
        def gradient(upstream: Tensor) -> Any:
            # Without the dependency, TensorFlow would merge this with the same operations of the forward pass.
            with tf.control_dependencies([upstream]), tf.GradientTape() as tape:
                copies = [tf.identity(each) for each in inputs]
                tape.watch(copies)
                output = function(*copies)
            return tape.gradient(output, copies, output_gradients=upstream)

        return function(*inputs), gradient

    wrapped: Callable[..., Tensor] = call
    return wrapped

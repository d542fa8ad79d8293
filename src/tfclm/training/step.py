"""The training and validation step that Keras' fit runs: a loss weighted by tokens, and gradient accumulation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
import tf_keras

from tfclm.metrics.perplexity import TokenLoss, token_losses
from tfclm.training.resume import Progress


@dataclass
class StepState:
    """What the step needs beside the model; no Keras object itself, so that Keras does not save it with the weights."""

    loss: TokenLoss
    pass_rows: int | None  # rows of one forward pass on one replica; None: all at once
    max_grad_norm: float
    start: tuple[int, int] = (0, 0)  # epoch and step that fit begins with
    progress: Progress | None = None  # for callbacks: the record of the run, which outlives its process


class FinetuningStep:
    """Mixed in before the model's own class: replaces the steps of transformers, whose loss is a mean of means.

    One call of `train_step` is one optimizer step: its batch holds the rows of all forward passes that are accumulated,
    so no accumulator outlives the step, and the gradient is that of the mean loss over all tokens of the batch.
    """

    step_state: StepState
    # What the model's own class brings.
    optimizer: Any
    trainable_variables: Any
    __call__: Any
    # What the steps report is equal on all replicas, and Keras would report its sum over them.
    distribute_reduction_method = "first"

    def _maybe_load_initial_counters_from_ckpt(self, steps_per_epoch: int, initial_epoch: int) -> tuple[int, int]:
        # Where Keras asks at which epoch and step to begin; fit's own argument knows epochs alone.
        return self.step_state.start

    @property
    def metrics(self) -> list[tf_keras.metrics.Metric]:
        """The one metric; reported as `loss` and `val_loss`."""
        return [self.step_state.loss]

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """One optimizer step on (features of [B, L], labels [B, L])."""
        features, labels = data
        state = self.step_state
        replicas = tf.distribute.get_replica_context()
        tokens = tf.reduce_sum(tf.cast(tf.not_equal(labels[:, 1:], -100), tf.float32))
        tokens = tf.maximum(replicas.all_reduce(tf.distribute.ReduceOp.SUM, tokens), 1.0)

        def gradients_of(part: dict[str, tf.Tensor]) -> list[tf.Tensor]:
            part_labels = part.pop("labels")
            with tf.GradientTape() as tape:
                losses, mask = token_losses(self(part, training=True).logits, part_labels)
                loss = tf.reduce_sum(losses) / tokens
                if isinstance(self.optimizer, tf_keras.mixed_precision.LossScaleOptimizer):
                    loss = self.optimizer.get_scaled_loss(loss)
            state.loss.update_state(losses, mask)
            gradients = tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
            return [tf.convert_to_tensor(gradient) for gradient in gradients]

        variables = self.trainable_variables
        rows = {**features, "labels": labels}
        if state.pass_rows is None:
            gradients = gradients_of(rows)
        else:
            passes, parts = _split(rows, state.pass_rows)
            _, gradients = tf.while_loop(
                lambda i, _: i < passes,
                lambda i, sums: (
                    i + 1,
                    [a + b for a, b in zip(sums, gradients_of({k: v[i] for k, v in parts.items()}), strict=True)],
                ),
                (tf.constant(0), [tf.zeros_like(variable) for variable in variables]),
            )
        norm = self._apply(replicas.all_reduce(tf.distribute.ReduceOp.SUM, gradients), variables)
        return {"loss": state.loss.result(), "grad_norm": norm}

    def _apply(self, gradients: list[tf.Tensor], variables: list[tf.Variable]) -> tf.Tensor:
        """Clips and applies gradients that are already summed over the replicas; returns their norm before."""
        optimizer = self.optimizer
        if isinstance(optimizer, tf_keras.mixed_precision.LossScaleOptimizer):
            gradients = optimizer.get_unscaled_gradients(gradients)
        norm = tf.linalg.global_norm(gradients)
        if self.step_state.max_grad_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, self.step_state.max_grad_norm, use_norm=norm)
        optimizer.apply_gradients(zip(gradients, variables, strict=True), experimental_aggregate_gradients=False)
        return norm

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Loss of (features of [B, L], labels [B, L])."""
        features, labels = data
        self.step_state.loss.update_state(*token_losses(self(features, training=False).logits, labels))
        return {"loss": self.step_state.loss.result()}


def _split(rows: dict[str, tf.Tensor], size: int) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    """Rows [B, L] as [passes, size, L]; the last pass is filled up with rows that have no label."""
    count = tf.shape(rows["labels"])[0]
    passes = -(-count // size)
    # A row without a label adds nothing to loss or gradient.
    return passes, {
        name: tf.reshape(
            tf.pad(value, [[0, passes * size - count], [0, 0]], constant_values=-100 if name == "labels" else 0),
            [-1, size, value.shape[1]],
        )
        for name, value in rows.items()
    }


@contextmanager
def finetuning_step(model: Any, pass_rows: int | None, max_grad_norm: float) -> Iterator[Any]:
    """The model with our steps, as the same object and under its class' own name; itself again afterwards.

    Args:
        model: a TensorFlow causal language model of transformers.
        pass_rows: rows of one forward pass on one replica; None runs a batch in one pass.
        max_grad_norm: gradients are clipped to this global norm; 0 is off.
    """
    original = type(model)
    # Saving reads the class' name (config.architectures), so the name stays.
    model.__class__ = type(original.__name__, (FinetuningStep, original), {"__module__": original.__module__})
    object.__setattr__(model, "step_state", StepState(TokenLoss(), pass_rows, max_grad_norm))
    try:
        yield model
    finally:
        model.__class__ = original
        object.__delattr__(model, "step_state")

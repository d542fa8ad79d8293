"""The training and validation steps that Keras' fit runs: a token-weighted loss, and gradient accumulation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tensorflow as tf
import tf_keras

from tfclm.metrics.perplexity import TokenLoss, sum_losses, token_losses
from tfclm.training.resume import Progress

if TYPE_CHECKING:
    from transformers import TFPreTrainedModel


@dataclass
class StepState:
    """State of the steps; not a Keras object, so that Keras does not save it with the weights."""

    loss: TokenLoss
    pass_rows: int | None  # rows per forward pass on one replica; None: all rows in one pass
    max_grad_norm: float
    # A replica that is to stop sets this to 1 before a step; after the step, every replica has the sum of all.
    stop: tf.Variable
    jit_compile: bool = False  # compile the computation of the gradients with XLA
    start: tuple[int, int] = (0, 0)  # epoch and step to start from
    progress: Progress | None = None  # of the whole run, for other callbacks


class FinetuningStep:
    """Base class put before the model's own: replaces the steps of transformers, whose loss is a mean of batch means.

    One call of `train_step` is one optimizer step, whose batch holds the rows of all accumulated forward passes. So no
    accumulator outlives the step, and the gradient is that of the mean loss over all tokens of the batch.
    """

    step_state: StepState
    # Attributes of the model's own class.
    optimizer: Any
    trainable_variables: Any
    __call__: Any
    # The steps return the same values on all replicas; by default Keras would sum them.
    distribute_reduction_method = "first"

    def _maybe_load_initial_counters_from_ckpt(self, steps_per_epoch: int, initial_epoch: int) -> tuple[int, int]:
        # Keras asks here for the epoch and step to start from; fit's own argument is the epoch only.
        return self.step_state.start

    @property
    def metrics(self) -> list[tf_keras.metrics.Metric]:
        """The token-weighted loss, reported as `loss` and `val_loss`."""
        return [self.step_state.loss]

    # Without Python's control flow there is nothing to convert, and converting all layers takes seconds.
    @tf.autograph.experimental.do_not_convert
    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Runs one optimizer step on (features [B, L], labels [B, L])."""
        features, labels = data
        state = self.step_state
        replicas = tf.distribute.get_replica_context()
        variables = self.trainable_variables
        tokens = tf.reduce_sum(tf.cast(tf.not_equal(labels[:, 1:], -100), tf.float32))
        # One exchange for both: each one waits for the slowest worker.
        tokens, stop = tf.unstack(replicas.all_reduce(tf.distribute.ReduceOp.SUM, tf.stack([tokens, state.stop])))
        tokens = tf.maximum(tokens, 1.0)
        state.stop.assign(stop)

        def compute_gradients(part: dict[str, tf.Tensor], tokens: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
            part = dict(part)
            part_labels = part.pop("labels")
            with tf.GradientTape() as tape:
                losses, mask = token_losses(self(part, training=True).logits, part_labels)
                loss = tf.reduce_sum(losses) / tokens
                if isinstance(self.optimizer, tf_keras.mixed_precision.LossScaleOptimizer):
                    loss = self.optimizer.get_scaled_loss(loss)
            gradients = tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
            return sum_losses(losses, mask), [tf.convert_to_tensor(gradient) for gradient in gradients]

        if state.jit_compile:
            compute_gradients = tf.function(compute_gradients, jit_compile=True)
        rows = {**features, "labels": labels}
        if state.pass_rows is None:
            sums, gradients = compute_gradients(rows, tokens)
        else:
            passes, parts = _split_passes(rows, state.pass_rows)
            zeros = tf.zeros(2, tf.float64), [tf.zeros_like(variable) for variable in variables]
            _, sums, gradients = tf.while_loop(
                lambda i, *_: i < passes,
                lambda i, *totals: (
                    i + 1,
                    *tf.nest.map_structure(
                        tf.add,
                        totals,
                        compute_gradients({name: value[i] for name, value in parts.items()}, tokens),
                    ),
                ),
                (tf.constant(0), *zeros),
            )
        state.loss.update_state(replicas.all_reduce(tf.distribute.ReduceOp.SUM, sums))
        norm = self._apply(replicas.all_reduce(tf.distribute.ReduceOp.SUM, gradients), variables)
        return {"loss": state.loss.result(), "grad_norm": norm}

    def _apply(self, gradients: list[tf.Tensor], variables: list[tf.Variable]) -> tf.Tensor:
        """Clips and applies gradients that are summed over all replicas; returns their norm before clipping."""
        optimizer = self.optimizer
        if isinstance(optimizer, tf_keras.mixed_precision.LossScaleOptimizer):
            gradients = optimizer.get_unscaled_gradients(gradients)
        norm = tf.linalg.global_norm(gradients)
        if self.step_state.max_grad_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, self.step_state.max_grad_norm, use_norm=norm)
        # Weight decay needs no gradient. If it ran earlier, it would copy the weights that the gradient still needs.
        with tf.control_dependencies([norm]):
            optimizer.apply_gradients(zip(gradients, variables, strict=True), experimental_aggregate_gradients=False)
        return norm

    @tf.autograph.experimental.do_not_convert
    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Adds (features [B, L], labels [B, L]) to the validation loss."""
        features, labels = data
        state = self.step_state
        replicas = tf.distribute.get_replica_context()
        sums = sum_losses(*token_losses(self(features, training=False).logits, labels))
        sums = tf.concat([sums, [tf.cast(state.stop, tf.float64)]], axis=0)
        sums = replicas.all_reduce(tf.distribute.ReduceOp.SUM, sums)
        state.stop.assign(tf.cast(sums[2], tf.float32))
        state.loss.update_state(sums[:2])
        return {"loss": state.loss.result()}


def _split_passes(rows: dict[str, tf.Tensor], size: int) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    """Reshapes rows [B, L] to [passes, size, L]; the last pass is filled with rows that have no label."""
    count = tf.shape(rows["labels"])[0]
    passes = -(-count // size)
    # Rows without a label add nothing to the loss or the gradient.
    return passes, {
        name: tf.reshape(
            tf.pad(value, [[0, passes * size - count], [0, 0]], constant_values=-100 if name == "labels" else 0),
            [-1, size, value.shape[1]],
        )
        for name, value in rows.items()
    }


@contextmanager
def finetuning_step(
    model: TFPreTrainedModel, pass_rows: int | None, max_grad_norm: float
) -> Iterator[TFPreTrainedModel]:
    """Replaces the model's training and validation steps within a block; the object and the class name stay the same.

    Args:
        model: a TensorFlow causal language model of transformers.
        pass_rows: rows per forward pass on one replica; None runs a batch in one pass.
        max_grad_norm: gradients are clipped to this global norm; 0 is off.
    """
    original = type(model)
    # The class name is kept, because saving writes it to config.architectures.
    model.__class__ = type(original.__name__, (FinetuningStep, original), {"__module__": original.__module__})
    stop = tf.Variable(
        0.0,
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        name="stop",
    )
    object.__setattr__(model, "step_state", StepState(TokenLoss(), pass_rows, max_grad_norm, stop))
    try:
        yield model
    finally:
        model.__class__ = original
        object.__delattr__(model, "step_state")

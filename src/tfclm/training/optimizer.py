"""AdamW with warm-up, a learning rate schedule, and weight decay for matrices only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tensorflow as tf
import tf_keras
from transformers import AdamWeightDecay

from tfclm.compat import create_all_weights
from tfclm.training.settings import TrainingSettings

if TYPE_CHECKING:
    from transformers import TFPreTrainedModel


class WarmupSchedule(tf_keras.optimizers.schedules.LearningRateSchedule):
    """Learning rate schedule: linear from 0 to the peak, then linear or cosine to 0, or constant."""

    def __init__(self, peak: float, steps: int, warmup_steps: int, schedule: str) -> None:
        self.peak, self.steps, self.warmup_steps, self.schedule = peak, steps, warmup_steps, schedule

    def __call__(self, step: Any) -> tf.Tensor:
        """The learning rate of a step, numbered from 0, as float32."""
        step = tf.cast(step, tf.float32)
        warmup = float(self.warmup_steps)
        done = tf.clip_by_value((step - warmup) / max(self.steps - warmup, 1.0), 0.0, 1.0)
        if self.schedule == "linear":
            after = 1.0 - done
        elif self.schedule == "cosine":
            after = 0.5 * (1.0 + tf.cos(tf.constant(3.141592653589793) * done))
        else:
            after = tf.ones_like(done)
        return self.peak * tf.where(step < warmup, step / max(warmup, 1.0), after)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"peak": self.peak, "steps": self.steps, "warmup_steps": self.warmup_steps, "schedule": self.schedule}


def exempt_from_decay(model: TFPreTrainedModel) -> list[str]:
    """Names of the trainable variables without weight decay: biases and the weights of normalization layers.

    The name patterns of transformers' `create_optimizer` match the normalization layers of some architectures only
    (GPT-2 calls them ln_1, ln_2, ln_f), so these are found by the type of the layer.
    """
    norms = {
        id(variable)
        for layer in model.submodules
        if "norm" in type(layer).__name__.lower()
        for variable in getattr(layer, "trainable_variables", ())
    }
    return [
        # The optimizer searches for these in a variable's name, which on a second replica ends in /replica_1:0.
        variable.name.removesuffix(":0")
        for variable in model.trainable_variables
        # Biases of GPT-2's Conv1D have shape [1, n].
        if id(variable) in norms or "bias" in variable.name.split("/")[-1] or sum(n > 1 for n in variable.shape) < 2
    ]


def make_optimizer(
    model: TFPreTrainedModel, settings: TrainingSettings, steps: int
) -> tf_keras.optimizers.legacy.Optimizer:
    """AdamWeightDecay of transformers for a run of `steps` optimizer steps, with its variables created.

    The training step clips gradients itself, because clipping needs the sum over all replicas.
    """
    optimizer = AdamWeightDecay(
        learning_rate=WarmupSchedule(settings.learning_rate, steps, settings.warmup_steps, settings.schedule),
        weight_decay_rate=settings.weight_decay,
        epsilon=1e-8,
        exclude_from_weight_decay=exempt_from_decay(model),
    )
    # Keras would create them at the first step, but restoring a saved state needs them before.
    create_all_weights(optimizer, model.trainable_variables)
    if settings.mixed_precision == "float16":
        return tf_keras.mixed_precision.LossScaleOptimizer(optimizer)
    return optimizer

"""AdamW with a warm-up and a schedule, and decay for the weights that should decay."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras
from transformers import AdamWeightDecay

from tfclm.compat import create_all_weights
from tfclm.training.settings import TrainingSettings


class WarmupSchedule(tf_keras.optimizers.schedules.LearningRateSchedule):
    """Learning rate by optimizer step: linear from 0 to the peak, then linear or cosine to 0, or constant."""

    def __init__(self, peak: float, steps: int, warmup_steps: int, course: str) -> None:
        self.peak, self.steps, self.warmup_steps, self.course = peak, steps, warmup_steps, course

    def __call__(self, step: Any) -> tf.Tensor:
        """The rate of the step numbered `step` from 0, as float32."""
        step = tf.cast(step, tf.float32)
        warmup = float(self.warmup_steps)
        done = tf.clip_by_value((step - warmup) / max(self.steps - warmup, 1.0), 0.0, 1.0)
        if self.course == "linear":
            after = 1.0 - done
        elif self.course == "cosine":
            after = 0.5 * (1.0 + tf.cos(tf.constant(3.141592653589793) * done))
        else:
            after = tf.ones_like(done)
        return self.peak * tf.where(step < warmup, step / max(warmup, 1.0), after)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"peak": self.peak, "steps": self.steps, "warmup_steps": self.warmup_steps, "course": self.course}


def exempt_from_decay(model: Any) -> list[str]:
    """Names of the trainable variables that weight decay leaves alone: biases, and all that a norm layer owns.

    A list of name patterns, as in `create_optimizer` of transformers, knows some architectures' norm layers and
    misses others (GPT-2 calls them ln_1, ln_2, ln_f); the layers themselves say what they are.
    """
    norms = {
        id(variable)
        for layer in model.submodules
        if "norm" in type(layer).__name__.lower()
        for variable in getattr(layer, "trainable_variables", ())
    }
    return [
        # The optimizer looks for these names inside of a variable's, which on a second replica ends in /replica_1:0.
        variable.name.removesuffix(":0")
        for variable in model.trainable_variables
        # GPT-2's convolution keeps its bias as [1, n].
        if id(variable) in norms or "bias" in variable.name.split("/")[-1] or sum(n > 1 for n in variable.shape) < 2
    ]


def make_optimizer(model: Any, settings: TrainingSettings, steps: int) -> tf_keras.optimizers.legacy.Optimizer:
    """AdamWeightDecay of transformers for a run of `steps` optimizer steps, with all its variables.

    Clipping is the training step's: it has to see the gradients of all replicas.
    """
    optimizer = AdamWeightDecay(
        learning_rate=WarmupSchedule(settings.learning_rate, steps, settings.warmup_steps, settings.schedule),
        weight_decay_rate=settings.weight_decay,
        epsilon=1e-8,
        exclude_from_weight_decay=exempt_from_decay(model),
    )
    # Not at the first step, as Keras does: a state is restored before that, and restores what is there.
    create_all_weights(optimizer, model.trainable_variables)
    if settings.mixed_precision == "float16":
        return tf_keras.mixed_precision.LossScaleOptimizer(optimizer)
    return optimizer

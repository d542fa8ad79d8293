"""Settings of a fine-tuning run; `python -m tfclm.fit` inherits these fields."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from tfclm.errors import InputError
from tfclm.settings import documented, setting


@documented
@dataclass(frozen=True)
class TrainingSettings:
    """Settings of `finetune`."""

    epochs: int = setting(3, "passes over the training blocks")
    max_steps: int | None = setting(None, "stop after this many optimizer steps, even within an epoch")
    batch_size: int = setting(16, "blocks per forward pass, over all devices")
    gradient_accumulation_steps: int = setting(1, "forward passes per optimizer step; their gradients are summed")
    learning_rate: float = setting(2e-5, "peak learning rate")
    schedule: Literal["linear", "cosine", "constant"] = setting("linear", "learning rate schedule after warm-up")
    warmup_steps: int = setting(0, "optimizer steps over which the learning rate rises from 0")
    weight_decay: float = setting(0.01, "decoupled weight decay; LayerNorm weights and biases are exempt")
    max_grad_norm: float = setting(1.0, "clip gradients to this global norm; 0 is off")
    early_stopping_patience: int = setting(0, "stop after this many epochs without a better validation loss; 0 is off")
    seed: int = setting(0, "seed of the validation split, the order of blocks, dropout and new weights")
    mixed_precision: Literal["no", "bfloat16", "float16"] = setting("no", "type to compute in; weights stay float32")
    jit_compile: bool = setting(False, "compile the training step with XLA")
    strategy: Literal["one", "mirrored", "multi_worker"] = setting(
        "one", "tf.distribute strategy: one device, all of this machine, or those of all workers"
    )
    deterministic: bool = setting(True, "the same settings on the same machine give the same weights, bit for bit")
    save_steps: int = setting(500, "optimizer steps between saves of the state from which an interrupted run resumes")

    @property
    def policy(self) -> str:
        """Name of the Keras dtype policy for `mixed_precision`."""
        return "float32" if self.mixed_precision == "no" else f"mixed_{self.mixed_precision}"

    def check(self) -> None:
        """Raises `InputError` for a value out of range, naming the field."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"`{field.name}` {value}: give a finite number")
        for name, low in {
            "epochs": 1,
            "batch_size": 1,
            "gradient_accumulation_steps": 1,
            "warmup_steps": 0,
            "weight_decay": 0,
            "max_grad_norm": 0,
            "early_stopping_patience": 0,
            "seed": 0,
            "save_steps": 1,
        }.items():
            if getattr(self, name) < low:
                raise InputError(f"`{name}` {getattr(self, name)}: give {low} or more")
        if self.seed >= 2**32:
            raise InputError(f"`seed` {self.seed}: give a number below {2**32}")
        if self.max_steps is not None and self.max_steps < 1:
            raise InputError(f"`max_steps` {self.max_steps}: give 1 or more, or leave it out")
        if not 0 < self.learning_rate < 10:
            raise InputError(f"`learning_rate` {self.learning_rate}: give a number between 0 and 10, such as 2e-5")

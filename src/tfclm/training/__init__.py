"""Training: data feed, optimizer, training step, callbacks, fine-tuning, and resuming."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tfclm.training.settings import TrainingSettings

if TYPE_CHECKING:
    from tfclm.training.finetuning import TrainingRecord, finetune

__all__ = ["TrainingRecord", "TrainingSettings", "finetune"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line needs the settings, but not TensorFlow.
    if name not in __all__:
        raise AttributeError(f"module 'tfclm.training' has no attribute {name!r}")
    value = getattr(importlib.import_module("tfclm.training.finetuning"), name)
    globals()[name] = value
    return value

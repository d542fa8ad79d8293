"""Fine-tune a causal language model with Keras on TensorFlow and serve it with TensorFlow Serving."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tfclm.compat import call_after_import

if TYPE_CHECKING:
    from tfclm.checkpoint import load, save
    from tfclm.client import Client, Completion, Score, ServerError
    from tfclm.corpus import pack
    from tfclm.errors import InputError
    from tfclm.metrics.perplexity import Perplexity, perplexity
    from tfclm.savedmodel import export_saved_model
    from tfclm.training import TrainingRecord, TrainingSettings, finetune

# Where each public name lives; it is imported on first use, so that `import tfclm` does not import TensorFlow.
_HOMES = {
    "Client": "client",
    "Completion": "client",
    "InputError": "errors",
    "Perplexity": "metrics.perplexity",
    "Score": "client",
    "ServerError": "client",
    "TrainingRecord": "training",
    "TrainingSettings": "training",
    "export_saved_model": "savedmodel",
    "finetune": "training",
    "load": "checkpoint",
    "pack": "corpus",
    "perplexity": "metrics.perplexity",
    "save": "checkpoint",
}

__version__ = "0.1.0"
__all__ = [
    "Client",
    "Completion",
    "InputError",
    "Perplexity",
    "Score",
    "ServerError",
    "TrainingRecord",
    "TrainingSettings",
    "export_saved_model",
    "finetune",
    "load",
    "pack",
    "perplexity",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tfclm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tfclm.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__") and name != "__getattr__")])


def _import_tensorflow_models() -> None:
    importlib.import_module("transformers.modeling_tf_utils")


def _register() -> None:
    importlib.import_module("tfclm.models.registration").register()


# TFAutoModelForCausalLM then knows our decoders, whoever imports it; `import tfclm` itself imports neither. The second
# module imports the first, or is imported by it, and ours need both.
call_after_import("transformers.modeling_tf_utils", _register)
call_after_import("transformers.models.auto.modeling_tf_auto", _import_tensorflow_models)

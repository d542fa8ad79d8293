"""Exporting: the graph of a SavedModel, its tokenizer, and how a finished version is checked and published."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfclm.savedmodel.exporting import Exported, export_saved_model

__all__ = ["Exported", "export_saved_model"]


def __getattr__(name: str) -> Any:
    # Imported on first use: reading a command's settings must not import TensorFlow.
    if name in __all__:
        from tfclm.savedmodel import exporting

        return getattr(exporting, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

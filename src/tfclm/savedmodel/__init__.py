"""What goes into the graph, and how a finished version is validated and published."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfclm.savedmodel.exporting import Exported, export_saved_model

__all__ = ["Exported", "export_saved_model"]


def __getattr__(name: str) -> Any:
    # On first use, so that the settings of a command can be read without TensorFlow.
    if name in __all__:
        from tfclm.savedmodel import exporting

        return getattr(exporting, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The Hugging Face Hub: pushing the results of a run, and fetching them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tfclm.hub.settings import HubSettings

if TYPE_CHECKING:
    from tfclm.hub.callback import PushToHubCallback
    from tfclm.hub.delivery import deliver
    from tfclm.hub.fetching import fetch_run, fetch_servable
    from tfclm.hub.repository import Repository, preflight

_MODULES = {
    "PushToHubCallback": "callback",
    "Repository": "repository",
    "deliver": "delivery",
    "fetch_run": "fetching",
    "fetch_servable": "fetching",
    "preflight": "repository",
}
__all__ = [
    "HubSettings",
    "PushToHubCallback",
    "Repository",
    "deliver",
    "fetch_run",
    "fetch_servable",
    "preflight",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: the callback needs transformers, which a server must not import.
    if name not in _MODULES:
        raise AttributeError(f"module 'tfclm.hub' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tfclm.hub.{_MODULES[name]}"), name)
    globals()[name] = value
    return value

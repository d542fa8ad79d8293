"""The Hugging Face Hub: pushing what a run makes, its card aside, and fetching it back."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tfclm.hub.settings import HubSettings

if TYPE_CHECKING:
    from tfclm.hub.callback import PushToHubCallback
    from tfclm.hub.delivery import deliver
    from tfclm.hub.fetching import fetch_run, fetch_servable
    from tfclm.hub.repository import Repository, preflight

_HOMES = {
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
    # The callback needs transformers, which a server that fetches a servable must not import.
    if name not in _HOMES:
        raise AttributeError(f"module 'tfclm.hub' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tfclm.hub.{_HOMES[name]}"), name)
    globals()[name] = value
    return value

"""Models of two layers, whose weights can be taken for each other's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def make_model(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """As for all tests, with a second layer."""
    return functools.partial(make_model, layers=2)

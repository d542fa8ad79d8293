"""Numbers that may not be finite: exp without overflow errors, and values for JSON, which has no NaN or infinity."""

from __future__ import annotations

import json
import math
from typing import Any


def exp(loss: float) -> float:
    """exp(loss): infinity where Python raises OverflowError, NaN for NaN."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def plain(values: Any) -> Any:
    """The values as JSON types, with None for each number that is not finite: Python's json would write NaN."""
    return json.loads(json.dumps(values), parse_constant=lambda name: None)

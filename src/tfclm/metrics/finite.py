"""Numbers that may not be finite: exp of any loss, and values for JSON, which has no NaN and no infinity."""

from __future__ import annotations

import json
import math
from typing import Any


def exp(loss: float) -> float:
    """exp(loss): infinite instead of an error where it overflows, NaN for NaN."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def plain(values: Any) -> Any:
    """The values in JSON's types, None for each number that is not finite: Python itself writes what is no JSON."""
    return json.loads(json.dumps(values), parse_constant=lambda name: None)

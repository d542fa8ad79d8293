"""Counters and histograms with TensorFlow Serving's names, in Prometheus' text format.

Every combination of label values stays in memory, so requests must not choose label values freely: see `UNKNOWN_MODEL`.
"""

from __future__ import annotations

import bisect
import re
import threading
from collections.abc import Iterator

_LATENCY_US = tuple(10 * 1.8**power for power in range(33))
_EXAMPLES = tuple(float(2**power) for power in range(15))

UNKNOWN_MODEL = "(unknown)"
"""The label value for all requests to models that the server does not have."""


class Counter:
    """A number that only grows, with one cell per combination of label values."""

    kind = "counter"

    def __init__(self, name: str, *labels: str) -> None:
        self.name, self._labels = name, labels
        self._cells: dict[tuple[str, ...], float] = {}
        self._lock = threading.Lock()

    def add(self, amount: float = 1, **labels: str) -> None:
        """Adds to the cell of the label values."""
        key = tuple(labels[label] for label in self._labels)
        with self._lock:
            self._cells[key] = self._cells.get(key, 0) + amount

    def total(self) -> int:
        """The value of the first cell."""
        with self._lock:
            return int(next(iter(self._cells.values()), 0))

    def lines(self) -> Iterator[str]:
        """One line per cell."""
        with self._lock:
            cells = list(self._cells.items())
        for key, value in cells:
            yield f"{self.name}{{{_pairs(self._labels, key)}}} {value:.0f}"


class Histogram:
    """How many values fell into each bucket, for each combination of label values."""

    kind = "histogram"

    def __init__(self, name: str, *labels: str, limits: tuple[float, ...] = _LATENCY_US) -> None:
        self.name, self._labels, self._limits = name, labels, limits
        self._cells: dict[tuple[str, ...], tuple[list[int], list[float]]] = {}
        self._lock = threading.Lock()

    def observe(self, value: float, **labels: str) -> None:
        """Counts a value."""
        key = tuple(labels[label] for label in self._labels)
        with self._lock:
            buckets, total = self._cells.setdefault(key, ([0] * (len(self._limits) + 1), [0.0]))
            # A bucket holds the values below its limit.
            buckets[bisect.bisect_right(self._limits, value)] += 1
            total[0] += value

    def lines(self) -> Iterator[str]:
        """The cumulative buckets, then the sum and the count, for each cell."""
        with self._lock:
            cells = [(key, list(buckets), total[0]) for key, (buckets, total) in self._cells.items()]
        for key, buckets, total in cells:
            pairs = _pairs(self._labels, key)
            count = 0
            for limit, number in zip([f"{limit:g}" for limit in self._limits] + ["+Inf"], buckets, strict=True):
                count += number
                yield f'{self.name}_bucket{{{pairs},le="{limit}"}} {count}'
            yield f"{self.name}_sum{{{pairs}}} {total:g}"
            yield f"{self.name}_count{{{pairs}}} {count}"


class Metrics:
    """All metrics of a server."""

    def __init__(self) -> None:
        prefix = ":tensorflow:serving:"
        self.request_count = Counter(f"{prefix}request_count", "model_name", "status")
        self.request_latency = Histogram(f"{prefix}request_latency", "model_name", "API", "entrypoint")
        self.runtime_latency = Histogram(f"{prefix}runtime_latency", "model_name", "API", "runtime")
        self.example_counts = Histogram(f"{prefix}request_example_counts", "model", limits=_EXAMPLES)
        self.example_count = Counter(f"{prefix}request_example_count_total", "model")
        self.warmup_latency = Histogram(f"{prefix}model_warmup_latency", "model_path", "status")
        self.warmup_records_read = Counter(f"{prefix}model_warmup_records_read", "model_path", "status")

    def page(self) -> str:
        """All metrics in Prometheus' text format."""
        lines = []
        for metric in sorted(vars(self).values(), key=lambda metric: str(metric.name)):
            lines += [f"# TYPE {metric.name} {metric.kind}", *metric.lines()]
        return "\n".join(lines) + "\n"

    def value(self, name: str) -> int:
        """The value of a counter, named with slashes as in TensorFlow; 0 for an unknown name."""
        flat = re.sub("[^a-zA-Z0-9_]", ":", name)
        return next((m.total() for m in vars(self).values() if isinstance(m, Counter) and m.name == flat), 0)


def _pairs(labels: tuple[str, ...], values: tuple[str, ...]) -> str:
    escaped = (value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for value in values)
    return ",".join(f'{label}="{value}"' for label, value in zip(labels, escaped, strict=True))

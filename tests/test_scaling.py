"""The arithmetic of `benchmarks.scaling`, against cases computed by hand."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.scaling import Network, Pieces, estimate, preparation_table, reduce_seconds, training_table

# An all-reduce of 8 bytes takes 1 ms and 2 ms per further worker: 1 ms of overhead and 1 ms for each of two messages.
SMALL = {2: 0.003, 3: 0.005, 4: 0.007}
# 1 GB between two workers takes 2 s more: 0.5 GB/s.
PIECES = Pieces("a model", 400_000_000, {4: 1.0, 8: 2.0}, SMALL, {1000: 0.0031, 10**9: 2.003}, 0.8, 500_000.0)


def test_what_is_read_from_the_measurements():
    """A latency per worker in place of one per message, or a bandwidth that includes the latency."""
    assert PIECES.overhead == pytest.approx(0.001)
    assert PIECES.latency == pytest.approx(0.001)
    assert PIECES.bandwidth == pytest.approx(0.5e9)
    assert Pieces.from_json(PIECES.to_json()) == PIECES


def test_a_ring_of_workers():
    """A ring that sends its bytes once in place of twice, or a network that is faster than its slowest part."""
    # 1 ms + 14 messages of 2 ms + 2 * 7/8 * 400 MB at 0.25 GB/s = 0.001 + 0.028 + 2.8.
    slow = Network(0.25e9, 0.001)
    assert reduce_seconds(PIECES, slow, 8, 400e6) == pytest.approx(2.829)
    # The software's 0.5 GB/s: 0.001 + 0.014 + 1.4.
    assert reduce_seconds(PIECES, Network(9e9, 0.0), 8, 400e6) == pytest.approx(1.415)


def test_a_step_and_its_days():
    """Tokens of one worker in place of all, exchanges that are left out, or days that are hours."""
    network = Network(9e9, 0.0)
    # 2 s of computation, 1.415 s for the gradients, 2 * 0.015 s for the token count and the loss.
    found = estimate(PIECES, network, 8, 8)
    assert found.seconds == pytest.approx(3.445)
    assert found.efficiency == pytest.approx(2 / 3.445)
    assert found.tokens_per_second == pytest.approx(8 * 8 * 128 / 3.445)
    row = next(line for line in training_table(PIECES, network) if line.startswith("| 8 | 8 |"))
    # 1e9 / 2377.94 / 86400 = 4.87
    days = "4.9 days | 48.7 days | 486.7 days | 4,867.3 days"
    assert row == f"| 8 | 8 | 3.45 s | 58% | 2,378 | {days} |"


def test_hours_to_prepare():
    """Bytes of another type than int32, or hours that do not depend on the cores."""
    # 1e11 / 500,000 / 3600 = 55.6 h.
    assert "| 1e11 | 400 GB | 55.6 h | 6.9 h | 0.2 h |" in preparation_table(PIECES)

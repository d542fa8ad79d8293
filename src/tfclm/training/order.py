"""The order in which a run takes its blocks, permuted an epoch at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


class RunOrder:
    """The order of blocks over a whole run.

    Each epoch is a permutation that depends on (seed, epoch) only, cut to whole batches, so each epoch leaves out
    other blocks. With fewer blocks than `batch_size`, a batch is all of them. An epoch is permuted when it is read, and
    only the last one that was read is kept: 4 bytes per block, 8 from 2**31 blocks on.

    Args:
        blocks: number of blocks.
        batch_size: blocks per batch.
        epochs: number of epochs.
        seed: seed of the permutations.
        start: leave out this many blocks, because a resumed run has taken them.

    Example:
        >>> order = RunOrder(23, 5, epochs=3, seed=1)
        >>> len(order)
        60
        >>> first_batch = order[np.arange(5)]
    """

    def __init__(self, blocks: int, batch_size: int, epochs: int, seed: int, start: int = 0) -> None:
        self._blocks, self._seed, self._start = blocks, seed, start
        self._per_epoch = blocks - blocks % min(batch_size, blocks)
        self._length = epochs * self._per_epoch - start
        self._last: tuple[int, np.ndarray[Any, Any]] | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, positions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Indices of blocks [N] at these positions [N] of the run.

        Raises:
            IndexError: a position is negative, or the run has ended before it.
        """
        if len(positions) and not 0 <= positions.min() <= positions.max() < self._length:
            raise IndexError(f"positions {positions.min()} to {positions.max()} in an order of {self._length} blocks")
        epochs, places = np.divmod(positions + self._start, self._per_epoch)
        indices = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._permutation(int(epoch))[places[here]]
        return indices

    def _permutation(self, epoch: int) -> np.ndarray[Any, Any]:
        last = self._last  # read once, because another thread may replace it
        if last is None or last[0] != epoch:
            self._last = None  # the two are not in memory together
            numbers = np.arange(self._blocks, dtype=np.int32 if self._blocks < 2**31 else np.int64)
            np.random.default_rng([self._seed, epoch]).shuffle(numbers)
            self._last = last = epoch, numbers
        return last[1]


def split_rows(rows: int, replicas: int) -> list[int]:
    """The rows of a batch that each replica takes.

    Example:
        >>> split_rows(9, 2)
        [5, 4]
    """
    return [rows // replicas + (replica < rows % replicas) for replica in range(replicas)]


@dataclass(frozen=True)
class WorkerOrder:
    """The part of an order that one worker takes: of every batch the rows of its replicas.

    Attributes:
        order: indices of rows, in the order of the batches of all workers.
        batch_size: rows per batch, over all workers.
        replicas: number of replicas of all workers.
        first: the worker's first replica.
        local: number of its replicas.
    """

    order: RunOrder | np.ndarray[Any, Any]
    batch_size: int
    replicas: int
    first: int
    local: int

    def __len__(self) -> int:
        batches, rest = divmod(len(self.order), self.batch_size)
        return batches * self._part(self.batch_size)[1] + self._part(rest)[1]

    def __getitem__(self, positions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Indices of rows [N] at these positions [N] of the worker's part."""
        start, rows = self._part(self.batch_size)
        whole, rest = divmod(len(self.order), self.batch_size)
        batches, row = np.divmod(positions, rows)
        # A short last batch is divided like the others.
        starts = np.where(batches < whole, start, self._part(rest)[0])
        return self.order[batches * self.batch_size + starts + row]

    def _part(self, rows: int) -> tuple[int, int]:
        """Its first row in a batch of so many rows, and the number of its rows."""
        sizes = split_rows(rows, self.replicas)
        return sum(sizes[: self.first]), sum(sizes[self.first : self.first + self.local])

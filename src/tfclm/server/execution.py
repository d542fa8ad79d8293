"""Runs of models: a kernel cannot be interrupted, but the caller who waits for it can be answered without it."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import tensorflow as tf

from tfclm.server.status import Code, StatusError

T = TypeVar("T")
Step = Callable[[int, int], T]
"""Runs a session in the thread pool of this number, within this many milliseconds (0 for no limit)."""

THREAD_POOLS = 32
MAX_ABANDONED_RUNS = 64  # per model
# TensorFlow's messages about a batch that was cancelled, while it ran or before it began. client/transport.py has the
# same list, because the client imports nothing of the server.
_CANCELLED_BATCH = ("Loop execution was cancelled", "Missing 0-th output from", "cancelled before it was started")


class Caller:
    """The caller who waits for the answer to a request; one object is used for the whole request.

    Args:
        seconds: how long the caller waits; None for no limit.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._cancelled = False
        self._notified = threading.Event()

    def cancel(self) -> None:
        """The caller no longer waits; another thread may call this."""
        self._cancelled = True
        self._notified.set()

    def remaining(self) -> float | None:
        """The seconds that are left, more than 0; None for no limit.

        Raises:
            StatusError: CANCELLED or DEADLINE_EXCEEDED: the caller no longer waits.
        """
        if self._deadline is not None:
            seconds = self._deadline - time.monotonic()
            if seconds <= 0:
                raise StatusError(Code.DEADLINE_EXCEEDED, "Timed out waiting for notification")
        if self._cancelled:
            raise StatusError(Code.CANCELLED, "The caller cancelled the request")
        return seconds if self._deadline is not None else None

    def wait(self, done: Callable[[], bool]) -> bool:
        """Waits for `done()` to be true, checking after each `notify`; returns False if the caller stopped waiting."""
        while not done():
            try:
                seconds = self.remaining()
            except StatusError:
                return False
            self._notified.wait(seconds)
            self._notified.clear()
        return True

    def notify(self) -> None:
        """Makes `wait` check again."""
        self._notified.set()


class Runs:
    """The runs of a server's sessions, each in its own thread.

    TensorFlow stops a run that timed out only between two kernels, and has no way to stop one whose caller has
    cancelled. Such a run is abandoned: its request is answered at once, and its thread continues until the run ends.
    Runs do not share a pool of inter-op threads while another pool is free, so they do not wait for an abandoned run.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        # Runs per pool. Pool 0 is left to what TensorFlow schedules by itself.
        self._pool_runs = [0] * (THREAD_POOLS + 1)
        self._abandoned: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """The number of current runs, abandoned ones included."""
        return sum(self._pool_runs)

    def run(self, model: str, step: Step[T], caller: Caller) -> T:
        """Runs a step of a model and returns its result; repeats it if it was cancelled because of another request.

        TensorFlow runs a batch of several requests under the deadline of the last one. When that passes, the others
        are cancelled, or get no output if the batch had not started.

        Raises:
            StatusError: CANCELLED or DEADLINE_EXCEEDED, if the caller no longer waits; UNAVAILABLE, while too many
                abandoned runs of the model are in progress.
        """
        while True:
            try:
                return self._run_once(model, step, caller)
            except (tf.errors.CancelledError, tf.errors.InternalError) as error:
                if not any(words in error.message for words in _CANCELLED_BATCH):
                    raise
                caller.remaining()  # raises if it was this caller's own deadline

    def _run_once(self, model: str, step: Step[T], caller: Caller) -> T:
        seconds = caller.remaining()
        with self._lock:
            if self._abandoned[model] >= MAX_ABANDONED_RUNS:
                raise StatusError(
                    Code.UNAVAILABLE,
                    f"{self._abandoned[model]} runs of model {model} whose callers no longer wait are still in "
                    "progress; try again later",
                )
            worker = self._idle.pop() if self._idle else _Worker()
            pool = min(range(1, len(self._pool_runs)), key=self._pool_runs.__getitem__)
            self._pool_runs[pool] += 1
        job = _Job(model, step, pool, 0 if seconds is None else math.ceil(seconds * 1000), caller)
        worker.jobs.put(partial(self._work, job, worker))
        if not caller.wait(job.is_done):
            with self._lock:
                job.abandoned = not job.done
                self._abandoned[model] += job.abandoned
            if job.abandoned:
                caller.remaining()
        try:
            if job.error is not None:
                raise job.error
            result: T = job.result
            return result
        finally:
            # The error's traceback refers to this frame, which would keep the job in memory.
            del job

    def _work(self, job: _Job, worker: _Worker) -> None:
        try:
            job.result = job.step(job.pool, job.timeout_ms)
        except BaseException as error:
            job.error = error
        with self._lock:
            job.done = True
            self._pool_runs[job.pool] -= 1
            self._abandoned[job.model] -= job.abandoned
            self._idle.append(worker)
        job.caller.notify()


class _Job:
    def __init__(self, model: str, step: Step[Any], pool: int, timeout_ms: int, caller: Caller) -> None:
        self.model, self.step, self.pool, self.timeout_ms, self.caller = model, step, pool, timeout_ms, caller
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = self.abandoned = False

    def is_done(self) -> bool:
        return self.done


class _Worker:
    """A thread that does one job after the other."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._work, name="tfclm-run", daemon=True).start()

    def _work(self) -> None:
        while True:
            self.jobs.get()()

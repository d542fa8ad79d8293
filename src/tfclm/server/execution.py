"""Runs of models: a kernel that runs cannot be interrupted, but whoever waits for it can be answered without it."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from tfclm.server.status import Code, StatusError

T = TypeVar("T")
Step = Callable[[int, int], T]
"""Runs a session in the thread pool of this number, within so many milliseconds (0 for no limit)."""

POOLS = 32
MAX_ABANDONED = 64  # of a model


class Caller:
    """Whoever waits for a request's answer. One object serves all that is done for the request."""

    def __init__(self, seconds: float | None = None) -> None:
        """`seconds` is how long the caller waits; None for as long as it takes."""
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._left = False
        self._news = threading.Event()

    def leave(self) -> None:
        """The caller waits no longer; another thread may call it."""
        self._left = True
        self._news.set()

    def remaining(self) -> float | None:
        """The seconds that are left, more than 0; None for no limit.

        Raises:
            StatusError: CANCELLED or DEADLINE_EXCEEDED: nobody waits any longer.
        """
        if self._deadline is not None:
            seconds = self._deadline - time.monotonic()
            if seconds <= 0:
                raise StatusError(Code.DEADLINE_EXCEEDED, "Timed out waiting for notification")
        if self._left:
            raise StatusError(Code.CANCELLED, "The caller cancelled the request")
        return seconds if self._deadline is not None else None

    def wait(self, done: Callable[[], bool]) -> bool:
        """Waits until `done()`, which is announced by `notify`; gives False if the caller left or ran out of time."""
        while not done():
            try:
                seconds = self.remaining()
            except StatusError:
                return False
            self._news.wait(seconds)
            self._news.clear()
        return True

    def notify(self) -> None:
        """Makes `wait` look again."""
        self._news.set()


class Runs:
    """The runs of a server's sessions, each in a thread of its own.

    TensorFlow ends a run whose time is up only between two kernels, and has no way to end one whose caller has gone.
    Such a run is abandoned: its request is answered at once, and its thread goes on until the run ends. Runs do not
    share a pool of inter-op threads as long as there is a free one, so that they do not wait for an abandoned one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        # Pool 0 is left to what TensorFlow schedules by itself.
        self._users = [0] * (POOLS + 1)
        self._abandoned: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """How many are under way, with those that are abandoned."""
        return sum(self._users)

    def run(self, model: str, step: Step[T], caller: Caller) -> T:
        """Gives the result of a model's step, or raises its error.

        Raises:
            StatusError: CANCELLED or DEADLINE_EXCEEDED, for a caller that does not wait any longer; UNAVAILABLE, where
                too many abandoned runs of the model are under way.
        """
        seconds = caller.remaining()
        with self._lock:
            if self._abandoned[model] >= MAX_ABANDONED:
                raise StatusError(
                    Code.UNAVAILABLE,
                    f"{self._abandoned[model]} runs of model {model} whose callers no longer wait are still under way; "
                    "try again later",
                )
            worker = self._idle.pop() if self._idle else _Worker()
            pool = min(range(1, len(self._users)), key=self._users.__getitem__)
            self._users[pool] += 1
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
            # The error's traceback holds this frame.
            del job

    def _work(self, job: _Job, worker: _Worker) -> None:
        try:
            job.result = job.step(job.pool, job.timeout_ms)
        except BaseException as error:
            job.error = error
        with self._lock:
            job.done = True
            self._users[job.pool] -= 1
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

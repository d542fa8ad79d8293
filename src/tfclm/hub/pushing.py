"""Pushes in the background: one at a time, the newest state next, tried again while there is time."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tfclm.hub.connection import FIRST_WAIT, PushFailed, format_error, next_wait, requested_wait
from tfclm.hub.repository import Repository
from tfclm.terminal import printable

__all__ = ["Pusher", "State", "log_above_progress"]


@dataclass(frozen=True)
class State:
    """Files to push in one commit.

    Attributes:
        files: local files by their path in the repository.
        title: first line of the commit message.
        description: the rest of the message.
        run: id of the run that the state belongs to, if it belongs to one.
        steps: optimizer steps of the run so far.
        staged: directory that is removed once the state is pushed or superseded.
    """

    files: Mapping[str, Path]
    title: str
    description: str = ""
    run: str | None = None
    steps: int = 0
    staged: Path | None = None

    def discard(self) -> None:
        """Removes the staged files."""
        if self.staged is not None:
            shutil.rmtree(self.staged, ignore_errors=True)


class Pusher:
    """Pushes states to a repository in a background thread.

    While one state is pushed, or waits until the Hub can be reached again, only the newest of the following ones is
    kept. `close` pushes that one, too, and ends the thread.

    Args:
        repository: where to push to.
        request_title: title of the pull request, if one is written.
        log: gets a line when a push fails.
        first_wait: seconds until a failed push is tried again; doubled each time.

    Attributes:
        error: why the newest state was not pushed; None if it was.
    """

    def __init__(
        self,
        repository: Repository,
        request_title: str,
        log: Callable[[str], None] = lambda line: log_above_progress(line),
        first_wait: float = FIRST_WAIT,
    ) -> None:
        self.repository, self._request_title, self._log, self._first_wait = repository, request_title, log, first_wait
        self.error: BaseException | None = None
        self._pushed_before: int | None = None  # steps of the run's newest state on the Hub when this process began
        self._changed = threading.Condition()
        self._waiting: State | None = None
        self._deadline: float | None = None  # on the monotonic clock, once `close` was called
        # A daemon, so that a process that is told to end does not wait for the Hub.
        self._thread = threading.Thread(target=self._run, name="push", daemon=True)
        self._thread.start()

    def put(self, state: State) -> None:
        """Hands over a state to push, in place of one that is waiting; returns at once."""
        with self._changed:
            if self._waiting is not None:
                self._waiting.discard()
            self._waiting = state
            self._changed.notify()

    def close(self, patience: float, *, drop: bool = False) -> BaseException | None:
        """Waits for the current push and for the waiting state; returns why the newest one failed, None if it did not.

        Args:
            patience: seconds for which a failed push is tried again. If the Hub asks for a longer wait, the push is
                given up at once.
            drop: discard the waiting state instead of pushing it.
        """
        with self._changed:
            if drop and self._waiting is not None:
                self._waiting.discard()
                self._waiting = None
            self._deadline = time.monotonic() + patience
            self._changed.notify()
        self._thread.join()
        return self.error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._deadline is not None)
                # The Hub may have asked an earlier state, or another pusher, to wait.
                until = self.repository.blocked_until
                in_time = self._waiting is None or self._sleep_until(until)
                state, self._waiting = self._waiting, None
            if state is None:
                return
            try:
                if in_time:
                    self.error = self._push(state)
                else:
                    wait = until - time.monotonic()
                    self.error = PushFailed(f"the Hub asks to wait for another {wait:.0f} s")
            except BaseException as error:  # or nobody would notice that the thread has ended
                self.error = error
                self._log(f"{state.title}: not pushed to {self.repository.repo_id}: {type(error).__name__}")
            finally:
                state.discard()

    def _sleep_until(self, until: float, *, interruptible: bool = False) -> bool:
        """Waits until a time, with the lock held; False, at once, if the deadline is before that time.

        If `interruptible`, a newer state ends the wait.
        """

        def out_of_time() -> bool:
            return self._deadline is not None and self._deadline < until

        self._changed.wait_for(
            lambda: out_of_time() or (interruptible and self._waiting is not None), max(until - time.monotonic(), 0.0)
        )
        return not out_of_time()

    def _push(self, state: State) -> BaseException | None:
        """Pushes a state until it succeeds, is superseded or refused, or time is up; the error if it failed."""
        waited = 0.0
        while True:
            try:
                if state.run is not None and self._pushed_before is None:
                    # A resumed run may have pushed this state, and later ones, before it was killed.
                    self._pushed_before = self.repository.pushed_steps(state.run, self._request_title)
                if state.run is None or state.steps > (self._pushed_before or 0):
                    self.repository.mirror(
                        state.files, state.title, state.description, request_title=self._request_title
                    )
                return None
            except Exception as error:  # of many types: the client's, the transport's, the operating system's
                requested = requested_wait(error)
                reason = format_error(error, self.repository.token)
                if requested is None:
                    self._log(f"{state.title}: not pushed to {self.repository.repo_id}: {reason}")
                    return error
                if not waited:
                    self._log(f"{state.title}: pushing to {self.repository.repo_id} failed, trying again: {reason}")
                waited = next_wait(waited, self._first_wait)
                again = time.monotonic() + max(waited, requested)
                # A newer state ends the back-off early, but not a wait that the Hub has asked for.
                self.repository.blocked_until = time.monotonic() + requested
                with self._changed:
                    if not self._sleep_until(again, interruptible=True) or self._waiting is not None:
                        return error


def log_above_progress(line: str) -> None:
    """Prints a line to stderr, above the progress bar of a training."""
    from tqdm.auto import tqdm

    if sys.stderr is not None:
        tqdm.write(printable(line, sys.stderr), file=sys.stderr)

"""Pushing in the background: one push at a time, the newest state next, and none given up while there is time."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tfclm.hub.repository import FIRST_WAIT, PushFailed, Repository, format_error, next_wait, wait_for
from tfclm.terminal import printable


@dataclass(frozen=True)
class State:
    """Files to push, by their path in the repository, and the commit's message."""

    files: Mapping[str, Path]
    title: str
    description: str = ""
    run: str | None = None  # of which run it is, and after how many optimizer steps
    steps: int = 0
    staged: Path | None = None  # a folder that is removed once the state is pushed or overtaken

    def discard(self) -> None:
        """Frees what the state takes on the disk."""
        if self.staged is not None:
            shutil.rmtree(self.staged, ignore_errors=True)


class Pusher:
    """Pushes states to a repository in a thread of its own.

    While one is pushed, or waits for the Hub to come back, the newest of those that follow waits; the ones between them
    are left out. `close` ends it: the state that waits is pushed, if that takes no longer than `patience` seconds of
    trying.

    Args:
        repository: where to.
        request_title: the title of the pull request, if one is written.
        log: gets a line for people.
        first_wait: seconds before a push that failed is tried again; twice as long each time after.
    """

    def __init__(
        self,
        repository: Repository,
        request_title: str,
        log: Callable[[str], None] = lambda line: complain(line),
        first_wait: float = FIRST_WAIT,
    ) -> None:
        self.repository, self._request_title, self._say, self._first_wait = repository, request_title, log, first_wait
        self.error: BaseException | None = None  # of the newest state, if its push failed
        self._reached: int | None = None  # steps of the run's newest state on the Hub when this process began
        self._news = threading.Condition()
        self._waiting: State | None = None
        self._deadline: float | None = None  # set when no more states come
        # A daemon: a process that is told to end does not wait for the Hub.
        self._thread = threading.Thread(target=self._run, name="push", daemon=True)
        self._thread.start()

    def put(self, state: State) -> None:
        """Hands over a state; returns at once."""
        with self._news:
            if self._waiting is not None:
                self._waiting.discard()
            self._waiting = state
            self._news.notify()

    def close(self, patience: float, *, drop: bool = False) -> BaseException | None:
        """Waits for the push that goes on and for the state that waits; why the newest one failed, if it did.

        Args:
            patience: seconds for which a push that fails is tried again. A Hub that asks for a longer wait is not
                waited for at all.
            drop: leave out the state that waits.
        """
        with self._news:
            if drop and self._waiting is not None:
                self._waiting.discard()
                self._waiting = None
            self._deadline = time.monotonic() + patience
            self._news.notify()
        self._thread.join()
        return self.error

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._waiting is not None or self._deadline is not None)
                # The wait that the Hub has asked for, of an earlier state or of another pusher.
                until = self.repository.rests_until
                in_time = self._waiting is None or self._rest(until)
                state, self._waiting = self._waiting, None
            if state is None:
                return
            try:
                if in_time:
                    self.error = self._push(state)
                else:
                    wait = until - time.monotonic()
                    self.error = PushFailed(f"the Hub asks to be left alone for {wait:.0f} s more")
            except BaseException as error:  # or nobody would know that the thread has ended
                self.error = error
                self._say(f"{state.title}: not pushed to {self.repository.repo_id}: {type(error).__name__}")
            finally:
                state.discard()

    def _rest(self, until: float, *, newer: bool = False) -> bool:
        """Waits until then, of which the lock is held; False, at once, if the time for pushing is over before.

        With `newer`, a newer state ends the wait.
        """

        def out_of_time() -> bool:
            return self._deadline is not None and self._deadline < until

        self._news.wait_for(
            lambda: out_of_time() or (newer and self._waiting is not None), max(until - time.monotonic(), 0.0)
        )
        return not out_of_time()

    def _push(self, state: State) -> BaseException | None:
        """Pushes until it is done, overtaken, refused for good, or out of time."""
        waited = 0.0
        while True:
            try:
                if state.run is not None and self._reached is None:
                    # A run that goes on may have pushed this state, and later ones, before it was killed.
                    self._reached = self.repository.steps_of(state.run, self._request_title)
                if state.run is None or state.steps > (self._reached or 0):
                    self.repository.mirror(
                        state.files, state.title, state.description, request_title=self._request_title
                    )
                return None
            except Exception as error:  # of many types: the client's, the transport's, the operating system's
                asked = wait_for(error)
                reason = format_error(error, self.repository.token)
                if asked is None:
                    self._say(f"{state.title}: not pushed to {self.repository.repo_id}: {reason}")
                    return error
                if not waited:
                    self._say(f"{state.title}: pushing to {self.repository.repo_id} failed, trying again: {reason}")
                waited = next_wait(waited, self._first_wait)
                again = time.monotonic() + max(waited, asked)
                # A newer state cuts our own back-off short, and waits in turn as long as the Hub has asked for.
                self.repository.rests_until = time.monotonic() + asked
                with self._news:
                    if not self._rest(again, newer=True) or self._waiting is not None:
                        return error


def complain(line: str) -> None:
    """A line on stderr, above the bar of a training."""
    from tqdm.auto import tqdm

    if sys.stderr is not None:
        tqdm.write(printable(line, sys.stderr), file=sys.stderr)

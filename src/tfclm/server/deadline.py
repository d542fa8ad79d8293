"""The time that a request may take."""

from __future__ import annotations

import time

from tfclm.server.status import Code, StatusError


class Deadline:
    """The end of a request's time, which begins when this is made; a `timeout_ms` of 0 sets no limit."""

    def __init__(self, timeout_ms: int = 0) -> None:
        self._end = time.monotonic() + timeout_ms / 1000 if timeout_ms else None

    def check(self) -> None:
        """Raises `StatusError`, DEADLINE_EXCEEDED, once the time is over; long loops call it now and then."""
        if self._end is not None and time.monotonic() >= self._end:
            raise expired()

    def seconds(self) -> float | None:
        """The seconds that are left, 0 at least; None without a limit."""
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)

    def milliseconds(self) -> int:
        """What is left as a time-out of a run in milliseconds, 0 for none; raises as `check` does."""
        self.check()
        seconds = self.seconds()
        return 0 if seconds is None else max(int(seconds * 1000), 1)


def expired() -> StatusError:
    """The error of a request whose time is over, with TensorFlow Serving's message."""
    return StatusError(Code.DEADLINE_EXCEEDED, "Timed out waiting for notification")

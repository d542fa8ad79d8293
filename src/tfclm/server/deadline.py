"""The time limit of a request."""

from __future__ import annotations

import time

from tfclm.server.status import Code, StatusError


class Deadline:
    """The deadline of a request that starts now; a `timeout_ms` of 0 sets no limit."""

    def __init__(self, timeout_ms: int = 0) -> None:
        self._end = time.monotonic() + timeout_ms / 1000 if timeout_ms else None

    def check(self) -> None:
        """Raises StatusError, DEADLINE_EXCEEDED, once the deadline has passed; long loops call this regularly."""
        if self._end is not None and time.monotonic() >= self._end:
            raise deadline_exceeded()

    def seconds(self) -> float | None:
        """The seconds that are left, at least 0; None for no limit."""
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)

    def milliseconds(self) -> int:
        """The milliseconds that are left, as the timeout of a run (0 for no limit); raises as `check` does."""
        self.check()
        seconds = self.seconds()
        return 0 if seconds is None else max(int(seconds * 1000), 1)


def deadline_exceeded() -> StatusError:
    """The error for a request whose deadline has passed, with TensorFlow Serving's message."""
    return StatusError(Code.DEADLINE_EXCEEDED, "Timed out waiting for notification")

"""Settings of a push, which `fit` and `push` inherit."""

from __future__ import annotations

from dataclasses import dataclass

from tfclm.errors import InputError
from tfclm.settings import documented, setting


@documented
@dataclass(frozen=True)
class HubSettings:
    """Settings of the commands that push to the Hub."""

    private: bool = setting(False, "create the Hub repository as private")
    branch: str | None = setting(None, "branch to push to, created if necessary; main if not given")
    create_pr: bool = setting(False, "push to a pull request; opens one unless there is one for this directory")
    push_timeout: float = setting(60.0, "time limit of a request to the Hub, in seconds without an answer")
    push_patience: float = setting(300.0, "seconds for which the last push is tried again if it fails")

    def check_hub(self) -> None:
        """Raises InputError for a value out of its range, or two that contradict each other."""
        if self.branch is not None and self.create_pr:
            raise InputError("`create_pr` opens a pull request against main: leave out `branch`")
        if not 0 < self.push_timeout < 86400:
            raise InputError(f"`push_timeout` {self.push_timeout}: give a number of seconds above 0, such as 60")
        if not 0 <= self.push_patience < 86400 * 30:
            raise InputError(f"`push_patience` {self.push_patience}: give a number of seconds, such as 300")

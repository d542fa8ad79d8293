"""How to push; `fit` and `push` inherit these fields."""

from __future__ import annotations

from dataclasses import dataclass

from tfclm.errors import InputError
from tfclm.settings import documented, setting


@documented
@dataclass(frozen=True)
class HubSettings:
    """Settings of every command that pushes."""

    private: bool = setting(False, "the Hub repository is private, where it is made")
    branch: str | None = setting(None, "branch of the Hub repository that is pushed to, made if need be; main")
    create_pr: bool = setting(False, "push into a pull request, which is opened if there is none of this folder's name")
    push_timeout: float = setting(60.0, "seconds without an answer after which a request to the Hub is given up")
    push_patience: float = setting(300.0, "seconds for which the last push is tried again after the training")

    def check_hub(self) -> None:
        """Raises InputError for a value out of its range, or two that exclude each other."""
        if self.branch is not None and self.create_pr:
            raise InputError("--create-pr opens a pull request against main: leave out --branch")
        if not 0 < self.push_timeout < 86400:
            raise InputError(f"--push-timeout {self.push_timeout}: give a number of seconds above 0, such as 60")
        if not 0 <= self.push_patience < 86400 * 30:
            raise InputError(f"--push-patience {self.push_patience}: give a number of seconds, such as 300")

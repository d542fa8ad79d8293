"""The Hub repository that a run is pushed to: while it trains, when it is finished, or later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm.errors import InputError
from tfclm.hub.settings import HubSettings
from tfclm.terminal import log

if TYPE_CHECKING:
    import tf_keras
    from transformers import PreTrainedTokenizerBase

    from tfclm.hub import Repository

# Makes the model card from the records of the epochs so far.
Card = Callable[[Sequence[Mapping[str, Any]]], str]


@dataclass(frozen=True)
class HubTarget:
    """A repository, and whether the Hub can be reached.

    Attributes:
        repository: the repository to push to.
        reachable: False if the Hub could not be reached; the run is pushed later then.
        patience: seconds for which the last push is tried again.
    """

    repository: Repository
    reachable: bool
    patience: float

    @classmethod
    def open(cls, repo_id: str, settings: HubSettings, *, push_later: bool) -> HubTarget:
        """Checks that a repository can be written, before anything is trained.

        Raises:
            InputError: it cannot be written, or the Hub cannot be reached and `push_later` is not set.
        """
        from tfclm.hub.repository import Repository, Unreachable, preflight

        where: dict[str, Any] = {name: getattr(settings, name) for name in ("private", "branch", "create_pr")}
        try:
            return cls(preflight(repo_id, timeout=settings.push_timeout, **where), True, settings.push_patience)
        except InputError as error:
            raise error.renamed(repo_id="push_to_hub") from error
        except Unreachable as error:
            if not push_later:
                raise InputError(f"{error}; go online, or give `push_later` to push when it can be reached") from error
            if "/" not in repo_id:
                raise InputError(f"{error}, so its owner is not known: give `push_to_hub` as owner/name") from error
            log(f"{error}; the run continues and will be pushed later")
            return cls(Repository(repo_id, **where), False, settings.push_patience)

    def callbacks(
        self,
        output_dir: Path,
        tokenizer: PreTrainedTokenizerBase,
        card: Card,
        *,
        strategy: str,
        steps: int,
        checkpoint: bool,
    ) -> list[tf_keras.callbacks.Callback]:
        """The callback that pushes during the training; none if the Hub cannot be reached."""
        if not self.reachable:
            return []
        from tfclm.hub import PushToHubCallback

        return [
            PushToHubCallback(
                str(output_dir),
                strategy,
                steps,
                tokenizer,
                checkpoint=checkpoint,
                repository=self.repository,
                at_end=False,
                card=card,
            )
        ]

    def mark(self, output_dir: Path) -> None:
        """Records in the run's directory that it still has to be pushed; the push removes the mark."""
        from tfclm.hub.delivery import mark

        mark(output_dir, self.repository)

    def push(self, output_dir: Path, version: Path | None) -> bool:
        """Pushes a finished run, and an exported version if there is one.

        Returns:
            False if a push failed; a run that waits for the Hub has not failed.
        """
        from tfclm.hub.delivery import deliver, finishing_command

        if not self.reachable:
            finish = finishing_command(output_dir, self.repository, version)
            log(f"not pushed yet; when the Hub can be reached:\n  {finish}")
            return True
        return deliver(output_dir, self.repository, patience=self.patience, servable=version, log=log)

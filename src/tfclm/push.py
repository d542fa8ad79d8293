"""`python -m tfclm.push`: puts a model, its tokenizer and its card on the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfclm.cli.command import command
from tfclm.disk import reason, write
from tfclm.errors import InputError
from tfclm.hub.settings import HubSettings
from tfclm.settings import setting
from tfclm.terminal import log


@dataclass(frozen=True)
class PushSettings(HubSettings):
    """Settings of `push`."""

    model: str | None = setting(None, "directory of a run, or of another checkpoint")
    repo_id: str | None = setting(
        None, "Hub repository, such as me/eli5; by default the one in the run's settings", metavar="REPO"
    )
    push_saved_model: str | None = setting(
        None, "exported model to push as well, zipped: a version, or a model directory for its newest version"
    )


def run(settings: PushSettings) -> int:
    """Uploads the directory so that the repository equals it; returns the exit code."""
    from tfclm.hub.archive import newest_version
    from tfclm.hub.delivery import deliver, marked
    from tfclm.hub.repository import Unreachable, preflight
    from tfclm.runs.card import plain_card
    from tfclm.runs.folder import Lock

    settings.check_hub()
    if settings.model is None:
        raise InputError("`model` is missing: give the directory of a checkpoint, such as runs/eli5")
    folder = Path(settings.model).expanduser()
    check_complete(folder)
    servable = newest_version(Path(settings.push_saved_model)) if settings.push_saved_model else None
    where: dict[str, Any] = {"private": settings.private, "branch": settings.branch, "create_pr": settings.create_pr}
    repo_id, left = settings.repo_id, marked(folder)
    if repo_id is None:
        if left is None:
            raise InputError("`repo_id` is missing: give the Hub repository, such as me/eli5")
        repo_id = left.pop("repo_id")
        # Flags override the settings of the run.
        where = left | {name: value for name, value in where.items() if value}
    lock = Lock(folder)
    try:
        try:
            repository = preflight(repo_id, timeout=settings.push_timeout, **where)
        except Unreachable as error:
            raise InputError(f"{error}; give the same command again when it can be reached") from error
        if not (folder / "README.md").is_file():
            log(f"{folder} has no README.md: writing a model card")
            write(folder / "README.md", plain_card(folder.resolve().name, [], {}))
        pushed = deliver(folder, repository, patience=settings.push_patience, servable=servable, log=log)
    finally:
        lock.release()
    return 0 if pushed else 1


def check_complete(folder: Path) -> None:
    """Raises InputError for a directory from which `load` could not read a checkpoint, or with an incomplete run."""
    from tfclm.checkpoint.locating import choose_weights

    if not folder.is_dir():
        raise InputError(f"`model` {folder}: there is no such directory")
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise InputError(f"`model` {folder} cannot be read: {reason(error)}") from error
    if "resume" in names and "results.json" not in names:
        raise InputError(f"`model` {folder} holds an incomplete run: resume it, or give another directory")
    if "config.json" not in names:
        raise InputError(f"`model` {folder} has no config.json: give the directory of a checkpoint")
    choose_weights(str(folder), names)
    if not {"tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model"} & names:
        raise InputError(f"`model` {folder} has no tokenizer: save it with the model")


def main() -> None:
    """The command."""
    command(PushSettings, run, verb="push", description=__doc__ or "", tensorflow=False)


if __name__ == "__main__":
    main()

"""Pushing a finished folder, now or later: a mark in the folder says that the Hub does not hold it yet."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tfclm.disk import write
from tfclm.errors import InputError
from tfclm.hub.pushing import Pusher, State, complain
from tfclm.hub.repository import Repository, format_error, list_files

MARKER = "unpushed.json"
STAGING = "resume/push"
WHERE = ("repo_id", "private", "branch", "create_pr")


def mark(folder: Path, repository: Repository) -> None:
    """Leaves a mark that the folder is to be pushed, and where to."""
    where = {name: getattr(repository, name) for name in WHERE}
    write(folder / MARKER, json.dumps(where, indent=2) + "\n")


def marked(folder: Path) -> dict[str, Any] | None:
    """Where a folder is still to be pushed, `preflight`'s arguments by their names; None if nothing is left to push.

    Raises:
        InputError: the mark cannot be read.
    """
    path = folder / MARKER
    if not path.is_file():
        return None
    try:
        where = json.loads(path.read_text(encoding="utf-8"))
        return {name: where[name] for name in WHERE}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} cannot be read: remove it, and say --repo-id") from error


def request_title(folder: Path) -> str:
    """The title of a folder's pull request, by which a later push finds it again."""
    return f"Upload {folder.absolute().name} by tfclm"


def finishing_command(folder: Path, repository: Repository, servable: Path | None = None) -> str:
    """The command that pushes a folder, to be pasted into a shell."""
    words = ["python", "-m", "tfclm.push", "--model", str(folder), "--repo-id", repository.repo_id]
    words += ["--private"] if repository.private else []
    words += ["--branch", repository.branch] if repository.branch else []
    words += ["--create-pr"] if repository.create_pr else []
    words += ["--push-saved-model", str(servable)] if servable else []
    return shlex.join(words)


def deliver(
    folder: Path,
    repository: Repository,
    *,
    patience: float,
    servable: Path | None = None,
    state: bool = False,
    log: Callable[[str], None] = complain,
) -> bool:
    """Makes the repository equal to a finished folder, file by file; whether it is.

    Args:
        folder: what to push; its mark is removed once the Hub holds it.
        repository: where to.
        patience: seconds for which a push that fails is tried again.
        servable: a version of an exported model that is pushed as well, zipped; `newest_version` finds it.
        state: push `resume/` too.
        log: gets a line for people.
    """
    from tfclm.hub.archive import SERVABLE, zip_servable

    files = list_files(folder, leave_out=(MARKER, STAGING) if state else (MARKER, "resume"))
    error: BaseException | None
    try:
        with tempfile.TemporaryDirectory(prefix="tfclm-") as scratch:
            if servable is not None:
                files[SERVABLE] = zip_servable(servable, Path(scratch) / SERVABLE)
            pusher = Pusher(repository, request_title(folder), log)
            pusher.put(State(files, *message(folder)))
            error = pusher.close(patience)
    except OSError as full:  # no room for the archive
        error = full
    if error is None:
        (folder / MARKER).unlink(missing_ok=True)
        log(f"{repository.url} holds {folder}")
        return True
    mark(folder, repository)
    log(
        f"{repository.repo_id} does not hold the last state, which is safe in {folder}: "
        f"{format_error(error, repository.token)}\nfinish with:\n  {finishing_command(folder, repository, servable)}"
    )
    return False


def message(folder: Path) -> tuple[str, str]:
    """Title and description of the commit: the run's history, where the folder has one."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        lines = [
            f"epoch {epoch['epoch']}, step {epoch['step']}: loss {epoch['loss']:.4f}, "
            f"validation loss {epoch['val_loss']:.4f}, validation perplexity {epoch['val_perplexity'] or 0:.2f}"
            for epoch in results["train"]["epochs"]
        ]
        return f"Perplexity {results['perplexity']:.2f} after step {results['train']['best_step']}", "\n".join(lines)
    except (OSError, ValueError, LookupError, TypeError):
        return f"Upload {folder.absolute().name}", ""  # not a run's folder

"""Pushes a finished directory, now or later: a marker in it says that the Hub does not hold it yet."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tfclm.disk import write
from tfclm.errors import InputError
from tfclm.hub.connection import format_error
from tfclm.hub.pushing import Pusher, State, log_above_progress
from tfclm.hub.repository import Repository, list_files

__all__ = ["MARKER", "STAGING", "deliver", "finishing_command", "mark", "marked", "request_title"]

MARKER = "unpushed.json"
STAGING = "resume/push"
TARGET_FIELDS = ("repo_id", "private", "branch", "create_pr")


def mark(folder: Path, repository: Repository) -> None:
    """Writes the marker: the directory still has to be pushed, to this repository."""
    target = {name: getattr(repository, name) for name in TARGET_FIELDS}
    write(folder / MARKER, json.dumps(target, indent=2) + "\n")


def marked(folder: Path) -> dict[str, Any] | None:
    """The repository that a directory still has to be pushed to, as arguments of `preflight`; None if there is none.

    Raises:
        InputError: the marker cannot be read.
    """
    path = folder / MARKER
    if not path.is_file():
        return None
    try:
        target = json.loads(path.read_text(encoding="utf-8"))
        return {name: target[name] for name in TARGET_FIELDS}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} cannot be read: remove it, and give `repo_id`") from error


def request_title(folder: Path) -> str:
    """The title of a directory's pull request, by which a later push finds it."""
    return f"Upload {folder.absolute().name} by tfclm"


def finishing_command(folder: Path, repository: Repository, servable: Path | None = None) -> str:
    """The shell command that pushes a directory.

    Example:
        >>> finishing_command(Path("runs/eli5"), Repository("me/eli5", private=True))
        'python -m tfclm.push --model runs/eli5 --repo-id me/eli5 --private'
    """
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
    log: Callable[[str], None] = log_above_progress,
) -> bool:
    """Makes a repository equal to a finished directory; False if the push failed.

    Args:
        folder: the directory; its marker is removed once the Hub holds it, and written if the push fails.
        repository: where to push to.
        patience: seconds for which a failed push is tried again.
        servable: version of an exported model to push as well, zipped; see `newest_version`.
        state: push `resume/`, too.
        log: gets a line about the result.

    Example:
        >>> deliver(Path("runs/eli5"), preflight("me/eli5"), patience=300.0)
        True
    """
    from tfclm.hub.archive import SERVABLE, zip_servable

    files = list_files(folder, leave_out=(MARKER, STAGING) if state else (MARKER, "resume"))
    error: BaseException | None
    try:
        with tempfile.TemporaryDirectory(prefix="tfclm-") as scratch:
            if servable is not None:
                files[SERVABLE] = zip_servable(servable, Path(scratch) / SERVABLE)
            pusher = Pusher(repository, request_title(folder), log)
            pusher.put(State(files, *_commit_message(folder)))
            error = pusher.close(patience)
    except OSError as disk_error:  # the archive cannot be written
        error = disk_error
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


def _commit_message(folder: Path) -> tuple[str, str]:
    """Title and description of the commit: the perplexity and the epochs of a run, where they are recorded."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        lines = [
            f"epoch {epoch['epoch']}, step {epoch['step']}: loss {epoch['loss']:.4f}, "
            f"validation loss {epoch['val_loss']:.4f}, validation perplexity {epoch['val_perplexity'] or 0:.2f}"
            for epoch in results["train"]["epochs"]
        ]
        return f"Perplexity {results['perplexity']:.2f} after step {results['train']['best_step']}", "\n".join(lines)
    except (OSError, ValueError, LookupError, TypeError):
        return f"Upload {folder.absolute().name}", ""  # not the output of a run

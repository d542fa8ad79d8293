"""What comes back from the Hub: a servable, and the state of a run. No TensorFlow, no transformers."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tfclm import disk
from tfclm.errors import InputError, first_line
from tfclm.hub.archive import SERVABLE, unpack
from tfclm.hub.repository import limit_requests, stored_token


def fetch_servable(repo_id: str, *, revision: str | None = None) -> Path:
    """Brings the exported model of a repository here; the servable's folder, one version in it, as a server takes it.

    It is kept in the Hub's cache, a folder for each content of the file: what was fetched once is not fetched again.

    Args:
        repo_id: owner/name.
        revision: a branch, tag or commit; main if not given.

    Raises:
        InputError: no such repository, none in it, or one that is damaged; or the Hub is out of reach, or the cache
            cannot be written.
    """
    from huggingface_hub import constants, hf_hub_download

    with _asking(repo_id, revision, f"no {SERVABLE} in it: push with --push-saved-model"):
        packed = Path(hf_hub_download(repo_id, SERVABLE, revision=revision))
    # The cache's own name of a content is its hash. Where there are no links, files lie in a folder of their commit.
    blob = packed.resolve()
    content = blob.name if blob.parent.name == "blobs" else packed.parent.name
    target = Path(constants.HF_HOME) / "tfclm" / "servables" / repo_id.replace("/", "--") / content
    if not target.is_dir():
        with ExitStack() as held:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                staged = held.enter_context(disk.staging(target.parent, ".part-"))
            except OSError as error:
                raise InputError(
                    f"the cache {target.parent} cannot be written ({disk.reason(error)}): let HF_HOME name a folder "
                    "that can"
                ) from error
            unpack(packed, staged / "servable", repo_id)
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(staged / "servable", target)
    return target


def fetch_run(repo_id: str, folder: Path, *, revision: str | None = None) -> None:
    """Brings the state that a run has pushed into a new or empty folder, where `fit` goes on: `resume/`, `fit.yaml`.

    Raises:
        InputError: no such repository, no state in it, or the Hub is out of reach.
    """
    from huggingface_hub import snapshot_download

    with _asking(repo_id, revision, ""):
        fetched = Path(snapshot_download(repo_id, revision=revision, allow_patterns=["resume/*", "fit.yaml"]))
    if not (fetched / "resume" / "state" / "checkpoint").is_file() or not (fetched / "fit.yaml").is_file():
        raise InputError(
            f"--resume-from {repo_id} has no state to go on from: there is one while a run that was given "
            "--push-checkpoint is not complete"
        )
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        # Beside it, and renamed when it is whole.
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder.absolute().parent) as beside:
            staged = Path(beside) / "run"
            # The cache holds links, and belongs to the Hub's client.
            disk.copy_folder(fetched / "resume", staged / "resume")
            shutil.copyfile(fetched / "fit.yaml", staged / "fit.yaml")
            _place(staged, folder)
    except OSError as error:
        raise InputError(f"--output-dir {folder}: {disk.reason(error)}; give a folder that can be written") from error


def _place(staged: Path, folder: Path) -> None:
    try:
        os.rename(staged, folder)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EBUSY):
            raise
        # The folder is a mount of its own, empty as yet. What makes a run of it comes last.
        disk.copy_folder(staged / "resume", folder / "resume")
        shutil.copyfile(staged / "fit.yaml", folder / "fit.yaml")


@contextlib.contextmanager
def _asking(repo_id: str, revision: str | None, without: str) -> Iterator[None]:
    """Names the repository where something cannot be fetched."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    stored_token()  # one that cannot be read is told of as such
    limit_requests()
    try:
        yield
    except HFValidationError as error:
        raise InputError(f"{repo_id}: a Hub id looks like owner/name") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"there is no {repo_id} on the Hub, or it is private") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repo_id} has no revision {revision} on the Hub") from error
    except LocalEntryNotFoundError as error:
        raise InputError(f"{repo_id} is not in the cache, and the Hub cannot be reached") from error
    except EntryNotFoundError as error:
        raise InputError(f"{repo_id} has {without}") from error
    except OSError as error:
        raise InputError(f"{repo_id} cannot be fetched from the Hub: {first_line(error)}") from error

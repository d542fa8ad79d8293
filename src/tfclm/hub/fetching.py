"""Downloads from the Hub: an exported model, or the state of a run. Imports neither TensorFlow nor transformers."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

from tfclm import disk
from tfclm.errors import InputError
from tfclm.hub.archive import SERVABLE, unpack
from tfclm.hub.connection import fetching_errors

__all__ = ["fetch_run", "fetch_servable"]


def fetch_servable(repo_id: str, *, revision: str | None = None) -> Path:
    """Downloads the exported model of a repository; its model directory, with one version, as servers take it.

    It is kept in the Hub's cache, in one directory per content of the archive, and not downloaded again.

    Args:
        repo_id: owner/name.
        revision: a branch, tag or commit; main if None.

    Raises:
        InputError: there is no such repository, no exported model in it, or a damaged one; the Hub cannot be reached;
            or the cache cannot be written.

    Example:
        >>> [version.name for version in fetch_servable("me/eli5").iterdir()]
        ['3']
    """
    from huggingface_hub import constants, hf_hub_download

    with fetching_errors(repo_id, revision, f"{SERVABLE}: push an exported model with `push_saved_model`"):
        packed = Path(hf_hub_download(repo_id, SERVABLE, revision=revision))
    # The cache names contents by their hash. Without symbolic links, files are in a directory named by the commit.
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
                    f"the cache {target.parent} cannot be written ({disk.reason(error)}): set HF_HOME to a directory "
                    "that can"
                ) from error
            unpack(packed, staged / "servable", repo_id)
            disk.sync_folder(staged / "servable")
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(staged / "servable", target)
    return target


def fetch_run(repo_id: str, output_dir: Path, *, revision: str | None = None) -> None:
    """Downloads the state that a run has pushed, `resume/` and `fit.yaml`, for `fit` to continue.

    Args:
        repo_id: owner/name.
        output_dir: a new or empty directory.
        revision: a branch, tag or commit; main if None.

    Raises:
        InputError: there is no such repository or no state in it, the Hub cannot be reached, or the directory cannot
            be written.

    Example:
        >>> fetch_run("me/eli5", Path("runs/eli5"))
    """
    from huggingface_hub import snapshot_download

    with fetching_errors(repo_id, revision, "state of a run"):
        fetched = Path(snapshot_download(repo_id, revision=revision, allow_patterns=["resume/*", "fit.yaml"]))
    if not (fetched / "resume" / "state" / "checkpoint").is_file() or not (fetched / "fit.yaml").is_file():
        raise InputError(
            f"{repo_id} has no state to resume from: a run holds one there while it is incomplete and has "
            "`push_checkpoint`"
        )
    place = output_dir.absolute().parent
    with ExitStack() as held:
        try:
            place.mkdir(parents=True, exist_ok=True)
            staged = held.enter_context(disk.staging(place, ".tfclm-part-"))
            # Copied, because the cache holds links and belongs to the Hub's client.
            _copy_state(fetched, staged)
            disk.sync_folder(staged)
            try:
                os.rename(staged, output_dir)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EBUSY):
                    raise
                _copy_state(staged, output_dir)  # an empty mount
        except OSError as error:
            raise InputError(
                f"`output_dir` {output_dir}: {disk.reason(error)}; give a directory that can be written"
            ) from error


def _copy_state(source: Path, target: Path) -> None:
    """Copies the state of a run; `fit.yaml`, which makes the directory one of a run, comes last."""
    disk.copy_folder(source / "resume", target / "resume")
    shutil.copyfile(source / "fit.yaml", target / "fit.yaml")

"""Finds the files of a checkpoint, local or on the Hub, and explains why one cannot be read."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tfclm.checkpoint.diagnosis import CONVERT, explain, explain_file
from tfclm.errors import InputError, first_line, root_cause

# In order of preference: the first that exists is read.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "tf_model.h5", "tf_model.h5.index.json")


def locate(where: str, revision: str | None) -> Path:
    """The local directory of a checkpoint; of a Hub model, the needed files are downloaded into the Hub's cache.

    Args:
        where: a directory or a Hub id.
        revision: branch, tag or commit of a Hub model.

    Raises:
        InputError: it is neither, it cannot be read or downloaded, or a directory is given with a revision.
    """
    if not where.strip():
        raise InputError("the model's name is empty: give a checkpoint directory or a Hub id")
    try:
        folder = Path(where).expanduser()
        if folder.is_dir():
            if revision is not None:
                raise InputError(f"{where} is a directory, and `revision` ({revision}) applies to Hub ids only")
            next(folder.iterdir(), None)  # raises an OSError if it cannot be listed
            return folder
        if folder.exists():
            raise InputError(explain_file(where, folder))
        if folder.is_symlink():
            raise InputError(f"{where} is a broken link to {folder.readlink()}: give the directory itself")
    except (OSError, RuntimeError) as error:  # a name that is too long, missing permissions, an unknown ~user
        raise InputError(f"{where} cannot be read: {first_line(error)}") from error
    address = re.fullmatch(r"(https?://|hf://)(huggingface\.co/|hf\.co/)?(models/)?([^/]+/[^/]+?)(/.*)?", where)
    if address and (address[2] or address[1] == "hf://"):
        raise InputError(f"{where} is a URL: give the Hub id, {address[4]}")
    if "://" in where:
        raise InputError(f"{where} is a URL: copy the checkpoint to a local directory and give that, or give a Hub id")
    return _download(where, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        names = HfApi().list_repo_files(name, revision=revision)
        files = [file for file in names if "/" not in file]
        if "config.json" not in files and (reason := explain(name, names)):
            raise InputError(reason)
        weights = choose_weights(name, files)
        shards = weights.removesuffix(".index.json")
        stem, suffix = shards.rsplit(".", 1)
        wanted = [file for file in files if file.endswith((".json", ".txt", ".model", ".jinja"))]
        wanted += [f"{stem}-*.{suffix}"] if shards != weights else [weights]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except HFValidationError as error:
        raise InputError(f"there is no directory {name}, and a Hub id looks like owner/name") from error
    except GatedRepoError as error:
        raise InputError(f"{name}: accept its terms on the Hub, then log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"there is no directory {name} and no such model on the Hub, or it is private") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name} has no revision {revision} on the Hub") from error
    except OSError as error:  # offline, or the Hub does not answer
        with contextlib.suppress(OSError):
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        raise InputError(
            f"there is no directory {name}, the Hub cannot be reached, and its cache has no such model: "
            f"{first_line(root_cause(error))}"
        ) from error


def choose_weights(where: str, files: Collection[str]) -> str:
    """The name of the weights file, or of the index of its shards, among the files of a checkpoint.

    Raises:
        InputError: there is none that can be read, or the checkpoint is an adapter.
    """
    if "adapter_config.json" in files:  # also next to weights, which compute something else without the adapter
        raise InputError(str(explain(where, ["adapter_config.json"])))
    for name in WEIGHTS:
        if name in files:
            return name
    if any(name.startswith("pytorch_model") for name in files):
        raise InputError(f"{where} has only pytorch_model.bin, which {CONVERT}")
    # With config.json, so that the message is about the weights and not about other files.
    raise InputError(
        explain(where, {"config.json", *files}) or f"{where} has no weights: expected one of {', '.join(WEIGHTS)}"
    )


def read_object(where: str, path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file of a checkpoint; raises `InputError` for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: {path.name} cannot be read: {why_unreadable(path, error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{where}: {path.name} is not a JSON object ({{...}})")
    return content


def why_unreadable(path: Path, error: BaseException) -> str:
    """Why a file cannot be read: from the file itself where the error does not say it."""
    try:
        if path.is_dir():
            return "it is a directory"
        if not path.exists():
            return f"it is a broken link to {path.readlink()}" if path.is_symlink() else "there is no such file"
        with path.open("rb") as stream:
            start = stream.read(512)
    except OSError as unreadable:
        return unreadable.strerror or first_line(unreadable)
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer: run `git lfs pull`"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page that was saved instead of the file: download the file itself"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON: line {error.lineno}, column {error.colno}: {error.msg}"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return first_line(error)

"""Where a checkpoint's files are: in a local folder, or downloaded from the Hub."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path

from tfclm.errors import InputError, first_line

# In the order of preference; the first that is there is read.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "tf_model.h5", "tf_model.h5.index.json")


def locate(where: str, revision: str | None) -> Path:
    """The local folder of a checkpoint; what a Hub id needs, and no more, is downloaded into the Hub's cache."""
    folder = Path(where).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"{where} is a folder, and a revision ({revision}) applies to Hub ids only")
        return folder
    if folder.exists():
        raise InputError(f"{where} is a file: give the folder that holds it")
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
        files = [file for file in HfApi().list_repo_files(name, revision=revision) if "/" not in file]
        weights = choose_weights(name, files)
        shards = weights.removesuffix(".index.json")
        stem, suffix = shards.rsplit(".", 1)
        wanted = [file for file in files if file.endswith((".json", ".txt", ".model", ".jinja"))]
        wanted += [f"{stem}-*.{suffix}"] if shards != weights else [weights]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except HFValidationError as error:
        raise InputError(f"there is no folder {name}, and a Hub id looks like owner/name") from error
    except GatedRepoError as error:
        raise InputError(f"{name}: accept its terms on the Hub, then log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"there is no folder {name} and no such model on the Hub, or it is private") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name} has no revision {revision} on the Hub") from error
    except OSError as error:  # offline, or the Hub does not answer
        with contextlib.suppress(OSError):
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        raise InputError(
            f"there is no folder {name}, the Hub cannot be reached, and its cache has no such model: "
            f"{first_line(error)}"
        ) from error


def choose_weights(where: str, files: Collection[str]) -> str:
    """The name of the file to read the weights from, among those that there are."""
    for name in WEIGHTS:
        if name in files:
            return name
    if any(name.startswith("pytorch_model") for name in files):
        raise InputError(
            f"{where} has only pytorch_model.bin, which needs PyTorch: convert it with PyTorch's save_pretrained to "
            "model.safetensors, or give a checkpoint that has one"
        )
    raise InputError(f"{where} has no weights: expected one of {', '.join(WEIGHTS)}")

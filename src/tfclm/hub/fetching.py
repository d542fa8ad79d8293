"""What comes back from the Hub: a servable, and the state of a run. No TensorFlow, no transformers."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tfclm.errors import InputError, first_line

SERVABLE = "saved_model.zip"  # its name in a repository; it holds one folder, named by the version's number


def newest_version(folder: Path) -> Path:
    """The folder of a version: the one given, or the newest below the one given.

    Raises:
        InputError: there is no exported version.
    """
    below = [each for each in folder.glob("*") if each.name.isdigit()]
    for version in (folder, *sorted(below, key=lambda each: int(each.name))[-1:]):
        if (version / "saved_model.pb").is_file() and version.resolve().name.isdigit():
            return version.resolve()
    raise InputError(f"{folder} is no exported model: give a folder that tfclm.export has written, or a version in it")


def zip_servable(version: Path, target: Path) -> Path:
    """Packs a version of an exported model into the file `target`; the same bytes for the same version."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as packed:  # weights do not get smaller
        for path in sorted(version.rglob("*")):
            if path.is_file():
                # Without the times of the files, so that a version that is there already is not sent again.
                entry = zipfile.ZipInfo(f"{version.name}/{path.relative_to(version).as_posix()}")
                with open(path, "rb") as source, packed.open(entry, "w", force_zip64=True) as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    return target


def fetch_servable(repo_id: str, *, revision: str | None = None) -> Path:
    """Brings the exported model of a repository here; the servable's folder, one version in it, as a server takes it.

    It is kept in the Hub's cache, a folder a commit's file: what was fetched once is not fetched again.

    Raises:
        InputError: no such repository, none in it, or one that is damaged; or the Hub is out of reach.
    """
    from huggingface_hub import constants, hf_hub_download

    with _asking(repo_id, revision, f"no {SERVABLE} in it: push with --push-saved-model"):
        packed = Path(hf_hub_download(repo_id, SERVABLE, revision=revision))
    # The cache's own name of a content is its hash.
    target = Path(constants.HF_HOME) / "tfclm" / "servables" / repo_id.replace("/", "--") / packed.resolve().name
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent) as staged:
            unpack(packed, Path(staged) / "servable", repo_id)
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(Path(staged) / "servable", target)
    return target


def unpack(packed: Path, target: Path, name: str) -> None:
    """Unpacks a servable that `zip_servable` packed into a folder; `name` is what messages call it.

    Raises:
        InputError: it is something else, or damaged.
    """
    try:
        with zipfile.ZipFile(packed) as file:
            paths = [PurePosixPath(entry) for entry in file.namelist()]
            roots = {path.parts[0] for path in paths if path.parts}
            if len(roots) != 1 or not min(roots).isdigit() or any(".." in path.parts for path in paths):
                raise InputError(f"{name}: {SERVABLE} does not hold one version of an exported model")
            file.extractall(target)  # compares the checksums
    except (zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{name}: {SERVABLE} is damaged: {first_line(error)}") from error
    if not (target / min(roots) / "saved_model.pb").is_file():
        raise InputError(f"{name}: {SERVABLE} holds no saved_model.pb")


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
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    # Beside it, and renamed when it is whole.
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder.absolute().parent) as beside:
        staged = Path(beside) / "run"
        # The cache holds links, and belongs to the Hub's client.
        shutil.copytree(fetched / "resume", staged / "resume")
        shutil.copyfile(fetched / "fit.yaml", staged / "fit.yaml")
        os.rename(staged, folder)


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

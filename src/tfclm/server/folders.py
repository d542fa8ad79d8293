"""Base paths of models: the versions below one, which of them a config selects, and whether they can be read."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfclm.server.status import Code, StatusError

_VERSION = re.compile(r"\s*[+-]?[0-9]+\s*", re.ASCII)


@dataclass(frozen=True)
class Listing:
    """The versions to serve from a base path, number -> directory.

    `error` says why there are none; `warning` says what is missing, even where other versions are there.
    """

    versions: dict[int, Path] = field(default_factory=dict)
    error: StatusError | None = None
    warning: str = ""


def is_version(name: str) -> bool:
    """Whether a directory of this name is a version of a model: its name is an int64."""
    return _VERSION.fullmatch(name) is not None and -(2**63) <= int(name) < 2**63


def misplaced_model(base_path: str) -> str:
    """Says that a base path is a version or a checkpoint instead, and what to give; "" if it can be a base path."""
    try:
        names = set(os.listdir(base_path))
    except (OSError, ValueError):
        # It may appear later, or become readable.
        return ""
    if any(map(is_version, names)):
        return ""
    path = Path(base_path).absolute()
    if names & {"saved_model.pb", "saved_model.pbtxt"}:
        if is_version(path.name):
            return f"is a version of a model, not the directory that holds its versions: give {path.parent}"
        return f"is a SavedModel, not a directory that holds versions: move it to {path / '1'} and give {path}"
    if "config.json" in names:
        return (
            "is a checkpoint, not an exported model: run "
            f"`python -m tfclm.export --model {base_path} --serving-dir DIR` and give DIR"
        )
    return ""


def list_versions(config: Any) -> Listing:
    """Lists the base path of a ModelConfig: the versions that the config wants served."""
    try:
        versions = _select_versions(config)
    except (OSError, ValueError) as error:
        unreadable = unreadable_error(error, f"base path {config.base_path} of model {config.name}")
        return Listing(error=unreadable, warning=unreadable.message)
    missing = sorted(set(config.model_version_policy.specific.versions) - versions.keys())
    warning = ""
    if missing:
        warning = f"model {config.name} has no version {', '.join(map(str, missing))} in {config.base_path}"
    elif not versions:
        warning = f"model {config.name} has no version in {config.base_path}: no subdirectory is named with a number"
    return Listing(versions, None if versions else StatusError(Code.NOT_FOUND, warning), warning)


def _select_versions(config: Any) -> dict[int, Path]:
    """The versions that a ModelConfig wants of those below its base path: children whose name is an int64.

    Raises:
        OSError: the base path cannot be read.
    """
    found: dict[int, Path] = {}
    for child in sorted(os.listdir(config.base_path)):
        if is_version(child):
            found[int(child)] = Path(config.base_path, child)
    policy = config.model_version_policy
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return found
    if choice == "specific":
        return {number: path for number, path in found.items() if number in policy.specific.versions}
    newest = sorted(found, reverse=True)[: max(policy.latest.num_versions, 1)]
    return {number: found[number] for number in newest}


def check_readable(folder: Path) -> None:
    """Raises OSError if a file in a directory cannot be opened. Missing files are left to the loader to report."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for path, _, files in os.walk(folder, onerror=fail):
        for file in files:
            try:
                # Non-blocking, because opening a named pipe without a writer would block.
                os.close(os.open(os.path.join(path, file), os.O_RDONLY | os.O_NONBLOCK))
            except OSError as error:
                fail(error)


def unreadable_error(error: OSError | ValueError, what: str) -> StatusError:
    """The status for a path that cannot be read."""
    code = Code.PERMISSION_DENIED if isinstance(error, PermissionError) else Code.UNAVAILABLE
    return StatusError(code, f"{what} cannot be read: {getattr(error, 'strerror', None) or error}")

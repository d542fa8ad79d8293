"""The states of models and versions, without locks or threads: the manager changes them under its lock."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorflow_serving.apis import get_model_status_pb2

from tfclm.server.servable import Servable
from tfclm.server.status import Code, StatusError

State = get_model_status_pb2.ModelVersionStatus.State


@dataclass
class Version:
    """A version that is or was wanted; `error` says why it is not served.

    An `unreadable` version has ended, and starts over once a poll finds that its files can be read.
    """

    path: Path
    state: int = State.START
    wanted: bool = True
    servable: Servable | None = None
    error: StatusError | None = None
    attempts: int = 0
    next_attempt: float = 0.0
    uses: int = 0
    unreadable: bool = False


@dataclass
class Model:
    """A model of the config, or of an earlier one (`config` is None); `error` says why a poll found no version."""

    name: str
    config: Any
    polled: bool = False
    error: StatusError | None = None
    versions: dict[int, Version] = field(default_factory=dict)

    def available(self, number: int | None) -> Version | None:
        """The version of this number if it is available; for None, the latest available one."""
        available = {each: version for each, version in self.versions.items() if version.state == State.AVAILABLE}
        return available.get(max(available, default=0) if number is None else number)

    def progress(self, *, starting: bool) -> tuple[bool, dict[str, StatusError]]:
        """Whether the model may still become available, and if it has failed, the error of each version.

        At the start of the server, `starting`, a version has failed with its first attempt to load it.
        """
        if self.config is None:
            return False, {self._key(): StatusError(Code.CANCELLED, "a later config has removed the model")}
        if not self.polled:
            return True, {}
        if self.error is not None:
            return False, {} if starting else {self._key(): self.error}
        versions = {number: version for number, version in self.versions.items() if version.wanted}
        if any(version.state == State.AVAILABLE for version in versions.values()):
            # One available version is enough, once the others have been tried.
            others = [version for version in versions.values() if version.state != State.AVAILABLE]
            return any(version.state != State.END and version.error is None for version in others), {}
        if starting:
            versions = {number: version for number, version in versions.items() if not version.unreadable}
        errors = {
            self._key(number): version.error
            for number, version in versions.items()
            if version.error is not None and (version.state == State.END or starting)
        }
        return (True, {}) if len(errors) < len(versions) else (False, errors)

    def status(self, number: int | None) -> get_model_status_pb2.GetModelStatusResponse:
        """The state of one version, or for None of all versions, the newest first.

        Raises:
            StatusError: NOT_FOUND.
        """
        versions = self.versions
        if number is not None:
            if number not in versions:
                raise StatusError(Code.NOT_FOUND, f"Could not find version {number} of model {self.name}")
            versions = {number: versions[number]}
        if not versions:
            reason = f": {self.error.message}" if self.error else ""
            raise StatusError(Code.NOT_FOUND, f"Could not find any versions of model {self.name}{reason}")
        response = get_model_status_pb2.GetModelStatusResponse()
        for each, version in sorted(versions.items(), reverse=True):
            added = response.model_version_status.add(version=each, state=version.state)
            error = version.error if version.state == State.END else None
            added.status.error_code = error.code if error else 0
            added.status.error_message = error.message if error else ""
        return response

    def _key(self, number: int | None = None) -> str:
        """How messages of TensorFlow Serving name a model or a version."""
        return f"{{name: {self.name}}}" if number is None else f"{{name: {self.name} version: {number}}}"

"""Which versions of which models are served: follows the file system, loads the new before it unloads the old."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tensorflow_serving.apis import get_model_status_pb2, model_pb2
from tensorflow_serving.config import model_server_config_pb2

from tfclm.server.execution import Caller
from tfclm.server.servable import Servable
from tfclm.server.settings import is_version, misplaced_model
from tfclm.server.status import Code, StatusError, invalid

State = get_model_status_pb2.ModelVersionStatus.State
Loader = Callable[[str, int, Path], Servable]

_log = logging.getLogger(__name__)


@dataclass
class _Version:
    """A version that is or was wanted; `error` says why it is not served.

    One that is `unreadable` has ended, and begins anew once a poll finds that its files can be read.
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
class _Model:
    """A model of the config, or one that was; `absent` says why a look at its base path has found no version."""

    config: Any
    looked_at: bool = False
    absent: StatusError | None = None
    versions: dict[int, _Version] = field(default_factory=dict)


class Manager:
    """The models of a server.

    One thread looks at the file system, loads and unloads; requests take a version for as long as they run. An old
    version goes once a new one is available and the last request has left it.
    """

    def __init__(
        self,
        load: Loader,
        *,
        poll_seconds: float = 1,
        max_retries: int = 5,
        retry_seconds: float = 60,
        labels_for_unavailable: bool = False,
    ) -> None:
        self._load = load
        self._poll_seconds, self._retry_seconds, self._max_retries = poll_seconds, retry_seconds, max_retries
        self._labels_for_unavailable = labels_for_unavailable
        self._config = model_server_config_pb2.ModelServerConfig()
        self._models: dict[str, _Model] = {}
        self._labels: dict[str, dict[str, int]] = {}
        # Guards the tables, and tells of every change to them. Loading happens outside of it.
        self._changed = threading.Condition()
        self._said: dict[tuple[str, int | None], str] = {}
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._poll_now = False
        self._thread: threading.Thread | None = None

    def start(self, config: Any) -> None:
        """Takes the first config and returns once each of its models is available.

        A model without a version, or with none that can be read, is not waited for: it is served once it has one.

        Raises:
            StatusError: the config is not valid, or a model does not load; CANCELLED after `interrupt`.
        """
        self._thread = threading.Thread(target=self._work, name="tfclm-manager", daemon=True)
        self._thread.start()
        self._await(self._take(config), Caller(), starting=True)

    def interrupt(self) -> None:
        """Ends the waiting of `start`; a signal handler may call it."""
        self._stopping.set()

    def stop(self, seconds: float | None = None) -> bool:
        """Unloads everything; requests that run are waited for by whoever started them.

        Loading a version cannot be interrupted: it is waited for at most `seconds`. Gives whether all has ended.
        """
        self._stopping.set()
        self._wake.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
        with self._changed:
            versions = [version for model in self._models.values() for version in model.versions.values()]
            self._models = {}
        for version in versions:
            if version.servable is not None and version.uses == 0:
                version.servable.close()
        return True

    def reload(self, config: Any, caller: Caller | None = None) -> None:
        """Takes a ModelServerConfig over the present one and returns once new models are available.

        Raises:
            StatusError: the config is not valid, in which case it changes nothing; or a new model has no version, or
                does not load, after as many attempts as any; or the caller does not wait for it any longer.
        """
        self._await(self._take(config), caller or Caller(), starting=False)

    def _take(self, config: Any) -> set[str]:
        """Takes a config; gives the names of the models that are new."""
        kind = config.WhichOneof("config")
        if kind == "model_config_list":
            self._check(config.model_config_list.config)
        with self._changed:
            if self._config.WhichOneof("config") and kind != "model_config_list":
                raise StatusError(
                    Code.FAILED_PRECONDITION,
                    "Cannot transition to requested config. It is only legal to transition "
                    "from one ModelConfigList to another.",
                )
            if kind is None:
                return set()
            if kind != "model_config_list":
                raise invalid("A custom model config is not supported: give a model_config_list")
            models = {model.name: model for model in config.model_config_list.config}
            self._labels = self._new_labels(models)
            new = models.keys() - self._models.keys()
            for name, model in models.items():
                self._models.setdefault(name, _Model(model)).config = model
            # A model that is gone from the config keeps its versions until they are unloaded.
            for name, model_ in self._models.items():
                if name not in models:
                    model_.config = None
            self._config.CopyFrom(config)
            self._poll_now = True
            self._wake.set()
            return new

    def _await(self, names: set[str], caller: Caller, *, starting: bool) -> None:
        """Returns once each of the models is available. At the start, no version is tried a second time."""
        with self._changed:
            while not self._stopping.is_set():
                waiting = False
                failed: dict[str, StatusError] = {}
                for name in names:
                    waits, errors = self._outlook(name, starting)
                    waiting |= waits
                    failed.update(errors)
                if failed:
                    reasons = ", ".join(f"{{{key} due to error: {error}}}" for key, error in failed.items())
                    message = f"{len(failed)} servable(s) did not become available: {{{reasons}}}"
                    raise StatusError(Code.UNKNOWN, message)
                if not waiting:
                    return
                caller.remaining()
                self._changed.wait(timeout=0.2)
        raise StatusError(Code.CANCELLED, "the server is stopping")

    def _outlook(self, name: str, starting: bool) -> tuple[bool, dict[str, StatusError]]:
        """Whether a model is to be waited for, and if it has failed, why each of its versions has."""
        model = self._models.get(name)
        if model is None or model.config is None:
            gone = StatusError(Code.CANCELLED, "another config has taken the model away")
            return False, {f"{{name: {name}}}": gone}
        if not model.looked_at:
            return True, {}
        if model.absent is not None:
            return False, {} if starting else {f"{{name: {name}}}": model.absent}
        versions = [each for each in model.versions.items() if each[1].wanted]
        if any(version.state == State.AVAILABLE for _, version in versions):
            # One that loads is enough, once the others have been tried.
            others = [version for _, version in versions if version.state != State.AVAILABLE]
            return any(version.state != State.END and version.error is None for version in others), {}
        if starting:
            versions = [each for each in versions if not each[1].unreadable]
        errors = {
            f"{{name: {name} version: {number}}}": version.error
            for number, version in versions
            if version.error is not None and (version.state == State.END or starting)
        }
        if len(errors) < len(versions):
            return True, {}
        return False, errors

    def _check(self, configs: Any) -> None:
        seen = set()
        for model in configs:
            if model.name in seen:
                raise invalid(f"Illegal to list model {model.name} multiple times in config list")
            seen.add(model.name)
            if not os.path.isabs(model.base_path):
                raise invalid(
                    f"Expected model {model.name} to have an absolute path or URI; got base_path()={model.base_path}"
                )
            platform = model.model_platform or ("tensorflow" if model.model_type == 1 else "")
            if not platform:
                raise invalid(
                    "Illegal setting neither ModelServerConfig::model_type (deprecated) nor "
                    f"ModelServerConfig::model_platform, model name is {model.name}"
                )
            if platform != "tensorflow":
                raise invalid(f"Model {model.name} requests unsupported platform {platform}")
            if mistake := misplaced_model(model.base_path):
                raise invalid(f"base_path {model.base_path} of model {model.name} {mistake}")

    def _new_labels(self, models: Mapping[str, Any]) -> dict[str, dict[str, int]]:
        labels: dict[str, dict[str, int]] = {}
        for name, model in models.items():
            for label, number in model.version_labels.items():
                held = self._labels.get(name, {}).get(label)
                version = self._models[name].versions.get(number) if name in self._models else None
                free = self._labels_for_unavailable and held in (None, number)
                if not free and (version is None or version.state != State.AVAILABLE):
                    raise StatusError(
                        Code.FAILED_PRECONDITION,
                        f"Request to assign label to version {number} of model {name}, "
                        "which is not currently available for inference",
                    )
                labels.setdefault(name, {})[label] = number
        return labels

    @contextmanager
    def use(self, spec: model_pb2.ModelSpec) -> Iterator[Servable]:
        """The version that a ModelSpec asks for; it stays loaded until the block is left.

        Raises:
            StatusError: NOT_FOUND, or INVALID_ARGUMENT for a label that there is not.
        """
        if not spec.name:
            raise invalid("ModelSpec has no name specified.")
        with self._changed:
            number = self._number(spec)
            model = self._models.get(spec.name)
            available = {
                each: version
                for each, version in (model.versions.items() if model else ())
                if version.state == State.AVAILABLE
            }
            version = available.get(max(available, default=0) if number is None else number)
            if version is None or version.servable is None:
                asked = f"Latest({spec.name})" if number is None else f"Specific({spec.name}, {number})"
                raise StatusError(Code.NOT_FOUND, f"Servable not found for request: {asked}")
            version.uses += 1
        try:
            yield version.servable
        finally:
            with self._changed:
                version.uses -= 1
                if version.uses == 0 and version.state == State.UNLOADING:
                    self._wake.set()

    def _number(self, spec: model_pb2.ModelSpec) -> int | None:
        choice = spec.WhichOneof("version_choice")
        if choice == "version_label":
            labels = self._labels.get(spec.name, {})
            if spec.version_label not in labels:
                raise invalid(f"Unrecognized servable version label: {spec.version_label}")
            return labels[spec.version_label]
        return int(spec.version.value) if choice == "version" else None

    def has(self, name: str) -> bool:
        """Whether there is a model of this name, with or without a version."""
        return name in self._models

    def names(self) -> list[str]:
        """The models that are to be served, in the order of their config."""
        with self._changed:
            return [model.name for model in self._config.model_config_list.config]

    def status(self, spec: model_pb2.ModelSpec) -> get_model_status_pb2.GetModelStatusResponse:
        """The state of a version, or of all of a model, the newest first. A label is ignored.

        Raises:
            StatusError: NOT_FOUND.
        """
        response = get_model_status_pb2.GetModelStatusResponse()
        with self._changed:
            model = self._models.get(spec.name)
            versions = model.versions if model else {}
            if spec.HasField("version"):
                number = spec.version.value
                if number not in versions:
                    raise StatusError(Code.NOT_FOUND, f"Could not find version {number} of model {spec.name}")
                versions = {number: versions[number]}
            if not versions:
                reason = f": {model.absent.message}" if model and model.absent else ""
                raise StatusError(Code.NOT_FOUND, f"Could not find any versions of model {spec.name}{reason}")
            for number, version in sorted(versions.items(), reverse=True):
                added = response.model_version_status.add(version=number, state=version.state)
                error = version.error if version.state == State.END else None
                added.status.error_code = error.code if error else 0
                added.status.error_message = error.message if error else ""
        return response

    def _work(self) -> None:
        next_poll = 0.0
        while not self._stopping.is_set():
            now = time.monotonic()
            try:
                with self._changed:
                    polls = self._poll_now or (self._poll_seconds > 0 and now >= next_poll)
                    self._poll_now = False
                    configs = {name: model.config for name, model in self._models.items()}
                if polls:
                    next_poll = now + self._poll_seconds
                    for name, config in configs.items():
                        self._follow(name, config)
                while not self._stopping.is_set() and self._act():
                    pass
            except Exception:
                # A fault of the manager must not end the following of all models.
                _log.exception("the model manager failed; it goes on")
                self._stopping.wait(1)
            self._wake.wait(timeout=min(0.1, self._poll_seconds) if self._poll_seconds > 0 else 0.1)
            self._wake.clear()

    def _follow(self, name: str, config: Any) -> None:
        """Marks which versions of a model are wanted, after a look at its base path."""
        wanted: dict[int, Path] = {}
        absent: StatusError | None = None
        missing = ""
        if config is not None:
            try:
                wanted = wanted_versions(config)
            except (OSError, ValueError) as error:
                absent = _unreadable(error, f"base path {config.base_path} of model {name}")
            else:
                numbers = sorted(set(config.model_version_policy.specific.versions) - wanted.keys())
                if numbers:
                    missing = f"model {name} has no version {', '.join(map(str, numbers))} in {config.base_path}"
                elif not wanted:
                    missing = f"model {name} has no version in {config.base_path}: no folder is named by a number"
                if not wanted:
                    absent = StatusError(Code.NOT_FOUND, missing)
        self._say((name, None), f"{absent.message}; it is looked for at each poll" if absent else missing)
        with self._changed:
            model = self._models.get(name)
            if model is None or model.config is not config:
                return
            if absent is not None and absent.code is not Code.NOT_FOUND and model.versions:
                # The path may be away for a while: what is loaded stays.
                return
            model.absent = absent
            held = dict(model.versions)
        # Those that are to begin, of which the files may be slow to read.
        begun = {}
        for number, path in wanted.items():
            version = held.get(number)
            if version is None or (version.state == State.END and (version.unreadable or not version.wanted)):
                begun[number] = self._begin(name, number, path)
        with self._changed:
            if self._models.get(name) is not model or model.config is not config:
                return
            model.versions.update(begun)
            # Not before its versions are known: a model without any is not waited for.
            model.looked_at = True
            for number, version in model.versions.items():
                version.wanted = number in wanted
            self._changed.notify_all()

    def _begin(self, name: str, number: int, path: Path) -> _Version:
        """A version that is to be loaded, or that has ended because its files cannot be read."""
        try:
            _read_all(path)
        except OSError as error:
            what = f"{error.filename or path} of version {number} of model {name}"
            version = _Version(path, State.END, error=_unreadable(error, what), unreadable=True)
        else:
            version = _Version(path)
        self._say((name, number), f"{version.error.message}; it is tried at each poll" if version.error else "")
        return version

    def _say(self, about: tuple[str, int | None], warning: str) -> None:
        """Logs a warning that is not the last one about this."""
        if warning and warning != self._said.get(about):
            _log.warning(warning)
        self._said[about] = warning

    def _act(self) -> bool:
        """Does the next thing there is to do, if any."""
        with self._changed:
            action = next(self._due(), None)
        if action is None:
            return False
        action()
        return True

    def _due(self) -> Iterator[Callable[[], None]]:
        for name, model in list(self._models.items()):
            versions = sorted(model.versions.items(), reverse=True)
            if model.config is None and all(version.state == State.END for _, version in versions):
                del self._models[name]
                continue
            wanted = [version for _, version in versions if version.wanted]
            # What serves goes on serving until something that is wanted does, or nothing is wanted.
            replaced = not wanted or any(version.state == State.AVAILABLE for version in wanted)
            for number, version in versions:
                if not version.wanted:
                    if version.state == State.AVAILABLE and replaced:
                        _log.info("unloading version %s of model %s", number, name)
                        version.state = State.UNLOADING
                    if version.state == State.UNLOADING and version.uses == 0:
                        yield partial(self._unload, name, number, version)
                    elif version.state in (State.START, State.LOADING):
                        version.state = State.END
                elif version.state in (State.START, State.LOADING) and version.next_attempt <= time.monotonic():
                    version.state = State.LOADING
                    yield partial(self._attempt, name, number, version)

    def _unload(self, name: str, number: int, version: _Version) -> None:
        with self._changed:
            servable, version.servable = version.servable, None
            version.state, version.error = State.END, None
            self._changed.notify_all()
        if servable is not None:
            servable.close()
        _log.info("unloaded version %s of model %s", number, name)

    def _attempt(self, name: str, number: int, version: _Version) -> None:
        try:
            servable = self._load(name, number, version.path)
        except Exception as error:
            if isinstance(error, OSError):
                error = _unreadable(error, f"{error.filename or version.path}")
            elif not isinstance(error, StatusError):
                _log.exception("version %s of model %s: loading failed", number, name)
                error = StatusError(Code.INTERNAL, f"loading failed: {type(error).__name__}: {error}")
            with self._changed:
                version.error = error
                version.attempts += 1
                version.next_attempt = time.monotonic() + self._retry_seconds
                if version.attempts > self._max_retries:
                    version.state = State.END
                self._changed.notify_all()
            attempts = f"attempt {version.attempts} of {self._max_retries + 1}"
            _log.error("version %s of model %s cannot be loaded (%s): %s", number, name, attempts, error)
            return
        with self._changed:
            version.servable, version.state, version.error = servable, State.AVAILABLE, None
            self._changed.notify_all()
        _log.info("loaded version %s of model %s", number, name)


def _unreadable(error: OSError | ValueError, what: str) -> StatusError:
    code = Code.PERMISSION_DENIED if isinstance(error, PermissionError) else Code.UNAVAILABLE
    return StatusError(code, f"{what} cannot be read: {getattr(error, 'strerror', None) or error}")


def _read_all(folder: Path) -> None:
    """Raises OSError if a file in a folder cannot be opened. That one is missing is for the loader to find."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for path, _, files in os.walk(folder, onerror=fail):
        for file in files:
            try:
                # A pipe that nobody writes to must not be waited for.
                os.close(os.open(os.path.join(path, file), os.O_RDONLY | os.O_NONBLOCK))
            except OSError as error:
                fail(error)


def wanted_versions(config: Any) -> dict[int, Path]:
    """The versions that a ModelConfig wants served, of those that its base path holds: children named as an int64.

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

"""The models that are served: polls the file system, and loads new versions before it unloads old ones."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tensorflow_serving.apis import get_model_status_pb2, model_pb2
from tensorflow_serving.config import model_server_config_pb2

from tfclm.server.config_files import check_models
from tfclm.server.execution import Caller
from tfclm.server.folders import Listing, check_readable, list_versions, unreadable_error
from tfclm.server.servable import Servable
from tfclm.server.states import Model, State, Version
from tfclm.server.status import Code, StatusError, invalid

Loader = Callable[[str, int, Path], Servable]

_log = logging.getLogger(__name__)


class Manager:
    """The models of a server.

    One thread polls the file system, loads and unloads; requests hold a version for as long as they run. An old version
    is unloaded once a new one is available and the last request has released it.

    Args:
        load: loads a version, given the model's name, the version's number and its directory.
        poll_seconds: time between two polls of the file system; 0 polls once.
        max_retries: how many times a version that failed to load is tried again.
        retry_seconds: time between two attempts to load a version.
        labels_for_unavailable: whether a new label may name a version that is not available.
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
        self._models: dict[str, Model] = {}
        self._labels: dict[str, dict[str, int]] = {}
        # Guards the tables, and is notified of every change to them. Models are loaded without holding it.
        self._changed = threading.Condition()
        self._last_warnings: dict[tuple[str, int | None], str] = {}
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._poll_now = False
        self._thread: threading.Thread | None = None

    def start(self, config: Any) -> None:
        """Applies the first config and returns once each of its models is available.

        It does not wait for a model without a version, or without a readable one: that is served once it has one.

        Raises:
            StatusError: the config is not valid, or a model does not load; CANCELLED after `interrupt`.
        """
        self._thread = threading.Thread(target=self._work, name="tfclm-manager", daemon=True)
        self._thread.start()
        self._wait_for(self._apply(config), Caller(), starting=True)

    def interrupt(self) -> None:
        """Makes `start` return; a signal handler may call it."""
        self._stopping.set()

    def stop(self, seconds: float | None = None) -> bool:
        """Unloads everything, except versions that requests still use.

        A load cannot be interrupted: this waits for it for at most `seconds`. Returns whether everything has ended.
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
        """Replaces the ModelServerConfig and returns once the new models are available.

        Raises:
            StatusError: the config is not valid, and nothing changes; or a new model has no version or does not load
                within the usual number of attempts; or the caller stopped waiting.
        """
        self._wait_for(self._apply(config), caller or Caller(), starting=False)

    def _apply(self, config: Any) -> set[str]:
        """Makes a config the current one; returns the names of the models that are new."""
        kind = config.WhichOneof("config")
        if kind == "model_config_list":
            check_models(config.model_config_list.config)
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
            self._labels = self._assign_labels(models)
            new = models.keys() - self._models.keys()
            for name, model in models.items():
                self._models.setdefault(name, Model(name, model)).config = model
            # A model that is no longer in the config keeps its versions until they are unloaded.
            for name, model_ in self._models.items():
                if name not in models:
                    model_.config = None
            self._config.CopyFrom(config)
            self._poll_now = True
            self._wake.set()
            return new

    def _assign_labels(self, models: Mapping[str, Any]) -> dict[str, dict[str, int]]:
        labels: dict[str, dict[str, int]] = {}
        for name, model in models.items():
            for label, number in model.version_labels.items():
                current = self._labels.get(name, {}).get(label)
                version = self._models[name].versions.get(number) if name in self._models else None
                allowed = self._labels_for_unavailable and current in (None, number)
                if not allowed and (version is None or version.state != State.AVAILABLE):
                    raise StatusError(
                        Code.FAILED_PRECONDITION,
                        f"Request to assign label to version {number} of model {name}, "
                        "which is not currently available for inference",
                    )
                labels.setdefault(name, {})[label] = number
        return labels

    def _wait_for(self, names: set[str], caller: Caller, *, starting: bool) -> None:
        """Returns once each of the models is available. At the start, no version is tried a second time."""
        with self._changed:
            while not self._stopping.is_set():
                waiting = False
                failed: dict[str, StatusError] = {}
                for name in names:
                    # A later config may have removed a model, and the thread its entry.
                    model = self._models.get(name) or Model(name, None)
                    pending, errors = model.progress(starting=starting)
                    waiting |= pending
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

    @contextmanager
    def use(self, spec: model_pb2.ModelSpec) -> Iterator[Servable]:
        """The version that a ModelSpec asks for; it stays loaded until the end of the `with` block.

        Raises:
            StatusError: NOT_FOUND, or INVALID_ARGUMENT for an unknown label.
        """
        if not spec.name:
            raise invalid("ModelSpec has no name specified.")
        with self._changed:
            number = self._number(spec)
            model = self._models.get(spec.name)
            version = model.available(number) if model else None
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
        """The version's number that a ModelSpec gives, directly or by its label; None for the latest."""
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
        """The names of the models in the config, in its order."""
        with self._changed:
            return [model.name for model in self._config.model_config_list.config]

    def status(self, spec: model_pb2.ModelSpec) -> get_model_status_pb2.GetModelStatusResponse:
        """The state of one version, or of all versions of a model, the newest first. A label is ignored.

        Raises:
            StatusError: NOT_FOUND.
        """
        with self._changed:
            model = self._models.get(spec.name) or Model(spec.name, None)
            return model.status(spec.version.value if spec.HasField("version") else None)

    def _work(self) -> None:
        next_poll = 0.0
        while not self._stopping.is_set():
            now = time.monotonic()
            try:
                with self._changed:
                    due = self._poll_now or (self._poll_seconds > 0 and now >= next_poll)
                    self._poll_now = False
                    configs = {name: model.config for name, model in self._models.items()}
                if due:
                    next_poll = now + self._poll_seconds
                    for name, config in configs.items():
                        self._poll(name, config)
                while not self._stopping.is_set() and self._act():
                    pass
            except Exception:
                # An error here must not keep all models from being updated.
                _log.exception("the model manager failed and continues")
                self._stopping.wait(1)
            self._wake.wait(timeout=min(0.1, self._poll_seconds) if self._poll_seconds > 0 else 0.1)
            self._wake.clear()

    def _poll(self, name: str, config: Any) -> None:
        """Lists the base path of a model and marks which of its versions are wanted."""
        # A model that was removed from the config has no wanted versions.
        listing = list_versions(config) if config is not None else Listing()
        self._warn_once((name, None), listing.warning + ("; checked again at each poll" if listing.error else ""))
        with self._changed:
            model = self._models.get(name)
            if model is None or model.config is not config:
                return
            if listing.error is not None and listing.error.code is not Code.NOT_FOUND and model.versions:
                # The path may be unavailable for a while: what is loaded stays.
                return
            model.error = listing.error
            known = dict(model.versions)
        # Reading the files of new versions may be slow, so the lock is released for it.
        added = {}
        for number, path in listing.versions.items():
            version = known.get(number)
            if version is None or (version.state == State.END and (version.unreadable or not version.wanted)):
                added[number] = self._add(name, number, path)
        with self._changed:
            if self._models.get(name) is not model or model.config is not config:
                return
            model.versions.update(added)
            # Only now that its versions are known: `start` does not wait for a polled model without versions.
            model.polled = True
            for number, version in model.versions.items():
                version.wanted = number in listing.versions
            self._changed.notify_all()

    def _add(self, name: str, number: int, path: Path) -> Version:
        """A version to load, or one that has ended because its files cannot be read."""
        try:
            check_readable(path)
        except OSError as error:
            what = f"{error.filename or path} of version {number} of model {name}"
            version = Version(path, State.END, error=unreadable_error(error, what), unreadable=True)
        else:
            version = Version(path)
        self._warn_once((name, number), f"{version.error.message}; tried again at each poll" if version.error else "")
        return version

    def _warn_once(self, subject: tuple[str, int | None], warning: str) -> None:
        """Logs a warning unless it is the last one about this subject."""
        if warning and warning != self._last_warnings.get(subject):
            _log.warning(warning)
        self._last_warnings[subject] = warning

    def _act(self) -> bool:
        """Performs the next load or unload; returns whether there was one."""
        with self._changed:
            action = next(self._actions(), None)
        if action is None:
            return False
        action()
        return True

    def _actions(self) -> Iterator[Callable[[], None]]:
        """Updates the states of the versions and yields the loads and unloads that are due."""
        for name, model in list(self._models.items()):
            versions = sorted(model.versions.items(), reverse=True)
            if model.config is None and all(version.state == State.END for _, version in versions):
                del self._models[name]
                continue
            wanted = [version for _, version in versions if version.wanted]
            # An unwanted version stays until a wanted one is available, unless none is wanted.
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
                    yield partial(self._try_to_load, name, number, version)

    def _unload(self, name: str, number: int, version: Version) -> None:
        with self._changed:
            servable, version.servable = version.servable, None
            version.state, version.error = State.END, None
            self._changed.notify_all()
        if servable is not None:
            servable.close()
        _log.info("unloaded version %s of model %s", number, name)

    def _try_to_load(self, name: str, number: int, version: Version) -> None:
        try:
            servable = self._load(name, number, version.path)
        except Exception as error:
            if isinstance(error, OSError):
                error = unreadable_error(error, f"{error.filename or version.path}")
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

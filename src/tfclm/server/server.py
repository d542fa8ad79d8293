"""The server as a whole: creates its parts from the settings, starts them and stops them in order."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from typing import Any

from tfclm.errors import InputError
from tfclm.server import config_files
from tfclm.server.execution import Runs
from tfclm.server.listener import Limits, Listener
from tfclm.server.manager import Manager
from tfclm.server.monitoring import Metrics
from tfclm.server.playground import Playground
from tfclm.server.rest import RestApi
from tfclm.server.rpc import RpcOptions, RpcServer
from tfclm.server.servable import LoadOptions, Servable
from tfclm.server.service import Service
from tfclm.server.settings import ServeSettings, check
from tfclm.server.status import Code, StatusError
from tfclm.server.wire.jsonreader import LARGE_BYTES

_log = logging.getLogger(__name__)

MARGIN_SECONDS = 2.0
"""Twice this time `stop` may take beyond the grace period."""


class Server:
    """A model server. After `start`, `grpc_port` and `rest_port` say where it listens (0 if it does not).

    Raises:
        InputError: a setting or a config file is not valid.
    """

    def __init__(self, settings: ServeSettings) -> None:
        """Checks the settings and reads the config files."""
        self._settings = settings
        check(settings)
        self._config = _model_config(settings)
        self.metrics = Metrics()
        self.grpc_port = self.rest_port = 0
        self._runs = Runs()
        self.manager = _manager(settings, self.metrics, self._runs)
        service = Service(self.manager, self.metrics)
        self._rpc = _rpc_server(settings, service) if settings.port or settings.grpc_socket_path else None
        self._rest = _rest_listener(settings, service) if settings.rest_api_port else None
        self._listening: list[RpcServer | Listener] = []
        self._stopping = threading.Event()
        self._config_thread: threading.Thread | None = None

    def start(self) -> bool:
        """Loads the models, then listens. Returns True once it listens, or False after `interrupt`.

        Raises:
            InputError: a model does not load, or a port is not available. Call `stop` in either case.
        """
        # Before the models, because loading them can take minutes.
        for name in ("port", "rest_api_port"):
            _check_port(name, self._settings.host, getattr(self._settings, name))
        try:
            self.manager.start(self._config)
        except StatusError as error:
            if error.code is Code.CANCELLED:
                return False
            raise InputError(f"failed to start: {error}") from error
        if self._rpc is not None:
            self.grpc_port = self._rpc.start()
            self._listening.append(self._rpc)
        if self._rest is not None:
            try:
                self.rest_port = self._rest.start()
            except OSError as error:
                address = f"{self._settings.host}:{self._settings.rest_api_port}"
                raise InputError(f"`rest_api_port`: cannot listen on {address}: {error.strerror}") from error
            self._listening.append(self._rest)
            if self._settings.playground:
                _log.info("playground: http://%s:%s/", self._settings.host, self.rest_port)
        if self._settings.model_config_file is not None and self._settings.model_config_file_poll_wait_seconds > 0:
            self._config_thread = threading.Thread(target=self._reload_config, name="tfclm-config", daemon=True)
            self._config_thread.start()
        return True

    def interrupt(self) -> None:
        """Makes `wait`, or a `start` that waits for a model, return; a signal handler may call this."""
        self.manager.interrupt()
        self._stopping.set()

    def wait(self) -> None:
        """Returns after `interrupt`."""
        # `Event.wait` may hold the lock that `set` needs, so a signal handler could deadlock.
        while not self._stopping.is_set():
            time.sleep(0.1)

    def stop(self) -> None:
        """Accepts no more requests, lets current ones finish within the grace period, and unloads the models.

        It does not wait longer: runs and loads that continue are left to end with the process.
        """
        self._stopping.set()
        grace = self._settings.shutdown_grace_seconds
        deadline = time.monotonic() + grace
        stops = [threading.Thread(target=part.stop, args=(grace,), daemon=True) for part in self._listening]
        for thread in stops:
            thread.start()
        for thread in stops:
            thread.join(max(deadline + MARGIN_SECONDS - time.monotonic(), 0))
        if self._config_thread is not None:
            self._config_thread.join(max(deadline - time.monotonic(), 0.1))
        # No request waits for a version that is still loading, so it gets no grace period.
        if not self.manager.stop(MARGIN_SECONDS):
            _log.warning("a version is still loading; not waiting for it")
        if self._runs.count:
            _log.warning(
                "%s run(s) did not end within the grace period of %g s; not waiting for them", self._runs.count, grace
            )

    def _reload_config(self) -> None:
        path = self._settings.model_config_file
        assert path is not None
        while not self._stopping.wait(self._settings.model_config_file_poll_wait_seconds):
            try:
                self.manager.reload(config_files.read_models(path))
            except (InputError, StatusError) as error:
                _log.error("the config is not changed: %s", error)


def _model_config(settings: ServeSettings) -> Any:
    if settings.model_config_file is not None:
        return config_files.read_models(settings.model_config_file)
    assert settings.model_base_path is not None
    return config_files.single_model(settings.model_name, settings.model_base_path)


def _manager(settings: ServeSettings, metrics: Metrics, runs: Runs) -> Manager:
    options = LoadOptions(
        tags=tuple(settings.saved_model_tags.split(",")),
        warmup=settings.enable_model_warmup,
        warmup_iterations=max(settings.num_request_iterations_for_warmup, 1),
        check_method_names=settings.enable_signature_method_name_check,
        inter_op_threads=settings.tensorflow_inter_op_parallelism,
        intra_op_threads=settings.tensorflow_intra_op_parallelism,
    )
    return Manager(
        lambda name, version, path: Servable(name, version, path, options, metrics, runs),
        poll_seconds=settings.file_system_poll_wait_seconds,
        max_retries=settings.max_num_load_retries,
        retry_seconds=max(settings.load_retry_interval_micros, 0) / 1e6,
        labels_for_unavailable=settings.allow_version_labels_for_unavailable_models,
    )


def _rpc_server(settings: ServeSettings, service: Service) -> RpcServer:
    options = RpcOptions(
        host=settings.host,
        port=settings.port,
        socket_path=settings.grpc_socket_path,
        threads=settings.grpc_max_threads or _default_threads(),
        queued=settings.max_queued_requests,
        message_bytes=settings.max_request_bytes,
        health=settings.enable_grpc_healthcheck_service,
        tls=config_files.read_tls(settings.ssl_config_file),
    )
    return RpcServer(service, options)


def _rest_listener(settings: ServeSettings, service: Service) -> Listener:
    api = RestApi(
        service,
        timeout_ms=settings.rest_api_timeout_in_ms,
        cors=settings.rest_api_enable_cors_support,
        metrics_path=config_files.read_metrics_path(settings.monitoring_config_file),
        playground=Playground(service.manager.names) if settings.playground else None,
        # While it is parsed, a value takes some hundred bytes of memory.
        max_values=max(settings.max_request_bytes // 32, LARGE_BYTES),
    )
    limits = Limits(
        threads=settings.rest_api_num_threads or _default_threads(),
        queued=settings.max_queued_requests,
        body_bytes=settings.max_request_bytes,
        read_seconds=settings.request_read_seconds,
    )
    return Listener(api, settings.host, max(settings.rest_api_port, 0), limits)


def _default_threads() -> int:
    return 4 * (os.cpu_count() or 1)


def _check_port(name: str, host: str, port: int) -> None:
    """Raises InputError if nothing can listen on this port now."""
    if port <= 0:
        return
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                # With this option, two sockets can bind the same port, but only one can listen.
                probe.listen(1)
    except socket.gaierror as error:
        raise InputError(f"`host` {host}: {error.strerror}") from error
    except OSError as error:
        raise InputError(f"`{name}`: cannot listen on {host}:{port}: {error.strerror}") from error

"""The server as a whole: its parts put together, started, and stopped in order."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time

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
from tfclm.server.wire.jsontext import LARGE_BYTES

_log = logging.getLogger(__name__)

MARGIN_SECONDS = 2.0
"""What `stop` may take beyond the grace period, twice."""


class Server:
    """A model server. After `start`, `grpc_port` and `rest_port` tell where it listens (0 for nowhere)."""

    def __init__(self, settings: ServeSettings) -> None:
        """Reads the config files and checks the settings; raises InputError for what is wrong with them."""
        self._settings = settings
        check(settings)
        if settings.model_config_file is not None:
            self._config = config_files.read_models(settings.model_config_file)
        else:
            assert settings.model_base_path is not None
            self._config = config_files.single_model(settings.model_name, settings.model_base_path)
        self.metrics = Metrics()
        self.grpc_port = self.rest_port = 0
        load = LoadOptions(
            tags=tuple(settings.saved_model_tags.split(",")),
            warmup=settings.enable_model_warmup,
            warmup_iterations=max(settings.num_request_iterations_for_warmup, 1),
            check_method_names=settings.enable_signature_method_name_check,
            inter_op_threads=settings.tensorflow_inter_op_parallelism,
            intra_op_threads=settings.tensorflow_intra_op_parallelism,
        )
        self._runs = Runs()
        self.manager = Manager(
            lambda name, version, path: Servable(name, version, path, load, self.metrics, self._runs),
            poll_seconds=settings.file_system_poll_wait_seconds,
            max_retries=settings.max_num_load_retries,
            retry_seconds=max(settings.load_retry_interval_micros, 0) / 1e6,
            labels_for_unavailable=settings.allow_version_labels_for_unavailable_models,
        )
        service = Service(self.manager, self.metrics)
        threads = 4 * (os.cpu_count() or 1)
        self._rpc: RpcServer | None = None
        self._rest: Listener | None = None
        if settings.port or settings.grpc_socket_path:
            options = RpcOptions(
                host=settings.host,
                port=settings.port,
                socket_path=settings.grpc_socket_path,
                threads=settings.grpc_max_threads or threads,
                queued=settings.max_queued_requests,
                message_bytes=settings.max_request_bytes,
                health=settings.enable_grpc_healthcheck_service,
                tls=config_files.read_tls(settings.ssl_config_file),
            )
            self._rpc = RpcServer(service, options)
        if settings.rest_api_port:
            api = RestApi(
                service,
                timeout_ms=settings.rest_api_timeout_in_ms,
                cors=settings.rest_api_enable_cors_support,
                metrics_path=config_files.read_metrics_path(settings.monitoring_config_file),
                playground=Playground(self.manager.names) if settings.playground else None,
                # A value takes some hundred bytes of memory while it is read.
                max_values=max(settings.max_request_bytes // 32, LARGE_BYTES),
            )
            limits = Limits(
                threads=settings.rest_api_num_threads or threads,
                queued=settings.max_queued_requests,
                body_bytes=settings.max_request_bytes,
                read_seconds=settings.request_read_seconds,
            )
            self._rest = Listener(api, settings.host, max(settings.rest_api_port, 0), limits)
        self._listening: list[RpcServer | Listener] = []
        self._stopping = threading.Event()
        self._follower: threading.Thread | None = None

    def start(self) -> bool:
        """Loads the models, then listens. Returns once both are done, or after `interrupt`; gives whether it listens.

        Raises:
            InputError: a model does not load, or a port cannot be had. `stop` is still to be called.
        """
        # A port that is taken must not be found only after minutes of loading.
        for flag in ("port", "rest_api_port"):
            _check_port(flag, self._settings.host, getattr(self._settings, flag))
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
                raise InputError(f"--rest_api_port: cannot listen on {address}: {error.strerror}") from error
            self._listening.append(self._rest)
            if self._settings.playground:
                _log.info("playground: http://%s:%s/", self._settings.host, self.rest_port)
        if self._settings.model_config_file is not None and self._settings.model_config_file_poll_wait_seconds > 0:
            self._follower = threading.Thread(target=self._follow_config, name="tfclm-config", daemon=True)
            self._follower.start()
        return True

    def interrupt(self) -> None:
        """Asks `wait`, or a `start` that waits for a model, to return; a signal handler may call it."""
        self.manager.interrupt()
        self._stopping.set()

    def wait(self) -> None:
        """Returns once `interrupt` was called."""
        # `Event.wait` holds a lock at times that a signal handler's `set` would wait for.
        while not self._stopping.is_set():
            time.sleep(0.1)

    def stop(self) -> None:
        """Takes no further requests, lets those that run finish within the grace period, and unloads the models.

        Nothing is waited for beyond the grace: a run or a load that goes on is left to the end of the process.
        """
        self._stopping.set()
        grace = self._settings.shutdown_grace_seconds
        deadline = time.monotonic() + grace
        stops = [threading.Thread(target=part.stop, args=(grace,), daemon=True) for part in self._listening]
        for thread in stops:
            thread.start()
        for thread in stops:
            thread.join(max(deadline + MARGIN_SECONDS - time.monotonic(), 0))
        if self._follower is not None:
            self._follower.join(max(deadline - time.monotonic(), 0.1))
        # Nobody waits for what is being loaded, hence no grace for it.
        if not self.manager.stop(MARGIN_SECONDS):
            _log.warning("a version is still being loaded; that is given up")
        if self._runs.count:
            _log.warning(
                "%s run(s) have not ended within the grace of %g s; they are given up", self._runs.count, grace
            )

    def _follow_config(self) -> None:
        path = self._settings.model_config_file
        assert path is not None
        while not self._stopping.wait(self._settings.model_config_file_poll_wait_seconds):
            try:
                self.manager.reload(config_files.read_models(path))
            except (InputError, StatusError) as error:
                _log.error("the models stay as they are: %s", error)


def _check_port(flag: str, host: str, port: int) -> None:
    """Raises InputError for a port that cannot be listened on now."""
    if port <= 0:
        return
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                # Two sockets may be bound to one port with this option, but only one may listen.
                probe.listen(1)
    except socket.gaierror as error:
        raise InputError(f"--host {host}: {error.strerror}") from error
    except OSError as error:
        raise InputError(f"--{flag}: cannot listen on {host}:{port}: {error.strerror}") from error

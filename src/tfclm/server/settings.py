"""The settings of the server: flags of tensorflow_model_server, and some that only this server has."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tfclm.errors import InputError
from tfclm.server.folders import misplaced_model
from tfclm.settings import setting


@dataclass(frozen=True)
class ServeSettings:
    """Settings of `serve`."""

    model_base_path: str | None = setting(None, "model directory, with one numbered subdirectory per version")
    hub: str | None = setting(
        None, "Hub repository whose saved_model.zip is served, instead of `model_base_path`", metavar="REPO"
    )
    hub_revision: str | None = setting(
        None, "branch, tag or commit of the Hub repository; a commit never changes, a branch or tag can"
    )
    model_name: str = setting("model", "name under which requests address the model")
    model_config_file: str | None = setting(
        None, "ModelServerConfig in protobuf text format: several models, version policies and labels"
    )
    model_config_file_poll_wait_seconds: int = setting(0, "seconds between two reads of the config file; 0 = read once")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 for all")
    port: int = setting(8500, "gRPC port; 0 = none, -1 = any free port")
    rest_api_port: int = setting(8501, "REST port; 0 = none, -1 = any free port")
    grpc_socket_path: str | None = setting(None, "Unix socket on which gRPC listens as well")
    rest_api_timeout_in_ms: int = setting(30_000, "milliseconds that a REST request may take, JSON parsing included")
    rest_api_num_threads: int = setting(0, "REST requests that run at the same time; 0 = 4 per CPU")
    rest_api_enable_cors_support: bool = setting(False, "send CORS headers, so that web pages can call the server")
    playground: bool = setting(False, "serve a web page at / on which to generate and score text")
    grpc_max_threads: int = setting(0, "gRPC calls that run at the same time; 0 = 4 per CPU")
    file_system_poll_wait_seconds: int = setting(1, "seconds between two checks for new versions; 0 = check once")
    max_num_load_retries: int = setting(5, "how many times to retry a version that failed to load")
    load_retry_interval_micros: int = setting(60_000_000, "microseconds between two attempts to load a version")
    allow_version_labels_for_unavailable_models: bool = setting(
        False, "allow a new label to name a version that is not loaded yet"
    )
    enable_model_warmup: bool = setting(
        True, "replay assets.extra/tf_serving_warmup_requests before a version is served"
    )
    num_request_iterations_for_warmup: int = setting(1, "how many times to run each warm-up request")
    saved_model_tags: str = setting("serve", "comma-separated tags of the graph to load")
    enable_signature_method_name_check: bool = setting(
        False, "refuse signatures whose method name does not match the API that is called"
    )
    tensorflow_inter_op_parallelism: int = setting(0, "ops that a session runs in parallel; 0 = automatic")
    tensorflow_intra_op_parallelism: int = setting(0, "threads per op; 0 = automatic")
    xla_cpu_compilation_enabled: bool = setting(False, "allow XLA compilation; without it, models that use XLA fail")
    monitoring_config_file: str | None = setting(
        None, "MonitoringConfig in text format: the path of Prometheus metrics"
    )
    ssl_config_file: str | None = setting(None, "SSLConfig in text format, for gRPC")
    enable_grpc_healthcheck_service: bool = setting(True, "provide grpc.health.v1.Health")
    max_queued_requests: int = setting(128, "requests that may wait for a thread; more are refused with 503")
    max_request_bytes: int = setting(
        100 * 2**20, "largest request after decompression; larger ones are refused with 413"
    )
    request_read_seconds: float = setting(
        30.0, "seconds that a client has to send a request, or to read some of a reply"
    )
    shutdown_grace_seconds: float = setting(30.0, "seconds that running requests have to finish after SIGTERM")
    access_log: bool = setting(True, "log each request to stderr")


def check(settings: ServeSettings) -> None:
    """Raises InputError for invalid settings; the files that they name are not read."""
    _check_ports(settings)
    for name in ("rest_api_num_threads", "grpc_max_threads", "max_queued_requests", "rest_api_timeout_in_ms"):
        if getattr(settings, name) < 0:
            raise InputError(f"`{name}` {getattr(settings, name)}: give 0 or more")
    for name in ("max_request_bytes", "request_read_seconds"):
        if getattr(settings, name) <= 0:
            raise InputError(f"`{name}` {getattr(settings, name)}: give more than 0")
    if settings.model_config_file is None:
        _check_base_path(settings.model_base_path)


def _check_ports(settings: ServeSettings) -> None:
    if not settings.port and not settings.grpc_socket_path and not settings.rest_api_port:
        raise InputError("`port` and `rest_api_port` are both 0: nothing would listen")
    for name in ("port", "rest_api_port"):
        if not -1 <= getattr(settings, name) < 2**16:
            raise InputError(f"`{name}` {getattr(settings, name)}: give 1 to 65535, 0 for none or -1 for a free one")
    if settings.port > 0 and settings.port == settings.rest_api_port:
        raise InputError(f"`rest_api_port` {settings.port}: give another port than `port`")
    if settings.playground and not settings.rest_api_port:
        raise InputError("`playground`: `rest_api_port` is 0, so nothing could serve the page")


def _check_base_path(path: str | None) -> None:
    if path is None:
        raise InputError("`model_base_path` is missing: give the model directory, which holds the versions")
    if not os.path.isdir(path):
        raise InputError(f"`model_base_path` {path}: there is no such directory")
    if mistake := misplaced_model(path):
        raise InputError(f"`model_base_path` {path} {mistake}")

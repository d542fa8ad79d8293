"""The settings of the server: tensorflow_model_server's flags, and a few of its own."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from tfclm.errors import InputError
from tfclm.settings import setting

_VERSION = re.compile(r"\s*[+-]?[0-9]+\s*", re.ASCII)


@dataclass(frozen=True)
class ServeSettings:
    """Settings of `serve`."""

    model_base_path: str | None = setting(None, "folder of the model, with a folder named by its number a version")
    hub: str | None = setting(None, "Hub repository whose saved_model.zip is served, instead of a --model_base_path")
    hub_revision: str | None = setting(
        None, "branch, tag or commit of --hub; a commit stays what it is, whatever is pushed later"
    )
    model_name: str = setting("model", "the name under which requests ask for the model")
    model_config_file: str | None = setting(
        None, "ModelServerConfig in protobuf's text format: several models, version policies and labels"
    )
    model_config_file_poll_wait_seconds: int = setting(0, "seconds between two readings of the file; 0 reads it once")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 for all")
    port: int = setting(8500, "port of gRPC; 0 for none, -1 for a free one")
    rest_api_port: int = setting(8501, "port of REST; 0 for none, -1 for a free one")
    grpc_socket_path: str | None = setting(None, "Unix socket on which gRPC listens too")
    rest_api_timeout_in_ms: int = setting(30_000, "time that a REST request may take, with the reading of its JSON")
    rest_api_num_threads: int = setting(0, "REST requests that run at a time; 0 for 4 a CPU")
    rest_api_enable_cors_support: bool = setting(False, "send CORS headers, so that web pages may ask")
    playground: bool = setting(False, "serve a page at / that generates and scores, for a browser")
    grpc_max_threads: int = setting(0, "gRPC calls that run at a time; 0 for 4 a CPU")
    file_system_poll_wait_seconds: int = setting(1, "seconds between two looks for new versions; 0 looks once")
    max_num_load_retries: int = setting(5, "further attempts to load a version that failed")
    load_retry_interval_micros: int = setting(60_000_000, "microseconds between two attempts")
    allow_version_labels_for_unavailable_models: bool = setting(
        False, "let a new label name a version that is not loaded yet"
    )
    enable_model_warmup: bool = setting(True, "replay assets.extra/tf_serving_warmup_requests before a version serves")
    num_request_iterations_for_warmup: int = setting(1, "times that each warm-up request is run")
    saved_model_tags: str = setting("serve", "tags of the graph to load, with commas between")
    enable_signature_method_name_check: bool = setting(False, "refuse signatures whose method name is not the call's")
    tensorflow_inter_op_parallelism: int = setting(0, "ops that a session runs at a time; 0 for automatic")
    tensorflow_intra_op_parallelism: int = setting(0, "threads of an op; 0 for automatic")
    xla_cpu_compilation_enabled: bool = setting(False, "let models compile with XLA; otherwise those that do fail")
    monitoring_config_file: str | None = setting(None, "MonitoringConfig in text format: where Prometheus asks")
    ssl_config_file: str | None = setting(None, "SSLConfig in text format, for gRPC")
    enable_grpc_healthcheck_service: bool = setting(True, "answer grpc.health.v1.Health")
    max_queued_requests: int = setting(128, "requests that wait for a thread; more are refused with 503")
    max_request_bytes: int = setting(100 * 2**20, "largest request, inflated; a larger one is refused with 413")
    request_read_seconds: float = setting(30.0, "time that a client has to send a request, or to take some of a reply")
    shutdown_grace_seconds: float = setting(30.0, "time that running requests have after SIGTERM")
    access_log: bool = setting(True, "log each request to stderr")


def check(settings: ServeSettings) -> None:
    """Raises InputError for what is wrong by itself, whatever the files hold that are named."""
    if not settings.port and not settings.grpc_socket_path and not settings.rest_api_port:
        raise InputError("--port and --rest_api_port are both 0: nothing would listen")
    for flag in ("port", "rest_api_port"):
        if not -1 <= getattr(settings, flag) < 2**16:
            raise InputError(f"--{flag} {getattr(settings, flag)}: give 1 to 65535, 0 for none or -1 for a free one")
    if settings.port > 0 and settings.port == settings.rest_api_port:
        raise InputError(f"--rest_api_port {settings.port}: give another port than --port")
    if settings.playground and not settings.rest_api_port:
        raise InputError("--playground: --rest_api_port is 0, so there is nothing that could serve it")
    for flag in ("rest_api_num_threads", "grpc_max_threads", "max_queued_requests", "rest_api_timeout_in_ms"):
        if getattr(settings, flag) < 0:
            raise InputError(f"--{flag} {getattr(settings, flag)}: give 0 or more")
    for flag in ("max_request_bytes", "request_read_seconds"):
        if getattr(settings, flag) <= 0:
            raise InputError(f"--{flag} {getattr(settings, flag)}: give more than 0")
    if settings.model_config_file is None:
        if settings.model_base_path is None:
            raise InputError("--model_base_path is missing: give the folder that holds the versions of the model")
        if not os.path.isdir(settings.model_base_path):
            raise InputError(f"--model_base_path {settings.model_base_path}: there is no such folder")
        if mistake := misplaced_model(settings.model_base_path):
            raise InputError(f"--model_base_path {settings.model_base_path} {mistake}")


def is_version(name: str) -> bool:
    """Whether a folder of this name is a version of a model: its name is an int64."""
    return _VERSION.fullmatch(name) is not None and -(2**63) <= int(name) < 2**63


def misplaced_model(base_path: str) -> str:
    """What else than a folder of versions a base path is, and what to give in its place; "" if it may be one."""
    try:
        names = set(os.listdir(base_path))
    except (OSError, ValueError):
        # It may come, or become readable.
        return ""
    if any(map(is_version, names)):
        return ""
    path = Path(base_path).absolute()
    if names & {"saved_model.pb", "saved_model.pbtxt"}:
        if is_version(path.name):
            return f"is a version of a model, not the folder that holds its versions: give {path.parent}"
        return f"is a SavedModel, not a folder that holds versions: move it to {path / '1'} and give {path}"
    if "config.json" in names:
        return (
            "is a checkpoint, not an exported model: run "
            f"`python -m tfclm.export --model {base_path} --serving-dir DIR` and give DIR"
        )
    return ""

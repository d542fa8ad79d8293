"""The config files of the server: text protos, as tensorflow_model_server reads them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import Message
from tensorflow_serving.config import model_server_config_pb2

from tfclm.errors import InputError
from tfclm.server.folders import misplaced_model
from tfclm.server.status import invalid

M = TypeVar("M", bound=Message)

METRICS_PATH = "/monitoring/prometheus/metrics"


@dataclass(frozen=True)
class Tls:
    """Key, certificate and certificate authority of the gRPC server, in PEM."""

    key: bytes
    certificate: bytes
    authority: bytes | None
    verify_client: bool


def read_models(path: str) -> Any:
    """Reads a ModelServerConfig."""
    return _read("model_config_file", path, model_server_config_pb2.ModelServerConfig())


def single_model(name: str, base_path: str) -> Any:
    """The ModelServerConfig of one model."""
    config = model_server_config_pb2.ModelServerConfig()
    config.model_config_list.config.add(
        name=name, base_path=str(Path(base_path).absolute()), model_platform="tensorflow"
    )
    return config


def check_models(configs: Iterable[Any]) -> None:
    """Raises StatusError, INVALID_ARGUMENT, for ModelConfigs that cannot be served."""
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


def read_metrics_path(path: str | None) -> str | None:
    """The URL path of the metrics according to a MonitoringConfig; None if there are no metrics."""
    if path is None:
        return None
    config = _read("monitoring_config_file", path, _message("MonitoringConfig"))
    prometheus = config.prometheus_config
    return (prometheus.path or METRICS_PATH) if prometheus.enable else None


def read_tls(path: str | None) -> Tls | None:
    """Reads an SSLConfig; None if no path is given."""
    if path is None:
        return None
    config = _read("ssl_config_file", path, _message("SSLConfig"))
    if not config.server_key or not config.server_cert:
        raise InputError(f"`ssl_config_file` {path}: give server_key and server_cert, the texts of two PEM files")
    authority = config.custom_ca.encode() or None
    if config.client_verify and authority is None:
        raise InputError(f"`ssl_config_file` {path}: client_verify needs custom_ca, the text of a PEM file")
    return Tls(config.server_key.encode(), config.server_cert.encode(), authority, config.client_verify)


def _read(setting: str, path: str, message: M) -> M:
    try:
        text_format.Parse(Path(path).read_text(encoding="utf-8"), message)
    except OSError as error:
        raise InputError(f"`{setting}` {path}: {error.strerror}") from error
    except (text_format.ParseError, UnicodeDecodeError) as error:
        name = message.DESCRIPTOR.name
        raise InputError(f"`{setting}` {path}: not a {name} in protobuf text format: {error}") from error
    return message


# The tensorflow-serving-api package does not include these two files.
_STRING, _BOOL = descriptor_pb2.FieldDescriptorProto.TYPE_STRING, descriptor_pb2.FieldDescriptorProto.TYPE_BOOL
_FIELDS: dict[str, dict[str, int | str]] = {
    "PrometheusConfig": {"enable": _BOOL, "path": _STRING},
    "MonitoringConfig": {"prometheus_config": "PrometheusConfig"},
    "SSLConfig": {"server_key": _STRING, "server_cert": _STRING, "custom_ca": _STRING, "client_verify": _BOOL},
}


def _message(name: str) -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="tfclm/serving.proto", package="tfclm.serving", syntax="proto3")
    for each, fields in _FIELDS.items():
        message = file.message_type.add(name=each)
        for number, (field, kind) in enumerate(fields.items(), start=1):
            added = message.field.add(name=field, number=number, label=1)
            if isinstance(kind, str):
                added.type, added.type_name = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE, f".tfclm.serving.{kind}"
            else:
                added.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"tfclm.serving.{name}"))()

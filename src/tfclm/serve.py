"""`python -m tfclm.serve`: serves exported models over REST and gRPC, as tensorflow_model_server does."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import signal
import sys
import time

from tfclm.errors import InputError
from tfclm.server.settings import ServeSettings, check
from tfclm.settings import command, import_tensorflow


def run(settings: ServeSettings) -> None:
    """Serves until SIGTERM or SIGINT."""
    if settings.hub is not None:
        settings = _from_hub(settings, settings.hub)
    elif settings.hub_revision is not None:
        raise InputError("--hub_revision goes with --hub, the repository whose revision it is")
    # Mistakes are told before TensorFlow's seconds.
    check(settings)
    import_tensorflow()
    _log_to_stderr(settings.access_log)
    if not settings.xla_cpu_compilation_enabled:
        _disable_xla()
    from tfclm.server.server import Server

    log = logging.getLogger("tfclm.server")
    server = Server(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.interrupt())
    try:
        server.start()
        log.info("listening on %s: gRPC %s, REST %s", settings.host, server.grpc_port, server.rest_port)
        server.wait()
        log.info("stopping")
    finally:
        server.stop()
    log.info("stopped")


def _from_hub(settings: ServeSettings, repo_id: str) -> ServeSettings:
    from tfclm.hub import fetch_servable

    if settings.model_base_path or settings.model_config_file:
        raise InputError("--hub names the model: leave out --model_base_path and --model_config_file")
    fetched = fetch_servable(repo_id, revision=settings.hub_revision)
    return dataclasses.replace(settings, model_base_path=str(fetched))


def _disable_xla() -> None:
    """Makes ops that compile with XLA fail, as they do in a stock server. There is no way back in this process."""
    import ctypes
    from pathlib import Path

    import tensorflow as tf

    library = next(Path(tf.__file__).parent.glob("libtensorflow_cc.*"))
    ctypes.CDLL(str(library))._ZN10tensorflow21DisableXlaCompilationEv()


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


def _log_to_stderr(access: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    log = logging.getLogger("tfclm.server")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("tfclm.server.access").disabled = not access


def _as_switch(argument: str) -> str:
    """`--flag=false` as tensorflow_model_server takes it, in the spelling of this project's commands."""
    match = re.fullmatch(r"--(\w+)=(true|1|t|yes|y|false|0|f|no|n)", argument, re.IGNORECASE)
    if match is None or ServeSettings.__annotations__.get(match[1]) != "bool":
        return argument
    return f"--{match[1]}" if match[2].lower() in ("true", "1", "t", "yes", "y") else f"--no_{match[1]}"


def main() -> None:
    """The command."""
    sys.argv[1:] = map(_as_switch, sys.argv[1:])
    command(ServeSettings, run, verb="serve", description=__doc__ or "", tensorflow=False)


if __name__ == "__main__":
    main()

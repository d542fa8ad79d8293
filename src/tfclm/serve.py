"""`python -m tfclm.serve`: serves exported models over REST and gRPC, as tensorflow_model_server does."""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from tfclm.cli.command import command, name_flags
from tfclm.compat import disable_xla, import_tensorflow
from tfclm.errors import InputError
from tfclm.server.settings import ServeSettings, check

STOP_SECONDS = 8.0  # beyond the grace period, for stopping itself


def run(settings: ServeSettings) -> None:
    """Serves until SIGTERM or SIGINT."""
    if settings.hub is not None:
        settings = _from_hub(settings, settings.hub)
    elif settings.hub_revision is not None:
        raise InputError("`hub_revision` goes with `hub`: give the repository too")
    # Before the import of TensorFlow, which takes seconds.
    check(settings)
    import_tensorflow()
    _log_to_stderr(settings.access_log)
    if not settings.xla_cpu_compilation_enabled:
        problem = disable_xla()
        if problem is not None:
            logging.getLogger("tfclm.server").warning(
                "XLA cannot be disabled in this build of TensorFlow (%s): a model exported for XLA runs here, "
                "but not on a tensorflow_model_server that was started without xla_cpu_compilation_enabled",
                problem,
            )
    from tfclm.server.server import Server

    logger = logging.getLogger("tfclm.server")
    server = Server(settings)
    _stop_on_signals(server.interrupt, settings.shutdown_grace_seconds + STOP_SECONDS)
    try:
        if server.start():
            logger.info("listening on %s: gRPC %s, REST %s", settings.host, server.grpc_port, server.rest_port)
            server.wait()
        logger.info("stopping")
    finally:
        server.stop()
    logger.info("stopped")


def _stop_on_signals(interrupt: Callable[[], None], seconds: float) -> None:
    """Stops on SIGTERM and SIGINT; the process exits after at most `seconds`, and at once on a second signal."""
    signals = 0

    def stop(number: int, _: Any) -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            os._exit(128 + number)
        # Its watchdog thread works even if the interpreter is blocked.
        faulthandler.dump_traceback_later(seconds, exit=True)
        interrupt()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _from_hub(settings: ServeSettings, repo_id: str) -> ServeSettings:
    from tfclm.hub import fetch_servable

    if settings.model_base_path or settings.model_config_file:
        raise InputError("`hub` already names the model: omit `model_base_path` and `model_config_file`")
    fetched = fetch_servable(repo_id, revision=settings.hub_revision)
    return dataclasses.replace(settings, model_base_path=str(fetched))


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "event": name_flags(record.getMessage(), ServeSettings, "--{}".format),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


def _log_to_stderr(access: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    logger = logging.getLogger("tfclm.server")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logging.getLogger("tfclm.server.access").disabled = not access


def to_switch(argument: str) -> str:
    """Converts a boolean flag of tensorflow_model_server to this project's form.

    Example:
        >>> to_switch("--enable_model_warmup=false")
        '--no_enable_model_warmup'
    """
    match = re.fullmatch(r"--(\w+)=(true|1|t|yes|y|false|0|f|no|n)", argument, re.IGNORECASE)
    if match is None or ServeSettings.__annotations__.get(match[1]) != "bool":
        return argument
    return f"--{match[1]}" if match[2].lower() in ("true", "1", "t", "yes", "y") else f"--no_{match[1]}"


def main() -> None:
    """The command."""
    sys.argv[1:] = map(to_switch, sys.argv[1:])
    try:
        command(ServeSettings, run, verb="serve", description=__doc__ or "", tensorflow=False, flag="--{}".format)
    except SystemExit as end:
        # A normal exit would wait for threads that cannot be stopped, and C++ would destroy objects that they use.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


if __name__ == "__main__":
    main()

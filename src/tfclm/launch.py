"""`python -m tfclm.launch [flags] fit ...`: starts several workers of `fit` on this machine, each with a TF_CONFIG."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import IO

from tfclm.cli.command import command
from tfclm.errors import InputError
from tfclm.settings import setting
from tfclm.terminal import log

# Seconds that the other workers have to end by themselves once one has failed.
GRACE = 60.0


@dataclass(frozen=True)
class LaunchSettings:
    """Settings of `launch`."""

    workers: int = setting(2, "number of workers; the first one is the chief")
    port: int = setting(0, "port of the first worker, the others have the next ones; 0 takes free ports")
    threads: int = setting(0, "threads of each worker for one operation; 0 divides the processors among the workers")

    def check(self) -> None:
        """Raises `InputError` for a value out of range, naming the field."""
        if self.workers < 1:
            raise InputError(f"`workers` {self.workers}: give 1 or more")
        if not 0 <= self.port <= 65535 - self.workers:
            raise InputError(f"`port` {self.port}: give 1 to {65535 - self.workers}, or 0")
        if self.threads < 0:
            raise InputError(f"`threads` {self.threads}: give 0 or more")


def free_ports(count: int) -> list[int]:
    """Ports on which nothing listens at the moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def worker_config(ports: list[int], index: int) -> str:
    """The TF_CONFIG of a worker on this machine.

    Example:
        >>> worker_config([2222, 2223], 1)
        '{"cluster": {"worker": ["127.0.0.1:2222", "127.0.0.1:2223"]}, "task": {"type": "worker", "index": 1}}'
    """
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    return json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})


def run(settings: LaunchSettings, arguments: Sequence[str]) -> int:
    """Runs `tfclm COMMAND` as several workers, until all have ended; returns the first exit code that is not 0.

    Args:
        settings: how many workers, and where they listen.
        arguments: the command and its flags, such as ["fit", "--strategy", "multi_worker"].
    """
    settings.check()
    ports = [settings.port + index for index in range(settings.workers)] if settings.port else []
    ports = ports or free_ports(settings.workers)
    threads = settings.threads or max((os.cpu_count() or 1) // settings.workers, 1)
    workers: list[subprocess.Popen[bytes]] = []
    for index in range(settings.workers):
        environment = {"TF_NUM_INTRAOP_THREADS": str(threads), **os.environ, "TF_CONFIG": worker_config(ports, index)}
        worker = subprocess.Popen(
            [sys.executable, "-m", "tfclm", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            # The chief has this process's own streams, for its progress bar and its result.
            stdout=None if index == 0 else subprocess.PIPE,
            stderr=None if index == 0 else subprocess.STDOUT,
            # Ctrl-C then comes from here, once.
            start_new_session=True,
        )
        workers.append(worker)
    printers = [
        threading.Thread(target=_print_lines, args=(worker.stdout, index), daemon=True)
        for index, worker in enumerate(workers)
        if worker.stdout is not None
    ]
    for printer in printers:
        printer.start()
    with _pass_signals(workers):
        _wait(workers)
    for printer in printers:
        printer.join(5)
    failed = {worker.returncode for worker in workers} - {0}
    return 2 if 2 in failed else 1 if failed else 0


def _wait(workers: list[subprocess.Popen[bytes]]) -> None:
    """Waits for all workers to end; kills those that go on for too long after one has failed."""
    until = float("inf")
    while any(worker.poll() is None for worker in workers):
        if until == float("inf") and any(worker.returncode for worker in workers):
            until = time.monotonic() + GRACE
        if time.monotonic() > until:
            for index, worker in enumerate(workers):
                if worker.poll() is None:
                    log(
                        f"tfclm.launch: worker {index} has not ended within {GRACE:g} seconds after another one: killed"
                    )
                    worker.kill()
        time.sleep(0.1)


@contextmanager
def _pass_signals(workers: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Passes Ctrl-C and SIGTERM on to all workers."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _print_lines(lines: IO[bytes], index: int) -> None:
    """Prints a worker's lines to stderr, with its name."""
    for line in lines:
        log(f"worker {index}: {line.decode(errors='backslashreplace').rstrip()}")


def split_command(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of `launch`, and the command that follows them.

    Example:
        >>> split_command(["--workers", "2", "fit", "--epochs", "1"])
        (['--workers', '2'], ['fit', '--epochs', '1'])
    """
    end = 0
    while end < len(arguments) and arguments[end].startswith("-"):
        alone = "=" in arguments[end] or arguments[end] in ("-h", "--help")
        end += 1 if alone else 2
    return list(arguments[:end]), list(arguments[end:])


def main() -> None:
    """The command."""
    own, rest = split_command(sys.argv[1:])
    sys.argv = [sys.argv[0], *own]

    def launch(settings: LaunchSettings) -> int:
        if not rest:
            raise InputError("the command to start is missing: give fit and its flags last")
        if rest[0] != "fit":
            raise InputError(f"{rest[0]} cannot be started as several workers: give fit and its flags last")
        # Without the strategy, each worker would be a run of its own, in one directory.
        return run(settings, ["fit", "--strategy", "multi_worker", *rest[1:]])

    command(LaunchSettings, launch, verb="launch", description=__doc__ or "", tensorflow=False)


if __name__ == "__main__":
    main()

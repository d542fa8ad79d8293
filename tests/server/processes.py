"""A server in its own process, as a deployment runs it: what it says, how much memory and time it takes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from server.conftest import Client

STARTS = 120  # seconds

FORKS = multiprocessing.get_context("forkserver")


def _serve(flags: list[str], stderr: Connection, first: Callable[[], None] | None) -> None:
    os.dup2(stderr.fileno(), 2)
    stderr.close()
    if first is not None:
        first()
    from tfclm.serve import main

    sys.argv = ["tfclm.serve", *flags]
    main()


class ServerProcess:
    """`python -m tfclm.serve` with some flags, on free ports. `first` is called in its process before."""

    def __init__(self, *flags: object, first: Callable[[], None] | None = None) -> None:
        words = ["--port=-1", "--rest_api_port=-1", *map(str, flags)]
        self._stderr, writer = FORKS.Pipe(duplex=False)
        self.process = FORKS.Process(target=_serve, args=(words, writer, first), daemon=True)
        self.process.start()
        writer.close()
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with open(self._stderr.fileno(), encoding="utf-8", closefd=False) as lines:
            for line in lines:
                self.lines.append(line)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def says(self, pattern: str, seconds: float = STARTS) -> re.Match[str]:
        """Waits until the log matches."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.log)):
            ended = not self._reader.is_alive()
            assert not ended, f"the server has ended: {self.log}"
            assert time.monotonic() < deadline, f"no {pattern} within {seconds} s: {self.log}"
            time.sleep(0.05)
        return found

    def listens(self) -> ServerProcess:
        found = self.says(r"gRPC (\d+), REST (\d+)")
        self.grpc_port, self.rest_port = int(found[1]), int(found[2])
        return self

    @property
    def rest(self) -> Client:
        return Client(f"http://127.0.0.1:{self.rest_port}")

    @property
    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self.lines if line.startswith("{")]

    def rss(self) -> int:
        """Resident memory in MiB."""
        return self._status("VmRSS") // 1024

    def peak(self) -> int:
        """The most resident memory so far, in MiB."""
        return self._status("VmHWM") // 1024

    def _status(self, key: str) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))

    def cpu(self) -> float:
        """The CPU seconds that it has taken."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ends(self, seconds: float) -> int:
        """Its exit code, once it has ended by itself."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"the server has not ended within {seconds} s: {self.log}"
        self._reader.join(10)
        return self.process.exitcode

    def terminate(self) -> None:
        os.kill(self.process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Ends it if it still runs."""
        self.process.kill()
        self.process.join()
        self._reader.join(10)
        self._stderr.close()


@contextlib.contextmanager
def launcher() -> Iterator[Callable[..., ServerProcess]]:
    """Gives what starts servers; those that still run at the end are killed."""
    started: list[ServerProcess] = []

    def launch(*flags: object, first: Callable[[], None] | None = None) -> ServerProcess:
        started.append(ServerProcess(*flags, first=first))
        return started[-1]

    try:
        yield launch
    finally:
        for server in started:
            server.kill()

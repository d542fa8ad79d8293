"""Watches the start of several workers from another process, and names those that are missing.

TensorFlow waits for all workers without an end and holds Python's lock, so that no thread of the worker itself could
tell.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from tfclm.terminal import log

CONNECT_TIMEOUT = 5.0
CHECKS = 10.0  # seconds in which the other process has checked all workers and told what it found


@contextlib.contextmanager
def limit_startup(workers: Mapping[str, str], seconds: float) -> Iterator[None]:
    """Ends this process with code 1 if the block takes longer, after a line that names the workers that do not answer.

    Args:
        workers: the address of each worker, HOST:PORT, by its name.
        seconds: how long the block may take; the process ends up to 10 seconds later.
    """
    command = [sys.executable, "-m", "tfclm.training.startup", str(seconds), json.dumps(dict(workers))]
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE)
    with open(os.devnull, "w") as nowhere:
        # Its thread needs no lock of Python.
        faulthandler.dump_traceback_later(seconds + CHECKS, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            watcher.communicate()  # closes its input, at which it ends


def answers(address: str) -> bool:
    """Whether something listens at an address, HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT).close()
    except OSError:
        return False
    return True


def main(seconds: float, workers: Mapping[str, str]) -> None:
    """What the other process does: it ends without a word if its input is closed in time."""
    if select.select([sys.stdin], [], [], seconds)[0]:
        return
    with ThreadPoolExecutor(len(workers)) as pool:
        found = pool.map(answers, workers.values())
        missing = [f"{name} ({workers[name]})" for name, here in zip(workers, found, strict=True) if not here]
    which = f"no answer from {', '.join(missing)}" if missing else "all of them answer, but not all take part"
    log(f"not all workers have started within {seconds:g} seconds (`startup_timeout`): {which}")


if __name__ == "__main__":
    main(float(sys.argv[1]), json.loads(sys.argv[2]))

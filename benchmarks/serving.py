"""The embedded server under load: throughput with 1 and 8 clients, many clients for minutes, and overload.

    python -m pip install 'tfclm[benchmarks]'
    python -m benchmarks.serving

`python -m tfclm.serve` runs in its own process, with a model of DistilGPT2's shape (random weights, greedy decoding,
prompts of some 16 tokens); `tfclm.Client` sends the requests over REST. Throughput is a ratio within one run.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.decoding import export, make_checkpoint
from tfclm import Client, ServerError

PROMPT = "The import statement combines two operations; it searches for the named module, then"
NEW_TOKENS = 64


class Server:
    """`python -m tfclm.serve` in its own process, and its memory."""

    def __init__(self, serving: Path, *flags: str) -> None:
        command = [
            sys.executable,
            "-m",
            "tfclm.serve",
            f"--model_base_path={serving}",
            "--port=0",
            "--rest_api_port=-1",
        ]
        self._process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        for line in self._process.stderr:
            found = re.search(r"listening on .* REST (\d+)", line)
            if found:
                self.url = f"http://127.0.0.1:{found[1]}"
                # Keep reading, because the server would block on a full pipe.
                threading.Thread(target=self._process.stderr.read, daemon=True).start()
                return
        raise RuntimeError("the server did not start")

    def memory(self) -> float:
        """Resident memory in MiB."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024

    def stop(self) -> None:
        """Stops the server by SIGTERM; raises RuntimeError if its exit code is not 0."""
        self._process.terminate()
        if self._process.wait(60):
            raise RuntimeError(f"the server ended with {self._process.returncode}")


@contextmanager
def serve(serving: Path, *flags: str) -> Any:
    """A server that is stopped at the end."""
    server = Server(serving, *flags)
    try:
        yield server
    finally:
        server.stop()


def run_in_threads(count: int, call: Callable[[int], Any]) -> None:
    """Runs `call(number)` for each number in its own thread and waits for all."""
    threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def throughput(url: str, rounds: int) -> None:
    """Compares one client with eight simultaneous ones, alternating, one request each."""
    with Client(url) as client:

        def ask(number: int) -> None:
            client.generate(PROMPT, max_new_tokens=NEW_TOKENS, temperature=0.0, seed=number)

        times: dict[int, list[float]] = {1: [], 8: []}
        for number in range(rounds + 1):
            for clients, elapsed in times.items():
                start = time.perf_counter()
                run_in_threads(clients, ask)
                if number:
                    elapsed.append(time.perf_counter() - start)
    one, eight = (statistics.median(elapsed) for elapsed in times.values())
    ratio = 8 * one / eight
    print(
        f"8 clients / 1 client, tokens per second {ratio:.2f}   target 3: {'met' if ratio >= 3 else 'NOT met'}",
        flush=True,
    )


def soak(server: Server, clients: int, seconds: float) -> None:
    """Many clients for minutes: counts their errors, and compares the server's memory after warm-up and at the end."""
    answers: Counter[str] = Counter()
    end = time.monotonic() + seconds
    memory: list[float] = []

    def ask(number: int) -> None:
        with Client(server.url, retries=0) as client:
            while time.monotonic() < end:
                try:
                    tokens = client.generate(PROMPT, max_new_tokens=16, temperature=1.0, seed=number).completion_tokens
                    answers["answers"] += 1
                    answers["tokens"] += tokens
                except Exception as error:
                    answers[f"{type(error).__name__}: {error}"] += 1

    def watch(_: int) -> None:
        while time.monotonic() < end:
            memory.append(server.memory())
            time.sleep(0.5)

    run_in_threads(clients + 1, lambda number: watch(0) if number == clients else ask(number))
    answered, tokens = answers.pop("answers"), answers.pop("tokens")
    print(
        f"{clients} clients for {seconds:.0f} s: {answered} answers, {tokens} tokens, errors: {dict(answers) or 'none'}"
    )
    quarter = len(memory) // 4
    first, last = max(memory[:quarter]), max(memory[-quarter:])
    print(f"memory: at most {first:.0f} MiB in the first quarter, {last:.0f} MiB in the last")


def overload(server: Server, clients: int) -> None:
    """Sends more simultaneous requests than may wait in the queue."""
    answers: Counter[str] = Counter()
    before = server.memory()

    def ask(number: int) -> None:
        with Client(server.url, retries=0) as client:
            try:
                client.generate(PROMPT, max_new_tokens=16, seed=number)
                answers["answered"] += 1
            except ServerError as error:
                answers["503" if "HTTP 503" in str(error) else str(error)] += 1

    run_in_threads(clients, ask)
    with Client(server.url) as client:
        client.generate(PROMPT, max_new_tokens=4)
    print(
        f"{clients} simultaneous requests: {dict(answers)}; memory {before:.0f} MiB before, {server.memory():.0f} after"
    )


def main() -> None:
    """Runs all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder, serving = Path(work) / "checkpoint", Path(work) / "serving"
        make_checkpoint(folder)
        export(folder, serving)
        with serve(serving) as server:
            throughput(server.url, arguments.rounds)
            soak(server, arguments.clients, arguments.seconds)
        with serve(serving, "--max_queued_requests=32") as server:
            overload(server, 400)


if __name__ == "__main__":
    main()

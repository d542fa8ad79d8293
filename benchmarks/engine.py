"""Continuous batching: what short requests wait for long ones, and a mixed load, with one export or two in turns.

    python -m pip install 'tfclm[benchmarks]'
    python -m benchmarks.engine --before DIR

`python -m tfclm.serve` runs in a process for each version, with DistilGPT2's shape (random weights, greedy decoding);
`tfclm.Client` asks `generate_tokens` over REST. DIR is a serving directory with a version of this shape that an earlier
tfclm exported; it is measured in the same run, in turns. Times are medians of `--rounds`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.decoding import export, make_checkpoint
from benchmarks.serving import run_in_threads, serve
from tfclm import Client

VOCABULARY = 50257
PARAMS = {"temperature": [0.0], "top_k": [0], "top_p": [1.0], "repetition_penalty": [1.0], "seed": [0]}


class Answer(NamedTuple):
    """What a request got."""

    seconds: float
    ids: list[int]


def ask(url: str, ids: list[int], new: int) -> Answer:
    """The new tokens of a prompt."""
    began = time.perf_counter()
    with Client(url, timeout=600) as client:
        inputs = {"input_ids": [ids], "attention_mask": [[1] * len(ids)], "max_new_tokens": [new], **PARAMS}
        out = client.predict("generate_tokens", inputs)
    return Answer(time.perf_counter() - began, out["output_ids"][0][: out["completion_tokens"][0]])


def random_prompt(rng: random.Random, length: int) -> list[int]:
    """Token ids."""
    return [rng.randrange(VOCABULARY - 1) for _ in range(length)]


def alone(url: str, rng: random.Random) -> float:
    """Seconds for 5 tokens on an idle server."""
    return statistics.median(ask(url, random_prompt(rng, 16), 5).seconds for _ in range(5))


def beside_long_requests(url: str, rng: random.Random, *, with_prompts: bool) -> float:
    """Seconds for 5 tokens while four requests for 400 run, and also while a prompt of 900 tokens comes each second."""
    running = [threading.Thread(target=ask, args=(url, random_prompt(rng, 16), 400)) for _ in range(4)]
    for thread in running:
        thread.start()
    stop = threading.Event()

    def send_prompts() -> None:
        threads = []
        while not stop.wait(1):
            threads.append(threading.Thread(target=ask, args=(url, random_prompt(rng, 900), 1)))
            threads[-1].start()
        for thread in threads:
            thread.join()

    prompts = threading.Thread(target=send_prompts)
    if with_prompts:
        prompts.start()
    time.sleep(2.5)
    times = []
    while all(thread.is_alive() for thread in running) and len(times) < 8:
        times.append(ask(url, random_prompt(rng, 16), 5).seconds)
    stop.set()
    for thread in [*running, *([prompts] if with_prompts else [])]:
        thread.join()
    return statistics.median(times)


def beside_scores(url: str, rng: random.Random) -> float:
    """Seconds for 5 tokens while four clients have texts of 900 tokens scored."""
    stop = threading.Event()

    def score(number: int) -> None:
        with Client(url, timeout=600) as client:
            while not stop.is_set():
                client.predict("score", {"text": [" the" * 900]})

    scoring = [threading.Thread(target=score, args=(number,)) for number in range(4)]
    for thread in scoring:
        thread.start()
    time.sleep(1)
    times = [ask(url, random_prompt(rng, 16), 5).seconds for _ in range(5)]
    stop.set()
    for thread in scoring:
        thread.join()
    return statistics.median(times)


def mixed(url: str, rate: float, count: int) -> tuple[float, float]:
    """Tokens per second, and the 95th percentile of the seconds per token, of requests that arrive at random."""
    rng = random.Random(0)
    requests = [(random_prompt(rng, rng.randrange(16, 501)), rng.randrange(8, 257)) for _ in range(count)]
    starts, now = [], 0.0
    for _ in requests:
        now += rng.expovariate(rate)
        starts.append(now)
    began = time.perf_counter()
    answers: list[Answer] = []

    def send(number: int) -> None:
        time.sleep(max(0.0, began + starts[number] - time.perf_counter()))
        answers.append(ask(url, *requests[number]))

    run_in_threads(count, send)
    elapsed = time.perf_counter() - began
    per_token = sorted(answer.seconds / len(answer.ids) for answer in answers)
    return sum(len(answer.ids) for answer in answers) / elapsed, per_token[int(0.95 * (count - 1))]


def capacity(url: str, count: int) -> float:
    """Requests per second of the mixed load when all come at once."""
    rng = random.Random(1)
    requests = [(random_prompt(rng, rng.randrange(16, 501)), rng.randrange(8, 257)) for _ in range(count)]
    began = time.perf_counter()
    run_in_threads(count, lambda number: ask(url, *requests[number]))
    return count / (time.perf_counter() - began)


def equal_requests(url: str, rng: random.Random, clients: int) -> float:
    """Tokens per second of requests for 64 tokens that are sent at once."""
    prompts = [random_prompt(rng, 16) for _ in range(clients)]
    began = time.perf_counter()
    run_in_threads(clients, lambda number: ask(url, prompts[number], 64))
    return clients * 64 / (time.perf_counter() - began)


def next_piece(url: str, rng: random.Random) -> tuple[float, float]:
    """Seconds to the first new token of a 900-token text that was just continued, and seconds per token."""
    prompt = random_prompt(rng, 900)
    first = ask(url, prompt, 32)
    again = ask(url, prompt + first.ids, 1)
    more = ask(url, prompt + first.ids + again.ids, 33)
    return again.seconds, (more.seconds - again.seconds) / 32


CASES: dict[str, tuple[str, Callable[[str, random.Random], Any]]] = {
    "alone": ("5 tokens alone, s", alone),
    "beside": ("5 tokens beside 4 x 400, s", lambda url, rng: beside_long_requests(url, rng, with_prompts=False)),
    "prompts": ("the same with prompts of 900, s", lambda url, rng: beside_long_requests(url, rng, with_prompts=True)),
    "scores": ("5 tokens beside 4 x score of 900, s", beside_scores),
    "one": ("one request, tokens/s", lambda url, rng: equal_requests(url, rng, 1)),
    "equal": ("8 equal requests, tokens/s", lambda url, rng: equal_requests(url, rng, 8)),
    "next": ("next token of 900, and further ones, s", next_piece),
}


def compare(urls: dict[str, str], names: list[str], rounds: int, count: int) -> None:
    """Prints a line for each case."""
    for name, case in (CASES[name] for name in names if name in CASES):
        results: dict[str, list[Any]] = {version: [] for version in urls}
        for number in range(rounds):
            for version, url in urls.items():
                results[version].append(case(url, random.Random(number)))
        for version, values in results.items():
            if isinstance(values[0], tuple):
                shown = ", ".join(f"{statistics.median(each):.3f}" for each in zip(*values, strict=True))
            else:
                shown = f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
            print(f"{name}: {version} {shown}", flush=True)
    if "mixed" not in names:
        return
    rate = 0.7 * capacity(urls["now"], count // 2)
    for version, url in urls.items():
        tokens, slow = mixed(url, rate, count)
        print(f"mixed load, {rate:.2f} requests/s: {version} {tokens:.1f} tokens/s, 95 % within {slow:.3f} s per token")


def main() -> None:
    """Runs all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a serving directory of an earlier version")
    parser.add_argument("--now", type=Path, help="one of this version; by default, it is exported first")
    parser.add_argument("--case", nargs="+", choices=[*CASES, "mixed"], default=[*CASES, "mixed"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=40, help="of the mixed load")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        serving = arguments.now or Path(work) / "serving"
        if arguments.now is None:
            make_checkpoint(Path(work) / "checkpoint")
            export(Path(work) / "checkpoint", serving)
        flags = ["--rest_api_num_threads=64", "--rest_api_timeout_in_ms=600000"]
        with serve(serving, *flags) as now:
            if arguments.before is None:
                compare({"now": now.url}, arguments.case, arguments.rounds, arguments.requests)
                return
            with serve(arguments.before, *flags) as before:
                urls = {"before": before.url, "now": now.url}
                compare(urls, arguments.case, arguments.rounds, arguments.requests)


if __name__ == "__main__":
    main()

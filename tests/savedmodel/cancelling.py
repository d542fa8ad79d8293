"""Calls an exported version as TensorFlow Serving does, with timeouts.

    python cancelling.py VERSION_DIR REPEATS SECONDS MAX_NEW_TOKENS

Prints the number of each outcome as JSON. Exits with 1 if an answer differs from that to its row alone.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2

ROWS = 24
TYPES = {
    "prompt": object,
    "max_new_tokens": np.int32,
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "repetition_penalty": np.float32,
    "seed": np.int64,
    "stop": object,
}
Row = dict[str, Any]


class Version:
    """A version in its own session, and the answer to each of some rows alone."""

    def __init__(self, folder: str, max_new_tokens: int) -> None:
        graph = tf.Graph()
        self._session = tf.compat.v1.Session(graph=graph)
        with graph.as_default():
            meta = tf.compat.v1.saved_model.load(self._session, ["serve"], folder)
        self._signature = meta.signature_def["generate"]
        self.max_new_tokens = max_new_tokens
        self.rows = [self.row(number) for number in range(ROWS)]
        self.alone = [self.ask([row])[0] for row in self.rows]
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    def row(self, number: int, new_tokens: int | None = None) -> Row:
        rng = random.Random(number)
        return {
            "prompt": "".join(rng.choices("abc def\n", k=rng.randrange(1, 30))),
            "max_new_tokens": new_tokens or rng.choice([1, 3, 20, self.max_new_tokens]),
            "temperature": rng.choice([0.0, 1.0]),
            "top_k": 0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "seed": number,
            "stop": "",
        }

    def ask(self, rows: list[Row], timeout_ms: int = 0) -> list[bytes]:
        fed = {
            info.name: np.array([row[name] for row in rows], TYPES[name])
            for name, info in self._signature.inputs.items()
        }
        options = config_pb2.RunOptions(timeout_in_ms=timeout_ms)
        answer = self._session.run(self._signature.outputs["completion_bytes"].name, fed, options=options)
        return list(answer)

    def try_to_ask(self, numbers: list[int], timeout_ms: int) -> None:
        """Counts the outcome of a request, and compares the answers."""
        for _ in range(100):
            try:
                answers = self.ask([self.rows[number] for number in numbers], timeout_ms)
            except tf.errors.DeadlineExceededError:
                self.outcomes["timed out"] += 1
                return
            except (tf.errors.CancelledError, tf.errors.InternalError) as error:
                # TensorFlow cancels a batch together with the last request in it: the others have to be sent again.
                if isinstance(error, tf.errors.InternalError) and "Missing 0-th output" not in error.message:
                    raise
                self.outcomes["cancelled with another"] += 1
                continue
            self.outcomes["answered"] += 1
            if answers != [self.alone[number] for number in numbers]:
                self.wrong.append(f"rows {numbers}: {answers}")
            return
        self.wrong.append(f"rows {numbers} were not answered")

    def time_out_next_to_another(self, seconds: float) -> None:
        """A request of eight long rows and a short one times out; another request shares the short row's batch."""
        long = [self.row(number, self.max_new_tokens) for number in range(8)]

        def first() -> None:
            try:
                self.ask([*long, self.row(8, 2)], max(1, int(seconds * 500)))
                self.outcomes["in time"] += 1
            except tf.errors.DeadlineExceededError:
                self.outcomes["timed out"] += 1

        thread = threading.Thread(target=first)
        thread.start()
        time.sleep(seconds * 0.25)
        self.try_to_ask([1], 0)
        thread.join()

    def mix(self, until: float, seed: int, seconds: float) -> None:
        """Sends requests of all sizes, two thirds of which time out, some early and some late."""
        rng = random.Random(seed)
        while time.monotonic() < until:
            numbers = [rng.randrange(ROWS) for _ in range(rng.choice([1, 1, 2, 5, 9, 20]))]
            self.try_to_ask(numbers, rng.choice([0, rng.randrange(1, int(seconds * 1000)), rng.randrange(1, 30)]))


def main() -> None:
    """Runs both, then compares every row again."""
    folder, repeats, load_seconds, max_new_tokens = sys.argv[1], *map(int, sys.argv[2:])
    version = Version(folder, max_new_tokens)
    long = [version.row(number, max_new_tokens) for number in range(8)]
    began = time.monotonic()
    version.ask(long)
    seconds = time.monotonic() - began
    for _ in range(repeats):
        version.time_out_next_to_another(seconds)
    until = time.monotonic() + load_seconds
    threads = [threading.Thread(target=version.mix, args=(until, seed, 2 * seconds)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, row in enumerate(version.rows):
        if version.ask([row])[0] != version.alone[number]:
            version.wrong.append(f"row {number}, asked again")
    print(json.dumps(dict(version.outcomes)))
    sys.exit("\n".join(version.wrong) or 0)


if __name__ == "__main__":
    main()

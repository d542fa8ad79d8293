"""How training scales past what can be run on one machine, computed from measured pieces.

    python -m benchmarks.scaling                  # minutes on two cores
    python -m benchmarks.scaling --quick          # a tiny model: only shows that everything runs
    python -m benchmarks.scaling --pieces my.json # your own measurements in place of this machine's

It measures, on this machine: a training step by blocks per worker, an all-reduce between worker processes by its bytes
and by their number, and the tokens that one core tokenizes and packs per second. These are CPU seconds, because other
programs on the machine change them less than the time that passes: a step takes them divided by the cores, and an
all-reduce those of one core. Only the smallest all-reduce is timed, at its fastest, since it mostly waits. The pieces
are printed as JSON, which --pieces reads, and from them a table for 8 to 256 workers and 1e9 to 1e12 tokens.

What the table assumes: every worker is a machine like this one. A step is the computation followed by its all-reduces,
without overlap. N workers reduce B bytes in a ring, which takes

    overhead + 2 (N - 1) * latency + 2 (N - 1) / N * B / bandwidth

seconds. Overhead and latency are those of the smallest all-reduce between 2 to 4 processes, a straight line in N - 1;
--network-latency is added to the latency. The bandwidth is that of the network, --gigabits, or what the software
reaches between two processes, whichever is lower. Nothing else takes time: no validation, no saving, no lost worker.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

BLOCK_SIZE = 128
WORKERS = (8, 16, 32, 64, 128, 256)
TOKENS = (10**9, 10**10, 10**11, 10**12)
BYTES_PER_TOKEN = 4  # of a prepared block
SMALL_REDUCES = 2  # per step, in addition to that of the gradients: the token count, and the sums of the loss
DAY = 86_400.0


@dataclass(frozen=True)
class Pieces:
    """What is measured.

    Attributes:
        model: what was trained.
        gradient_bytes: bytes of the gradients, which a step reduces.
        steps: seconds of a training step on one worker, by its blocks per step: CPU seconds by the number of cores.
        small_reduces: seconds of an all-reduce of 8 bytes, by the number of workers.
        reduces: seconds of an all-reduce between two workers, by its bytes: CPU seconds of one of them.
        gradients: seconds of an all-reduce of the model's gradients between two workers.
        tokens_per_core: tokens that one core tokenizes and packs per second.
    """

    model: str
    gradient_bytes: int
    steps: dict[int, float]
    small_reduces: dict[int, float]
    reduces: dict[int, float]
    gradients: float
    tokens_per_core: float

    @property
    def overhead(self) -> float:
        """Seconds of an all-reduce without any message."""
        return max(self._line()[1], 0.0)

    @property
    def latency(self) -> float:
        """Seconds of a message; a ring of N workers sends 2 (N - 1) of them, one after the other."""
        return max(self._line()[0] / 2, 0.0)

    def _line(self) -> tuple[float, float]:
        """Slope and intercept of the smallest all-reduce, over the number of workers minus 1."""
        x, y = [count - 1 for count in self.small_reduces], list(self.small_reduces.values())
        slope, intercept = statistics.linear_regression(x, y)
        return slope, intercept

    @property
    def bandwidth(self) -> float:
        """Bytes per second that the software reaches: each of two workers sends as many bytes as they reduce."""
        most = max(self.reduces)
        return most / max(self.reduces[most] - self.small_reduces[2], 1e-9)

    @staticmethod
    def from_json(text: str) -> Pieces:
        """The pieces that `to_json` has written."""
        values = json.loads(text)
        for name in ("steps", "small_reduces", "reduces"):
            values[name] = {int(key): float(value) for key, value in values[name].items()}
        return Pieces(**values)

    def to_json(self) -> str:
        """The pieces as JSON."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Network:
    """What is assumed of the network between the workers: bytes per second, and seconds per message."""

    bandwidth: float
    latency: float


def reduce_seconds(pieces: Pieces, network: Network, workers: int, size: float) -> float:
    """Seconds of an all-reduce of `size` bytes in a ring of workers."""
    messages, sent = 2 * (workers - 1), 2 * (workers - 1) / workers * size
    latency, bandwidth = pieces.latency + network.latency, min(pieces.bandwidth, network.bandwidth)
    return pieces.overhead + messages * latency + sent / bandwidth


@dataclass(frozen=True)
class Estimate:
    """A step of many workers: its seconds, the fraction of them that is computation, and tokens per second."""

    seconds: float
    efficiency: float
    tokens_per_second: float


def estimate(pieces: Pieces, network: Network, workers: int, blocks: int) -> Estimate:
    """What a step takes on `workers` workers with `blocks` blocks each."""
    exchange = reduce_seconds(pieces, network, workers, pieces.gradient_bytes)
    exchange += SMALL_REDUCES * reduce_seconds(pieces, network, workers, 8)
    compute = pieces.steps[blocks]
    seconds = compute + exchange
    return Estimate(seconds, compute / seconds, workers * blocks * BLOCK_SIZE / seconds)


def training_table(pieces: Pieces, network: Network) -> list[str]:
    """Markdown: steps and days by workers and blocks per worker."""
    titles = [f"{tokens:.0e} tokens".replace("e+", "e") for tokens in TOKENS]
    lines = [
        f"| workers | blocks per worker | step | computing | tokens per second | {' | '.join(titles)} |",
        "|" + "---|" * (5 + len(TOKENS)),
    ]
    for blocks in sorted(pieces.steps)[-2:]:
        for workers in WORKERS:
            found = estimate(pieces, network, workers, blocks)
            days = [f"{tokens / found.tokens_per_second / DAY:,.1f} days" for tokens in TOKENS]
            lines.append(
                f"| {workers} | {blocks} | {found.seconds:.2f} s | {found.efficiency:.0%} | "
                f"{found.tokens_per_second:,.0f} | {' | '.join(days)} |"
            )
    return lines


def preparation_table(pieces: Pieces) -> list[str]:
    """Markdown: hours to tokenize and pack by cores, and the bytes of the blocks."""
    lines = ["| tokens | blocks on disk | 1 core | 8 cores | 256 cores |", "|---|---|---|---|---|"]
    for tokens in TOKENS:
        hours = [f"{tokens / pieces.tokens_per_core / cores / 3600:,.1f} h" for cores in (1, 8, 256)]
        size = f"{tokens * BYTES_PER_TOKEN / 1e9:,.0f} GB"
        lines.append(f"| {tokens:.0e} | {size} | {' | '.join(hours)} |".replace("e+", "e"))
    return lines


# Measuring


def make_model(quick: bool) -> Any:
    """A GPT-2 of DistilGPT2's shape, or a tiny one, with random weights."""
    from transformers import GPT2Config

    from tfclm.checkpoint import create

    sizes = {"n_embd": 48, "n_layer": 1, "n_head": 2, "vocab_size": 512} if quick else {"n_layer": 6}
    return create(GPT2Config(**sizes))


def measure_steps(model: Any, counts: list[int], repetitions: int) -> dict[int, float]:
    """Seconds of a training step on this process's devices, by blocks: CPU seconds by cores."""
    import numpy as np
    import tensorflow as tf

    from tfclm.training import TrainingSettings
    from tfclm.training.optimizer import make_optimizer
    from tfclm.training.step import finetuning_step

    found = {}
    with finetuning_step(model, None, 1.0):
        model.compile(optimizer=make_optimizer(model, TrainingSettings(), 1000))
        for count in counts:
            ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (count, BLOCK_SIZE))
            inputs = {"input_ids": tf.constant(ids), "attention_mask": tf.ones_like(ids)}
            times = []
            for _ in range(repetitions + 1):
                start = time.process_time()
                model.train_on_batch(inputs, tf.constant(ids))
                times.append(time.process_time() - start)
            found[count] = min(times[1:]) / (os.cpu_count() or 1)
    return found


def measure_tokenizing(count: int) -> float:
    """Tokens that one core tokenizes and packs per second."""
    import datasets

    from benchmarks.data import documents, gpt2_tokenizer
    from tfclm.corpus import pack, tokenize

    datasets.disable_caching()
    datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = gpt2_tokenizer()
    texts = datasets.Dataset.from_dict({"text": documents(count)})
    start = os.times()
    packed = pack(tokenize(texts, tokenizer, 1), BLOCK_SIZE, [tokenizer.eos_token_id])
    end = os.times()
    return packed.tokens / (sum(end[:4]) - sum(start[:4]))  # of this process and those that it has started


def measure_reduces(workers: int, shapes: list[list[list[int]]], repetitions: int) -> list[tuple[float, float]]:
    """Seconds and CPU seconds of all-reduces between so many processes, each of tensors of some shapes."""
    from tfclm.launch import free_ports, worker_config

    ports = free_ports(workers)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.scaling", "--reduce", json.dumps([shapes, repetitions])],
            env=os.environ | {"TF_CONFIG": worker_config(ports, index)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(workers)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("the all-reduces could not be measured")
    return [(wall, cpu) for wall, cpu in json.loads(outputs[0])]


def reduce_as_worker(shapes: list[list[list[int]]], repetitions: int) -> list[tuple[float, float]]:
    """What each of these processes does; the least seconds and CPU seconds of each all-reduce."""
    import tensorflow as tf

    from tfclm.training.workers import make_strategy

    strategy = make_strategy("multi_worker", "ring", 120)

    def least(values: list[Any]) -> tuple[float, float]:
        def add() -> Any:
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values)

        run = tf.function(lambda: strategy.run(add), autograph=False)
        times = []
        for _ in range(repetitions + 1):
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
        walls, cpus = zip(*times[1:], strict=True)
        return min(walls), min(cpus)

    return [least([tf.zeros(shape) for shape in each]) for each in shapes]


def measure(quick: bool) -> Pieces:
    """Measures all pieces."""
    model = make_model(quick)
    shapes = [variable.shape.as_list() for variable in model.trainable_variables]
    parameters = sum(variable.shape.num_elements() for variable in model.trainable_variables)
    sizes = [1 << 20] if quick else [1 << 20, 1 << 24, 1 << 26]
    repetitions = 5 if quick else 11
    print("all-reduces", file=sys.stderr)
    small = {workers: measure_reduces(workers, [[[2]]], repetitions)[0][0] for workers in (2, 3, 4)}
    *times, gradients = measure_reduces(2, [*([[size // 4]] for size in sizes), shapes], repetitions // 4)
    reduces = {size: cpu for size, (_, cpu) in zip(sizes, times, strict=True)}
    print("training steps", file=sys.stderr)
    steps = measure_steps(model, [1, 2] if quick else [2, 8], 2)
    name = f"GPT-2 with {parameters / 1e6:.1f} million parameters, blocks of {BLOCK_SIZE} tokens, float32"
    print("tokenizing", file=sys.stderr)
    tokens_per_core = measure_tokenizing(200 if quick else 2000)
    return Pieces(name, 4 * parameters, steps, small, reduces, gradients[1], tokens_per_core)


def print_pieces(pieces: Pieces) -> None:
    """Prints what was measured."""
    print(f"{pieces.model}; {os.cpu_count()} cores")
    print("blocks per step: " + ", ".join(f"{blocks}: {value:.3f} s" for blocks, value in pieces.steps.items()))
    small = ", ".join(f"{workers} workers: {value:.4f} s" for workers, value in pieces.small_reduces.items())
    print(f"all-reduce of 8 bytes: {small}; {pieces.overhead:.4f} s and {pieces.latency:.4f} s per message")
    print("all-reduce of 2 workers: " + ", ".join(f"{size} B: {value:.3f} s" for size, value in pieces.reduces.items()))
    predicted = reduce_seconds(pieces, Network(math.inf, 0.0), 2, pieces.gradient_bytes)
    print(
        f"that of the gradients, {pieces.gradient_bytes / 1e6:.1f} MB: {pieces.gradients:.3f} s; by the formula "
        f"{predicted:.3f} s, at {pieces.bandwidth / 1e9:.2f} GB/s"
    )
    print(f"tokenizing and packing: {pieces.tokens_per_core:,.0f} tokens per second and core")
    print(pieces.to_json(), flush=True)


def main() -> None:
    """Measures, or reads the pieces, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few repetitions")
    parser.add_argument("--pieces", metavar="FILE", help="JSON of an earlier run, in place of measuring")
    parser.add_argument(
        "--gigabits", type=float, default=10.0, help="bandwidth of the network per worker and direction"
    )
    parser.add_argument("--network-latency", type=float, default=1e-4, help="seconds that the network adds per message")
    parser.add_argument("--reduce", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if options.reduce:
        print(json.dumps(reduce_as_worker(*json.loads(options.reduce))))
        return
    if options.pieces:
        with open(options.pieces) as file:
            pieces = Pieces.from_json(file.read())
    else:
        pieces = measure(options.quick)
    print_pieces(pieces)
    network = Network(options.gigabits * 1e9 / 8, options.network_latency)
    print(f"\nnetwork: {options.gigabits:g} Gbit/s, {options.network_latency * 1e3:g} ms per message\n")
    print("\n".join([*training_table(pieces, network), "", *preparation_table(pieces)]))


if __name__ == "__main__":
    main()

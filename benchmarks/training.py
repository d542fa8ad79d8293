"""A training step compared with PyTorch's and KerasHub's: seconds, CPU seconds and peak memory, in one run.

    python -m pip install 'tfclm[benchmarks]'
    python -m benchmarks.training
    python -m benchmarks.training --size tiny --rounds 1 --steps 2     # only shows that everything runs

(PyTorch's build for CPUs is enough.)

SmolLM2-135M's shape with random weights, the same for all programs; 4 blocks of 128 tokens per step, AdamW, gradients
clipped to a global norm of 1. `tfclm` is `tfclm.finetune` with its default settings, PyTorch is `LlamaForCausalLM` of
transformers with torch's AdamW, KerasHub is its Llama with Keras' fit. Each program runs in its own process on the same
CPUs, one process at a time, in turns. Figures are medians of the rounds; a round's is the median of its steps. The peak
is the resident memory of the whole process, until the last step. Only the ratios are comparable between machines.

PyTorch and KerasHub may be in environments of their own, which need neither tfclm nor each other:

    python -m venv torch && torch/bin/pip install torch 'transformers>=4.54.1,<6'
    python -m venv keras-hub && keras-hub/bin/pip install keras-hub tensorflow safetensors
    python -m benchmarks.training --torch-python torch/bin/python --keras-hub-python keras-hub/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LENGTH = 128
RATE, DECAY, NORM = 2e-5, 0.01, 1.0
SIZES = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
COMMON = {
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# name: program, computes in bfloat16, compiled by XLA
PROGRAMS = {
    "tfclm": ("tfclm", False, False),
    "tfclm, XLA": ("tfclm", False, True),
    "tfclm, bfloat16": ("tfclm", True, False),
    "tfclm, bfloat16, XLA": ("tfclm", True, True),
    "PyTorch": ("torch", False, False),
    "PyTorch, bfloat16": ("torch", True, False),
    "KerasHub": ("keras_hub", False, False),
    "KerasHub, XLA": ("keras_hub", False, True),
}
# one program / another; targets for seconds and for peak memory, the highest ratios allowed
RATIOS: list[tuple[str, str, float | None, float | None]] = [
    ("tfclm", "PyTorch", 1.0, 1.2),
    ("tfclm", "KerasHub", 1.0, None),
    ("tfclm, XLA", "PyTorch", None, None),
    ("tfclm, XLA", "KerasHub, XLA", None, None),
    ("tfclm, bfloat16", "PyTorch, bfloat16", None, None),
    ("tfclm, bfloat16, XLA", "PyTorch, bfloat16", None, None),
]


class Stopwatch:
    """The seconds and CPU seconds between the ends of steps. The first step, which compiles, is left out."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []
        self._losses: list[float] = []
        self._peak = 0.0

    def lap(self, loss: float) -> None:
        """Notes the end of a step."""
        self._marks.append((time.perf_counter(), time.process_time()))
        self._losses.append(loss)
        self._peak = peak_mib()

    def result(self) -> dict[str, Any]:
        """The median of the steps, the peak memory, and the losses of all steps."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        wall, cpu = (statistics.median(after[i] - before[i] for before, after in pairs) for i in (0, 1))
        return {"seconds": wall, "cpu_seconds": cpu, "peak_mib": self._peak, "losses": self._losses}


def peak_mib() -> float:
    """The peak resident memory of this process so far, in MiB."""
    # Not getrusage, whose value begins with that of the process that started this one.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def read_blocks(folder: Path, rows: int, steps: int) -> list[Any]:
    """The token ids int64 [rows, LENGTH] of each step."""
    import numpy as np

    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocabulary, [steps, rows, LENGTH], dtype=np.int64)
    return list(ids)


def train_tfclm(folder: Path, rows: int, steps: int, bfloat16: bool, jit_compile: bool) -> Stopwatch:
    """Trains by `tfclm.finetune`, whose validation and snapshots before the first step are part of the peak."""
    import datasets
    import numpy as np
    import tf_keras

    import tfclm
    from tfclm.training.order import RunOrder

    settings = tfclm.TrainingSettings(
        epochs=1,
        batch_size=rows,
        learning_rate=RATE,
        schedule="constant",
        weight_decay=DECAY,
        max_grad_norm=NORM,
        mixed_precision="bfloat16" if bfloat16 else "no",
        jit_compile=jit_compile,
    )
    tf_keras.mixed_precision.set_global_policy(settings.policy)
    model, tokenizer = tfclm.load(str(folder))
    batches = read_blocks(folder, rows, steps)
    # Placed so that the run's order gives the batches of the other programs.
    order = RunOrder(rows * steps, rows, 1, settings.seed)[np.arange(rows * steps)]
    blocks = np.concatenate(batches)
    shuffled = np.empty_like(blocks)
    shuffled[order] = blocks
    train, validation = (
        datasets.Dataset.from_dict({"input_ids": each.astype(np.int32)}) for each in (shuffled, batches[0])
    )
    stopwatch = Stopwatch()

    class Laps(tf_keras.callbacks.Callback):
        sum_before = 0.0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            # Keras reports the mean of the epoch so far.
            loss_sum = float(logs["loss"]) * (batch + 1)
            stopwatch.lap(loss_sum - self.sum_before)
            self.sum_before = loss_sum

    tfclm.finetune(model, tokenizer, train, validation, settings, callbacks=[Laps()])
    return stopwatch


def train_torch(folder: Path, rows: int, steps: int, bfloat16: bool, jit_compile: bool) -> Stopwatch:
    """Trains with PyTorch, in autocast if `bfloat16`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).train()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    stopwatch = Stopwatch()
    for ids in map(torch.from_numpy, read_blocks(folder, rows, steps)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            # No cache of keys and values, which training does not use.
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), NORM)
        optimizer.step()
        optimizer.zero_grad()
        stopwatch.lap(loss.item())
    return stopwatch


def train_keras_hub(folder: Path, rows: int, steps: int, bfloat16: bool, jit_compile: bool) -> Stopwatch:
    """Trains with KerasHub's Llama on TensorFlow."""
    import keras
    import keras_hub
    import numpy as np

    model = keras_hub.models.Llama3CausalLM(keras_hub.models.Llama3Backbone.from_preset(str(folder)), preprocessor=None)
    optimizer = keras.optimizers.AdamW(RATE, weight_decay=DECAY, epsilon=1e-8, global_clipnorm=NORM)
    optimizer.exclude_from_weight_decay([variable for variable in model.trainable_variables if len(variable.shape) < 2])
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight"),
        jit_compile=jit_compile,
    )
    stopwatch = Stopwatch()
    for ids in read_blocks(folder, rows, steps):
        labels = np.concatenate([ids[:, 1:], np.zeros_like(ids[:, :1])], 1)
        counted = np.ones(labels.shape, np.float32)
        counted[:, -1] = 0
        inputs = {"token_ids": ids.astype(np.int32), "padding_mask": np.ones_like(ids, np.int32)}
        # Of the epoch so far, so reset before each step.
        model.reset_metrics()
        stopwatch.lap(float(model.train_on_batch(inputs, labels, sample_weight=counted, return_dict=True)["loss"]))
    return stopwatch


TRAIN: dict[str, Callable[..., Stopwatch]] = {
    "tfclm": train_tfclm,
    "torch": train_torch,
    "keras_hub": train_keras_hub,
}


def make_checkpoint(folder: Path, size: str) -> None:
    """A checkpoint of random weights, with a tokenizer that is not used."""
    import tf_keras
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from tfclm import checkpoint

    tf_keras.utils.set_random_seed(0)
    model = checkpoint.create(LlamaConfig(**COMMON, **SIZES[size]))
    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    checkpoint.save(model, PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>"), folder)


def start(command: list[str], threads: int, program: str) -> str:
    """Runs this module in a new process on some CPUs; returns the last line of its output."""
    cpus = set(sorted(os.sched_getaffinity(0))[:threads])
    environment = {
        **os.environ,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TRANSFORMERS_VERBOSITY": "error",
        "KERAS_BACKEND": "tensorflow",
        # Else transformers imports both, where both are installed, and the peak holds the other one's libraries.
        **({"USE_TORCH": "1"} if program == "torch" else {"USE_TF": "1"}),
    }
    # Importing tfclm sets it in this process; KerasHub needs Keras 3.
    environment.pop("TF_USE_LEGACY_KERAS", None)
    run = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        # All libraries take as many threads as they may use CPUs.
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    )
    return run.stdout.splitlines()[-1] if run.stdout else ""


def measure(names: list[str], folder: Path, options: argparse.Namespace, rows: int) -> dict[str, dict[str, float]]:
    """The medians of each program over interleaved rounds."""
    pythons = {"tfclm": sys.executable, "torch": options.torch_python, "keras_hub": options.keras_hub_python}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            program = PROGRAMS[name][0]
            command = [pythons[program], "-m", "benchmarks.training", "--program", name, "--folder", str(folder)]
            command += ["--rows", str(rows), "--steps", str(options.steps)]
            rounds[name].append(json.loads(start(command, options.threads, program)))
            one = rounds[name][-1]
            print(
                f"{name:22s} {one['seconds']:8.3f} s  {one['cpu_seconds']:8.3f} CPU s  {one['peak_mib']:7.0f} MiB"
                f"   loss {one['losses'][0]:.4f} to {one['losses'][-1]:.4f}",
                flush=True,
            )
    return {
        name: {key: statistics.median(one[key] for one in each) for key in ("seconds", "cpu_seconds", "peak_mib")}
        for name, each in rounds.items()
    }


def report(measured: dict[str, dict[str, float]], tokens: int) -> None:
    """Prints the medians, then the ratios with their targets."""
    for name, one in measured.items():
        print(
            f"{name:22s} {one['seconds']:8.3f} s  {one['cpu_seconds']:8.3f} CPU s  {one['peak_mib']:7.0f} MiB"
            f"   {tokens / one['seconds']:6.0f} tokens/s"
        )
    for name, other, most_seconds, most_memory in RATIOS:
        if {name, other} <= measured.keys():
            ratio = {key: measured[name][key] / measured[other][key] for key in measured[name]}
            print(
                f"{name} / {other}: seconds {ratio['seconds']:.2f}{verdict(ratio['seconds'], most_seconds)}, "
                f"CPU seconds {ratio['cpu_seconds']:.2f}, "
                f"peak memory {ratio['peak_mib']:.2f}{verdict(ratio['peak_mib'], most_memory)}"
            )


def verdict(ratio: float, most: float | None) -> str:
    """The target, and whether it is met; nothing if there is none."""
    return "" if most is None else f" (at most {most:g}: {'met' if ratio <= most else 'NOT met'})"


def main() -> None:
    """Runs the requested programs, or, in a process that this one has started, one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="per round; the first one is not timed")
    parser.add_argument("--size", choices=SIZES, default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=4, help="blocks of 128 tokens per step")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPUs that each program uses")
    parser.add_argument("--part", choices=["all", "float32", "bfloat16"], default="all")
    parser.add_argument("--torch-python", default=sys.executable, metavar="PYTHON", help="one that has PyTorch")
    parser.add_argument("--keras-hub-python", default=sys.executable, metavar="PYTHON", help="one that has KerasHub")
    parser.add_argument("--program", choices=PROGRAMS, nargs="+", help="only these")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        program, bfloat16, jit_compile = PROGRAMS[options.program[0]]
        stopwatch = TRAIN[program](options.folder, options.rows, options.steps, bfloat16, jit_compile)
        print(json.dumps(stopwatch.result()))
        return
    names = options.program or [
        name
        for name, (_, bfloat16, _) in PROGRAMS.items()
        if options.part in ("all", "bfloat16" if bfloat16 else "float32")
    ]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "checkpoint"
        make_checkpoint(folder, options.size)
        report(measure(names, folder, options, options.rows), options.rows * LENGTH)


if __name__ == "__main__":
    main()

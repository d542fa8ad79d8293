"""Runs of tiny models under a strategy, for the tests of many workers: what each process computes."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

# What each run is, beyond `run`'s defaults. 45 blocks in steps of 9 or 18 leave each of two replicas unequal parts, and
# 11 to validate on leave a short batch, or nothing for one of the replicas.
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {"batch_size": 9, "epochs": 2, "max_steps": 8},
    "llama": {
        "architecture": "llama",
        "gradient_accumulation_steps": 2,
        "batch_size": 9,
        "mixed_precision": "bfloat16",
    },
    "stopping": {"batch_size": 10, "epochs": 6, "early_stopping_patience": 1, "learning_rate": 9.0},
    "dropout": {"dropout": 0.1, "save_steps": 2, "gradient_accumulation_steps": 2, "batch_size": 7, "epochs": 3},
    # Trains as `fit --blocks` does; `Runs` has made the model and the blocks.
    "blocks": {"blocks": "prepared", "model": "model", "batch_size": 9, "epochs": 2, "max_steps": 6},
    "jit": {"jit_compile": True, "max_steps": 3},
}
# What is compared with a run on one device, too.
ON_ONE_DEVICE = {"gpt2"}
SOME = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 2}


def make_blocks(count: int, seed: int):
    """Blocks with something to learn; in some, a part has no label."""
    import datasets

    first = np.random.default_rng(seed).integers(2, 60, (count, 1))
    ids = ((first + np.arange(16) * 3) % 60 + 2).astype(np.int32)
    labels = ids.astype(np.int64)
    labels[::3, 4:] = -100
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})


def make_config(architecture: str, dropout: float):
    """The config of a tiny GPT-2, or of a tiny model of our own decoder."""
    from conftest import tiny_config
    from transformers import LlamaConfig

    if architecture == "gpt2":
        return tiny_config("gpt2", resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(vocab_size=512, max_position_embeddings=64, num_hidden_layers=1, **sizes)


def run(folder: Path, tokenizer_dir: Path, strategy, *, architecture="gpt2", dropout=0.0, end=None, **settings):
    """Trains and returns what was reported after each step, the record, and the weights.

    With `end`, (step, signal), this process gets that signal after that step of this call.
    """
    import tf_keras
    from transformers import AutoTokenizer

    from tfclm.checkpoint import create
    from tfclm.training import TrainingSettings

    chosen = TrainingSettings(**SOME | settings)
    tf_keras.mixed_precision.set_global_policy(chosen.policy)
    tf_keras.utils.set_random_seed(0)
    with strategy.scope():
        model = create(make_config(architecture, dropout))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return train(model, tokenizer, make_blocks(45, 0), make_blocks(11, 1), chosen, folder, strategy, end)


def run_blocks(folder: Path, strategy, **settings):
    """What `run` returns, for a run of `fit --blocks`; a worker that is not the chief follows it and returns None."""
    import tf_keras

    from tfclm.cli.run_data import load_model_and_blocks
    from tfclm.fit import FitSettings, begin_together, follow
    from tfclm.training.workers import Workers

    paths = {name: str(folder.parent / settings[name]) for name in ("model", "blocks")}
    chosen = FitSettings(**SOME | settings | paths, block_size=16, output_dir=str(folder)).resolved()
    tf_keras.utils.set_random_seed(0)
    workers = Workers(strategy)
    if not workers.is_chief:
        assert follow(chosen, workers) == 0
        return None
    begin_together(workers, folder)
    model, tokenizer, data = load_model_and_blocks(chosen, strategy, chosen.seed)
    return train(model, tokenizer, data.train.blocks, data.validation.blocks, chosen, folder, strategy, None)


def train(model, tokenizer, blocks, validation, settings, folder: Path, strategy, end):
    """What `run` returns."""
    import tf_keras

    from tfclm.training import finetune

    class Reports(tf_keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            reports.append([float(logs["loss"]), float(logs["grad_norm"])])
            if end and len(reports) == end[0]:
                os.kill(os.getpid(), end[1])

    reports: list[list[float]] = []
    record = finetune(
        model,
        tokenizer,
        blocks,
        validation,
        settings,
        output_dir=folder,
        callbacks=[Reports()],
        strategy=strategy,
    )
    record = {name: value for name, value in vars(record).items() if name != "seconds"}
    return {"reports": reports, "record": record}, [variable.numpy() for variable in model.weights]


def keep(path: Path, found: tuple[dict[str, Any], list[np.ndarray]]) -> None:
    """Writes what `run` returns."""
    np.savez(path, *found[1], found=json.dumps(found[0]))


def work(config: str | None, log: Path, folder: Path, tokenizer_dir: Path, cases: dict[str, dict[str, Any]]) -> None:
    """What one process does: the cases, one after the other, as a worker of TF_CONFIG.

    Without it: each case on two devices, and on one if that is compared.
    """
    redirect(log)
    # The place of the tests, as for pytest.
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import tensorflow as tf

    from tfclm.training.workers import Workers, WorkersLost, make_strategy

    tf.config.threading.set_intra_op_parallelism_threads(1)
    if config is None:
        device = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * 2)
        strategies = {"mirrored": tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), "one": None}
    else:
        os.environ["TF_CONFIG"] = config
        strategy = make_strategy("multi_worker", "ring", 120)
        strategies = {f"worker{Workers(strategy).index}": strategy}
    for name, settings in cases.items():
        for kind, strategy in strategies.items():
            if kind == "one" and name not in ON_ONE_DEVICE:
                continue
            place = folder / (name if config else f"{name}-{kind}")
            place.mkdir(parents=True, exist_ok=True)
            chosen = strategy or tf.distribute.get_strategy()
            try:
                if "blocks" in settings:
                    found = run_blocks(place, chosen, **settings)
                else:
                    found = run(place, tokenizer_dir, chosen, **settings)
            except WorkersLost:
                traceback.print_exc()
                os._exit(1)  # as `fit` does: TensorFlow's own shutdown may wait for the worker that is lost
            if found is not None:
                keep(folder / f"{name}-{kind}.npz", found)


def fit(config: str, log: Path, arguments: list[str]) -> None:
    """The command `fit` with these arguments, as a worker of TF_CONFIG."""
    redirect(log)
    from tfclm.fit import main

    os.environ["TF_CONFIG"] = config
    sys.argv = ["tfclm", *arguments]
    main()


def redirect(log: Path) -> None:
    """Appends what this process prints to a file."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)

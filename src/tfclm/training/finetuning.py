"""Fine-tuning with Keras' fit: from token blocks to the best weights."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf
import tf_keras

from tfclm.corpus import check_ids
from tfclm.errors import InputError
from tfclm.training.callbacks import Diverged, EventLog, ProgressBar, RunKeeper
from tfclm.training.feed import feed, run_order
from tfclm.training.optimizer import make_optimizer
from tfclm.training.resume import Progress, Snapshots, seed_dropout, stop_signals
from tfclm.training.settings import TrainingSettings
from tfclm.training.step import finetuning_step


@dataclass(frozen=True)
class TrainingRecord:
    """What a run did; losses are mean negative log-likelihoods a token (natural log)."""

    initial_loss: float
    best_loss: float
    best_step: int  # optimizer steps that the best weights have seen; 0: those that the run began with
    best_epoch: int | None  # the epoch that ended with that step; None if it lies inside an epoch
    epochs: list[dict[str, float]]  # epoch, step, loss, val_loss, val_perplexity
    steps: int
    tokens: int
    seconds: float
    diverged: str | None = None


def finetune(
    model: Any,
    tokenizer: Any,
    train: Any,
    validation: Any,
    settings: TrainingSettings | None = None,
    *,
    output_dir: str | Path | None = None,
    callbacks: Sequence[tf_keras.callbacks.Callback] = (),
    strategy: tf.distribute.Strategy | None = None,
) -> TrainingRecord:
    """Fine-tunes a causal language model in place; it ends with the weights of the best validation loss.

    Args:
        model: a TensorFlow causal language model of transformers, built under `strategy` if one is given.
        tokenizer: its tokenizer.
        train: a dataset of token blocks, `input_ids` int32 [L], as `tfclm.pack` makes them.
        validation: the same of texts that are not trained on.
        settings: how to train; `TrainingSettings()` if not given.
        output_dir: gets `logs/` (TensorBoard) and `resume/`. A run that was interrupted goes on from there when called
            with the same arguments, to the same weights as if it had not been (bit for bit on one CPU).
        callbacks: more Keras callbacks.
        strategy: the tf.distribute strategy to train under.

    Returns:
        A `TrainingRecord`; `diverged` says why the run ended early if the loss was no longer finite.

    Raises:
        InputError: settings out of range or not those that the model was made under, no block or no token ids, a model
            whose loss is not finite, or the state in `output_dir` is of another run or broken.
        Interrupted: Ctrl-C or SIGTERM came; the state is saved.
    """
    settings = settings or TrainingSettings()
    settings.check()
    if model.dtype_policy.name != settings.policy:
        raise InputError(
            f"the model computes in {model.dtype_policy.name}, mixed_precision {settings.mixed_precision!r} in "
            f"{settings.policy}: call tf_keras.mixed_precision.set_global_policy({settings.policy!r}) before tfclm.load"
        )
    if settings.strategy == "mirrored" and strategy is None and not tf.distribute.has_strategy():
        raise InputError(
            "strategy 'mirrored' needs the model made under it: load it inside of "
            "tf.distribute.MirroredStrategy().scope(), and give that strategy to finetune"
        )
    check_ids(train, "train")
    check_ids(validation, "validation")
    if output_dir is None:
        with tempfile.TemporaryDirectory() as folder:
            return finetune(
                model, tokenizer, train, validation, settings, output_dir=folder, callbacks=callbacks, strategy=strategy
            )
    if not len(train) or not len(validation):
        raise InputError("no block of tokens to train on or to validate with: give more text, or a smaller block size")
    if settings.deterministic:
        tf.config.experimental.enable_op_determinism()
    tf_keras.utils.set_random_seed(settings.seed)
    strategy = strategy or tf.distribute.get_strategy()
    output = Path(output_dir)

    rows = min(settings.batch_size * settings.gradient_accumulation_steps, len(train))
    steps_per_epoch = len(train) // rows
    total_steps = min(settings.epochs * steps_per_epoch, settings.max_steps or sys.maxsize)
    left_out = len(train) % rows
    if left_out > len(train) / 10:
        print(
            f"each epoch leaves out {left_out} of {len(train)} blocks, because a step takes {rows} (--batch-size "
            f"{settings.batch_size} x --gradient-accumulation-steps {settings.gradient_accumulation_steps}): "
            "make one of them smaller to leave out fewer",
            file=sys.stderr,
        )
    order = run_order(len(train), rows, -(-total_steps // steps_per_epoch), settings.seed)
    replicas = strategy.num_replicas_in_sync
    block_size = len(train[0]["input_ids"])

    accumulate = settings.gradient_accumulation_steps > 1
    pass_rows = -(-settings.batch_size // replicas) if accumulate else None
    with strategy.scope(), finetuning_step(model, pass_rows, settings.max_grad_norm), stop_signals() as stop:
        generators = seed_dropout(model, settings.seed)
        optimizer = make_optimizer(model, settings, total_steps)
        model.compile(optimizer=optimizer, jit_compile=settings.jit_compile)
        validation_feed = feed(model, validation, tokenizer, batch_size=settings.batch_size)

        snapshots = Snapshots(output / "resume", model, optimizer, generators, model.step_state.loss)
        identity = _identity(settings, train, validation)
        progress = snapshots.restore() or Progress(identity)
        if progress.identity != identity:
            raise InputError(
                f"text or settings have changed since the run in {output} began; --overwrite starts afresh"
            )
        model.step_state.progress = progress
        keeper = RunKeeper(snapshots, progress, settings, total_steps, stop)
        keeper.set_model(model)

        def validate(watching: Any) -> float:
            return float(model.evaluate(validation_feed, callbacks=watching, verbose=0, return_dict=True)["loss"])

        if progress.best_step is None:
            progress.initial_loss = validate([keeper])
            if not math.isfinite(progress.initial_loss):
                raise InputError(
                    "the model's loss on the validation text is not finite before any training: its weights, or what "
                    "it computes from them, hold NaN or infinity; begin with another checkpoint"
                )
            snapshots.keep_best(progress, progress.initial_loss)
            keeper.save()

        diverged = None
        bar, event_log = ProgressBar(keeper, rows * block_size), EventLog(keeper, output / "logs")
        watching = [keeper, bar, event_log, *callbacks]
        try:
            if progress.step and progress.steps == min((progress.epoch + 1) * steps_per_epoch, total_steps):
                # Interrupted after an epoch's last step, before its validation was over: what is left of the epoch is,
                # for the callbacks, a fit of its own.
                rest = tf_keras.callbacks.CallbackList(watching, model=model)
                rest.on_train_begin()
                rest.on_epoch_end(progress.epoch, {"loss": progress.loss, "val_loss": validate(rest)})
                rest.on_train_end()
            if not keeper.finished:
                model.step_state.start = (progress.epoch, progress.step)
                model.fit(
                    feed(model, train, tokenizer, batch_size=rows, order=order[progress.steps * rows :]),
                    validation_data=validation_feed,
                    epochs=-(-total_steps // steps_per_epoch),
                    steps_per_epoch=steps_per_epoch,
                    callbacks=watching,
                    verbose=0,
                )
        except Diverged as error:
            diverged = str(error)
            keeper.progress = progress = snapshots.restore() or progress
            loss = validate([keeper])
            if loss < progress.best_loss:
                snapshots.keep_best(progress, loss)
                keeper.save()
        finally:
            bar.close()
            event_log.close()
        snapshots.restore_best(progress)

    ends = {0: 0} | {int(epoch["step"]): int(epoch["epoch"]) for epoch in progress.epochs}
    best_step = int(progress.best_step or 0)
    return TrainingRecord(
        initial_loss=progress.initial_loss,
        best_loss=progress.best_loss,
        best_step=best_step,
        best_epoch=ends.get(best_step),
        epochs=progress.epochs,
        steps=progress.steps,
        tokens=progress.steps * rows * (block_size - 1),
        seconds=progress.seconds,
        diverged=diverged,
    )


def _identity(settings: TrainingSettings, *splits: Any) -> str:
    """A digest of all that determines a run's weights; how often it is saved does not."""
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(TrainingSettings)}
    digest = hashlib.sha256(repr(fields | {"save_steps": None}).encode())
    for blocks in splits:
        digest.update(f"{len(blocks)} ".encode())
        for batch in blocks.with_format("numpy").iter(batch_size=4096):
            digest.update(batch["input_ids"].tobytes())
    return digest.hexdigest()

"""Fine-tuning with Keras' fit: trains on token blocks and keeps the best weights."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf
import tf_keras

from tfclm.corpus import check_ids, content_digest
from tfclm.errors import InputError
from tfclm.metrics.perplexity import IGNORED
from tfclm.terminal import log
from tfclm.training.callbacks import Diverged, EventLog, ProgressBar, RunTracker
from tfclm.training.feed import worker_feed
from tfclm.training.optimizer import make_optimizer
from tfclm.training.order import RunOrder
from tfclm.training.resume import Progress, Snapshots, seed_dropout, stop_signals
from tfclm.training.settings import TrainingSettings
from tfclm.training.step import finetuning_step
from tfclm.training.workers import Workers

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase, TFPreTrainedModel


@dataclass(frozen=True)
class TrainingRecord:
    """What a training run did.

    Attributes:
        initial_loss: validation loss before training. All losses are mean negative log-likelihoods per token, in nats.
        best_loss: validation loss of the best weights, with which the model ends.
        best_step: optimizer step after which they were saved; 0 for the initial weights.
        best_epoch: the epoch that ended with that step; None if it lies inside an epoch.
        epochs: epoch, step, loss, val_loss and val_perplexity of each epoch.
        steps: number of optimizer steps.
        tokens: number of predicted tokens trained on.
        seconds: time spent, over all processes of a resumed run.
        diverged: why training ended early, if the loss or the gradient was no longer finite.
    """

    initial_loss: float
    best_loss: float
    best_step: int
    best_epoch: int | None
    epochs: list[dict[str, float]]
    steps: int
    tokens: int
    seconds: float
    diverged: str | None = None


@dataclass(frozen=True)
class Plan:
    """The sizes of a run, derived from its settings, blocks and devices.

    Attributes:
        block_size: tokens per block.
        step_rows: blocks per optimizer step, over all replicas and forward passes.
        pass_rows: blocks per forward pass on one replica; None for one pass per step.
        steps_per_epoch: optimizer steps per epoch.
        total_steps: optimizer steps of the run.
    """

    block_size: int
    step_rows: int
    pass_rows: int | None
    steps_per_epoch: int
    total_steps: int

    @property
    def epochs(self) -> int:
        """Number of epochs; the last one may end early."""
        return -(-self.total_steps // self.steps_per_epoch)

    def is_end_of_epoch(self, progress: Progress) -> bool:
        """Whether all steps of the present epoch are done, but not its validation."""
        end = min((progress.epoch + 1) * self.steps_per_epoch, self.total_steps)
        return progress.step > 0 and progress.steps == end


def finetune(
    model: TFPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: datasets.Dataset,
    validation: datasets.Dataset,
    settings: TrainingSettings | None = None,
    *,
    output_dir: str | Path | None = None,
    callbacks: Sequence[tf_keras.callbacks.Callback] = (),
    strategy: tf.distribute.Strategy | None = None,
) -> TrainingRecord:
    """Fine-tunes a causal language model in place; it ends with the weights of the lowest validation loss.

    Args:
        model: a TensorFlow causal language model of transformers, created under `strategy` if one is given.
        tokenizer: the model's tokenizer.
        train: blocks to train on, `input_ids` int32 [L] and maybe `labels`, as `tfclm.pack` makes them.
        validation: blocks of other text to validate on.
        settings: how to train; `TrainingSettings()` if not given.
        output_dir: gets `logs/` (TensorBoard) and `resume/`. When called again with the same arguments, an interrupted
            run resumes from there, with the same result as without the interruption (bit for bit on one CPU).
        callbacks: more Keras callbacks.
        strategy: the tf.distribute strategy to train under; the current one if not given. Under
            `MultiWorkerMirroredStrategy` every worker calls this; one of them writes in `output_dir`, which all share.

    Returns:
        A `TrainingRecord`.

    Raises:
        InputError: settings are out of range or differ from those that the model was created under; there are no
            blocks or no token ids; the model's initial loss is not finite; or the state in `output_dir` belongs to
            another run or is broken.
        Interrupted: Ctrl-C or SIGTERM was received, by any of the workers; the state is saved.
        WorkersLost: another worker has ended; the run resumes from the last saved state.

    Example:
        >>> model, tokenizer = tfclm.load("distilgpt2")
        >>> settings = tfclm.TrainingSettings(epochs=1, learning_rate=2e-5)
        >>> record = tfclm.finetune(model, tokenizer, train.blocks, validation.blocks, settings)
        >>> math.exp(record.best_loss)  # validation perplexity
    """
    settings = settings or TrainingSettings()
    settings.check()
    _check_model(model, settings, strategy)
    check_ids(train, "train")
    check_ids(validation, "validation")
    if not len(train) or not len(validation):
        raise InputError("no block of tokens to train on or to validate on: give more text, or a smaller `block_size`")
    workers = Workers(strategy or tf.distribute.get_strategy())
    if workers.count > 1 and output_dir is None:
        raise InputError("several workers need `output_dir`, a directory that all of them share")
    if settings.deterministic:
        tf.config.experimental.enable_op_determinism()
    tf_keras.utils.set_random_seed(settings.seed)
    plan = _make_plan(settings, train, workers)
    if workers.is_chief:
        _report_left_out(settings, plan, len(train))
    with contextlib.ExitStack() as stack:
        folder = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        with workers.explain_loss():
            workers.check_shared(folder)
            return _run(model, tokenizer, train, validation, settings, plan, folder, callbacks, workers)


def _check_model(model: TFPreTrainedModel, settings: TrainingSettings, strategy: tf.distribute.Strategy | None) -> None:
    """Raises `InputError` unless the model was created with the settings' precision and strategy."""
    if model.dtype_policy.name != settings.policy:
        raise InputError(
            f"the model computes in {model.dtype_policy.name}, `mixed_precision` {settings.mixed_precision!r} in "
            f"{settings.policy}: call tf_keras.mixed_precision.set_global_policy({settings.policy!r}) before tfclm.load"
        )
    if settings.strategy != "one" and strategy is None and not tf.distribute.has_strategy():
        name = {"mirrored": "MirroredStrategy", "multi_worker": "MultiWorkerMirroredStrategy"}[settings.strategy]
        raise InputError(
            f"`strategy` {settings.strategy!r} needs a model that was created under it: load it inside "
            f"tf.distribute.{name}().scope(), and give that strategy to finetune"
        )


def _make_plan(settings: TrainingSettings, train: datasets.Dataset, workers: Workers) -> Plan:
    replicas = workers.strategy.num_replicas_in_sync
    if workers.count > 1 and min(settings.batch_size, len(train)) < replicas:
        raise InputError(
            f"`batch_size` {settings.batch_size}, of {len(train)} blocks, leaves some of the {replicas} devices "
            f"without a block: give {replicas} or more of both"
        )
    step_rows = min(settings.batch_size * settings.gradient_accumulation_steps, len(train))
    steps_per_epoch = len(train) // step_rows
    accumulates = settings.gradient_accumulation_steps > 1
    return Plan(
        block_size=len(train[0]["input_ids"]),
        step_rows=step_rows,
        pass_rows=-(-settings.batch_size // replicas) if accumulates else None,
        steps_per_epoch=steps_per_epoch,
        total_steps=min(settings.epochs * steps_per_epoch, settings.max_steps or sys.maxsize),
    )


def _report_left_out(settings: TrainingSettings, plan: Plan, blocks: int) -> None:
    """Logs how many blocks an epoch leaves out, because they do not fill a step, if these are many."""
    left_out = blocks % plan.step_rows
    if left_out > blocks / 10:
        log(
            f"each epoch leaves out {left_out} of {blocks} blocks, because a step takes {plan.step_rows} "
            f"(`batch_size` {settings.batch_size} x `gradient_accumulation_steps` "
            f"{settings.gradient_accumulation_steps}): make one of them smaller to leave out fewer"
        )


def _run(
    model: TFPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: datasets.Dataset,
    validation: datasets.Dataset,
    settings: TrainingSettings,
    plan: Plan,
    output: Path,
    callbacks: Sequence[tf_keras.callbacks.Callback],
    workers: Workers,
) -> TrainingRecord:
    """Trains from the saved state in `output`, or from the beginning, to the end."""
    diverged, replicas = None, workers.strategy.num_replicas_in_sync
    with (
        workers.strategy.scope(),
        finetuning_step(model, plan.pass_rows, settings.max_grad_norm),
        stop_signals() as stop,
    ):
        generators = seed_dropout(model, settings.seed)
        optimizer = make_optimizer(model, settings, plan.total_steps)
        # XLA compiles no exchange between devices, so with several of them it compiles what lies between.
        model.step_state.jit_compile = settings.jit_compile and replicas > 1
        model.compile(optimizer=optimizer, jit_compile=settings.jit_compile and replicas == 1)
        validation_feed = worker_feed(
            model,
            validation,
            tokenizer,
            batch_size=settings.batch_size,
            order=np.arange(len(validation)),
            workers=workers,
        )
        # Keras cannot know the length of a feed of several workers.
        validation_steps = -(-len(validation) // settings.batch_size) if workers.count > 1 else None

        loss = model.step_state.loss
        snapshots = Snapshots(output / "resume", model, optimizer, generators, loss, writes=workers.is_chief)
        identity = hash_run(settings, train, validation)
        workers.check_equal(identity, "the blocks or settings")
        progress = _restore_progress(snapshots, identity, output)
        dropout = any(getattr(layer, "rate", 0.0) for layer in model.submodules)
        _adopt_replicas(progress, replicas, dropout=dropout, chief=workers.is_chief)
        tracker = RunTracker(snapshots, progress, settings, plan.total_steps, stop, workers)
        tracker.set_model(model)
        model.step_state.progress = progress

        def validate(callbacks: object) -> float:
            results = model.evaluate(
                validation_feed, steps=validation_steps, callbacks=callbacks, verbose=0, return_dict=True
            )
            return float(results["loss"])

        def train_feed() -> tf.data.Dataset:
            """The batches that are left."""
            taken = progress.steps * plan.step_rows
            order = RunOrder(len(train), plan.step_rows, plan.epochs, settings.seed, taken)
            return worker_feed(
                model, train, tokenizer, batch_size=plan.step_rows, order=order, workers=workers, endless=True
            )

        if progress.best_step is None:
            _measure_initial_loss(snapshots, tracker, validate)
        bar = ProgressBar(tracker, plan.step_rows * plan.block_size)
        event_logs = [EventLog(tracker, output / "logs")] if workers.is_chief else []
        chosen = [tracker, bar, *event_logs, *callbacks]
        try:
            _fit(model, plan, tracker, chosen, train_feed, (validation_feed, validation_steps), validate)
        except Diverged as error:
            diverged = str(error)
            tracker.progress = progress = snapshots.restore() or progress
            loss = validate([tracker])
            if loss < progress.best_loss:
                snapshots.save_best(progress, loss)
                tracker.save()
        finally:
            bar.close()
            for event_log in event_logs:
                event_log.close()
        workers.wait()  # until the best weights are written
        snapshots.restore_best(progress)
        workers.wait()  # until all have read them, because the caller may remove the state
    order = RunOrder(len(train), plan.step_rows, plan.epochs, settings.seed)
    return _make_record(progress, _count_predicted(train, order, progress.steps * plan.step_rows), diverged)


def _restore_progress(snapshots: Snapshots, identity: str, output: Path) -> Progress:
    """Restores the saved state of the run, if there is one; else the progress of a new run."""
    progress = snapshots.restore() or Progress(identity)
    if progress.identity != identity:
        raise InputError(
            f"text or settings have changed since the run in {output} began: use `overwrite` to start over"
        )
    return progress


def _adopt_replicas(progress: Progress, replicas: int, *, dropout: bool, chief: bool) -> None:
    """Notes how many devices the run is on; warns if it was on another number and dropout makes that matter."""
    if progress.best_step is not None and progress.replicas != replicas and dropout and chief:
        log(
            f"the run was on {progress.replicas} devices and continues on {replicas}: dropout will differ from that of "
            "an uninterrupted run"
        )
    progress.replicas = replicas


def _measure_initial_loss(snapshots: Snapshots, tracker: RunTracker, validate: Callable[[object], float]) -> None:
    """Validates the initial weights and saves them as the best so far."""
    progress = tracker.progress
    progress.initial_loss = validate([tracker])
    if not math.isfinite(progress.initial_loss):
        raise InputError(
            "the model's loss on the validation text is not finite before any training: its weights or logits hold NaN "
            "or infinity; start from another checkpoint"
        )
    snapshots.save_best(progress, progress.initial_loss)
    tracker.save()


def _fit(
    model: TFPreTrainedModel,
    plan: Plan,
    tracker: RunTracker,
    callbacks: list[tf_keras.callbacks.Callback],
    train_feed: Callable[[], tf.data.Dataset],
    validation: tuple[tf.data.Dataset, int | None],
    validate: Callable[[object], float],
) -> None:
    """Runs Keras' fit from the restored position to the end of the run."""
    progress = tracker.progress
    if plan.is_end_of_epoch(progress):
        # Interrupted during an epoch's validation: for the callbacks, the rest of that epoch is a separate fit.
        rest = tf_keras.callbacks.CallbackList(callbacks, model=model)
        rest.on_train_begin()
        rest.on_epoch_end(progress.epoch, {"loss": progress.loss, "val_loss": validate(rest)})
        rest.on_train_end()
    if not tracker.finished:
        model.step_state.start = (progress.epoch, progress.step)
        model.fit(
            train_feed(),
            validation_data=validation[0],
            validation_steps=validation[1],
            epochs=plan.epochs,
            steps_per_epoch=plan.steps_per_epoch,
            callbacks=callbacks,
            verbose=0,
        )
        if not tracker.finished and not model.stop_training:
            # Keras only warns if it gets fewer batches than it asked for.
            raise RuntimeError(f"the batches ended after step {progress.steps} of {plan.total_steps}")


def _count_predicted(blocks: datasets.Dataset, order: RunOrder, taken: int) -> int:
    """Number of tokens that are predicted in the first `taken` blocks of a run."""
    if "labels" not in blocks.column_names:
        return taken * (len(blocks[0]["input_ids"]) - 1)
    counts = np.concatenate(
        [
            np.count_nonzero(batch["labels"][:, 1:] != IGNORED, axis=1)
            for batch in blocks.with_format("numpy").iter(batch_size=4096)
        ]
    )
    parts = range(0, taken, 1 << 20)
    return sum(int(counts[order[np.arange(part, min(part + parts.step, taken))]].sum()) for part in parts)


def _make_record(progress: Progress, tokens: int, diverged: str | None) -> TrainingRecord:
    epoch_at_step = {0: 0} | {int(epoch["step"]): int(epoch["epoch"]) for epoch in progress.epochs}
    best_step = int(progress.best_step or 0)
    return TrainingRecord(
        initial_loss=progress.initial_loss,
        best_loss=progress.best_loss,
        best_step=best_step,
        best_epoch=epoch_at_step.get(best_step),
        epochs=progress.epochs,
        steps=progress.steps,
        tokens=tokens,
        seconds=progress.seconds,
        diverged=diverged,
    )


def hash_run(settings: TrainingSettings, *splits: datasets.Dataset) -> str:
    """A digest of everything that determines a run's weights: its settings, except `save_steps`, and its blocks."""
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(TrainingSettings)}
    digest = hashlib.sha256(repr(fields | {"save_steps": None}).encode())
    for blocks in splits:
        digest.update(f"{len(blocks)} ".encode())
        if name := content_digest(blocks):
            digest.update(name.encode())
            continue
        for batch in blocks.with_format("numpy").iter(batch_size=4096):
            digest.update(b"".join(batch[name].tobytes() for name in ("input_ids", "labels") if name in batch))
    return digest.hexdigest()

"""Keras callbacks of a run: its state, best weights and record; a progress bar; TensorBoard events."""

# The hooks have Keras' names, which say when it calls them.
# ruff: noqa: D102

from __future__ import annotations

import math
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import tensorflow as tf
import tf_keras
from tqdm.auto import tqdm

from tfclm.metrics.finite import exp
from tfclm.training.resume import Interrupted, Progress, Snapshots
from tfclm.training.settings import TrainingSettings
from tfclm.training.workers import Workers


class Diverged(RuntimeError):
    """The loss or the gradient is no longer finite."""


class RunTracker(tf_keras.callbacks.Callback):
    """Counts steps, saves the state and the best weights, and ends the run."""

    def __init__(
        self,
        snapshots: Snapshots,
        progress: Progress,
        settings: TrainingSettings,
        total_steps: int,
        stop: threading.Event,
        workers: Workers,
    ) -> None:
        super().__init__()
        self.snapshots, self.progress, self.settings, self.stop = snapshots, progress, settings, stop
        self.workers = workers
        self.total_steps = total_steps
        self._since = time.monotonic()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self.progress.step:
            self.snapshots.restore_loss(self.progress)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._announce_stop()

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._announce_stop()

    def _announce_stop(self) -> None:
        """Has the next step tell all workers that a signal stops this one."""
        if self.workers.count > 1 and self.stop.is_set():
            self.model.step_state.stop.assign(1.0)

    def _is_stopping(self) -> bool:
        """Whether a signal has stopped the run; the same on all workers, which know it from the step."""
        if self.workers.count == 1:
            return self.stop.is_set()
        return bool(self.model.step_state.stop.read_value() > 0)

    def _stop(self, when: str) -> NoReturn:
        self.save()
        self.workers.wait()  # the state is saved before any worker ends
        raise Interrupted(f"stopped {when} step {self.progress.steps} of {self.total_steps}")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.progress.step = batch + 1
        self.progress.steps += 1
        # Before validation, which resets the sums.
        self.progress.loss_sums = self.snapshots.loss_sums()
        # Under float16, steps whose gradient overflows are skipped and the loss scale is halved: not a divergence.
        norm = 0.0 if self.settings.mixed_precision == "float16" else logs["grad_norm"]
        if not (math.isfinite(logs["loss"]) and math.isfinite(norm)):
            quantity = "loss" if not math.isfinite(logs["loss"]) else "gradient norm"
            raise Diverged(f"the {quantity} is not finite at step {self.progress.steps}")
        if self._is_stopping():
            self._stop("after")
        if self.progress.steps >= self.total_steps:
            self.model.stop_training = True
        elif self.progress.steps % self.settings.save_steps == 0:
            self.save()

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._is_stopping():
            self._stop("while validating after")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        progress = self.progress
        if not math.isfinite(logs["val_loss"]):
            raise Diverged(f"the validation loss is not finite after step {progress.steps}")
        if logs["val_loss"] < progress.best_loss:
            self.snapshots.save_best(progress, float(logs["val_loss"]))
        progress.epochs.append(
            {
                "epoch": progress.epoch + 1,
                "step": progress.steps,
                "loss": float(logs["loss"]),
                "val_loss": float(logs["val_loss"]),
                "val_perplexity": exp(logs["val_loss"]),
            }
        )
        if self.finished:
            self.model.stop_training = True
        progress.epoch, progress.step = progress.epoch + 1, 0
        self.save()

    def _is_patience_exhausted(self) -> bool:
        patience = self.settings.early_stopping_patience
        losses = [self.progress.initial_loss, *(epoch["val_loss"] for epoch in self.progress.epochs)]
        return bool(patience) and len(losses) - 1 - losses.index(min(losses)) >= patience

    @property
    def finished(self) -> bool:
        """Whether the run is complete: all steps are done and validated, or it stopped early."""
        epochs = self.progress.epochs
        return bool(epochs) and (epochs[-1]["step"] >= self.total_steps or self._is_patience_exhausted())

    def save(self) -> None:
        """Saves a snapshot of the current state."""
        now = time.monotonic()
        self.progress.seconds += now - self._since
        self._since = now
        self.snapshots.save(self.progress)


class ProgressBar(tf_keras.callbacks.Callback):
    """Progress bar on stderr: tokens, tokens per second, remaining time, loss and perplexity."""

    def __init__(self, tracker: RunTracker, tokens_per_step: int) -> None:
        super().__init__()
        self.tracker, self.tokens_per_step = tracker, tokens_per_step

    def on_train_begin(self, logs: Any = None) -> None:
        self.bar = tqdm(
            total=self.tracker.total_steps * self.tokens_per_step,
            initial=self.tracker.progress.steps * self.tokens_per_step,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not self.tracker.workers.is_chief,
            # In a log file, each update is a line.
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )
        if not self.tracker.progress.epochs and self.tracker.workers.is_chief:
            loss = self.tracker.progress.initial_loss
            text = f"before: validation loss {loss:.4f}, validation perplexity {exp(loss):.2f}"
            self.bar.write(text, file=sys.stderr)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.bar.set_description(f"epoch {epoch + 1}", refresh=False)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.bar.set_postfix(
            refresh=False,
            loss=f"{logs['loss']:.3f}",
            perplexity=f"{exp(logs['loss']):.1f}",
            step=self.tracker.progress.steps,
        )
        self.bar.update(self.tokens_per_step)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if not self.tracker.workers.is_chief:
            return
        record = self.tracker.progress.epochs[-1]
        self.bar.write(
            f"epoch {record['epoch']:.0f}: loss {record['loss']:.4f}, validation loss {record['val_loss']:.4f}, "
            f"validation perplexity {record['val_perplexity']:.2f}",
            file=sys.stderr,
        )

    def on_train_end(self, logs: Any = None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the bar; may be called again, or before training began."""
        if hasattr(self, "bar"):
            self.bar.close()


class EventLog(tf_keras.callbacks.Callback):
    """TensorBoard scalars: loss, gradient norm and learning rate per step; validation loss and perplexity per epoch."""

    def __init__(self, tracker: RunTracker, folder: Path, every: int = 10) -> None:
        super().__init__()
        self.tracker, self.every = tracker, every
        self.writer = tf.summary.create_file_writer(str(folder))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        step = self.tracker.progress.steps
        if step % self.every == 0 or step == self.tracker.total_steps:
            rate = self.model.optimizer.learning_rate
            self._write(step, loss=logs["loss"], grad_norm=logs["grad_norm"], learning_rate=rate(step - 1))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        record = self.tracker.progress.epochs[-1]
        self._write(int(record["step"]), **{name: record[name] for name in ("val_loss", "val_perplexity")})
        self.writer.flush()

    def _write(self, step: int, **values: Any) -> None:
        with self.writer.as_default(step):
            for name, value in values.items():
                # Scalars are float32: a perplexity beyond its range becomes infinity.
                tf.summary.scalar(name, tf.cast(tf.constant(float(value), tf.float64), tf.float32))

    def close(self) -> None:
        """Writes pending events and closes the file."""
        self.writer.close()

"""The state of a run, saved as one so that it can resume: weights, optimizer, dropout, position and record."""

from __future__ import annotations

import json
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import tensorflow as tf

from tfclm.compat import BaseRandomLayer, stateful_generator
from tfclm.errors import InputError
from tfclm.metrics.perplexity import TokenLoss

if TYPE_CHECKING:
    import tf_keras
    from transformers import TFPreTrainedModel


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended the run after its state was saved."""


@dataclass
class Progress:
    """How far a run has got: plain values, saved in the same checkpoint as the weights."""

    identity: str  # digest of the blocks and of the settings
    replicas: int = 1  # devices that the run was on when it was saved
    epoch: int = 0  # complete epochs
    step: int = 0  # optimizer steps in the current epoch
    steps: int = 0  # optimizer steps in total
    initial_loss: float = float("nan")  # NaN until it is measured
    epochs: list[dict[str, float]] = field(default_factory=list)  # one record per epoch
    best_step: int | None = None  # optimizer steps of the best weights
    best_loss: float = float("inf")
    seconds: float = 0.0
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])  # distinguishes this run from a repetition
    loss_sums: list[float] = field(default_factory=list)  # negative log-likelihood and tokens of the current epoch

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per token of the current epoch, as `TokenLoss` computes it."""
        total, tokens = self.loss_sums
        return total / tokens


class _Text(tf.train.experimental.PythonState):
    """A text in a checkpoint. Unlike a variable of strings, it needs no communication between workers."""

    value = ""

    def serialize(self) -> str:
        return self.value

    def deserialize(self, string_value: str | bytes) -> None:
        self.value = string_value.decode() if isinstance(string_value, bytes) else string_value


def seed_dropout(model: TFPreTrainedModel, seed: int) -> list[tf.random.Generator]:
    """Gives every random layer a generator whose state can be saved, seeded by its position in the model.

    By default Keras uses hidden counters of the runtime, which cannot be saved or restored.
    """
    generators = []
    for position, layer in enumerate(model.submodules):
        if isinstance(layer, BaseRandomLayer):
            generators.append(stateful_generator(layer, (seed * 100_003 + position) % 2**31))
    return generators


class Snapshots:
    """Saves and restores the whole state of a run in one directory; the newest complete snapshot counts.

    Of several workers, one writes and all restore.
    """

    def __init__(
        self,
        folder: Path,
        model: TFPreTrainedModel,
        optimizer: tf_keras.optimizers.Optimizer,
        generators: list[tf.random.Generator],
        loss: TokenLoss,
        *,
        writes: bool = True,
    ) -> None:
        self.folder, self._writes = folder, writes
        self._loss = loss
        # The variables only: a checkpoint of the model would include the optimizer.
        self._weights = tf.train.Checkpoint(weights=model.weights)
        self._progress = _Text()
        self._state = tf.train.Checkpoint(
            model=model, optimizer=optimizer, generators=generators, progress=self._progress
        )
        _ = self._state.save_counter  # all workers have to create this variable together
        with _explain_errors(folder / "state"):
            self._manager = tf.train.CheckpointManager(self._state, str(folder / "state"), max_to_keep=1)

    def save(self, progress: Progress) -> None:
        """Writes a snapshot; until it is complete, the previous one counts."""
        if not self._writes:
            return
        self._progress.value = json.dumps(asdict(progress))
        self._manager.save()
        for index in self.folder.glob("best-*.index"):
            if index.stem != f"best-{progress.best_step}":
                for file in self.folder.glob(f"{index.stem}.*"):
                    file.unlink()

    def restore(self) -> Progress | None:
        """Restores the newest snapshot; None if there is none.

        Raises:
            InputError: the snapshot or the best weights cannot be read.
        """
        newest, folder = self._manager.latest_checkpoint, self.folder / "state"
        if not newest and not (folder / "checkpoint").exists():
            return None
        with _explain_errors(folder):
            tf.train.Checkpoint(progress=self._progress).read(newest).expect_partial()
            progress = Progress(**json.loads(self._progress.value))
        if progress.best_step is not None:
            # Fails now rather than at the end of the run if they are lost.
            self.restore_best(progress)
        with _explain_errors(folder):
            self._state.restore(newest).assert_consumed()
        return progress

    def loss_sums(self) -> list[float]:
        """Negative log-likelihood and tokens of the current epoch."""
        return [float(self._loss.total.read_value()), float(self._loss.tokens.read_value())]

    def restore_loss(self, progress: Progress) -> None:
        """Restores the sums of the current epoch's loss, which Keras resets when an epoch begins."""
        for variable, value in zip((self._loss.total, self._loss.tokens), progress.loss_sums, strict=True):
            variable.assign(tf.constant(value, variable.dtype))

    def save_best(self, progress: Progress, loss: float) -> None:
        """Saves the current weights as the best, under a new name, so that a kill leaves the previous ones intact."""
        if self._writes:
            self._weights.write(str(self.folder / f"best-{progress.steps}"))
        progress.best_step, progress.best_loss = progress.steps, loss

    def restore_best(self, progress: Progress) -> None:
        """Restores the best weights into the model."""
        path = self.folder / f"best-{progress.best_step}"
        with _explain_errors(path):
            self._weights.read(str(path)).assert_consumed()


@contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # its type depends on which file is missing or broken
        raise InputError(f"{path} cannot be read ({type(error).__name__}): use `overwrite` to start over") from error


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second signal has its usual effect at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread can handle signals
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: FrameType | None) -> None:
        event.set()
        for other, handler in previous.items():
            signal.signal(other, handler)

    for number in previous:
        signal.signal(number, stop)
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

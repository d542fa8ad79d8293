"""The state that an interrupted run goes on from: weights, optimizer, dropout, position and record, saved as one."""

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
from typing import Any

import tensorflow as tf

from tfclm.compat import BaseRandomLayer, stateful_generator
from tfclm.errors import InputError
from tfclm.metrics.perplexity import TokenLoss


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended the run after its state was saved."""


@dataclass
class Progress:
    """How far a run has come; plain values, saved within the same checkpoint as the weights."""

    identity: str  # digest of the blocks and of the settings
    epoch: int = 0  # epochs that are over
    step: int = 0  # optimizer steps done inside the present epoch
    steps: int = 0  # optimizer steps done in all
    initial_loss: float = float("nan")  # before the first evaluation
    epochs: list[dict[str, float]] = field(default_factory=list)  # one record an epoch
    best_step: int | None = None  # after how many optimizer steps the weights were best
    best_loss: float = float("inf")
    seconds: float = 0.0
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])  # tells this run from a repetition
    # Of the present epoch, a pair a replica: negative log-likelihood, tokens. Added up they would not be what each
    # replica goes on with, to the last bit.
    loss_sums: list[list[float]] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Of the present epoch: mean negative log-likelihood a token, as `TokenLoss` gives it."""
        total, tokens = (sum(sums) for sums in zip(*self.loss_sums, strict=True))
        return float(total / tokens)


def seed_dropout(model: Any, seed: int) -> list[tf.random.Generator]:
    """Gives every random layer a generator of its own, whose state can be saved, seeded by its place in the model.

    Keras' default draws from the runtime's hidden counters, which nothing can save or restore.
    """
    generators = []
    for place, layer in enumerate(model.submodules):
        if isinstance(layer, BaseRandomLayer):
            generators.append(stateful_generator(layer, (seed * 100_003 + place) % 2**31))
    return generators


class Snapshots:
    """Saves and restores all of a run's state in one folder; the newest complete snapshot is the one that counts."""

    def __init__(
        self, folder: Path, model: Any, optimizer: Any, generators: list[tf.random.Generator], loss: TokenLoss
    ) -> None:
        self.folder = folder
        self._loss = loss
        # The variables alone: by way of the model the optimizer would come along.
        self._weights = tf.train.Checkpoint(weights=model.weights)
        with tf.device("CPU:0"):
            self._progress = tf.Variable("", dtype=tf.string, name="progress")
        self._state = tf.train.Checkpoint(
            model=model, optimizer=optimizer, generators=generators, progress=self._progress
        )
        with _reading(folder / "state"):
            self._manager = tf.train.CheckpointManager(self._state, str(folder / "state"), max_to_keep=1)

    def save(self, progress: Progress) -> None:
        """Writes a snapshot; until it is complete the one before stays in force."""
        self._progress.assign(json.dumps(asdict(progress)))
        self._manager.save()
        for index in self.folder.glob("best-*.index"):
            if index.stem != f"best-{progress.best_step}":
                for file in self.folder.glob(f"{index.stem}.*"):
                    file.unlink()

    def restore(self) -> Progress | None:
        """Brings back the newest snapshot, all of it; None if there is none.

        Raises:
            InputError: it cannot be read, or the best weights beside it cannot.
        """
        newest, folder = self._manager.latest_checkpoint, self.folder / "state"
        if not newest and not (folder / "checkpoint").exists():
            return None
        with _reading(folder):
            tf.train.Checkpoint(progress=self._progress).read(newest).expect_partial()
            values = json.loads(self._progress.numpy())
            sums = values["loss_sums"]
            if sums and not isinstance(sums[0], list):
                values["loss_sums"] = [sums]  # one pair for all replicas, as older versions have written it
            progress = Progress(**values)
        if progress.best_step is not None:
            # Read here already: that they are lost should not come out when the run is over.
            self.restore_best(progress)
        with _reading(folder):
            self._state.restore(newest).assert_consumed()
        return progress

    def loss_sums(self) -> list[list[float]]:
        """What the epoch's loss is made of so far, a pair a replica: summed negative log-likelihood, tokens."""
        return [[float(variable.numpy()) for variable in pair] for pair in self._sums()]

    def _sums(self) -> list[tuple[tf.Variable, tf.Variable]]:
        # By way of the variables of all replicas, a sum of theirs is read, and an equal part is written to each.
        local = tf.distribute.get_strategy().experimental_local_results
        return list(zip(local(self._loss.total), local(self._loss.tokens), strict=True))

    def restore_loss(self, progress: Progress) -> None:
        """Goes on with the sums of an epoch's loss; Keras resets them when an epoch begins."""
        replicas, sums = self._sums(), progress.loss_sums
        if len(sums) != len(replicas):  # the run goes on with another number of devices
            sums = [[sum(each) for each in zip(*sums, strict=True)], *([[0.0, 0.0]] * (len(replicas) - 1))]
        for variables, values in zip(replicas, sums, strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(tf.constant(value, variable.dtype))

    def keep_best(self, progress: Progress, loss: float) -> None:
        """Keeps the present weights as the best; a name of its own, so that a kill leaves the older ones whole."""
        self._weights.write(str(self.folder / f"best-{progress.steps}"))
        progress.best_step, progress.best_loss = progress.steps, loss

    def restore_best(self, progress: Progress) -> None:
        """Puts the best weights back into the model."""
        path = self.folder / f"best-{progress.best_step}"
        with _reading(path):
            self._weights.read(str(path)).assert_consumed()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of many types, depending on which file is missing or broken
        raise InputError(f"{path} cannot be read ({type(error).__name__}); --overwrite starts afresh") from error


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second signal acts at once, as without us."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may take signals
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: FrameType | None) -> None:
        event.set()
        for each, handler in former.items():
            signal.signal(each, handler)

    for number in former:
        signal.signal(number, stop)
    try:
        yield event
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)

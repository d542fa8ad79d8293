"""A `PushToHubCallback` that uses the Hub's HTTP API, in the background."""

# Keras' names of the hooks say when it calls them.
# ruff: noqa: D102

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tf_keras
import transformers
from transformers import IntervalStrategy

from tfclm.disk import write
from tfclm.errors import InputError
from tfclm.hub.delivery import STAGING, deliver, mark, request_title
from tfclm.hub.pushing import Pusher, State, log_above_progress
from tfclm.hub.repository import Repository, list_files, preflight

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PushToHubCallback"]

Epochs = Sequence[Mapping[str, Any]]


class PushToHubCallback(transformers.PushToHubCallback):
    """Pushes a model to the Hugging Face Hub while it trains with Keras' `fit`.

    It replaces `transformers.PushToHubCallback` and takes the same arguments in the same order, but needs neither git
    nor a local clone, and never blocks the training. Each push is one commit that makes the repository equal to the
    saved model, tokenizer and model card. If the Hub cannot be reached, a push is tried again until it succeeds or a
    newer one takes its place. After the training, the last state is saved to `output_dir` and pushed, so that both hold
    the same files.

    Args:
        output_dir: directory that the last state is saved to. With `checkpoint`, the `output_dir` of
            `tfclm.finetune`.
        save_strategy: when to push during the training: "epoch", "steps" or "no". The last state is pushed in any
            case.
        save_steps: optimizer steps between two pushes, for "steps".
        tokenizer: saved and pushed with the model.
        hub_model_id: the repository as owner/name, or the name of one of your own; the name of `output_dir` if None. It
            is created if it does not exist.
        hub_token: token that may write there; that of HF_TOKEN or of `hf auth login` if None.
        checkpoint: also push, after each epoch, the state that `tfclm.fit --resume-from` continues. Needs
            `save_strategy` "epoch".
        repository: the result of `tfclm.hub.preflight`; the constructor calls it if None.
        patience: seconds for which the last push is tried again if it fails.
        at_end: save and push the last state when the training ends. If False, call `close` then.
        card: returns the text of README.md, given the records of the epochs so far: "epoch", "step" and Keras' logs.
        model_card_args: metadata for the default model card: language, license, tags, finetuned_from, dataset and
            others.

    Raises:
        ValueError: `checkpoint` without `save_strategy` "epoch", or "steps" without `save_steps`.
        InputError: the repository cannot be written: the name is not valid, or the token is missing or refused.
        tfclm.hub.repository.Unreachable: the Hub does not answer, or HF_HUB_OFFLINE is set.

    Example:
        >>> model, tokenizer = tfclm.load("distilgpt2")
        >>> callback = PushToHubCallback("runs/eli5", tokenizer=tokenizer, hub_model_id="me/eli5", license="mit")
        >>> model.fit(train_set, validation_data=validation_set, epochs=3, callbacks=[callback])
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        save_strategy: str | IntervalStrategy = "epoch",
        save_steps: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        hub_model_id: str | None = None,
        hub_token: str | None = None,
        checkpoint: bool = False,
        *,
        repository: Repository | None = None,
        patience: float = 300.0,
        at_end: bool = True,
        card: Callable[[Epochs], str] | None = None,
        **model_card_args: Any,
    ) -> None:
        # Not the constructor of transformers' callback, which clones the repository with git.
        tf_keras.callbacks.Callback.__init__(self)
        self.save_strategy = IntervalStrategy(str(getattr(save_strategy, "value", save_strategy)).lower())
        if checkpoint and self.save_strategy != IntervalStrategy.EPOCH:
            raise ValueError("checkpoint=True pushes a state after each epoch: give save_strategy='epoch'")
        if self.save_strategy == IntervalStrategy.STEPS and (not isinstance(save_steps, int) or save_steps <= 0):
            raise ValueError("save_strategy='steps' needs save_steps, a whole number above 0")
        self.output_dir = Path(output_dir)
        self.save_steps, self.tokenizer, self.checkpoint = save_steps, tokenizer, checkpoint
        self.repository = repository or _preflight(hub_model_id or self.output_dir.absolute().name, hub_token)
        self.hub_model_id = self.repository.repo_id
        self.patience, self.at_end = patience, at_end
        self.model_card_args = model_card_args
        self.training_history: list[dict[str, Any]] = []
        self._card = card or self._default_card
        self._staging = self.output_dir / STAGING
        shutil.rmtree(self._staging, ignore_errors=True)  # left by a killed run
        self._pusher: Pusher | None = None
        self._pushed_steps = 0  # steps of the last state that was handed to the pusher

    def on_train_begin(self, logs: Any = None) -> None:
        self.training_history, self._pushed_steps = [], 0
        if self.checkpoint and not (self.output_dir / "resume" / "state").is_dir():
            raise ValueError(
                f"checkpoint=True pushes the state that tfclm.finetune keeps in its output_dir, and {self.output_dir} "
                "has none: give both the same directory"
            )
        if self._pusher is None:
            self._pusher = Pusher(self.repository, request_title(self.output_dir))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.save_strategy == IntervalStrategy.STEPS:
            steps = self._steps()
            if steps and steps % int(self.save_steps or 1) == 0:
                self._push(f"Step {steps}", steps)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.training_history.append({"epoch": epoch + 1, "step": self._steps(), **(logs or {})})
        if self.save_strategy == IntervalStrategy.EPOCH:
            self._push(f"Epoch {epoch + 1}, step {self._steps()}", self._steps())

    def on_train_end(self, logs: Any = None) -> None:
        if not self.at_end:
            return
        self.close()
        self._save(self.output_dir)
        mark(self.output_dir, self.repository)
        deliver(self.output_dir, self.repository, patience=self.patience, state=self.checkpoint)

    def close(self) -> None:
        """Waits for the current push and discards the waiting one; the callback may be used again afterwards."""
        if self._pusher is not None:
            self._pusher.close(0.0, drop=True)
            self._pusher = None
        shutil.rmtree(self._staging, ignore_errors=True)

    @property
    def _progress(self) -> Any:
        """The progress of a run of `tfclm.finetune`, restored when it is resumed; None for other trainings."""
        return getattr(getattr(self.model, "step_state", None), "progress", None)

    def _steps(self) -> int:
        return int(self._progress.steps if self._progress else self.model.optimizer.iterations)

    def _push(self, title: str, steps: int) -> None:
        """Hands a copy of the current state to the thread that pushes."""
        assert self._pusher is not None
        if steps > self._pushed_steps:
            staged = self._staging / str(steps)
            try:
                self._save(staged)
            except (OSError, InputError) as error:  # a full disk must not end the training
                log_above_progress(f"{title}: not pushed to {self.hub_model_id}: {error}")
                shutil.rmtree(staged, ignore_errors=True)
                return
            run = self._progress.run if self._progress else None
            description = f"run {run}, step {steps}" if run else ""
            self._pusher.put(State(list_files(staged), title, description, run, steps, staged))
            self._pushed_steps = steps

    def _save(self, folder: Path) -> None:
        from tfclm.checkpoint import save

        save(self.model, self.tokenizer, folder)
        epochs = self._progress.epochs if self._progress else self.training_history
        write(folder / "README.md", self._card(epochs))
        if folder != self.output_dir:
            self._add_state(folder)

    def _add_state(self, folder: Path) -> None:
        """Adds the run's settings and its state at the step of the weights, from which it can be resumed."""
        settings, resume = self.output_dir / "fit.yaml", self.output_dir / "resume"
        if settings.is_file():
            shutil.copyfile(settings, folder / settings.name)
        if self.checkpoint:
            for name, path in list_files(resume, leave_out=(Path(STAGING).name, "former.json")).items():
                target = folder / "resume" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    # As safe as a copy: TensorFlow never changes these files and replaces their list by a rename.
                    os.link(path, target)
                except OSError:  # not every file system has hard links
                    shutil.copyfile(path, target)

    def _default_card(self, epochs: Epochs) -> str:
        from tfclm.runs.card import plain_card

        return plain_card(self.output_dir.absolute().name, epochs, self.model_card_args)


def _preflight(hub_model_id: str, token: str | None) -> Repository:
    try:
        return preflight(hub_model_id, token=token)
    except InputError as error:
        raise error.renamed(repo_id="hub_model_id") from error

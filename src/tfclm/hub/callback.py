"""`PushToHubCallback` of transformers, over the Hub's HTTP API and in the background."""

# The names of the hooks are Keras', and say when it calls them.
# ruff: noqa: D102

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tf_keras
import transformers
from transformers import IntervalStrategy

from tfclm.errors import InputError
from tfclm.hub.delivery import STAGING, deliver, mark, request_title
from tfclm.hub.pushing import Pusher, State, complain
from tfclm.hub.repository import Repository, list_files, preflight

Epochs = Sequence[Mapping[str, Any]]


class PushToHubCallback(transformers.PushToHubCallback):
    """Keeps a repository on the Hub in step with a training: model, tokenizer, card, and the state to resume from.

    It takes the place of transformers' callback of the same name, whose arguments it has. It needs no git; a push never
    holds up the training, and is tried again until it is done, or overtaken by a newer one; when the training is over,
    the last state is in `output_dir` and on the Hub, the same files there and here.

    Args:
        output_dir: gets the last state; with `checkpoint`, it is the `output_dir` that `tfclm.finetune` was given, too.
        save_strategy: "epoch", "steps" or "no": when to push, beside at the end.
        save_steps: optimizer steps between two pushes.
        tokenizer: is pushed with the model.
        hub_model_id: the repository, owner/name; the name of `output_dir` if not given.
        hub_token: instead of the token of the environment or of `hf auth login`.
        checkpoint: push, with each epoch, the state that `tfclm.fit --resume-from` goes on from.
        repository: what `tfclm.hub.preflight` gave; it is called here if not given.
        patience: seconds for which the last push is tried again.
        at_end: push the last state; False leaves that to the caller, who has `close` to call.
        card: makes the README.md from the record of the epochs so far.
        model_card_args: metadata of the card: language, license, tags, finetuned_from, dataset…

    Raises:
        ValueError: `checkpoint` without `save_strategy` "epoch", or no `save_steps` for "steps".
        InputError: the repository cannot be written.
        Unreachable: there is no way to the Hub.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        save_strategy: str | IntervalStrategy = "epoch",
        save_steps: int | None = None,
        tokenizer: Any = None,
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
        # Not the constructor of transformers' callback: that clones with git.
        tf_keras.callbacks.Callback.__init__(self)
        self.save_strategy = IntervalStrategy(str(getattr(save_strategy, "value", save_strategy)).lower())
        if checkpoint and self.save_strategy != IntervalStrategy.EPOCH:
            raise ValueError("checkpoint=True pushes a state after each epoch: give save_strategy='epoch'")
        if self.save_strategy == IntervalStrategy.STEPS and (not isinstance(save_steps, int) or save_steps <= 0):
            raise ValueError("save_strategy='steps' needs save_steps, a whole number above 0")
        self.output_dir = Path(output_dir)
        self.save_steps, self.tokenizer, self.checkpoint = save_steps, tokenizer, checkpoint
        self.repository = repository or preflight(
            hub_model_id or self.output_dir.absolute().name, token=hub_token, flag="hub_model_id"
        )
        self.hub_model_id = self.repository.repo_id
        self.patience, self.at_end = patience, at_end
        self.model_card_args = model_card_args
        self.training_history: list[dict[str, Any]] = []
        self._card = card or self._own_card
        self._staging = self.output_dir / STAGING
        shutil.rmtree(self._staging, ignore_errors=True)  # what a killed run left
        self._pusher: Pusher | None = None
        self._pushed = 0  # steps of the last state that was handed over

    def on_train_begin(self, logs: Any = None) -> None:
        self.training_history, self._pushed = [], 0
        if self.checkpoint and not (self.output_dir / "resume" / "state").is_dir():
            raise ValueError(
                f"checkpoint=True pushes the state that tfclm.finetune keeps in its output_dir, and {self.output_dir} "
                "has none: give both the same folder"
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
        """Waits for the push that goes on, and leaves out the one that waits; a training may begin anew then."""
        if self._pusher is not None:
            self._pusher.close(0.0, drop=True)
            self._pusher = None
        shutil.rmtree(self._staging, ignore_errors=True)

    @property
    def _progress(self) -> Any:
        """The record of a run of `tfclm.finetune`, which outlives its process; None for another training."""
        return getattr(getattr(self.model, "step_state", None), "progress", None)

    def _steps(self) -> int:
        return int(self._progress.steps if self._progress else self.model.optimizer.iterations)

    def _push(self, title: str, steps: int) -> None:
        """Hands a copy of the present state to the thread that pushes."""
        assert self._pusher is not None
        if steps > self._pushed:
            staged = self._staging / str(steps)
            try:
                self._save(staged)
            except (OSError, InputError) as error:  # a disk that is full must not end the training
                complain(f"{title}: not pushed to {self.hub_model_id}: {error}")
                shutil.rmtree(staged, ignore_errors=True)
                return
            run = self._progress.run if self._progress else None
            description = f"run {run}, step {steps}" if run else ""
            self._pusher.put(State(list_files(staged), title, description, run, steps, staged))
            self._pushed = steps

    def _save(self, folder: Path) -> None:
        from tfclm.checkpoint import save

        save(self.model, self.tokenizer, folder)
        epochs = self._progress.epochs if self._progress else self.training_history
        (folder / "README.md").write_text(self._card(epochs), encoding="utf-8")
        if folder != self.output_dir:
            self._add_state(folder)

    def _add_state(self, folder: Path) -> None:
        """Adds what a run can be resumed from: its settings and, of the same moment as the weights, its state."""
        settings, resume = self.output_dir / "fit.yaml", self.output_dir / "resume"
        if settings.is_file():
            shutil.copyfile(settings, folder / settings.name)
        if self.checkpoint:
            for name, path in list_files(resume, leave_out=(Path(STAGING).name, "former.json")).items():
                target = folder / "resume" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    # As good as a copy: TensorFlow writes a file once, and renames the list of them into place.
                    os.link(path, target)
                except OSError:  # not every file system has links
                    shutil.copyfile(path, target)

    def _own_card(self, epochs: Epochs) -> str:
        from tfclm.runs.card import plain_card

        return plain_card(self.output_dir.absolute().name, epochs, self.model_card_args)

"""The output folder of a run: whose it is, whether it is complete, and what is written when it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import yaml

from tfclm.disk import FolderLock, write
from tfclm.errors import InputError
from tfclm.metrics.finite import exp, plain
from tfclm.runs.card import draw_curve, model_card, versions
from tfclm.settings import to_yaml
from tfclm.terminal import log

if TYPE_CHECKING:
    from tfclm.training.finetuning import TrainingRecord

# Settings that may differ between a run and its continuation: they change how, not what.
FREE = (
    *("num_proc", "output_dir", "save_steps"),
    *("push_strategy", "push_steps", "push_checkpoint", "push_timeout", "push_patience"),
)
# What a run writes beside the files of the checkpoint, fit.yaml and resume/.
RUN_FILES = ("README.md", "logs", "loss.png", "results.json", "unpushed.json")


class RunFolder:
    """Claims a folder for a run; as a context, holds it against a second process.

    Args:
        path: the folder; made if it is not there.
        settings: the run's settings as plain values.
        overwrite: remove what a former run has left.

    Raises:
        InputError: the folder holds something else, or a run with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool) -> None:
        self.path, self.settings = path, settings
        self.results: dict[str, Any] | None = None
        self._resume, self._results = path / "resume", path / "results.json"
        # Kept for its list of files until this run has saved its own.
        self._former = self._resume / "former.json"
        self._overwrite = overwrite
        # A fit.yaml alone may be somebody's settings file.
        mine = (path / "fit.yaml").is_file() and (self._resume.is_dir() or self._results.is_file())
        try:
            if not mine and path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise InputError(
                    f"--output-dir {path} is there already and holds no run: give another folder, or empty this one"
                )
            if mine and not overwrite:
                self._check_same(path / "fit.yaml")
                if self._results.is_file():
                    self.results = read_results(self._results)
                    shutil.rmtree(self._resume, ignore_errors=True)
                    return
            path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(path)
        except OSError as error:
            raise InputError(
                f"--output-dir {path}: {error.strerror or error}; give a folder that can be written"
            ) from error

    def _check_same(self, file: Path) -> None:
        try:
            former = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError):
            former = None
        if not isinstance(former, dict):
            raise InputError(f"{file} holds no settings that can be read; --overwrite starts afresh")
        different = [
            f"{name} {former.get(name)!r} there, {value!r} now"
            for name, value in self.settings.items()
            if name not in FREE and former.get(name) != value
        ]
        if different:
            raise InputError(
                f"{self.path} holds a run with other settings ({'; '.join(different)}): "
                "give another --output-dir, or --overwrite to start afresh"
            )

    def begin(self) -> None:
        """From here on the folder is this run's; what it held before is kept until all input has proved good."""
        self._resume.mkdir(exist_ok=True)
        if self._overwrite:
            if self._results.is_file():
                os.replace(self._results, self._former)
            remove(entry for entry in self.path.iterdir() if entry.name in RUN_FILES)
            remove(entry for entry in self._resume.iterdir() if entry != self._former)
        write(self.path / "fit.yaml", to_yaml(self.settings))

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._lock.release()
        if kind is not None and not any(self.path.iterdir()):
            self.path.rmdir()  # nothing was begun: leave the place as it was found

    def finish(
        self,
        done: TrainingRecord,
        protocol: dict[str, Any],
        tokens: int,
        files: Sequence[str],
        corpus_tokens: int,
        base: Mapping[str, Any],
        repo_id: str | None = None,
    ) -> dict[str, Any]:
        """Writes curve, card and results beside the model; `results.json` comes last and marks the run complete.

        Args:
            done: what the training did.
            protocol: how the perplexity was measured.
            tokens: number of tokens that it was measured on.
            files: names of the checkpoint's files; those of a former run that are not among them are removed.
            corpus_tokens: number of tokens in the training blocks.
            base: what the card says of the model that the run began with.
            repo_id: full name of the Hub repository that the folder is pushed to.

        Returns:
            What `results.json` holds: a number that is not finite is None there.
        """
        self._remove_former(files)
        results = {
            "perplexity": exp(done.best_loss),
            "loss": done.best_loss,
            "tokens": tokens,
            "initial_perplexity": exp(done.initial_loss),
            "protocol": protocol,
            "train": {
                "loss": done.epochs[-1]["loss"] if done.epochs else None,
                "steps": done.steps,
                "tokens": done.tokens,
                "corpus_tokens": corpus_tokens,
                "seconds": round(done.seconds, 3),
                "best_step": done.best_step,
                "best_epoch": done.best_epoch,
                "epochs": done.epochs,
                "diverged": done.diverged,
            },
            "sample": None,
            "files": list(files),
            "versions": versions(),
        }
        draw_curve(done, self.path / "loss.png")
        write(self.path / "README.md", model_card(results, {**self.settings, "push_to_hub": repo_id}, base))
        results = self.record(results)
        shutil.rmtree(self._resume, ignore_errors=True)  # the run is complete; the next one removes what is left
        return results

    def record(self, results: dict[str, Any]) -> dict[str, Any]:
        """Writes `results.json`; the results as they are there."""
        results = plain(results)
        write(self._results, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        return results

    def _remove_former(self, files: Sequence[str]) -> None:
        """Removes what only a former run's checkpoint has: to a loader it would be a part of this one."""
        if not self._former.is_file():
            return
        try:
            names = read_results(self._former)["files"]
        except InputError:
            text = f"the former results.json cannot be read: files of its checkpoint may be left in {self.path}"
            log(text)
            return
        left = {name.split("/")[0] for name in names} - {name.split("/")[0] for name in files}
        # From what is in the folder, so that no name leads out of it.
        remove(entry for entry in self.path.iterdir() if entry.name in left)


class Lock(FolderLock):
    """One run a folder: a lock that ends with its process, however that ends."""

    def __init__(self, folder: Path) -> None:
        try:
            super().__init__(folder)
        except BlockingIOError as error:
            raise InputError(f"{folder} is in use by another run: wait for it, or give another --output-dir") from error


def read_results(file: Path) -> dict[str, Any]:
    """What a `results.json` holds; raises InputError if it is not what a run has written."""
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _ = results["perplexity"], results["initial_perplexity"], results["train"]["diverged"], results["sample"]
        _ = [name.split("/") for name in results["files"]]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not what a run has written; --overwrite starts afresh") from error
    return results


def remove(entries: Iterable[Path]) -> None:
    """Removes files and folders."""
    for entry in list(entries):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

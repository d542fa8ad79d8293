"""The output directory of a run: claims and locks it, and writes the results."""

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
from tfclm.metrics.bits import bits_per_byte
from tfclm.metrics.finite import exp, plain
from tfclm.runs.card import model_card, versions
from tfclm.runs.curve import draw_curve
from tfclm.settings import to_yaml
from tfclm.terminal import log

if TYPE_CHECKING:
    from tfclm.training.finetuning import TrainingRecord

# Settings that may change when a run is resumed: the result does not depend on them.
CHANGEABLE = (
    *("num_proc", "output_dir", "save_steps", "communication", "startup_timeout"),
    *("push_strategy", "push_steps", "push_checkpoint", "push_timeout", "push_patience"),
)
# Files of a run in addition to those of the checkpoint, fit.yaml and resume/.
RUN_FILES = ("README.md", "logs", "loss.png", "results.json", "unpushed.json")


class RunFolder:
    """Claims a directory for a run, and keeps it locked until the context ends.

    Args:
        path: the directory, which is created if needed.
        settings: the run's settings as plain values.
        overwrite: remove the files of an earlier run.

    Raises:
        InputError: the directory holds other files, a run with other settings, or a run in progress.
    """

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool) -> None:
        self.path, self.settings = path, settings
        self.results: dict[str, Any] | None = None
        self._resume, self._results = path / "resume", path / "results.json"
        # The results of an overwritten run: its files are removed once this run has saved its own.
        self._former = self._resume / "former.json"
        self._overwrite = overwrite
        # A fit.yaml alone may be a settings file of the user.
        holds_run = (path / "fit.yaml").is_file() and (self._resume.is_dir() or self._results.is_file())
        try:
            if not holds_run and path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise InputError(
                    f"`output_dir` {path} exists and holds no run: give another directory, or empty this one"
                )
            if holds_run and not overwrite:
                self._check_same(path / "fit.yaml")
                if self._results.is_file():
                    self.results = read_results(self._results)
                    shutil.rmtree(self._resume, ignore_errors=True)
                    return
            path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(path)
        except OSError as error:
            raise InputError(f"`output_dir` {path}: {error.strerror or error}; give a writable directory") from error

    def _check_same(self, file: Path) -> None:
        try:
            recorded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError):
            recorded = None
        if not isinstance(recorded, dict):
            raise InputError(f"{file} holds no readable settings: use `overwrite` to start over")
        different = [
            f"`{name}` {recorded.get(name)!r} there, {value!r} now"
            for name, value in self.settings.items()
            if name not in CHANGEABLE and recorded.get(name) != value
        ]
        if different:
            raise InputError(
                f"{self.path} holds a run with other settings ({'; '.join(different)}): "
                "give another `output_dir`, or use `overwrite` to start over"
            )

    def begin(self) -> None:
        """Starts the run in the directory; called once all input is checked, so that bad input removes nothing."""
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
            self.path.rmdir()  # the run did not begin

    def finish(
        self,
        record: TrainingRecord,
        protocol: dict[str, Any],
        tokens: int,
        size: int | None,
        files: Sequence[str],
        corpus_tokens: int,
        base: Mapping[str, Any],
        repo_id: str | None = None,
    ) -> dict[str, Any]:
        """Writes curve, card and results next to the model; `results.json` comes last and marks the run as complete.

        Args:
            record: the record of the training.
            protocol: how the perplexity was measured.
            tokens: number of tokens that it was measured on.
            size: UTF-8 bytes of the text that these stand for; None if they are not known.
            files: names of the checkpoint's files; other files of an overwritten run are removed.
            corpus_tokens: number of tokens in the training blocks.
            base: metadata of the base model, for the card.
            repo_id: full name of the Hub repository that the directory is pushed to.

        Returns:
            The content of `results.json`, where numbers that are not finite are None.
        """
        self._remove_former(files)
        results = {
            "perplexity": exp(record.best_loss),
            "loss": record.best_loss,
            "tokens": tokens,
            "bytes": size,
            "bits_per_byte": bits_per_byte(record.best_loss, tokens, size),
            "initial_perplexity": exp(record.initial_loss),
            "protocol": protocol,
            "train": {
                "loss": record.epochs[-1]["loss"] if record.epochs else None,
                "steps": record.steps,
                "tokens": record.tokens,
                "corpus_tokens": corpus_tokens,
                "seconds": round(record.seconds, 3),
                "best_step": record.best_step,
                "best_epoch": record.best_epoch,
                "epochs": record.epochs,
                "diverged": record.diverged,
            },
            "sample": None,
            "files": list(files),
            "versions": versions(),
        }
        draw_curve(record, self.path / "loss.png")
        write(self.path / "README.md", model_card(results, {**self.settings, "push_to_hub": repo_id}, base))
        results = self.record(results)
        shutil.rmtree(self._resume, ignore_errors=True)  # errors do not matter: the next run removes what is left
        return results

    def record(self, results: dict[str, Any]) -> dict[str, Any]:
        """Writes `results.json` and returns its content."""
        results = plain(results)
        write(self._results, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        return results

    def _remove_former(self, files: Sequence[str]) -> None:
        """Removes files of the overwritten checkpoint: loaders would take them for part of the new one."""
        if not self._former.is_file():
            return
        try:
            names = read_results(self._former)["files"]
        except InputError:
            log(f"the former results.json cannot be read: files of its checkpoint may be left in {self.path}")
            return
        left = {name.split("/")[0] for name in names} - {name.split("/")[0] for name in files}
        # Only entries of the directory: a name from the file could lead out of it.
        remove(entry for entry in self.path.iterdir() if entry.name in left)


class Lock(FolderLock):
    """Allows one run per directory; the lock ends with the process."""

    def __init__(self, folder: Path) -> None:
        try:
            super().__init__(folder)
        except BlockingIOError as error:
            raise InputError(f"{folder} is in use by another run: wait for it, or give another `output_dir`") from error


def read_results(file: Path) -> dict[str, Any]:
    """Reads a `results.json`; raises `InputError` if no run has written it."""
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _ = results["perplexity"], results["initial_perplexity"], results["train"]["diverged"], results["sample"]
        _ = [name.split("/") for name in results["files"]]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{file} was not written by a run: use `overwrite` to start over") from error
    return results


def remove(entries: Iterable[Path]) -> None:
    """Removes files and directories."""
    for entry in list(entries):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

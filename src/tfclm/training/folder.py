"""The output folder of a run: whose it is, whether it is complete, and what is written when it is."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from tfclm.errors import InputError
from tfclm.settings import to_yaml
from tfclm.training.report import draw_curve, model_card
from tfclm.training.run import TrainingRecord

# Settings that may differ between a run and its continuation: they change how, not what.
FREE = ("num_proc", "output_dir", "save_steps")
# What a run writes beside the files of the checkpoint; `--overwrite` removes these and nothing else.
RUN_FILES = ("README.md", "fit.yaml", "logs", "loss.png", "results.json", "resume")
PACKAGES = ("tfclm", "tensorflow", "tf-keras", "transformers", "tokenizers", "datasets", "huggingface-hub")


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
        mine = (path / "fit.yaml").is_file()
        self._fresh = overwrite or not mine
        try:
            if not mine and path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise InputError(f"--output-dir {path} is there already and holds no run: give another folder")
            # A run that was killed before its first step has nothing to lose.
            if mine and not overwrite and any((path / name).exists() for name in ("resume", "results.json")):
                self._check_same(path / "fit.yaml")
                if (path / "results.json").is_file():
                    self.results = json.loads((path / "results.json").read_text(encoding="utf-8"))
                    shutil.rmtree(path / "resume", ignore_errors=True)
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
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read; --overwrite starts afresh") from error
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

    def _remove(self, *names: str) -> None:
        for entry in (self.path / name for name in names):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)

    def begin(self) -> None:
        """From here on the folder is this run's; what it held before is kept until all input has proved good."""
        if self._fresh:
            self._remove(*RUN_FILES)
        write(self.path / "fit.yaml", to_yaml(self.settings))

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._lock.release()
        if kind is not None and not any(self.path.iterdir()):
            self.path.rmdir()  # nothing was begun: leave the place as it was found

    def finish(self, done: TrainingRecord, protocol: dict[str, Any], tokens: int, sample: str) -> dict[str, Any]:
        """Writes curve, card and results beside the model; `results.json` comes last and marks the run complete."""
        from tfclm.training.callbacks import exp

        versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
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
                "seconds": round(done.seconds, 3),
                "best_epoch": done.best_epoch,
                "epochs": done.epochs,
                "diverged": done.diverged,
            },
            "sample": sample,
            "versions": versions,
        }
        draw_curve(done, self.path / "loss.png")
        write(self.path / "README.md", model_card(results, self.settings))
        write(self.path / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        shutil.rmtree(self.path / "resume")
        return results


class Lock:
    """One run a folder: a lock that ends with its process, however that ends."""

    def __init__(self, folder: Path) -> None:
        import fcntl

        # The folder itself is locked: a lock file would be one file too many in the result.
        self._handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._handle)
            raise InputError(f"{folder} is in use by another run: wait for it, or give another --output-dir") from error

    def release(self) -> None:
        """Lets the folder go."""
        os.close(self._handle)


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    beside = path.with_name(f".{path.name}.part")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)

"""A checkpoint becomes the next version that a server takes, if the gate and the canary pass it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm.errors import InputError
from tfclm.savedmodel.settings import ServableSettings
from tfclm.terminal import log

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TFPreTrainedModel

    from tfclm.savedmodel import Exported
    from tfclm.savedmodel.publishing.gate import Gate, PerplexityResult
    from tfclm.savedmodel.publishing.versions import ServingDirectory

    Measure = Callable[[TFPreTrainedModel, PreTrainedTokenizerBase], PerplexityResult | None]

# The documents on which the new version and the one served now are both scored.
Texts = Callable[[], Iterable[str]]


@dataclass(frozen=True)
class Release:
    """Where a checkpoint is published, and the limits that it must meet.

    Attributes:
        directory: the model directory, which can be written.
        settings: how the model is exported.
        limits: what its perplexity must meet.
    """

    directory: ServingDirectory
    settings: ServableSettings
    limits: Gate

    @classmethod
    def open(cls, serving_dir: str, settings: ServableSettings, limits: Gate, version: int | None = None) -> Release:
        """Checks, before a model is loaded or trained, that a version can be published.

        Args:
            serving_dir: the model directory; its numbered subdirectories are the versions.
            settings: how the model is exported.
            limits: what its perplexity must meet.
            version: the version's number; the highest there plus 1 if None.

        Raises:
            InputError: a setting out of its range, a version that is taken, or a directory that cannot be written.
        """
        from tfclm.savedmodel.publishing.versions import ServingDirectory

        settings.check()
        limits.check()
        return cls(ServingDirectory.open(serving_dir, version), settings, limits)

    def check(self, texts: Texts | None, protocol: Mapping[str, Any] | None = None, tokens: int | None = None) -> None:
        """Checks, before a model is loaded or trained, that the gate can compare it with the version served now.

        Args:
            texts: documents on which the version served now can be scored, if there are any.
            protocol: how the new perplexity is measured, if that is known already.
            tokens: the number of tokens that it is measured on, if that is known already.

        Raises:
            InputError: it cannot.
        """
        from tfclm.savedmodel.publishing.gate import can_be_measured, check_comparable, served_record

        served = served_record(self.directory, self.limits)
        if texts is None or not can_be_measured(served):
            check_comparable(self.limits, served, protocol, tokens)

    def check_recorded(self, recorded: PerplexityResult | None) -> None:
        """Raises InputError if the gate cannot decide by the perplexity that is recorded with a checkpoint."""
        from tfclm.savedmodel.publishing.gate import decide, served_record

        decide(self.limits, recorded, served_record(self.directory, self.limits))

    def publish(
        self,
        checkpoint: str,
        revision: str | None = None,
        *,
        texts: Texts | None = None,
        measure: Measure | None = None,
        recorded: PerplexityResult | None = None,
    ) -> Exported:
        """Loads a checkpoint and publishes it.

        Args:
            checkpoint: its directory or Hub id.
            revision: branch, tag or commit of a Hub id.
            texts: documents on which the version served now is scored too.
            measure: measures the perplexity of a model; called if none is recorded, and for smaller weights.
            recorded: the perplexity that the run measured.

        Returns:
            The published version.

        Raises:
            InputError: the model cannot be exported, or the gate has nothing to decide by.
            GateFailed, CanaryFailed: it was not published.
        """
        from tfclm.checkpoint import load
        from tfclm.savedmodel import export_saved_model

        model, tokenizer = load(checkpoint, revision=revision)
        if recorded is not None and recorded.finite is None:
            log(f"{checkpoint}/results.json: the run diverged, so there is no perplexity to record")
        return export_saved_model(
            model,
            tokenizer,
            self.directory,
            self.settings,
            version=self.directory.version,
            recorded=recorded,
            measure=None if measure is None else lambda model: measure(model, tokenizer),
            limits=self.limits,
            texts=texts,
            source={"checkpoint": checkpoint, "revision": revision},
            log=log,
        )


def recorded_perplexity(checkpoint: str, revision: str | None = None) -> PerplexityResult | None:
    """The perplexity that `fit` recorded with a checkpoint; NaN if the run diverged, None without a record.

    Raises:
        InputError: the record of a local checkpoint is damaged.
    """
    from tfclm.checkpoint.locating import locate
    from tfclm.savedmodel.publishing.gate import PerplexityResult

    path = locate(checkpoint, revision) / "results.json"
    if not path.is_file():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        perplexity = float("nan") if results["perplexity"] is None else float(results["perplexity"])
        return PerplexityResult(perplexity, int(results["tokens"]), dict(results["protocol"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        if not Path(checkpoint).expanduser().is_dir():
            return None  # on the Hub, a file of that name may be anybody's
        raise InputError(f"{path} is not a record of tfclm.fit: move it away, or train again") from error

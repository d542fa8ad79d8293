"""The release of a run's own model: what `fit --export-to` checks before the training and publishes after it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tfclm.cli.evaluation import document_texts
from tfclm.cli.release import Release, Texts, recorded_perplexity
from tfclm.corpus.settings import SourceSettings
from tfclm.errors import InputError

if TYPE_CHECKING:
    from tfclm.savedmodel import Exported


@dataclass(frozen=True)
class RunRelease:
    """A release, and the validation text on which the version served now can be scored too.

    Attributes:
        release: where the model is published, and the limits that it must meet.
        source: the run's text.
        validation_split: the split that the run validates on, if it is given.
        validation_files: the files that it validates on, if they are given.
    """

    release: Release
    source: SourceSettings
    validation_split: str | None
    validation_files: tuple[str, ...]

    def check(self, protocol: Mapping[str, Any] | None = None, tokens: int | None = None) -> None:
        """Checks, before the training, that the gate can compare the model with the version served now.

        Args:
            protocol: how the run's perplexity will be measured, once that is known.
            tokens: on how many tokens, once that is known.

        Raises:
            InputError: it cannot.
        """
        texts = self.validation_texts(protocol)
        if texts is None and protocol is None and self.source.dataset:
            # The dataset may have its own validation split, which is known once the dataset is read.
            texts = functools.partial(document_texts, self.source)
        with fields_of_fit(text=True):
            self.release.check(texts, protocol, tokens)

    def publish(self, output_dir: str) -> Exported:
        """Publishes the finished model.

        Raises:
            InputError, GateFailed, CanaryFailed: it was not published.
        """
        recorded = recorded_perplexity(output_dir)
        protocol = recorded.protocol if recorded else None
        texts = None
        try:
            self.release.check(None, protocol, recorded.tokens if recorded else None)
        except InputError:
            # Both versions are scored on the run's validation text then.
            texts = self.validation_texts(protocol)
        if texts is None:
            with fields_of_fit(text=True):
                self.release.check_recorded(recorded)
        with fields_of_fit():
            return self.release.publish(output_dir, texts=texts, recorded=recorded)

    def validation_texts(self, protocol: Mapping[str, Any] | None) -> Texts | None:
        """Reads the validation text; None where it was drawn from the training text, or is not known yet."""
        if self.validation_files:
            return functools.partial(document_texts, self.source, files=self.validation_files)
        split = self.validation_split
        if split is None and protocol is not None and str(protocol.get("validation", "")).startswith("split "):
            split = str(protocol["validation"]).removesuffix(" (the dataset's own)").removeprefix("split ")
        return functools.partial(document_texts, self.source, split) if split else None


@contextmanager
def fields_of_fit(*, text: bool = False) -> Iterator[None]:
    """Errors name the fields of `fit`; `text`: those of the text that both versions are scored on as well."""
    names = {"serving_dir": "export_to"}
    if text:
        names |= {"dataset": "validation_split", "file": "validation_file"}
    try:
        yield
    except InputError as error:
        raise error.renamed(**names) from error

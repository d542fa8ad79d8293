"""Where a run's model goes besides its folder: a servable that TensorFlow Serving hosts, and a Hub repository."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm.errors import InputError
from tfclm.savedmodel.publishing.versions import address
from tfclm.terminal import log

if TYPE_CHECKING:
    from tfclm.export import ExportSettings
    from tfclm.fit import FitSettings
    from tfclm.hub import Repository

__all__ = ["check_export", "export", "is_unpushed", "push", "push_callback", "reach_hub"]


def check_export(settings: FitSettings, protocol: Mapping[str, Any] | None = None, tokens: int | None = None) -> None:
    """Refuses, before the time of a training, what `--export-to` would refuse behind it.

    Args:
        settings: the run's.
        protocol: how its perplexity is going to be measured, once that is known.
        tokens: of how many tokens, once that is known.

    Raises:
        InputError: a folder that cannot be written, a limit out of its range, or a served version that the run's
            perplexity cannot be compared with.
    """
    if settings.export_to is None:
        return
    from tfclm.export import preflight
    from tfclm.savedmodel.publishing.gate import can_be_measured, check_comparable, served_record

    with _named_export_to():
        # Before the text is read, a dataset may have a validation split of its own.
        compares = _validation_text(settings, protocol) is not None or (protocol is None and bool(settings.dataset))
        limits = preflight(_export_settings(settings), compares=compares)
        served = served_record(settings.export_to, limits)
        if not (compares and can_be_measured(served)):
            check_comparable(limits, served, protocol, tokens)


def export(settings: FitSettings) -> tuple[int, Path | None]:
    """Publishes the finished model where `--export-to` says, if the gate and the canary let it.

    Returns:
        The exit code, and the folder of the version if it is to be pushed.
    """
    if settings.export_to is None:
        return 0, None
    from tfclm.export import recorded, run
    from tfclm.hub.archive import newest_version
    from tfclm.savedmodel.publishing.gate import Gate, check_comparable, served_record

    with _named_export_to():
        exported, texts = _export_settings(settings), None
        known = recorded(str(settings.output_dir), None)
        limits = Gate(settings.max_perplexity, settings.max_regression)
        try:
            served = served_record(settings.export_to, limits)
            check_comparable(limits, served, known.protocol if known else None, known.tokens if known else None)
        except InputError:
            # Both are measured on the run's validation text then.
            texts = _validation_text(settings, known.protocol if known else None)
        code = run(exported, texts)
    return code, newest_version(Path(address(settings.export_to))) if settings.push_saved_model and not code else None


def _validation_text(settings: FitSettings, protocol: Mapping[str, Any] | None) -> Callable[[], Iterable[str]] | None:
    """Reads a run's validation text, on which the served version can be measured too; None where it was drawn."""
    from tfclm.export import documents

    split = settings.validation_split
    if split is None and protocol is not None and str(protocol.get("validation", "")).startswith("split "):
        split = str(protocol["validation"]).removesuffix(" (the dataset's own)").removeprefix("split ")
    if settings.validation_file:
        return functools.partial(documents, settings, files=settings.validation_file)
    return functools.partial(documents, settings, split=split) if split else None


@contextmanager
def _named_export_to() -> Iterator[None]:
    """Errors name the flags that the user gave."""
    try:
        yield
    except InputError as error:
        names = {"serving_dir": "export_to", "dataset": "validation_split", "file": "validation_file"}
        raise error.renamed(**names) from error


def _export_settings(settings: FitSettings) -> ExportSettings:
    """What `export` is told by a run."""
    from tfclm.export import ExportSettings

    return ExportSettings(
        model=settings.output_dir,
        serving_dir=settings.export_to,
        max_perplexity=settings.max_perplexity,
        max_regression=settings.max_regression,
    )


def reach_hub(settings: FitSettings) -> tuple[Repository, bool] | None:
    """The repository that is pushed to, and whether it can be now; None if none is.

    Raises:
        InputError: it cannot be pushed to, or, without `--push-later`, not be reached.
    """
    if settings.push_to_hub is None:
        return None
    from tfclm.hub.repository import Repository, Unreachable, preflight

    where: dict[str, Any] = {name: getattr(settings, name) for name in ("private", "branch", "create_pr")}
    try:
        return preflight(settings.push_to_hub, timeout=settings.push_timeout, **where), True
    except InputError as error:
        raise error.renamed(repo_id="push_to_hub") from error
    except Unreachable as reason:
        if not settings.push_later:
            raise InputError(f"{reason}; go online, or give --push-later to push when it can be reached") from reason
        if "/" not in settings.push_to_hub:
            raise InputError(f"{reason}, so its owner is not known: give --push-to-hub as owner/name") from reason
        log(f"{reason}; the run goes on, and is to be pushed later")
        return Repository(settings.push_to_hub, **where), False


def push_callback(
    settings: FitSettings, target: tuple[Repository, bool] | None, tokenizer: Any, card: Any
) -> list[Any]:
    """The callback that pushes while the training goes on, if the Hub can be reached."""
    if target is None or not target[1]:
        return []
    from tfclm.hub import PushToHubCallback

    return [
        PushToHubCallback(
            str(settings.output_dir),
            settings.push_strategy,
            settings.push_steps,
            tokenizer,
            checkpoint=settings.push_checkpoint,
            repository=target[0],
            at_end=False,
            card=card,
        )
    ]


def is_unpushed(settings: FitSettings) -> bool:
    """Whether the complete run still has to be pushed."""
    from tfclm.hub.delivery import marked

    return settings.push_to_hub is not None and marked(Path(str(settings.output_dir))) is not None


def push(settings: FitSettings, target: tuple[Repository, bool] | None, version: Path | None) -> int:
    """Pushes the finished folder, and the exported version if there is one to push; the exit code."""
    if target is None:
        return 0
    from tfclm.hub.delivery import deliver, finishing_command

    repository, reached = target
    folder = Path(str(settings.output_dir))
    if not reached:
        log(f"not pushed yet; when the Hub can be reached:\n  {finishing_command(folder, repository, version)}")
        return 0
    return 0 if deliver(folder, repository, patience=settings.push_patience, servable=version, log=log) else 1

"""Where a run's model goes besides its folder: a servable that TensorFlow Serving hosts, and a Hub repository."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm.errors import InputError
from tfclm.savedmodel.publish import address
from tfclm.settings import say

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
    from tfclm.savedmodel.gate import check_comparable, served_record

    with _named_export_to():
        limits = preflight(_export_settings(settings))
        check_comparable(limits, served_record(settings.export_to, limits), protocol, tokens)


def export(settings: FitSettings) -> tuple[int, Path | None]:
    """Publishes the finished model where `--export-to` says, if the gate and the canary let it.

    Returns:
        The exit code, and the folder of the version if it is to be pushed.
    """
    if settings.export_to is None:
        return 0, None
    from tfclm.export import run
    from tfclm.hub.archive import newest_version

    with _named_export_to():
        code = run(_export_settings(settings))
    return code, newest_version(Path(address(settings.export_to))) if settings.push_saved_model and not code else None


@contextmanager
def _named_export_to() -> Iterator[None]:
    """Errors name the flag that the user gave."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("--serving-dir", "--export-to")) from error


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
    except Unreachable as reason:
        if not settings.push_later:
            raise InputError(f"{reason}; go online, or give --push-later to push when it can be reached") from reason
        if "/" not in settings.push_to_hub:
            raise InputError(f"{reason}, so its owner is not known: give --push-to-hub as owner/name") from reason
        say(f"{reason}; the run goes on, and is to be pushed later")
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
        say(f"not pushed yet; when the Hub can be reached:\n  {finishing_command(folder, repository, version)}")
        return 0
    return 0 if deliver(folder, repository, patience=settings.push_patience, servable=version, say=say) else 1

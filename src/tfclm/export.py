"""`python -m tfclm.export`: writes the next version of a model, or lists the versions or removes the newest one."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tfclm.cli.command import command
from tfclm.cli.evaluation import document_texts, evaluate
from tfclm.cli.release import Release, recorded_perplexity
from tfclm.corpus.settings import SourceSettings
from tfclm.errors import InputError
from tfclm.savedmodel.settings import ServableSettings
from tfclm.settings import setting
from tfclm.terminal import log, print_result

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TFPreTrainedModel

    from tfclm.savedmodel import Exported
    from tfclm.savedmodel.publishing.gate import PerplexityResult

# What applies to a model that is already exported.
EXPORTED_FLAGS = {"serving_dir", "version", "keep_versions", "max_perplexity", "max_regression"}

# What applies only where the perplexity is measured on a text.
TEXT_FLAGS = ("dataset_config", "dataset_revision", "text_column", "separator", "split")


@dataclass(frozen=True)
class ExportSettings(ServableSettings, SourceSettings):
    """Settings of `export`."""

    model: str | None = setting(None, "directory or Hub id of the checkpoint")
    revision: str | None = setting(None, "branch, tag or commit of a Hub id")
    serving_dir: str | None = setting(
        None, "model directory, such as serving_models/eli5; its numbered subdirectories are the versions"
    )
    version: int | None = setting(None, "version number; the highest existing one plus 1 if not given")
    keep_versions: int | None = setting(None, "after publishing, keep only this many of the newest versions")
    max_perplexity: float | None = setting(None, "publish only if the perplexity is at most this")
    max_regression: float | None = setting(
        None, "publish only if the perplexity is at most this fraction above the served version's; 0.02 is 2 %"
    )
    split: str = setting("test", "split of `dataset` to measure the perplexity on")
    file: tuple[str, ...] = setting((), "local files or globs to measure the perplexity on")
    list: bool = setting(False, "print the existing versions and exit")
    from_hub: str | None = setting(
        None,
        "Hub repository with an exported model, which becomes the next version here",
        metavar="REPO",
    )
    exported: str | None = setting(
        None, "directory of a version that is already exported, which becomes the next version here", metavar="DIR"
    )
    rollback: bool = setting(False, "remove the newest version, so that a server returns to the previous one")


def run(settings: ExportSettings) -> int:
    """Exports a checkpoint, or lists or removes versions; returns the exit code."""
    if not settings.serving_dir:
        raise InputError("`serving_dir` is missing: give the model directory, such as serving_models/eli5")
    if settings.list:
        from tfclm.cli.versions_table import print_versions

        return print_versions(settings.serving_dir)
    if settings.rollback:
        from tfclm.savedmodel.publishing.versions import ServingDirectory

        removed, served = ServingDirectory.at(settings.serving_dir).rollback()
        print_result(f"version {removed} removed, {served} is the newest")
        return 0
    from tfclm.savedmodel.publishing.canary import CanaryFailed
    from tfclm.savedmodel.publishing.gate import GateFailed

    try:
        if settings.from_hub is not None:
            exported = import_from_hub(settings)
        elif settings.exported is not None:
            exported = import_version(settings)
        else:
            exported = export_checkpoint(settings)
    except (GateFailed, CanaryFailed) as error:
        log(f"tfclm.export: {error}")
        return 1
    print_result(f"{settings.serving_dir.rstrip('/')}/{exported.version}")
    return remove_old_versions(settings, exported.version)


def export_checkpoint(settings: ExportSettings) -> Exported:
    """Exports a checkpoint and publishes it, if gate and canary pass it."""
    if settings.model is None:
        raise InputError("`model` is missing: give the directory or Hub id of a checkpoint")
    release = open_release(settings)
    if has_text(settings):
        texts = functools.partial(document_texts, settings, settings.split, settings.file)
        release.check(texts)
        recorded = None
    else:
        texts = None
        release.check(None)
        recorded = recorded_perplexity(settings.model, settings.revision)
        release.check_recorded(recorded)
    measure = functools.partial(measure_perplexity, settings)
    return release.publish(settings.model, settings.revision, texts=texts, measure=measure, recorded=recorded)


def import_from_hub(settings: ExportSettings) -> Exported:
    """Publishes the exported model that a Hub repository holds, if gate and canary pass it."""
    from tfclm.hub import fetch_servable

    release = open_import(settings, "from_hub", "revision")
    (version,) = fetch_servable(str(settings.from_hub), revision=settings.revision).iterdir()
    return publish(version, release, {"hub": settings.from_hub, "hub_revision": settings.revision})


def import_version(settings: ExportSettings) -> Exported:
    """Publishes a version that was exported to another directory, if gate and canary pass it."""
    path = Path(str(settings.exported))
    release = open_import(settings, "exported")
    if not (path / "saved_model.pb").is_file():
        raise InputError(f"`exported` {path} holds no saved_model.pb: give a version, such as serving_models/eli5/3")
    return publish(path, release, {"exported": str(path)})


def open_import(settings: ExportSettings, *names: str) -> Release:
    """Where a model that is already exported is published; settings for making or measuring one are refused."""
    for field in dataclasses.fields(ExportSettings):
        if field.name not in EXPORTED_FLAGS.union(names) and getattr(settings, field.name) != field.default:
            raise InputError(f"`{names[0]}` takes a model that is already exported: leave out `{field.name}`")
    release = open_release(settings)
    release.check(None)
    return release


def publish(version: Path, release: Release, source: dict[str, str | None]) -> Exported:
    """Publishes a version that is already exported."""
    from tfclm.savedmodel.exporting import publish_exported

    directory = release.directory
    return publish_exported(
        version, directory, version=directory.version, limits=release.limits, source=source, log=log
    )


def open_release(settings: ExportSettings) -> Release:
    """Where the model is published, and the limits that it must meet.

    Raises:
        InputError: a setting that has no effect, or is out of its range.
    """
    from tfclm.savedmodel.publishing.gate import Gate

    if not has_text(settings) and settings.from_hub is None:
        for name in TEXT_FLAGS:
            if getattr(settings, name) != getattr(ExportSettings, name):
                raise InputError(f"`{name}` applies to the text of `dataset` or `file`: give one of them as well")
    if settings.keep_versions is not None and settings.keep_versions < 1:
        raise InputError(f"`keep_versions` {settings.keep_versions}: give 1 or more")
    limits = Gate(settings.max_perplexity, settings.max_regression)
    return Release.open(str(settings.serving_dir), settings, limits, settings.version)


def has_text(settings: ExportSettings) -> bool:
    """Whether the perplexity is measured on a text that the settings name."""
    return settings.dataset is not None or bool(settings.file)


def measure_perplexity(
    settings: ExportSettings, model: TFPreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PerplexityResult | None:
    """The perplexity on the settings' text; without one, on Python's documentation if the weights are made smaller.

    What smaller weights cost has to be measured on some text, and the run's need not be available.
    """
    from tfclm.checkpoint import context_size
    from tfclm.savedmodel.publishing.gate import PerplexityResult

    if has_text(settings):
        result = evaluate(model, tokenizer, settings, split=settings.split, files=settings.file)
    elif settings.weights == "float32":
        return None
    else:
        size = settings.block_size_for(context_size(model))
        separator: Literal["eos", "none"] = "eos" if tokenizer.eos_token_id is not None else "none"
        documentation = SourceSettings("python-docs", block_size=size, separator=separator, num_proc=settings.num_proc)
        result = evaluate(model, tokenizer, documentation, split="train[:200]", batch_size=max(1, 512 // size))
    return PerplexityResult(result["perplexity"], result["tokens"], result["protocol"])


def remove_old_versions(settings: ExportSettings, version: int) -> int:
    """Removes all versions except the newest if `keep_versions` is given; returns the exit code."""
    from tfclm.savedmodel.publishing.versions import ServingDirectory

    if settings.keep_versions is None:
        return 0
    try:
        ServingDirectory.at(str(settings.serving_dir)).keep(settings.keep_versions, spare=version)
    except InputError as error:
        left = f"version {version} is published, and older ones are left"
        log(f"tfclm.export: {left}: {error}")
        return 1
    return 0


def main() -> None:
    """The command."""
    command(ExportSettings, run, verb="export", description=__doc__ or "")


if __name__ == "__main__":
    main()

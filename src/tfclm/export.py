"""`python -m tfclm.export`: writes the next version of a servable, or lists and rolls back what is there."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm.corpus.settings import SourceSettings
from tfclm.errors import InputError
from tfclm.savedmodel.settings import ServableSettings
from tfclm.settings import command, say, setting

if TYPE_CHECKING:
    from tfclm.savedmodel.gate import Gate, Measured


# What goes with a model that is exported already.
TAKEN_FROM_HUB = {"from_hub", "revision", "serving_dir", "version", "keep_versions", "max_perplexity", "max_regression"}

# What goes with a text alone.
OF_TEXT = ("dataset_config", "dataset_revision", "text_column", "separator", "split")


@dataclass(frozen=True)
class ExportSettings(ServableSettings, SourceSettings):
    """Settings of `export`."""

    model: str | None = setting(None, "folder or Hub id of the checkpoint")
    revision: str | None = setting(None, "branch, tag or commit of a Hub id")
    serving_dir: str | None = setting(
        None, "folder of the servable, such as serving_models/eli5; versions are below it"
    )
    version: int | None = setting(None, "number of the version; the highest there plus 1 if not given")
    keep_versions: int | None = setting(None, "afterwards remove all but this many of the newest versions")
    max_perplexity: float | None = setting(None, "publish only if the perplexity is at most this")
    max_regression: float | None = setting(
        None, "publish only if the perplexity is at most this part above the served version's; 0.02 is 2 %"
    )
    split: str = setting("test", "split of --dataset that the perplexity is measured on, instead of fit's record")
    file: tuple[str, ...] = setting((), "local files to measure the perplexity on, or globs of them")
    list: bool = setting(False, "print the versions that are there, and do nothing else")
    from_hub: str | None = setting(
        None, "Hub repository whose exported model, as push --push-saved-model left it, becomes the next version here"
    )
    rollback: bool = setting(False, "remove the newest version, so that a server goes back to the one before")


def run(settings: ExportSettings) -> int:
    """Checkpoint to version."""
    if not settings.serving_dir:
        raise InputError("--serving-dir is missing: give the servable's folder, such as serving_models/eli5")
    if settings.list:
        return show(settings.serving_dir)
    if settings.rollback:
        from tfclm.savedmodel.publish import rollback

        gone, served = rollback(settings.serving_dir)
        print(f"version {gone} removed, {served} is the newest")
        return 0
    if settings.from_hub is not None:
        return bring(settings)
    if settings.model is None:
        raise InputError("--model is missing: give the folder or Hub id of a checkpoint")
    limits = preflight(settings)

    from tfclm.checkpoint import load
    from tfclm.savedmodel import export_saved_model
    from tfclm.savedmodel.canary import CanaryFailed
    from tfclm.savedmodel.gate import GateFailed, decide, served_record

    model, tokenizer = load(settings.model, revision=settings.revision)
    known = None
    if settings.dataset is None and not settings.file:
        known = recorded(settings.model, settings.revision)
        # What the gate cannot decide by the records is known now.
        decide(limits, known, served_record(settings.serving_dir, limits))
        if known is not None and known.finite is None:
            say(f"{settings.model}/results.json: the run diverged, so that there is no perplexity to record")
    try:
        exported = export_saved_model(
            model,
            tokenizer,
            settings.serving_dir,
            settings,
            version=settings.version,
            recorded=known,
            measure=lambda model: measured(model, tokenizer, settings),
            limits=limits,
            source={"checkpoint": settings.model, "revision": settings.revision},
            say=say,
        )
    except (GateFailed, CanaryFailed) as error:
        say(f"tfclm.export: {error}")
        return 1
    return published(settings, exported.version)


def published(settings: ExportSettings, version: int) -> int:
    """Names the new version, and removes old ones if that is asked for; the exit code."""
    from tfclm.savedmodel.publish import keep

    where = str(settings.serving_dir)
    print(f"{where.rstrip('/')}/{version}")
    if settings.keep_versions is not None:
        try:
            keep(where, settings.keep_versions, spare=version)
        except InputError as error:
            left = f"version {version} is published, and older ones are left"
            print(f"tfclm.export: {left}: {error}", file=sys.stderr)
            return 1
    return 0


def bring(settings: ExportSettings) -> int:
    """Publishes the exported model that a Hub repository holds, if gate and canary let it; the exit code."""
    from tfclm.hub import fetch_servable
    from tfclm.savedmodel.canary import CanaryFailed
    from tfclm.savedmodel.exporting import publish_exported
    from tfclm.savedmodel.gate import GateFailed

    # Of what decides how a model is made or measured, nothing can be heeded any more.
    for field in dataclasses.fields(ExportSettings):
        if field.name not in TAKEN_FROM_HUB and getattr(settings, field.name) != field.default:
            flag = field.name.replace("_", "-")
            raise InputError(f"--from-hub brings a model that is exported already: leave out --{flag}")
    limits = preflight(settings)
    (version,) = fetch_servable(str(settings.from_hub), revision=settings.revision).iterdir()
    source = {"hub": settings.from_hub, "hub_revision": settings.revision}
    try:
        exported = publish_exported(
            version, str(settings.serving_dir), version=settings.version, limits=limits, source=source, say=say
        )
    except (GateFailed, CanaryFailed) as error:
        say(f"tfclm.export: {error}")
        return 1
    return published(settings, exported.version)


def preflight(settings: ExportSettings) -> Gate:
    """Refuses what can be refused before a model is loaded or trained; the limits of the gate.

    Raises:
        InputError: a setting out of its range, a version that is taken, a serving directory that cannot be written, or
            one whose newest version has nothing to compare with.
    """
    from tfclm.savedmodel.gate import Gate, check_comparable, served_record
    from tfclm.savedmodel.publish import check_place

    settings.check()
    if settings.dataset is None and not settings.file and settings.from_hub is None:
        for name in OF_TEXT:
            if getattr(settings, name) != getattr(ExportSettings, name):
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} goes with --dataset or --file, to measure the perplexity on: give one")
    if settings.keep_versions is not None and settings.keep_versions < 1:
        raise InputError(f"--keep-versions {settings.keep_versions}: give 1 or more")
    limits = Gate(settings.max_perplexity, settings.max_regression)
    limits.check()
    check_place(str(settings.serving_dir), settings.version)
    check_comparable(limits, served_record(str(settings.serving_dir), limits))
    return limits


def measured(model: Any, tokenizer: Any, settings: ExportSettings) -> Measured | None:
    """The perplexity on the settings' text; without one, on Python's documentation, where smaller weights need one.

    What these cost has to be measured on some text, and none of the run's need be here.
    """
    from tfclm.checkpoint import context_size
    from tfclm.evaluate import EvaluateSettings, measure
    from tfclm.savedmodel.gate import Measured

    source = {field.name: getattr(settings, field.name) for field in dataclasses.fields(SourceSettings)}
    if settings.dataset is None and not settings.file:
        if settings.weights == "float32":
            return None
        size = min(settings.block_size, context_size(model) or settings.block_size)
        result = measure(
            model,
            tokenizer,
            EvaluateSettings(
                dataset="python-docs",
                split="train[:200]",
                block_size=size,
                separator="eos" if tokenizer.eos_token_id is not None else "none",
                num_proc=settings.num_proc,
                batch_size=max(1, 512 // size),
            ),
        )
    else:
        result = measure(model, tokenizer, EvaluateSettings(**source, split=settings.split, file=settings.file))
    return Measured(result["perplexity"], result["tokens"], result["protocol"])


def recorded(model: str, revision: str | None) -> Measured | None:
    """The perplexity that `fit` wrote beside a checkpoint, if it did; not finite if the run diverged."""
    from tfclm.checkpoint.files import locate
    from tfclm.savedmodel.gate import Measured

    path = locate(model, revision) / "results.json"
    if not path.is_file():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        perplexity = float("nan") if results["perplexity"] is None else float(results["perplexity"])
        return Measured(perplexity, int(results["tokens"]), dict(results["protocol"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        if not Path(model).expanduser().is_dir():
            return None  # on the Hub, a file of that name may be anybody's
        raise InputError(f"{path} is no record of tfclm.fit: move it away, or train again") from error


def show(serving_dir: str) -> int:
    """Prints a line a version; the exit code."""
    import tensorflow as tf

    from tfclm.savedmodel.gate import read_record
    from tfclm.savedmodel.publish import address, explain_incomplete, folders, incomplete

    where = address(serving_dir)
    there = folders(where)
    if not there and not tf.io.gfile.isdir(where):
        raise InputError(f"--serving-dir {serving_dir}: there is no such folder")
    code = 0
    for number, names in there.items():
        try:
            entries = read_record(f"{where}/{names[-1]}")
        except InputError as error:
            say(f"tfclm.export: {error}")
            print(f"{number}\tits record is damaged\tof unknown source")
            code = 2
            continue
        perplexity = entries.get("perplexity")
        shown = f"perplexity {perplexity:.4f}" if perplexity is not None else "no perplexity recorded"
        print(f"{number}\t{shown}\t{(entries.get('source') or {}).get('checkpoint', 'of unknown source')}")
    for number in incomplete(where):
        say(f"tfclm.export: {explain_incomplete(where, number)}")
    return code


def main() -> None:
    """The command."""
    command(ExportSettings, run, verb="export", description=__doc__ or "")


if __name__ == "__main__":
    main()

"""`python -m tfclm.export`: writes the next version of a servable, or lists and rolls back what is there."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm.cli.command import command
from tfclm.corpus.settings import SourceSettings
from tfclm.errors import InputError
from tfclm.savedmodel.settings import ServableSettings
from tfclm.settings import setting
from tfclm.terminal import log, print_result

if TYPE_CHECKING:
    from tfclm.savedmodel.publishing.gate import Gate, PerplexityResult


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


def run(settings: ExportSettings, texts: Callable[[], Iterable[str]] | None = None) -> int:
    """Checkpoint to version.

    Args:
        settings: the command's.
        texts: documents on which the version served now is measured too, beside a perplexity that is recorded; those
            of `--dataset` or `--file` where these are given.
    """
    if not settings.serving_dir:
        raise InputError("--serving-dir is missing: give the servable's folder, such as serving_models/eli5")
    if settings.list:
        return show(settings.serving_dir)
    if settings.rollback:
        from tfclm.savedmodel.publishing.versions import rollback

        gone, served = rollback(settings.serving_dir)
        print_result(f"version {gone} removed, {served} is the newest")
        return 0
    if settings.from_hub is not None:
        return bring(settings)
    if settings.model is None:
        raise InputError("--model is missing: give the folder or Hub id of a checkpoint")
    text_is_given = settings.dataset is not None or bool(settings.file)
    if text_is_given:
        texts = functools.partial(documents, settings)
    limits = preflight(settings, compares=texts is not None)

    from tfclm.checkpoint import load
    from tfclm.savedmodel import export_saved_model
    from tfclm.savedmodel.publishing.canary import CanaryFailed
    from tfclm.savedmodel.publishing.gate import GateFailed, decide, served_record

    model, tokenizer = load(settings.model, revision=settings.revision)
    known = None
    if not text_is_given:
        known = recorded(settings.model, settings.revision)
        if texts is None:
            # What the gate cannot decide by the records is known now.
            decide(limits, known, served_record(settings.serving_dir, limits))
        if known is not None and known.finite is None:
            log(f"{settings.model}/results.json: the run diverged, so that there is no perplexity to record")
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
            texts=texts,
            source={"checkpoint": settings.model, "revision": settings.revision},
            log=log,
        )
    except (GateFailed, CanaryFailed) as error:
        log(f"tfclm.export: {error}")
        return 1
    return published(settings, exported.version)


def published(settings: ExportSettings, version: int) -> int:
    """Names the new version, and removes old ones if that is asked for; the exit code."""
    from tfclm.savedmodel.publishing.versions import keep

    where = str(settings.serving_dir)
    print_result(f"{where.rstrip('/')}/{version}")
    if settings.keep_versions is not None:
        try:
            keep(where, settings.keep_versions, spare=version)
        except InputError as error:
            left = f"version {version} is published, and older ones are left"
            log(f"tfclm.export: {left}: {error}")
            return 1
    return 0


def bring(settings: ExportSettings) -> int:
    """Publishes the exported model that a Hub repository holds, if gate and canary let it; the exit code."""
    from tfclm.hub import fetch_servable
    from tfclm.savedmodel.exporting import publish_exported
    from tfclm.savedmodel.publishing.canary import CanaryFailed
    from tfclm.savedmodel.publishing.gate import GateFailed

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
            version, str(settings.serving_dir), version=settings.version, limits=limits, source=source, log=log
        )
    except (GateFailed, CanaryFailed) as error:
        log(f"tfclm.export: {error}")
        return 1
    return published(settings, exported.version)


def documents(settings: SourceSettings, split: str = "", files: Sequence[str] = ()) -> Iterable[str]:
    """The documents that settings name; `split` and `files` where these are not those of an export."""
    from tfclm import corpus

    found = corpus.read_split(
        dataset=None if files else settings.dataset,
        dataset_config=None if files else settings.dataset_config,
        revision=None if files else settings.dataset_revision,
        split=split or getattr(settings, "split", ""),
        files=files or getattr(settings, "file", ()),
        text_column=settings.text_column,
    )
    texts: Iterable[str] = found.texts["text"]
    return texts


def preflight(settings: ExportSettings, *, compares: bool = False) -> Gate:
    """Refuses what can be refused before a model is loaded or trained; the limits of the gate.

    Args:
        settings: the command's.
        compares: there is a text on which the version served now can be measured.

    Raises:
        InputError: a setting out of its range, a version that is taken, a serving directory that cannot be written, or
            one whose newest version has nothing to compare with.
    """
    from tfclm.savedmodel.publishing.gate import Gate, can_be_measured, check_comparable, served_record
    from tfclm.savedmodel.publishing.versions import check_place

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
    served = served_record(str(settings.serving_dir), limits)
    if not (compares and can_be_measured(served)):
        check_comparable(limits, served)
    return limits


def measured(model: Any, tokenizer: Any, settings: ExportSettings) -> PerplexityResult | None:
    """The perplexity on the settings' text; without one, on Python's documentation, where smaller weights need one.

    What these cost has to be measured on some text, and none of the run's need be here.
    """
    from tfclm.checkpoint import context_size
    from tfclm.evaluate import EvaluateSettings, measure
    from tfclm.savedmodel.publishing.gate import PerplexityResult

    source = {field.name: getattr(settings, field.name) for field in dataclasses.fields(SourceSettings)}
    if settings.dataset is None and not settings.file:
        if settings.weights == "float32":
            return None
        size = settings.block_size_for(context_size(model))
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
    return PerplexityResult(result["perplexity"], result["tokens"], result["protocol"])


def recorded(model: str, revision: str | None) -> PerplexityResult | None:
    """The perplexity that `fit` wrote beside a checkpoint, if it did; not finite if the run diverged."""
    from tfclm.checkpoint.locating import locate
    from tfclm.savedmodel.publishing.gate import PerplexityResult

    path = locate(model, revision) / "results.json"
    if not path.is_file():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        perplexity = float("nan") if results["perplexity"] is None else float(results["perplexity"])
        return PerplexityResult(perplexity, int(results["tokens"]), dict(results["protocol"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        if not Path(model).expanduser().is_dir():
            return None  # on the Hub, a file of that name may be anybody's
        raise InputError(f"{path} is no record of tfclm.fit: move it away, or train again") from error


def show(serving_dir: str) -> int:
    """Prints a table of the versions, and of what was not published; the exit code."""
    import tensorflow as tf

    from tfclm.savedmodel.publishing.gate import read_record, verdicts
    from tfclm.savedmodel.publishing.versions import address, explain_incomplete, folders, incomplete

    where = address(serving_dir)
    there = folders(where)
    if not there and not tf.io.gfile.isdir(where):
        raise InputError(f"--serving-dir {serving_dir}: there is no such folder")
    code = 0
    rows = [("version", "exported", "perplexity", "tokens", "source")]
    for number, names in there.items():
        version = f"{where}/{names[-1]}"
        try:
            entries = read_record(version)
        except InputError as error:
            log(f"tfclm.export: {error}")
            rows.append((str(number), _written(version), "damaged record", "-", "unknown"))
            code = 2
            continue
        when = _date(entries.get("time")) or _written(version)
        tokens = "-" if entries.get("tokens") is None else str(entries["tokens"])
        rows.append((str(number), when, _figure(entries.get("perplexity")), tokens, _source(entries)))
    for line in _aligned(rows):
        print_result(line)
    refused = [verdict for verdict in verdicts(where) if verdict.get("passed") is False]
    if refused:
        print_result("\nnot published:")
        lines = [("checked", "perplexity", "source", "reason")]
        for verdict in refused:
            # What both versions were measured on, if they were.
            measured = verdict.get("compared") if isinstance(verdict.get("compared"), dict) else verdict
            figure = _figure((measured or {}).get("perplexity"))
            lines.append((_date(verdict.get("time")) or "-", figure, _source(verdict), str(verdict.get("reason", "-"))))
        for line in _aligned(lines):
            print_result(line)
    for number in incomplete(where):
        log(f"tfclm.export: {explain_incomplete(where, number)}")
    return code


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """A table's lines, with two blanks or more between the columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _figure(perplexity: Any) -> str:
    return f"{perplexity:.4f}" if isinstance(perplexity, int | float) else "-"


def _source(entries: Mapping[str, Any]) -> str:
    source = entries.get("source")
    named = source if isinstance(source, dict) else {}
    return str(named.get("hub") or named.get("checkpoint") or "unknown")


def _date(recorded: Any) -> str | None:
    """A recorded time to the minute, in UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.strptime(recorded, "%Y-%m-%dT%H:%M:%SZ"))
    except (TypeError, ValueError):
        return None


def _written(version: str) -> str:
    """When the graph was written, for a record that does not say when it was exported."""
    import tensorflow as tf

    try:
        seconds = tf.io.gfile.stat(f"{version}/saved_model.pb").mtime_nsec / 1e9
    except tf.errors.OpError:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def main() -> None:
    """The command."""
    command(ExportSettings, run, verb="export", description=__doc__ or "")


if __name__ == "__main__":
    main()

"""What `export --list` prints: the versions of a model directory, and the models that were not published."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tfclm.errors import InputError
from tfclm.terminal import log, print_result

DAMAGED = "damaged record"


def print_versions(serving_dir: str) -> int:
    """Prints a table of the versions, and of the models that were not published; returns the exit code."""
    import tensorflow as tf

    from tfclm.savedmodel.publishing.gate import verdicts
    from tfclm.savedmodel.publishing.versions import ServingDirectory, explain_incomplete

    directory = ServingDirectory.at(serving_dir)
    versions = {number: f"{directory}/{names[-1]}" for number, names in directory.folders().items()}
    if not versions and not tf.io.gfile.isdir(directory.address):
        raise InputError(f"`serving_dir` {serving_dir}: there is no such directory")
    rows = [_version_row(number, version) for number, version in versions.items()]
    _print_table(("version", "exported", "perplexity", "tokens", "source"), rows)
    refused = [verdict for verdict in verdicts(directory) if verdict.get("passed") is False]
    if refused:
        print_result("\nnot published:")
        _print_table(("checked", "perplexity", "source", "reason"), map(_verdict_row, refused))
    for number in directory.incomplete():
        log(f"tfclm.export: {explain_incomplete(directory.address, number)}")
    return 2 if any(DAMAGED in row for row in rows) else 0


def _version_row(number: int, version: str) -> tuple[str, ...]:
    from tfclm.savedmodel.publishing.gate import read_record

    try:
        record = read_record(version)
    except InputError as error:
        log(f"tfclm.export: {error}")
        return (str(number), _written(version), DAMAGED, "-", "unknown")
    when = _date(record.get("time")) or _written(version)
    tokens = "-" if record.get("tokens") is None else str(record["tokens"])
    return (str(number), when, _figure(record.get("perplexity")), tokens, _source(record))


def _verdict_row(verdict: Mapping[str, Any]) -> tuple[str, ...]:
    # Of the text that both versions were scored on, if they were.
    compared = verdict.get("compared")
    measured = compared if isinstance(compared, dict) else verdict
    when, figure = _date(verdict.get("time")) or "-", _figure(measured.get("perplexity"))
    return (when, figure, _source(verdict), str(verdict.get("reason", "-")))


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    for line in _aligned([header, *rows]):
        print_result(line)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """The lines of a table, with at least two spaces between columns."""
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
    """When the graph was written, where the record has no time."""
    import tensorflow as tf

    try:
        seconds = tf.io.gfile.stat(f"{version}/saved_model.pb").mtime_nsec / 1e9
    except tf.errors.OpError:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))

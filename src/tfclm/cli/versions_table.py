"""What `export --list` prints: the versions of a model directory, and the models that were not published."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tfclm.errors import InputError
from tfclm.terminal import log, print_result


def print_versions(serving_dir: str) -> int:
    """Prints a table of the versions, and of the models that were not published; the exit code."""
    import tensorflow as tf

    from tfclm.savedmodel.publishing.gate import read_record, verdicts
    from tfclm.savedmodel.publishing.versions import address, explain_incomplete, folders, incomplete

    where = address(serving_dir)
    there = folders(where)
    if not there and not tf.io.gfile.isdir(where):
        raise InputError(f"`serving_dir` {serving_dir}: there is no such directory")
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
            # Of the text that both versions were scored on, if they were.
            measured = verdict.get("compared") if isinstance(verdict.get("compared"), dict) else verdict
            figure = _figure((measured or {}).get("perplexity"))
            lines.append((_date(verdict.get("time")) or "-", figure, _source(verdict), str(verdict.get("reason", "-"))))
        for line in _aligned(lines):
            print_result(line)
    for number in incomplete(where):
        log(f"tfclm.export: {explain_incomplete(where, number)}")
    return code


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

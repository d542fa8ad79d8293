"""The gate: decides by a model's perplexity whether it is published, as TFX's Evaluator does; records verdicts."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from tfclm.errors import InputError, first_line
from tfclm.savedmodel import saving
from tfclm.savedmodel.publishing.versions import ServingDirectory

if TYPE_CHECKING:
    from tfclm.savedmodel.publishing.comparison import Comparison

__all__ = [
    "REMEDY",
    "Gate",
    "GateFailed",
    "PerplexityResult",
    "QuantizationLoss",
    "can_be_measured",
    "check_comparable",
    "decide",
    "decide_by_text",
    "read_record",
    "record_verdict",
    "served_record",
    "verdicts",
]

# What to do if two records cannot be compared.
REMEDY = "give `dataset` or `file`, on which both are measured then, or leave it out once"
VERDICTS = ".verdicts"  # servers ignore it: its name is not a number
DIVERGED = "the model has diverged and has no perplexity: train it again"


class GateFailed(RuntimeError):
    """The model's perplexity is too high; nothing was published."""


@dataclass(frozen=True)
class Gate:
    """The limits that a model's perplexity must meet; None is no limit."""

    max_perplexity: float | None = None
    max_regression: float | None = None  # 0.02: at most 2 % above the version served now

    def check(self) -> None:
        """Raises InputError for a value out of its range."""
        if self.max_perplexity is not None and not self.max_perplexity >= 1:
            raise InputError(f"`max_perplexity` {self.max_perplexity}: give 1 or more")
        if self.max_regression is not None and not self.max_regression > -1:
            raise InputError(f"`max_regression` {self.max_regression}: give a fraction, such as 0.02 for 2 %")


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity, not finite if the model has diverged, and how it was measured."""

    perplexity: float
    tokens: int | None  # None if a record does not hold it
    protocol: Mapping[str, Any]

    @property
    def finite(self) -> float | None:
        """The perplexity, or None if it is not finite: JSON has no NaN."""
        return self.perplexity if math.isfinite(self.perplexity) else None


@dataclass(frozen=True)
class QuantizationLoss:
    """The loss by a smaller type of the weights: the perplexities of both on one text."""

    float32: PerplexityResult
    smaller: PerplexityResult

    def applied(self, exact: PerplexityResult) -> PerplexityResult:
        """Scales a perplexity of the float32 weights on another text by the ratio measured here."""
        ratio = self.smaller.perplexity / self.float32.perplexity
        return replace(exact, perplexity=exact.perplexity * ratio)

    def record(self) -> dict[str, Any]:
        """The entries of a version's record."""
        return {
            "float32_perplexity": self.float32.finite,
            "perplexity": self.smaller.finite,
            "tokens": self.smaller.tokens,
            "protocol": dict(self.smaller.protocol),
        }


def decide(gate: Gate, measured: PerplexityResult | None, served: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict on a model.

    Args:
        gate: the limits.
        measured: the model's perplexity; None if it was not measured.
        served: the record of the version served now, empty if there is none.

    Returns:
        `passed`, what was compared, and the `reason` if it did not pass.

    Raises:
        InputError: the limits cannot be applied: nothing was measured, or the served version was measured differently.

    Example:
        >>> decide(Gate(max_perplexity=20.0), PerplexityResult(25.0, 1000, {}), {})["reason"]
        'perplexity 25.0000 is above 20.0'
    """
    asked = {"max_perplexity": gate.max_perplexity, "max_regression": gate.max_regression}
    if asked == dict.fromkeys(asked):
        return {"passed": True, **asked}
    if measured is None:
        raise InputError(
            "the gate needs a perplexity, and the checkpoint has no results.json: give `dataset` or `file` to measure "
            "it on"
        )
    verdict: dict[str, Any] = {"passed": True, **asked, "perplexity": measured.finite}
    if measured.finite is None:
        return verdict | {"passed": False, "reason": DIVERGED}
    if gate.max_perplexity is not None and not measured.perplexity <= gate.max_perplexity:
        verdict |= {"passed": False, "reason": f"perplexity {measured.perplexity:.4f} is above {gate.max_perplexity}"}
    if gate.max_regression is not None and served:
        check_comparable(gate, served, measured.protocol, measured.tokens)
        before = served["perplexity"]
        verdict |= {"served_perplexity": before}
        reason = _regression(gate.max_regression, measured.perplexity, before)
        if reason is not None:
            verdict |= {"passed": False, "reason": reason}
    return verdict


def decide_by_text(gate: Gate, verdict: Mapping[str, Any], compared: Comparison) -> dict[str, Any]:
    """The verdict on a model that was scored on the same text as the served version.

    Args:
        gate: the limits; `max_regression` is applied.
        verdict: that by the other limits.
        compared: both perplexities.

    Raises:
        InputError: the served version has no finite perplexity on this text.
    """
    assert gate.max_regression is not None
    if not math.isfinite(compared.served):
        raise InputError(
            "`max_regression`: the version served now has no finite perplexity on this text; leave it out once"
        )
    made = {**verdict, "max_regression": gate.max_regression, "compared": compared.record()}
    if not math.isfinite(compared.perplexity):
        return made | {"passed": False, "reason": DIVERGED}
    reason = _regression(gate.max_regression, compared.perplexity, compared.served, on="on the same text")
    return made if reason is None else made | {"passed": False, "reason": reason}


def _regression(limit: float, perplexity: float, served: float, on: str = "") -> str | None:
    """Why a perplexity is too far above that of the served version; None if it is not."""
    most = served * (1 + limit)
    if perplexity <= most:
        return None
    allowed = f"{served:.4f} {on}".rstrip()
    return f"perplexity {perplexity:.4f} is above {most:.4f}, the most that the served version's {allowed} allows"


def can_be_measured(served: Mapping[str, Any]) -> bool:
    """Whether there is a served version that can score a text; one without a list of signatures in its record may."""
    return bool(served) and "score" in (served.get("signatures") or ["score"])


def check_comparable(
    gate: Gate, served: Mapping[str, Any], protocol: Mapping[str, Any] | None = None, tokens: int | None = None
) -> None:
    """Refuses to compare with a served version that was not measured in the same way.

    Args:
        gate: the limits; without `max_regression`, nothing is compared.
        served: the record of the version served now, empty if there is none.
        protocol: how the new perplexity is measured, if that is known already.
        tokens: the number of tokens that it is measured on, if that is known already.

    Raises:
        InputError: the served version has no perplexity, or was measured differently.
    """
    if gate.max_regression is None or not served:
        return
    if served.get("perplexity") is None:
        raise InputError(f"`max_regression`: the version served now has no perplexity in its record: {REMEDY}")
    if protocol is None:
        return
    # The served record was read from JSON, which has no tuples.
    ours = _measured_text(json.loads(json.dumps(dict(protocol))))
    theirs = _measured_text(served.get("protocol") or {})
    # Another tokenizer makes other tokens of the same text.
    if tokens is not None and served.get("tokens") is not None:
        ours, theirs = ours | {"tokens": tokens}, theirs | {"tokens": served["tokens"]}
    if ours != theirs:
        names = sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        raise InputError(
            f"`max_regression`: the version served now was measured differently ({', '.join(names)} differ): {REMEDY}"
        )


def _measured_text(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a protocol about the text that was measured; `fit` also records the training text."""
    # The same split, whether it was asked for or chosen by default.
    validation = str(protocol.get("validation", "")).removesuffix(" (the dataset's own)")
    if not validation or "drawn with seed" in validation:
        training = {"train_dropped_tokens"}
    else:
        training = {"train_dropped_tokens", "split", "train_rows", "dropped_rows"}
        if validation.startswith("files "):
            training |= {"source", "dataset_config", "revision"}
    return {name: value for name, value in protocol.items() if name not in training} | {"validation": validation}


def served_record(serving_dir: str | os.PathLike[str] | ServingDirectory, gate: Gate) -> dict[str, Any]:
    """The record of the newest version, with a perplexity of None if it holds none.

    Empty if there is no version, and without `max_regression`: a damaged record must not stop an export that does not
    need it.

    Raises:
        InputError: the record is damaged.
    """
    version = ServingDirectory.at(serving_dir).served() if gate.max_regression is not None else None
    return {"perplexity": None, **read_record(version)} if version is not None else {}


def read_record(version: str) -> dict[str, Any]:
    """The record in a version's directory or address; empty if another exporter wrote none.

    Raises:
        InputError: the record is damaged; the message names the file.
    """
    try:
        entries: Any = saving.read_record(version)
        if not isinstance(entries, dict):
            raise ValueError("not a JSON object")
        fields: dict[str, type | tuple[type, ...]] = {"perplexity": (int, float), "tokens": int}
        for name, kinds in {**fields, "protocol": dict, "source": dict, "settings": dict}.items():
            if not isinstance(entries.get(name), kinds) and entries.get(name) is not None:
                raise ValueError(f"{name} is {entries[name]!r}")
    except (ValueError, tf.errors.OpError) as error:
        path = f"{version.rstrip('/')}/{saving.RECORD}"
        raise InputError(f"{path} is damaged: {first_line(error)}; repair or remove it") from error
    return entries


def record_verdict(serving_dir: str | os.PathLike[str] | ServingDirectory, verdict: Mapping[str, Any]) -> str:
    """Writes a verdict to `.verdicts` in the model directory; returns the path of the file.

    Raises:
        InputError: it cannot be written there.
    """
    where = ServingDirectory.at(serving_dir).address
    folder = f"{where}/{VERDICTS}"
    path = f"{folder}/{time.time_ns()}.json"
    text = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **verdict}, indent=2) + "\n"
    try:
        tf.io.gfile.makedirs(folder)
        with tf.io.gfile.GFile(path, "w") as file:
            file.write(text)
    except tf.errors.OpError as error:
        raise InputError(f"`serving_dir` {where}: the verdict cannot be written: {error.message}") from error
    return path


def verdicts(serving_dir: str | os.PathLike[str] | ServingDirectory) -> list[dict[str, Any]]:
    """The verdicts recorded in a model directory, oldest first; unreadable files are left out."""
    folder = f"{ServingDirectory.at(serving_dir).address}/{VERDICTS}"
    found = []
    with contextlib.suppress(tf.errors.OpError):
        for name in sorted(tf.io.gfile.listdir(folder)):
            with contextlib.suppress(ValueError, tf.errors.OpError), tf.io.gfile.GFile(f"{folder}/{name}") as file:
                verdict = json.loads(file.read())
                if isinstance(verdict, dict):
                    found.append(verdict)
    return found

"""The gate: whether a model's perplexity lets it be published, as TFX's Evaluator decides, with the verdict kept."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from tfclm.errors import InputError, first_line
from tfclm.savedmodel import saving
from tfclm.savedmodel.publishing.versions import address, folders

if TYPE_CHECKING:
    from tfclm.savedmodel.publishing.comparison import Compared

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
    "served_version",
    "verdicts",
]

# What is said where two records cannot be compared.
REMEDY = "give `dataset` or `file`, on which both are measured then, or leave it out once"
VERDICTS = ".verdicts"  # hidden from servers, which take folders with a number for a name


class GateFailed(RuntimeError):
    """The model's perplexity is too high; nothing was published."""


@dataclass(frozen=True)
class Gate:
    """What a model must meet; None is not asked for."""

    max_perplexity: float | None = None
    max_regression: float | None = None  # 0.02: at most 2 % above the version that is served now

    def check(self) -> None:
        """Raises InputError for a value out of its range, naming the flag."""
        if self.max_perplexity is not None and not self.max_perplexity >= 1:
            raise InputError(f"--max-perplexity {self.max_perplexity}: give 1 or more")
        if self.max_regression is not None and not self.max_regression > -1:
            raise InputError(f"--max-regression {self.max_regression}: give a part, such as 0.02 for 2 %")


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity, which is not finite if the model has diverged, and how it was measured."""

    perplexity: float
    tokens: int | None  # None where an old record does not say
    protocol: Mapping[str, Any]

    @property
    def finite(self) -> float | None:
        """The perplexity as a record holds it."""
        return self.perplexity if math.isfinite(self.perplexity) else None


@dataclass(frozen=True)
class QuantizationLoss:
    """What a smaller type of the weights costs: two perplexities on one text."""

    float32: PerplexityResult
    smaller: PerplexityResult

    def applied(self, exact: PerplexityResult) -> PerplexityResult:
        """A perplexity of the float32 weights on another text as that of the smaller ones, in the same ratio."""
        ratio = self.smaller.perplexity / self.float32.perplexity
        return replace(exact, perplexity=exact.perplexity * ratio)

    def record(self) -> dict[str, Any]:
        """As a version's record holds it."""
        return {
            "float32_perplexity": self.float32.finite,
            "perplexity": self.smaller.finite,
            "tokens": self.smaller.tokens,
            "protocol": dict(self.smaller.protocol),
        }


def decide(gate: Gate, measured: PerplexityResult | None, served: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict on a model, given the record of the version that is served, empty if there is none.

    Returns:
        `passed`, and what was compared.

    Raises:
        InputError: what is asked for cannot be compared, because nothing was measured, or not in the same way.
    """
    asked = {"max_perplexity": gate.max_perplexity, "max_regression": gate.max_regression}
    if asked == dict.fromkeys(asked):
        return {"passed": True, **asked}
    if measured is None:
        raise InputError(
            "the gate needs a perplexity, and the checkpoint has no results.json: give --dataset or --file to measure"
        )
    verdict: dict[str, Any] = {"passed": True, **asked, "perplexity": measured.finite}
    if measured.finite is None:
        return verdict | {"passed": False, "reason": "the model has diverged and has no perplexity: train it again"}
    if gate.max_perplexity is not None and not measured.perplexity <= gate.max_perplexity:
        verdict |= {"passed": False, "reason": f"perplexity {measured.perplexity:.4f} is above {gate.max_perplexity}"}
    if gate.max_regression is not None and served:
        check_comparable(gate, served, measured.protocol, measured.tokens)
        before = served["perplexity"]
        most = before * (1 + gate.max_regression)
        verdict |= {"served_perplexity": before}
        if not measured.perplexity <= most:
            reason = f"perplexity {measured.perplexity:.4f} is above {most:.4f}"
            verdict |= {"passed": False, "reason": f"{reason}, which the served version's {before:.4f} allows"}
    return verdict


def decide_by_text(gate: Gate, verdict: Mapping[str, Any], compared: Compared) -> dict[str, Any]:
    """The verdict on a model whose regression is decided by one text, on which the served version was measured too.

    Args:
        gate: what is asked for.
        verdict: that on everything else.
        compared: both perplexities.

    Raises:
        InputError: the served version has no finite perplexity on this text.
    """
    assert gate.max_regression is not None
    if not math.isfinite(compared.served):
        raise InputError(
            "--max-regression: the version served now has no finite perplexity on this text; leave it out once"
        )
    made = {**verdict, "max_regression": gate.max_regression, "compared": compared.record()}
    most = compared.served * (1 + gate.max_regression)
    if not math.isfinite(compared.perplexity):
        made |= {"passed": False, "reason": "the model has diverged and has no perplexity: train it again"}
    elif not compared.perplexity <= most:
        reason = f"perplexity {compared.perplexity:.4f} is above {most:.4f}"
        allows = f"which the served version's {compared.served:.4f} on the same text allows"
        made |= {"passed": False, "reason": f"{reason}, {allows}"}
    return made


def can_be_measured(served: Mapping[str, Any]) -> bool:
    """Whether there is a served version that can score a text, going by its record; one that does not say may."""
    return bool(served) and "score" in (served.get("signatures") or ["score"])


def served_version(serving_dir: str) -> str | None:
    """The folder or address of the newest version; None if there is none."""
    there = list(folders(serving_dir).values())
    return f"{address(serving_dir)}/{there[-1][-1]}" if there else None


def check_comparable(
    gate: Gate, served: Mapping[str, Any], protocol: Mapping[str, Any] | None = None, tokens: int | None = None
) -> None:
    """Refuses a comparison with the served version that says nothing.

    Args:
        gate: what is asked for.
        served: the record of the version that is served, empty if there is none.
        protocol: how the new perplexity is measured, if that is known already.
        tokens: of how many tokens it is, if that is known already.

    Raises:
        InputError: the served version has no perplexity, or was measured in another way.
    """
    if gate.max_regression is None or not served:
        return
    if served.get("perplexity") is None:
        raise InputError(f"--max-regression: the version served now has no perplexity in its record: {REMEDY}")
    if protocol is None:
        return
    # A record has been through JSON.
    ours, theirs = (
        _measured_text(each) for each in (json.loads(json.dumps(dict(protocol))), served.get("protocol") or {})
    )
    # The same text has other tokens where the tokenizer is another one.
    if tokens is not None and served.get("tokens") is not None:
        ours, theirs = ours | {"tokens": tokens}, theirs | {"tokens": served["tokens"]}
    if ours != theirs:
        names = sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        raise InputError(
            f"--max-regression: the version served now was measured otherwise ({', '.join(names)} differ): {REMEDY}"
        )


def _measured_text(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What a protocol says of the text that was measured; that of `fit` also tells what was trained on."""
    # A split is the same one whether it was asked for or taken.
    validation = str(protocol.get("validation", "")).removesuffix(" (the dataset's own)")
    if not validation or "drawn with seed" in validation:
        training = {"train_dropped_tokens"}
    else:
        training = {"train_dropped_tokens", "split", "train_rows", "dropped_rows"}
        if validation.startswith("files "):
            training |= {"source", "dataset_config", "revision"}
    return {name: value for name, value in protocol.items() if name not in training} | {"validation": validation}


def served_record(serving_dir: str, gate: Gate) -> dict[str, Any]:
    """What the gate needs of the newest version: its record, with a perplexity of None if it has none.

    Empty if there is no version, and where nothing is asked of it: a damaged record must not keep others out.

    Raises:
        InputError: it is damaged.
    """
    version = served_version(serving_dir) if gate.max_regression is not None else None
    return {"perplexity": None, **read_record(version)} if version is not None else {}


def read_record(version: str) -> dict[str, Any]:
    """The record of a version's folder or address; empty where somebody else's export has none.

    Raises:
        InputError: it is damaged; the message names the file.
    """
    try:
        entries: Any = saving.read_record(version)
        if not isinstance(entries, dict):
            raise ValueError("no JSON object")
        fields: dict[str, type | tuple[type, ...]] = {"perplexity": (int, float), "tokens": int}
        for name, kinds in {**fields, "protocol": dict, "source": dict, "settings": dict}.items():
            if not isinstance(entries.get(name), kinds) and entries.get(name) is not None:
                raise ValueError(f"{name} is {entries[name]!r}")
    except (ValueError, tf.errors.OpError) as error:
        path = f"{version.rstrip('/')}/{saving.RECORD}"
        raise InputError(f"{path} is damaged: {first_line(error)}; mend it, or remove it") from error
    return entries


def record_verdict(serving_dir: str, verdict: Mapping[str, Any]) -> str:
    """Writes a verdict into the serving directory's `.verdicts`; the file's name.

    Raises:
        InputError: it cannot be written there.
    """
    folder = f"{serving_dir.rstrip('/')}/{VERDICTS}"
    path = f"{folder}/{time.time_ns()}.json"
    text = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **verdict}, indent=2) + "\n"
    try:
        tf.io.gfile.makedirs(folder)
        with tf.io.gfile.GFile(path, "w") as file:
            file.write(text)
    except tf.errors.OpError as error:
        raise InputError(f"--serving-dir {serving_dir}: the verdict cannot be written: {error.message}") from error
    return path


def verdicts(serving_dir: str) -> list[dict[str, Any]]:
    """The verdicts that are kept in a serving directory, the oldest first; what cannot be read is left out."""
    folder = f"{address(serving_dir)}/{VERDICTS}"
    found = []
    with contextlib.suppress(tf.errors.OpError):
        for name in sorted(tf.io.gfile.listdir(folder)):
            with contextlib.suppress(ValueError, tf.errors.OpError), tf.io.gfile.GFile(f"{folder}/{name}") as file:
                verdict = json.loads(file.read())
                if isinstance(verdict, dict):
                    found.append(verdict)
    return found

"""The gate: whether a model's perplexity lets it be published, as TFX's Evaluator decides, with the verdict kept."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from tfclm.errors import InputError, first_line
from tfclm.savedmodel import saving
from tfclm.savedmodel.publish import address, folders

__all__ = [
    "Cost",
    "Gate",
    "GateFailed",
    "Measured",
    "check_comparable",
    "decide",
    "read_record",
    "record_verdict",
    "served_record",
]

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
class Measured:
    """A perplexity, which is not finite if the model has diverged, and how it was measured."""

    perplexity: float
    tokens: int | None  # None where an old record does not say
    protocol: Mapping[str, Any]

    @property
    def finite(self) -> float | None:
        """The perplexity as a record holds it."""
        return self.perplexity if math.isfinite(self.perplexity) else None


@dataclass(frozen=True)
class Cost:
    """What a smaller type of the weights costs: two perplexities on one text."""

    float32: Measured
    smaller: Measured

    def applied(self, exact: Measured) -> Measured:
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


def decide(gate: Gate, measured: Measured | None, served: Mapping[str, Any]) -> dict[str, Any]:
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
        raise InputError("--max-regression: the version served now has no perplexity in its record; leave it out once")
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
            f"--max-regression: the version served now was measured otherwise ({', '.join(names)} differ); measure "
            "both on the same text with the same tokenizer, or leave it out once"
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
    there = list(folders(serving_dir).values()) if gate.max_regression is not None else []
    return {"perplexity": None, **read_record(f"{address(serving_dir)}/{there[-1][-1]}")} if there else {}


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

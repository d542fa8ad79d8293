"""From a model to a published version: build, write, gate, canary, publish."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from tfclm.disk import copy_folder
from tfclm.errors import InputError
from tfclm.savedmodel import saving, warmup
from tfclm.savedmodel.graph.signatures import GenerationModule
from tfclm.savedmodel.publishing import canary, comparison, gate
from tfclm.savedmodel.publishing.canary import CanaryFailed
from tfclm.savedmodel.publishing.gate import Gate, GateFailed, PerplexityResult, QuantizationLoss
from tfclm.savedmodel.publishing.versions import address, check_place, publish, staged
from tfclm.savedmodel.settings import ServableSettings
from tfclm.settings import record

__all__ = ["Exported", "export_saved_model", "publish_exported"]


@dataclass(frozen=True)
class Exported:
    """A published version: its number, its folder or address, and its record."""

    version: int
    path: str
    record: dict[str, Any]


def export_saved_model(
    model: Any,
    tokenizer: Any,
    serving_dir: str | os.PathLike[str],
    settings: ServableSettings | None = None,
    *,
    version: int | None = None,
    recorded: PerplexityResult | None = None,
    measure: Callable[[Any], PerplexityResult | None] | None = None,
    limits: Gate | None = None,
    texts: Callable[[], Iterable[str]] | None = None,
    source: Mapping[str, Any] | None = None,
    log: Callable[[str], None] | None = None,
) -> Exported:
    """Writes the next version of a servable that TensorFlow Serving hosts as it is: text in, text out.

    Args:
        model: a TensorFlow causal LM of transformers.
        tokenizer: its fast tokenizer.
        serving_dir: the servable's folder, or an address that TensorFlow knows (gs://, s3://); versions are below it.
        settings: defaults, limits and compilation; `ServableSettings()` if not given.
        version: the version's number; the highest there plus 1 if not given.
        recorded: the model's perplexity, where it is known already.
        measure: gives a model's perplexity on some text, and is asked if none is recorded. It is asked of smaller
            weights too: the gate and the record go by the model's perplexity times what they cost on that text.
        limits: what the perplexity must meet.
        texts: gives the documents that the new version and the one served now are both scored on, where
            `max_regression` is asked for. Without them, and where one of the two has no signature `score`, the served
            version's record is compared with.
        source: where the model came from, for the record.
        log: gets a line of progress now and then.

    Returns:
        What was published.

    Raises:
        InputError: a setting or a tokenizer that cannot be exported exactly, or a directory that cannot be written.
        GateFailed: the perplexity is too high; nothing was published.
        CanaryFailed: the finished version does not do what the model does; nothing was published.
    """
    settings, limits, log = settings or ServableSettings(), limits or Gate(), log or _log_nothing
    measure = measure or _measure_nothing
    settings.check()
    limits.check()
    where = address(serving_dir)
    check_place(where, version)
    served = gate.served_record(where, limits)
    by_text = texts is not None and gate.can_be_measured(served)
    # What is decided before there is a version to score a text with.
    first = replace(limits, max_regression=None) if by_text else limits
    gate.check_comparable(first, served)
    verdicts = _Verdicts(where, dict(source or {}))
    smaller = settings.weights != "float32"
    if recorded is not None:  # what it decides is known before anything is built
        gate.check_comparable(first, served, recorded.protocol, recorded.tokens)
        if not smaller:
            verdicts.require(gate.decide(first, recorded, served))
    began = time.monotonic()
    servable = GenerationModule(model, tokenizer, settings)
    if servable.tokenizer_problem is not None:
        log(f"generate_tokens alone is exported: {servable.tokenizer_problem}")
        by_text, first = False, limits
    network = servable.network
    exact = recorded if recorded is not None else measure(model)
    measured, cost = exact, None
    if smaller:
        cost = _cost(measure(model) if recorded is not None else exact, measure(network.model))
        measured = cost.applied(exact) if cost is not None and exact is not None else None
    verdict = gate.decide(first, measured, served)
    verdicts.require(verdict)
    prompts = canary.make_prompts(network.model, network.vocab_size, network.context, servable.eos_ids, servable.limit)
    samples = canary.make_texts(tokenizer, network.context) if servable.tokenizer_problem is None else []
    with staged(where, log) as folder:
        log("writing the SavedModel")
        saving.write(servable, folder)
        records = warmup.write(servable, folder)
        seconds = time.monotonic() - began
        log(f"verifying it in a separate process ({records} warm-up records)")
        with verdicts.of_canary(verdict):
            checked = canary.validate(folder, prompts, samples, xla=settings.compile == "xla")
            if by_text and texts is not None:
                scored = comparison.pieces(texts(), tokenizer)
                log(f"scoring {len(scored)} texts with this version and with the one served now")
                compared = comparison.compare(str(folder), str(gate.served_version(where)), scored)
                recorded_too = {"perplexity": measured.finite if measured is not None else None}
                verdict = gate.decide_by_text(limits, recorded_too | verdict, compared)
        verdicts.require(verdict)
        entries = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "source": dict(source or {}),
            "model_type": model.config.model_type,
            "perplexity": measured.finite if measured else None,
            "float32_perplexity": exact.finite if exact else None,
            "tokens": measured.tokens if measured else None,
            "protocol": dict(measured.protocol) if measured else None,
            "weights_cost": cost.record() if cost else None,
            "tokenizer": type(tokenizer).__name__ if servable.tokenizer_problem is None else None,
            "signatures": servable.names,
            "settings": {name: value for name, value in record(settings).items() if hasattr(ServableSettings, name)},
            "defaults": vars(servable.defaults),
            "max_new_tokens_limit": servable.limit,
            "max_request_tokens": servable.max_request_tokens,
            "context": network.context,
            "buckets": servable.buckets,
            "gate": verdict,
            "canary": {"prompts": len(prompts), "texts": len(samples), **checked},
            "export_seconds": round(seconds, 1),
            "peak_memory_mib": canary.peak_memory_mib(),
            "saved_model_bytes": (folder / "saved_model.pb").stat().st_size,
            "size_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            "versions": {name: metadata.version(name) for name in ("tfclm", "tensorflow", "tf-keras", "transformers")},
        }
        saving.write_record(folder, entries)
        number = publish(folder, where, version)
    verdicts.published(verdict, number, log)
    return Exported(number, f"{where}/{number}", entries)


def publish_exported(
    exported: Path,
    serving_dir: str | os.PathLike[str],
    *,
    version: int | None = None,
    limits: Gate | None = None,
    source: Mapping[str, Any] | None = None,
    log: Callable[[str], None] | None = None,
) -> Exported:
    """Makes a version that was exported elsewhere the next one here, if its record passes the gate.

    Args:
        exported: the version's folder. There is no Python model to compare it with: the canary replays its warm-up
            records.
        serving_dir: where it goes to, as for `export_saved_model`.
        version: its number here; the highest there plus 1 if not given.
        limits: what the recorded perplexity must meet.
        source: where it came from, for the verdict.
        log: gets a line of progress now and then.

    Raises:
        InputError: a damaged record, one without the perplexity that is asked for, or a directory that cannot be
            written.
        GateFailed: the perplexity is too high; nothing was published.
        CanaryFailed: it cannot be loaded, or a warm-up record fails; nothing was published.
    """
    limits, log = limits or Gate(), log or _log_nothing
    limits.check()
    where = address(serving_dir)
    check_place(where, version)
    entries = gate.read_record(str(exported))
    measured = None
    if entries.get("perplexity") is not None:
        measured = PerplexityResult(entries["perplexity"], entries.get("tokens"), entries.get("protocol") or {})
    elif limits != Gate():
        raise InputError("the gate needs a perplexity, and the exported model's record has none: leave out the limits")
    verdicts = _Verdicts(where, {**(entries.get("source") or {}), **(source or {})})
    verdict = gate.decide(limits, measured, gate.served_record(where, limits))
    verdicts.require(verdict)
    with staged(where, log) as folder:
        copy_folder(exported, folder)
        log("verifying it in a separate process")
        with verdicts.of_canary(verdict):
            canary.validate(folder, xla=(entries.get("settings") or {}).get("compile") == "xla")
        number = publish(folder, where, version)
    verdicts.published(verdict, number, log)
    return Exported(number, f"{where}/{number}", entries)


def _log_nothing(line: str) -> None:
    pass


def _measure_nothing(model: Any) -> PerplexityResult | None:
    return None


def _cost(exact: PerplexityResult | None, smaller: PerplexityResult | None) -> QuantizationLoss | None:
    return QuantizationLoss(exact, smaller) if exact is not None and smaller is not None else None


@dataclass(frozen=True)
class _Verdicts:
    """Those on one model, which are written down whatever they are."""

    where: str
    source: dict[str, Any]

    def require(self, verdict: Mapping[str, Any]) -> None:
        """Goes on if the gate lets the model pass."""
        if not verdict["passed"]:
            raise GateFailed(f"not published: {verdict['reason']} ({self._write(verdict)})")

    @contextmanager
    def of_canary(self, verdict: Mapping[str, Any]) -> Iterator[None]:
        """Goes on if the canary, which is asked inside, lets it pass too."""
        try:
            yield
        except CanaryFailed as error:
            kept = self._write({**verdict, "passed": False, "reason": str(error)})
            raise CanaryFailed(f"not published: {error} ({kept})") from error

    def published(self, verdict: Mapping[str, Any], version: int, log: Callable[[str], None]) -> None:
        """Writes the verdict of a version that may be served by now, and whose own record holds it too."""
        try:
            gate.record_verdict(self.where, {**verdict, "version": version, "source": self.source})
        except InputError as error:
            log(f"version {version} is published, but {error}")

    def _write(self, verdict: Mapping[str, Any]) -> str:
        try:
            return f"the verdict is in {gate.record_verdict(self.where, {**verdict, 'source': self.source})}"
        except InputError as error:
            return str(error)

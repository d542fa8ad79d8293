"""Exports a model and publishes it: build, gate, write, canary, compare, record, publish."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm.disk import copy_folder
from tfclm.errors import InputError
from tfclm.savedmodel import saving, warmup
from tfclm.savedmodel.graph.signatures import GenerationModule
from tfclm.savedmodel.publishing import canary, comparison, gate
from tfclm.savedmodel.publishing.canary import CanaryFailed
from tfclm.savedmodel.publishing.gate import Gate, GateFailed, PerplexityResult, QuantizationLoss
from tfclm.savedmodel.publishing.versions import ServingDirectory
from tfclm.savedmodel.settings import ServableSettings
from tfclm.settings import record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TFPreTrainedModel

__all__ = ["Exported", "export_saved_model", "publish_exported"]

Log = Callable[[str], None]
Measure = Callable[["TFPreTrainedModel"], PerplexityResult | None]


@dataclass(frozen=True)
class Exported:
    """A published version.

    Attributes:
        version: its number.
        path: its directory or address.
        record: what its assets.extra/tfclm.json holds.
    """

    version: int
    path: str
    record: dict[str, Any]


def export_saved_model(
    model: TFPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    serving_dir: str | os.PathLike[str] | ServingDirectory,
    settings: ServableSettings | None = None,
    *,
    version: int | None = None,
    recorded: PerplexityResult | None = None,
    measure: Measure | None = None,
    limits: Gate | None = None,
    texts: Callable[[], Iterable[str]] | None = None,
    source: Mapping[str, Any] | None = None,
    log: Log | None = None,
) -> Exported:
    """Publishes a model as the next version of a SavedModel that unmodified TensorFlow Serving hosts.

    The SavedModel takes and gives text: tokenizer, generation and detokenizer are in its graph.

    Args:
        model: a TensorFlow causal LM of transformers.
        tokenizer: its fast tokenizer.
        serving_dir: the model directory, or an address that TensorFlow knows (gs://, s3://), with one numbered
            subdirectory per version.
        settings: defaults of the signatures, limits and compilation; `ServableSettings()` if None.
        version: number of the version; the highest there plus 1 if None.
        recorded: the model's perplexity, if it is known already.
        measure: returns the perplexity of a model on some text; called if none is recorded. With smaller weights, it
            is also called for these: gate and record use the model's perplexity times the ratio measured on that text.
        limits: what the perplexity must meet; no limits if None.
        texts: returns the documents that the new version and the served one are both scored on for `max_regression`.
            Without them, and where one of the two has no signature `score`, the served version's record is used.
        source: where the model came from, for the record.
        log: gets a line of progress now and then.

    Returns:
        The published version.

    Raises:
        InputError: a setting is out of range, the tokenizer cannot be exported exactly, or the directory cannot be
            written.
        GateFailed: the perplexity is too high; nothing was published.
        CanaryFailed: the finished version does not behave as the model does; nothing was published.

    Example:
        >>> model, tokenizer = tfclm.load("runs/eli5")
        >>> tfclm.export_saved_model(model, tokenizer, "serving_models/eli5").path
        'serving_models/eli5/1'
    """
    settings, limits, log = settings or ServableSettings(), limits or Gate(), log or _log_nothing
    settings.check()
    limits.check()
    directory = ServingDirectory.open(serving_dir, version)
    verdicts = _Verdicts(directory, dict(source or {}))
    served = gate.served_record(directory, limits)
    if not gate.can_be_measured(served):
        texts = None
    _check_early(verdicts, limits, served, recorded, texts, final=settings.weights == "float32")

    started = time.monotonic()
    servable = GenerationModule(model, tokenizer, settings)
    if servable.tokenizer_problem is not None:
        log(f"generate_tokens alone is exported: {servable.tokenizer_problem}")
        texts = None
    megabytes = servable.cached_tokens * servable.network.bytes_per_token / 1e6
    log(f"keys and values of at most {servable.cached_tokens} tokens are kept, {megabytes:.0f} MB (cache_tokens)")
    perplexities = _measure(model, servable, recorded, measure or _measure_nothing)
    verdict = gate.decide(_decided_by_records(limits, texts), perplexities.exported, served)
    verdicts.require(verdict)
    expected = _Expected.of(servable, tokenizer)
    exact = perplexities.exported
    servable.about = {
        "perplexity": exact.finite if exact else None,
        "protocol": dict(exact.protocol) if exact else None,
        "versions": _versions(),
    }
    with directory.staged(log) as folder:
        log("writing the SavedModel")
        saving.write(servable, folder)
        records = warmup.write(servable, folder)
        seconds = time.monotonic() - started
        log(f"verifying it in a separate process ({records} warm-up records)")
        with verdicts.of_canary(verdict):
            xla = settings.compile == "xla"
            checked = canary.validate(folder, expected.prompts, expected.texts, xla=xla, log=log)
            if texts is not None:
                scored = comparison.split_documents(texts(), tokenizer)
                log(f"scoring {len(scored)} texts with this version and the served one")
                compared = comparison.compare(str(folder), str(directory.served()), scored)
                verdict = gate.decide_by_text(limits, perplexities.recorded() | verdict, compared)
        verdicts.require(verdict)
        entries = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "source": verdicts.source,
            **_describe(servable, tokenizer, perplexities),
            "gate": verdict,
            "canary": {"prompts": len(expected.prompts), "texts": len(expected.texts), **checked},
            "export_seconds": round(seconds, 1),
            "peak_memory_mib": canary.peak_memory_mib(),
            **_sizes(folder),
            "versions": _versions(),
        }
        saving.write_record(folder, entries)
        number = directory.publish(folder)
    verdicts.published(verdict, number, log)
    return Exported(number, f"{directory}/{number}", entries)


def publish_exported(
    exported: Path,
    serving_dir: str | os.PathLike[str] | ServingDirectory,
    *,
    version: int | None = None,
    limits: Gate | None = None,
    source: Mapping[str, Any] | None = None,
    log: Log | None = None,
) -> Exported:
    """Publishes a version that was exported elsewhere, if its record passes the gate.

    Args:
        exported: the version's directory. There is no Python model to compare it with: the canary replays its warm-up
            records.
        serving_dir: as for `export_saved_model`.
        version: its number here; the highest there plus 1 if None.
        limits: what the recorded perplexity must meet; no limits if None.
        source: where it came from, for the verdict.
        log: gets a line of progress now and then.

    Returns:
        The published version.

    Raises:
        InputError: the record is damaged or lacks the perplexity that a limit needs, or the directory cannot be
            written.
        GateFailed: the perplexity is too high; nothing was published.
        CanaryFailed: the version does not load, or a warm-up record fails; nothing was published.

    Example:
        >>> publish_exported(Path("downloads/7"), "serving_models/eli5").path
        'serving_models/eli5/1'
    """
    limits, log = limits or Gate(), log or _log_nothing
    limits.check()
    directory = ServingDirectory.open(serving_dir, version)
    entries = gate.read_record(str(exported))
    measured = None
    if entries.get("perplexity") is not None:
        measured = PerplexityResult(entries["perplexity"], entries.get("tokens"), entries.get("protocol") or {})
    elif limits != Gate():
        raise InputError(
            "the gate needs a perplexity, and the exported model's record has none: leave out `max_perplexity` and "
            "`max_regression`"
        )
    verdicts = _Verdicts(directory, {**(entries.get("source") or {}), **(source or {})})
    verdict = gate.decide(limits, measured, gate.served_record(directory, limits))
    verdicts.require(verdict)
    with directory.staged(log) as folder:
        copy_folder(exported, folder)
        log("verifying it in a separate process")
        with verdicts.of_canary(verdict):
            canary.validate(folder, xla=(entries.get("settings") or {}).get("compile") == "xla", log=log)
        number = directory.publish(folder)
    verdicts.published(verdict, number, log)
    return Exported(number, f"{directory}/{number}", entries)


def _log_nothing(line: str) -> None:
    pass


def _measure_nothing(model: TFPreTrainedModel) -> PerplexityResult | None:
    return None


@dataclass(frozen=True)
class _Verdicts:
    """Records every verdict on one model, whether it passed or not."""

    directory: ServingDirectory
    source: dict[str, Any]

    def require(self, verdict: Mapping[str, Any]) -> None:
        """Raises GateFailed if the gate did not let the model pass."""
        if not verdict["passed"]:
            raise GateFailed(f"not published: {verdict['reason']} ({self._write(verdict)})")

    @contextmanager
    def of_canary(self, verdict: Mapping[str, Any]) -> Iterator[None]:
        """Records that the canary, which runs inside, refused a model that had passed so far."""
        try:
            yield
        except CanaryFailed as error:
            written = self._write({**verdict, "passed": False, "reason": str(error)})
            raise CanaryFailed(f"not published: {error} ({written})") from error

    def published(self, verdict: Mapping[str, Any], version: int, log: Log) -> None:
        """Records the verdict on a published version; a failure is only logged, its record holds the verdict too."""
        try:
            gate.record_verdict(self.directory, {**verdict, "version": version, "source": self.source})
        except InputError as error:
            log(f"version {version} is published, but {error}")

    def _write(self, verdict: Mapping[str, Any]) -> str:
        try:
            return f"the verdict is in {gate.record_verdict(self.directory, {**verdict, 'source': self.source})}"
        except InputError as error:
            return str(error)


def _decided_by_records(limits: Gate, texts: Callable[[], Iterable[str]] | None) -> Gate:
    """The limits that are decided before a version is written: not the regression, if both score the same texts."""
    return limits if texts is None else replace(limits, max_regression=None)


def _check_early(
    verdicts: _Verdicts,
    limits: Gate,
    served: Mapping[str, Any],
    recorded: PerplexityResult | None,
    texts: Callable[[], Iterable[str]] | None,
    *,
    final: bool,
) -> None:
    """Refuses what can be refused before the graph is built; `final` if the recorded perplexity is the exported one."""
    by_records = _decided_by_records(limits, texts)
    gate.check_comparable(by_records, served)
    if recorded is not None:
        gate.check_comparable(by_records, served, recorded.protocol, recorded.tokens)
        if final:
            verdicts.require(gate.decide(by_records, recorded, served))


@dataclass(frozen=True)
class _Perplexities:
    """The perplexity of the float32 weights, that of the exported ones, and the loss between them if they differ."""

    float32: PerplexityResult | None
    exported: PerplexityResult | None
    loss: QuantizationLoss | None

    def recorded(self) -> dict[str, float | None]:
        """The exported perplexity as a verdict holds it."""
        return {"perplexity": self.exported.finite if self.exported is not None else None}


def _measure(
    model: TFPreTrainedModel, servable: GenerationModule, recorded: PerplexityResult | None, measure: Measure
) -> _Perplexities:
    """Measures the perplexity if none is recorded; with smaller weights always, both on the same text."""
    exact = recorded if recorded is not None else measure(model)
    if servable.settings.weights == "float32":
        return _Perplexities(exact, exact, None)
    before = measure(model) if recorded is not None else exact
    after = measure(servable.network.model)
    if before is None or after is None or exact is None:
        return _Perplexities(exact, None, None)
    loss = QuantizationLoss(before, after)
    return _Perplexities(exact, loss.applied(exact), loss)


@dataclass(frozen=True)
class _Expected:
    """What the canary asks the version, with the answers of the Python model and its tokenizer."""

    prompts: list[canary.Prompt]
    texts: list[canary.Text]

    @classmethod
    def of(cls, servable: GenerationModule, tokenizer: PreTrainedTokenizerBase) -> _Expected:
        network = servable.network
        return cls(
            canary.make_prompts(
                network.model, network.vocab_size, network.context, servable.eos_ids, servable.limit, network.rounding
            ),
            [] if servable.tokenizer_problem is not None else canary.make_texts(tokenizer, network.context),
        )


def _describe(
    servable: GenerationModule, tokenizer: PreTrainedTokenizerBase, perplexities: _Perplexities
) -> dict[str, Any]:
    """The entries of a version's record about the model and its signatures."""
    measured, exact, settings = perplexities.exported, perplexities.float32, servable.settings
    return {
        "model_type": servable.network.model.config.model_type,
        "perplexity": measured.finite if measured else None,
        "float32_perplexity": exact.finite if exact else None,
        "tokens": measured.tokens if measured else None,
        "protocol": dict(measured.protocol) if measured else None,
        "weights_cost": perplexities.loss.record() if perplexities.loss else None,
        "tokenizer": type(tokenizer).__name__ if servable.tokenizer_problem is None else None,
        "signatures": servable.names,
        "settings": {name: value for name, value in record(settings).items() if hasattr(ServableSettings, name)},
        "defaults": vars(servable.defaults),
        "max_new_tokens_limit": servable.limit,
        "max_request_tokens": servable.max_request_tokens,
        "context": servable.network.context,
        "cache_tokens": servable.cached_tokens,
        "buckets": servable.buckets,
    }


def _versions() -> dict[str, str]:
    """The versions of the packages that make an export."""
    return {name: metadata.version(name) for name in ("tfclm", "tensorflow", "tf-keras", "transformers")}


def _sizes(folder: Path) -> dict[str, int]:
    """The entries of a version's record about its files, in bytes."""
    return {
        "saved_model_bytes": (folder / "saved_model.pb").stat().st_size,
        "size_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    }

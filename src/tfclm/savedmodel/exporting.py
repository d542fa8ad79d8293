"""From a model to a published version: build, write, gate, canary, publish."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from tfclm.errors import InputError
from tfclm.savedmodel import canary, gate, saving, warmup
from tfclm.savedmodel.gate import Gate, GateFailed, Measured
from tfclm.savedmodel.publish import check_place, publish, staged
from tfclm.savedmodel.servable import Servable
from tfclm.savedmodel.settings import ServableSettings
from tfclm.settings import record

__all__ = ["Exported", "export_saved_model"]


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
    settings: ServableSettings = ServableSettings(),
    *,
    version: int | None = None,
    measure: Callable[[Any], Measured | None] = lambda model: None,
    limits: Gate = Gate(),
    source: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Writes the next version of a servable that TensorFlow Serving hosts as it is: text in, text out.

    Args:
        model: a TensorFlow causal LM of transformers.
        tokenizer: its fast tokenizer.
        serving_dir: the servable's folder, or an address that TensorFlow knows (gs://, s3://); versions are below it.
        settings: defaults, limits and compilation.
        version: the version's number; the highest there plus 1 if not given.
        measure: gives a model's perplexity, for the gate and the record; with smaller weights it is asked twice, so
            that the record says what they cost.
        limits: what the perplexity must meet.
        source: where the model came from, for the record.
        say: gets a line of progress now and then.

    Returns:
        What was published.

    Raises:
        InputError: a setting or a tokenizer that cannot be exported exactly, or a directory that cannot be written.
        GateFailed: the perplexity is too high; nothing was published.
        CanaryFailed: the finished version does not do what the model does; nothing was published.
    """
    settings.check()
    limits.check()
    where = os.fspath(serving_dir)
    check_place(where, version)
    served = gate.served_record(where, limits)
    gate.check_comparable(limits, served)
    began = time.monotonic()
    servable = Servable(model, tokenizer, settings)
    if servable.tokenizer_problem is not None:
        say(f"generate_tokens alone is exported: {servable.tokenizer_problem}")
    network = servable.network
    measured = measure(network.model)
    verdict = gate.decide(limits, measured, served)
    if not verdict["passed"]:
        file = gate.record_verdict(where, {**verdict, "source": dict(source or {})})
        raise GateFailed(f"not published: {verdict['reason']} (the verdict is in {file})")
    exact = measure(model) if network.model is not model else measured
    prompts = canary.make_prompts(network.model, network.vocab_size, network.context, servable.eos_ids, servable.limit)
    with staged(where) as folder:
        say("writing the SavedModel")
        saving.write(servable, folder)
        records = warmup.write(servable, folder)
        seconds = time.monotonic() - began
        say(f"asking it in a process of its own ({records} warm-up records)")
        checked = canary.validate(folder, prompts, settings.compile == "xla")
        entries = {
            "source": dict(source or {}),
            "model_type": model.config.model_type,
            "perplexity": measured.perplexity if measured else None,
            "float32_perplexity": exact.perplexity if exact else None,
            "tokens": measured.tokens if measured else None,
            "protocol": dict(measured.protocol) if measured else None,
            "tokenizer": type(tokenizer).__name__ if servable.tokenizer_problem is None else None,
            "signatures": servable.names,
            "settings": {name: value for name, value in record(settings).items() if hasattr(ServableSettings, name)},
            "defaults": vars(servable.defaults),
            "max_new_tokens_limit": servable.limit,
            "context": network.context,
            "buckets": servable.buckets,
            "gate": verdict,
            "canary": {"prompts": len(prompts), **checked},
            "export_seconds": round(seconds, 1),
            "size_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            "versions": {name: metadata.version(name) for name in ("tfclm", "tensorflow", "tf-keras", "transformers")},
        }
        saving.write_record(folder, entries)
        number = publish(folder, where, version)
    try:
        gate.record_verdict(where, {**verdict, "version": number, "source": dict(source or {})})
    except InputError as error:
        # The version may be served by now, and its own record holds the verdict too.
        say(f"version {number} is published, but {error}")
    return Exported(number, f"{where.rstrip('/')}/{number}", entries)

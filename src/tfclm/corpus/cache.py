"""Arrow files that are written once and found again by what they were made from."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm.errors import InputError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

# Part of every key: raise it when a writer's result changes.
FORMAT = 2


def made_by() -> list[object]:
    """What is part of the key of all that `datasets` caches for us: it knows a function by its name alone."""
    return [FORMAT, *(importlib.metadata.version(name) for name in ("tokenizers", "transformers"))]


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """One folder a process for runs without caching, removed at exit."""
    return tempfile.TemporaryDirectory(prefix="tfclm-")


def _folder() -> Path:
    import datasets

    if not datasets.is_caching_enabled():
        return Path(tempfile.mkdtemp(dir=_scratch().name))
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "tfclm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _not_writable(folder, error) from error
    return folder


def _not_writable(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"the cache {folder} cannot be written ({error.strerror or error}): let HF_HOME or HF_DATASETS_CACHE name a "
        "folder that can"
    )


def stored(
    kind: str, key: object, schema: pa.Schema, write: Callable[[Callable[[pa.RecordBatch], None]], dict[str, Any]]
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """The dataset that `write` makes, from the cache when it was made before from the same `key`.

    `write` is called with a function that appends one record batch of `schema` to the file, and returns facts about
    the whole (JSON types), which are stored beside it. Returns the memory-mapped dataset and those facts. A file
    appears under its name only when it is complete; whatever `write` raises leaves nothing behind.
    """
    import datasets
    import pyarrow as pa

    folder = _folder()
    name = hashlib.sha256(json.dumps([FORMAT, kind, key, str(schema)]).encode()).hexdigest()[:32]
    arrow, facts = folder / f"{kind}-{name}.arrow", folder / f"{kind}-{name}.json"
    if arrow.exists():
        try:
            return datasets.Dataset.from_file(str(arrow)), json.loads(facts.read_text(encoding="utf-8"))
        except (pa.ArrowInvalid, OSError, ValueError):
            pass  # a crash of the machine can leave files without their content: they are written again
    handle, part = tempfile.mkstemp(dir=folder, prefix=f"{kind}-{name}.", suffix=".part")
    os.close(handle)
    try:
        with pa.ipc.new_stream(part, schema) as writer:
            found = write(writer.write_batch)
        facts_part = Path(f"{part}.json")
        facts_part.write_text(json.dumps(found), encoding="utf-8")
        # Facts first: the Arrow file's presence means that both are there.
        os.replace(facts_part, facts)
        os.replace(part, arrow)
    except OSError as error:
        raise _not_writable(folder, error) from error
    finally:
        Path(part).unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(arrow)), found

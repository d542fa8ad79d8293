"""Arrow files in the datasets cache, found again by a key that names their input."""

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

# Part of every key: increase it when a writer's result changes.
FORMAT = 2


def code_versions() -> list[object]:
    """Versions for the cache key of every `datasets.map`, which hashes this package's functions by name alone."""
    return [FORMAT, *(importlib.metadata.version(name) for name in ("tokenizers", "transformers"))]


@functools.cache
def _temporary_root() -> tempfile.TemporaryDirectory[str]:
    """One directory per process, used when caching is off and removed at exit."""
    return tempfile.TemporaryDirectory(prefix="tfclm-")


def cache_folder() -> Path:
    """The directory of the cached files, which is created if needed."""
    import datasets

    if not datasets.is_caching_enabled():
        return Path(tempfile.mkdtemp(dir=_temporary_root().name))
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "tfclm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _not_writable(folder, error) from error
    return folder


def _not_writable(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"the cache {folder} cannot be written ({error.strerror or error}): set HF_HOME or HF_DATASETS_CACHE to a "
        "writable directory"
    )


def stored(
    kind: str, key: object, schema: pa.Schema, write: Callable[[Callable[[pa.RecordBatch], None]], dict[str, Any]]
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """The dataset that `write` produces, read from the cache if it was stored under the same `key` before.

    Args:
        kind: beginning of the file names.
        key: all that the result depends on, as JSON types.
        schema: the Arrow schema of the rows.
        write: gets a function that appends one record batch to the file, and returns facts about the whole dataset as
            JSON types, which are stored next to it.

    Returns:
        The memory-mapped dataset and the facts. A file gets its name once it is complete; if `write` raises, nothing
        is left on disk.

    Raises:
        InputError: the cache cannot be written.
    """
    import datasets
    import pyarrow as pa

    folder = cache_folder()
    name = hashlib.sha256(json.dumps([FORMAT, kind, key, str(schema)]).encode()).hexdigest()[:32]
    arrow, facts = folder / f"{kind}-{name}.arrow", folder / f"{kind}-{name}.json"
    if arrow.exists():
        try:
            return datasets.Dataset.from_file(str(arrow)), json.loads(facts.read_text(encoding="utf-8"))
        except (pa.ArrowInvalid, OSError, ValueError):
            pass  # a crash of the machine can leave empty files: write them again
    handle, part = tempfile.mkstemp(dir=folder, prefix=f"{kind}-{name}.", suffix=".part")
    os.close(handle)
    try:
        with pa.ipc.new_stream(part, schema) as writer:
            found = write(writer.write_batch)
        facts_part = Path(f"{part}.json")
        facts_part.write_text(json.dumps(found), encoding="utf-8")
        # The facts first: if the Arrow file exists, so do they.
        os.replace(facts_part, facts)
        os.replace(part, arrow)
    except OSError as error:
        raise _not_writable(folder, error) from error
    finally:
        Path(part).unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(arrow)), found

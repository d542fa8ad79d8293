"""Splits of a dataset: from the Hub, a directory of data files, or a directory that `save_to_disk` wrote."""

from __future__ import annotations

import errno
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm.compat import fingerprint, set_fingerprint
from tfclm.corpus.cache import code_versions
from tfclm.corpus.columns import extract_texts, find_column, is_blank
from tfclm.corpus.files import Split, hash_files
from tfclm.errors import InputError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

PYTHON_DOCS = "python-docs"
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the directory."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def load_splits(name: str, config: str | None, revision: str | None) -> datasets.DatasetDict:
    """Loads all splits of a dataset, memory-mapped. (`load_dataset(split=…)` prepares all of them as well.)

    Args:
        name: Hub id, directory, or "python-docs".
        config: configuration of a Hub dataset.
        revision: branch, tag or commit of a Hub dataset.

    Raises:
        InputError: the dataset cannot be loaded.
    """
    import datasets

    if name == PYTHON_DOCS:
        return datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": read_python_docs()}))
    try:
        if is_saved_dataset(Path(name)):
            saved = datasets.load_from_disk(name)
            splits = saved if isinstance(saved, datasets.DatasetDict) else datasets.DatasetDict(train=saved)
            return _fingerprint_by_content(splits)
        if not Path(name).is_dir():
            return datasets.load_dataset(name, config, revision=revision)
        # By default datasets tells local files apart by their modification time alone.
        files = datasets.load_dataset_builder(name, config).config.data_files or {}
        content = hash_files(path for split in files.values() for path in map(Path, split) if path.is_file())
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "tfclm-folders" / content
        return _fingerprint_by_content(datasets.load_dataset(name, config, cache_dir=str(cache)))
    except InputError:
        raise
    # IndexError and StopIteration: datasets raises them for files without rows.
    except (RuntimeError, ValueError, OSError, IndexError, StopIteration, datasets.exceptions.DatasetsError) as error:
        raise InputError(_explain_load_error(name, config, revision, error)) from error


def _fingerprint_by_content(splits: datasets.DatasetDict) -> datasets.DatasetDict:
    """Makes the content of the files part of the fingerprints, which are the keys of everything cached."""
    for rows in splits.values():
        content = hash_files(Path(file["filename"]) for file in rows.cache_files)
        set_fingerprint(rows, hashlib.sha256(f"{fingerprint(rows)} {content}".encode()).hexdigest()[:32])
    return splits


def _explain_load_error(name: str, config: str | None, revision: str | None, error: Exception) -> str:
    message = " ".join(str(error.__cause__ or error).split())
    if "Dataset scripts are no longer supported" in message:
        known = " (for eli5 and eli5_category: `dataset` dany0407/eli5_category)" if "eli5" in name.lower() else ""
        return (
            f"`dataset` {name} is a loading script, which datasets no longer runs: give its parquet version, "
            f"`dataset_revision` refs/convert/parquet, or a copy as parquet{known}"
        )
    if isinstance(error, ConnectionError):
        return f"`dataset` {name} is not in the cache and the Hub cannot be reached: go online once, or give files"
    if "BuilderConfig" in message or "Config name is missing" in message:
        return f"`dataset_config` {config} does not fit `dataset` {name}: {message}"
    if "Revision" in message and revision:
        return f"`dataset_revision` {revision} does not exist for `dataset` {name}: give a branch, tag or commit"
    if isinstance(error, NotImplementedError) or (
        isinstance(error, OSError) and error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
    ):
        return (
            f"`dataset` {name} cannot be prepared, because the cache's file system has no file locks ({message}): "
            "set HF_DATASETS_CACHE to a directory on a local disk"
        )
    if isinstance(error, IndexError | StopIteration) or any(
        part in message for part in ("corresponds to no data", "at least one example", "No columns to parse")
    ):
        return f"`dataset` {name} has no text: its files hold no rows"
    if isinstance(error, FileNotFoundError):
        return (
            f"`dataset` {name} is neither a dataset on the Hub that you can access nor a directory with data files: "
            f"{message}"
        )
    return f"`dataset` {name} cannot be read: {message}"


def read_python_docs() -> list[str]:
    """Python's language reference, which every interpreter includes; one document per paragraph."""
    from pydoc_data.topics import topics

    return [part for _, text in sorted(topics.items()) for part in re.split(r"(?<=\n)\n+(?=\S)", text)]


def take_rows(splits: datasets.DatasetDict, source: str, expression: str, named: str, text_column: str) -> Split:
    """The documents that a split expression selects.

    Args:
        splits: all splits of the dataset.
        source: name of the dataset.
        expression: such as `train`, `train[:1000]` or `train+test`.
        named: the expression with its setting, for messages.
        text_column: dotted path of the text column.

    Raises:
        InputError: the expression selects no rows, or the column is missing or holds no text.
    """
    import datasets

    parts = [splits[name].select(range(first, end)) for name, first, end in _row_ranges(splits, expression, named)]
    rows = datasets.concatenate_datasets(parts)
    column, path = find_column(rows.features.arrow_schema, text_column, source)
    texts = (
        rows.select_columns([column])
        .with_format("arrow")
        .map(
            _keep_text,
            batched=True,
            remove_columns=[column],
            fn_kwargs={"column": column, "path": path, "versions": code_versions()},
            desc="reading",
        )
        .with_format(None)
    )
    if not len(texts):
        raise InputError(
            f"every row of column {text_column} in {named} of {source} is empty: give another column or split"
        )
    dropped = len(rows) - len(texts)
    return Split(texts, {"source": source, "split": expression, "rows": len(texts), "dropped_rows": dropped})


def _keep_text(table: pa.Table, column: str, path: str, versions: Any) -> pa.Table:
    import pyarrow as pa

    texts = [text for text in extract_texts(table[column], path) if not is_blank(text)]
    return pa.table({"text": pa.array(texts, pa.string())})


def _row_ranges(splits: datasets.DatasetDict, expression: str, named: str) -> list[tuple[str, int, int]]:
    """The rows that a split expression selects, as (split, first, end)."""
    import datasets

    try:
        spec = datasets.ReadInstruction.from_spec(expression)
        parts = spec.to_absolute({name: len(rows) for name, rows in splits.items()})
    except (ValueError, AssertionError) as error:
        raise InputError(
            f"{named} cannot be read; the dataset has {', '.join(splits)}; write for example "
            f"{next(iter(splits))}[:1000]"
        ) from error
    ranges = [
        (part.splitname, part.from_ or 0, len(splits[part.splitname]) if part.to is None else part.to) for part in parts
    ]
    for name, first, end in ranges:
        if first >= end:
            raise InputError(f"{named} selects none of the {len(splits[name])} rows of {name}: give another range")
    return ranges


def find_validation_split(split: str, names: list[str]) -> str | None:
    """The dataset's validation split that belongs to `split`: `validation_asks` for `train_asks[:5000]`."""
    bases = [re.sub(r"[(\[].*", "", part).strip() for part in split.split("+")]
    for kind in VALIDATION_NAMES:
        wanted = [base.replace("train", kind) if "train" in base else kind for base in bases]
        if set(wanted) <= set(names) - set(bases):
            return "+".join(dict.fromkeys(wanted))
    return None


def check_disjoint(splits: datasets.DatasetDict, split: str, validation_split: str) -> None:
    """Raises `InputError` if two split expressions share rows."""
    for name, first, end in _row_ranges(splits, split, "`train_split`"):
        for other, other_first, other_end in _row_ranges(splits, validation_split, "`validation_split`"):
            shared = min(end, other_end) - max(first, other_first)
            if name == other and shared > 0:
                raise InputError(
                    f"`validation_split` {validation_split} shares {shared} rows with `train_split` {split}: "
                    f"give rows that are not trained on, for example {name}[:90%] and {name}[90%:]"
                )

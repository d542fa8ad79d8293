"""Reads the documents to train on and to validate on, from a dataset or from local files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm.corpus.dataset_splits import (
    PYTHON_DOCS,
    check_disjoint,
    find_validation_split,
    is_saved_dataset,
    load_splits,
    take_rows,
)
from tfclm.corpus.files import Split, read_files, resolve_paths
from tfclm.errors import InputError

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Texts:
    """The documents to train on and to validate on.

    Attributes:
        train: a dataset with one column, "text".
        validation: the same; no row is in both.
        description: `source`, `split`, `validation` (where its documents are from), `train_rows`, `validation_rows`,
            `dropped_rows` (null or blank rows) and so on; JSON types.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    description: dict[str, Any]


def read(
    *,
    dataset: str | None = None,
    dataset_config: str | None = None,
    revision: str | None = None,
    split: str = "train",
    validation_split: str | None = None,
    files: Sequence[str] = (),
    validation_files: Sequence[str] = (),
    text_column: str = "text",
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> Texts:
    """Reads the documents to train on and those to validate on.

    The validation documents are, in this order: those of `validation_split`; those of `validation_files`; the
    dataset's own split that belongs to `split` (`validation`, `valid`, `val`, `dev` or `test`; `validation_asks` and
    so on for `train_asks`); else `validation_fraction` of the documents.

    A .txt file is split into paragraphs, one document each. A paragraph keeps the blank lines after it, so the
    documents joined are the file's text, without a byte order mark and with \\r\\n read as \\n. A paragraph of more
    than 65,536 characters is cut, at the end of a line if it has lines: memory stays bounded for any file.

    Args:
        dataset: Hub id, a directory of data files, a directory that `save_to_disk` wrote, or "python-docs".
        dataset_config: configuration of a Hub dataset.
        revision: branch, tag or commit of a Hub dataset; messages call it `dataset_revision`.
        split: split of the dataset, also an expression such as `train_asks[:5000]`; messages call it `train_split`.
        validation_split: the same for validation.
        files: instead of a dataset, paths or globs of .txt, .jsonl, .json, .csv (each also .gz) and .parquet files,
            read in this order; messages call them `train_file`.
        validation_files: the same for validation; messages call them `validation_file`.
        text_column: dotted path of the text column: `answers.text` is the field `text` in the struct, or list of
            structs, `answers`. The strings of a list are joined with spaces. Null and blank rows are dropped.
        validation_fraction: fraction of the documents to hold out, chosen by `seed`. Both parts keep their order;
            documents that differ only in surrounding white space stay together.
        seed: see `validation_fraction`.

    Raises:
        InputError: the input cannot be used; the message names the file and line, the column, the split or the setting.

    Example:
        >>> texts = read(files=["texts/*.jsonl"], text_column="body", validation_fraction=0.2)
        >>> len(texts.train), len(texts.validation)
        (800, 200)
    """
    _check_source(dataset, dataset_config, revision, files, "train_file")
    if validation_split and validation_files:
        raise InputError("`validation_split` and `validation_file` are mutually exclusive: give one of them")
    if validation_split and not dataset:
        raise InputError("`validation_split` needs `dataset`; with `train_file` give `validation_file`")

    validation: Split | None = None
    origin = ""
    if dataset:
        splits = load_splits(dataset, dataset_config, revision)
        train = take_rows(splits, dataset, split, f"`train_split` {split}", text_column)
        if not validation_files:
            validation, origin = _take_validation(splits, dataset, split, validation_split, text_column)
    else:
        train = read_files(resolve_paths(files, "train_file"), text_column)
    if validation_files:
        validation, origin = _read_validation_files(validation_files, files, text_column)

    dropped = {}
    if validation is None:
        train_texts, validation_texts = _hold_out(train.texts, validation_fraction, seed)
        origin = f"{validation_fraction:g} of the documents, drawn with seed {seed}"
    else:
        train_texts, validation_texts = train.texts, validation.texts
        dropped = {"validation_dropped_rows": validation.description["dropped_rows"]}
    description = {
        **train.description,
        **({"dataset_config": dataset_config, "revision": revision} if dataset else {}),
        "text_column": text_column,
        "validation": origin,
        "train_rows": len(train_texts),
        "validation_rows": len(validation_texts),
        **dropped,
    }
    del description["rows"]
    return Texts(train_texts, validation_texts, description)


def read_split(
    *,
    dataset: str | None = None,
    dataset_config: str | None = None,
    revision: str | None = None,
    split: str = "test",
    files: Sequence[str] = (),
    text_column: str = "text",
) -> Split:
    """Reads one split of a dataset, or some files, and holds nothing out.

    Arguments and errors are those of `read`; messages call `files` `file` and `split` `split`.
    """
    _check_source(dataset, dataset_config, revision, files, "file")
    if not dataset:
        return read_files(resolve_paths(files, "file"), text_column)
    splits = load_splits(dataset, dataset_config, revision)
    found = take_rows(splits, dataset, split, f"`split` {split}", text_column)
    return Split(found.texts, found.description | {"dataset_config": dataset_config, "revision": revision})


def _check_source(
    dataset: str | None, config: str | None, revision: str | None, files: Sequence[str], field: str
) -> None:
    """Raises `InputError` unless exactly one source is given and the options apply to it; `field` names the files."""
    if dataset and files:
        raise InputError(f"`dataset` and `{field}` are mutually exclusive: give one of them")
    if not dataset and not files:
        raise InputError(f"no text to read: give `dataset` or `{field}`")
    folder = Path(dataset or "")
    try:
        saved = is_saved_dataset(folder)
        if dataset and folder.is_file():
            raise InputError(f"`dataset` {dataset} is a file: give it as `{field}` {dataset}")
    except OSError as error:
        raise InputError(f"`dataset` {dataset}: {error.strerror}") from error
    for option, value, applies in (
        ("dataset_config", config, dataset and dataset != PYTHON_DOCS and not saved),
        ("dataset_revision", revision, dataset and dataset != PYTHON_DOCS and not folder.is_dir()),
    ):
        if value is not None and not applies:
            raise InputError(
                f"`{option}` {value} is for datasets of the Hub, not for {dataset or f'`{field}`'}: leave it out"
            )


def _take_validation(
    splits: datasets.DatasetDict, source: str, split: str, validation_split: str | None, text_column: str
) -> tuple[Split | None, str]:
    """The documents of `validation_split` or of the dataset's own validation split, and a phrase that names it."""
    chosen = validation_split or find_validation_split(split, list(splits))
    if chosen is None:
        return None, ""
    named = f"`validation_split` {chosen}"
    origin = f"split {chosen}"
    if not validation_split:
        named = f"the dataset's own split {chosen} (`validation_split` chooses another)"
        origin += " (the dataset's own)"
    validation = take_rows(splits, source, chosen, named, text_column)
    check_disjoint(splits, split, chosen)
    return validation, origin


def _read_validation_files(
    patterns: Sequence[str], train_patterns: Sequence[str], text_column: str
) -> tuple[Split, str]:
    """The documents of the validation files, and a phrase that names them."""
    paths = resolve_paths(patterns, "validation_file")
    trained_on = {path.resolve() for path in resolve_paths(train_patterns, "train_file")}
    shared = [path for path in paths if path.resolve() in trained_on]
    if shared:
        raise InputError(f"{shared[0]} is both a `train_file` and a `validation_file`: validate on other text")
    return read_files(paths, text_column), "files " + ", ".join(map(str, paths))


def _hold_out(texts: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Splits the documents at random into those to train on and those to validate on."""
    import numpy as np

    if not 0 < fraction < 1:
        raise InputError(f"`validation_fraction` {fraction:g}: give a number between 0 and 1, for example 0.1")
    # Duplicates stay together: no document may be both trained on and validated on.
    digests = np.fromiter(
        (
            int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "big", signed=True)
            for batch in texts.iter(batch_size=1000)
            for text in batch["text"]
        ),
        np.int64,
        len(texts),
    )
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    document = np.argsort(np.argsort(first))[inverse]  # distinct documents, numbered by first occurrence
    count = len(first)
    if count < 2:
        raise InputError(
            f"{count} document is not enough to hold some out for validation: "
            "give more text, or `validation_file` or `validation_split`"
        )
    held_out = np.random.default_rng(seed).permutation(count)[: min(max(round(count * fraction), 1), count - 1)]
    is_held_out = np.isin(document, held_out)
    return texts.select(np.flatnonzero(~is_held_out)), texts.select(np.flatnonzero(is_held_out))

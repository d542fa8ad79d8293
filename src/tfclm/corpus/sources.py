"""Where texts come from: the Hugging Face Hub, a saved dataset, local files; and what is held out for validation."""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm.compat import fingerprint, set_fingerprint
from tfclm.corpus.cache import made_by
from tfclm.corpus.columns import is_blank, locate, texts_of
from tfclm.corpus.files import Split, digest, read_files, resolve
from tfclm.errors import InputError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

PYTHON_DOCS = "python-docs"
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")


@dataclass(frozen=True)
class Texts:
    """The documents to train on and those held out, one column "text" each; no row is in both.

    `description` has `source`, `split`, `validation` (how it was obtained), `train_rows`, `validation_rows` and
    `dropped_rows` (null or blank rows that were left out), in JSON types.
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
    """Read the texts to train on and the texts to validate on.

    The source is either `dataset`, a Hub id, a folder that `load_dataset` opens or one that `save_to_disk` wrote, with
    `split` an expression such as `train_asks[:5000]`; or `files`, paths or globs of .txt, .jsonl, .json, .csv (each
    also .gz) and .parquet, read in the order given.

    `text_column` is a dotted path: `answers.text` finds `text` inside the struct, or list of structs, `answers`, and
    joins a list of strings with a space. Rows that are null or blank are dropped and counted.

    A .txt file has no rows, so it is split at blank lines: a paragraph is a document, which the caller of `pack` ends
    with EOS. Each keeps its newlines, the blank lines after it included: joined, the documents are the file's text
    (less a byte order mark, with \\r\\n read as \\n). A paragraph beyond 65,536 characters is cut, at a line end when
    it has lines, so that a file without blank lines needs bounded memory too.

    Validation is, in this order: `validation_split`; `validation_files`; the dataset's own split that goes with
    `split` (`validation`, `valid`, `val`, `dev` or `test`; for `train_asks`, `validation_asks` and so on); else
    `validation_fraction` of the documents, drawn by `seed`, both parts in their original order; documents that
    differ only in the white space around them are drawn together.

    Raises `InputError` for input that cannot be used, naming the file and line, the column, the split or the flag.
    """
    _check_source(dataset, dataset_config, revision, files, "--train-file")
    if validation_split and validation_files:
        raise InputError("--validation-split and --validation-file exclude each other: give one of them")
    if validation_split and not dataset:
        raise InputError("--validation-split needs --dataset; with --train-file give --validation-file")

    held_out: Split | None = None
    if dataset:
        splits = _load(dataset, dataset_config, revision)
        train = _take(splits, dataset, split, f"--train-split {split}", text_column)
        own = None if validation_files else validation_split or _own_validation(split, list(splits))
        if own:
            named = (
                f"--validation-split {own}"
                if validation_split
                else f"the dataset's own split {own} (--validation-split takes another)"
            )
            held_out = _take(splits, dataset, own, named, text_column)
            _check_disjoint(splits, split, own)
            obtained = f"split {own}" + ("" if validation_split else " (the dataset's own)")
    else:
        train = read_files(resolve(files, "--train-file"), text_column)
    if validation_files:
        paths = resolve(validation_files, "--validation-file")
        trained_on = {path.resolve() for path in resolve(files, "--train-file")}
        shared = [path for path in paths if path.resolve() in trained_on]
        if shared:
            raise InputError(f"{shared[0]} is both a --train-file and a --validation-file: validate on other text")
        held_out = read_files(paths, text_column)
        obtained = "files " + ", ".join(map(str, paths))

    dropped = {"dropped_rows": train.description["dropped_rows"]}
    if held_out is not None:
        dropped["validation_dropped_rows"] = held_out.description["dropped_rows"]
        kept, validation = train.texts, held_out.texts
    else:
        kept, validation = _hold_out(train.texts, validation_fraction, seed)
        obtained = f"{validation_fraction:g} of the documents, drawn with seed {seed}"
    origin = {"dataset_config": dataset_config, "revision": revision} if dataset else {}
    description = (
        train.description
        | origin
        | {
            "text_column": text_column,
            "validation": obtained,
            "train_rows": len(kept),
            "validation_rows": len(validation),
            **dropped,
        }
    )
    del description["rows"]
    return Texts(kept, validation, description)


def read_split(
    *,
    dataset: str | None = None,
    dataset_config: str | None = None,
    revision: str | None = None,
    split: str = "test",
    files: Sequence[str] = (),
    text_column: str = "text",
) -> Split:
    """Read one split, or some files, with nothing held out; the arguments and the errors are those of `read`."""
    _check_source(dataset, dataset_config, revision, files, "--file")
    if not dataset:
        return read_files(resolve(files, "--file"), text_column)
    found = _take(_load(dataset, dataset_config, revision), dataset, split, f"--split {split}", text_column)
    return Split(found.texts, found.description | {"dataset_config": dataset_config, "revision": revision})


def _check_source(
    dataset: str | None, config: str | None, revision: str | None, files: Sequence[str], flag: str
) -> None:
    if dataset and files:
        raise InputError(f"--dataset and {flag} exclude each other: give one of them")
    if not dataset and not files:
        raise InputError(f"no text to read: give --dataset or {flag}")
    folder = Path(dataset or "")
    try:
        saved = _is_saved(folder)
        if dataset and folder.is_file():
            raise InputError(f"--dataset {dataset} is a file: give it as {flag} {dataset}")
    except OSError as error:
        raise InputError(f"--dataset {dataset}: {error.strerror}") from error
    for option, value, applies in (
        ("--dataset-config", config, dataset and dataset != PYTHON_DOCS and not saved),
        ("--dataset-revision", revision, dataset and dataset != PYTHON_DOCS and not folder.is_dir()),
    ):
        if value is not None and not applies:
            raise InputError(f"{option} {value} is for datasets of the Hub, not for {dataset or flag}: leave it out")


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _hold_out(texts: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    import numpy as np

    if not 0 < fraction < 1:
        raise InputError(f"--validation-fraction {fraction:g} is not between 0 and 1, for example 0.1")
    # A text that occurs twice goes to one side: else it would be validated on after being trained on.
    digests = np.fromiter(
        (
            int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "big", signed=True)
            for batch in texts.iter(batch_size=1000)
            for text in batch["text"]
        ),
        np.int64,
        len(texts),
    )
    _, first, place = np.unique(digests, return_index=True, return_inverse=True)
    different = np.argsort(np.argsort(first))[place]  # numbered as they first occur
    count = len(first)
    if count < 2:
        raise InputError(
            f"{count} document is too little to hold some out for validation: "
            "give more text, or --validation-file or --validation-split"
        )
    held_out = np.random.default_rng(seed).permutation(count)[: min(max(round(count * fraction), 1), count - 1)]
    drawn = np.isin(different, held_out)
    return texts.select(np.flatnonzero(~drawn)), texts.select(np.flatnonzero(drawn))


# Datasets: the Hub, folders, save_to_disk


def _load(name: str, config: str | None, revision: str | None) -> datasets.DatasetDict:
    """Every split of a dataset, memory-mapped. (`load_dataset(split=…)` prepares them all as well.)"""
    import datasets

    if name == PYTHON_DOCS:
        return datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": python_documentation()}))
    try:
        if _is_saved(Path(name)):
            saved = datasets.load_from_disk(name)
            return _identified(saved if isinstance(saved, datasets.DatasetDict) else datasets.DatasetDict(train=saved))
        if not Path(name).is_dir():
            return datasets.load_dataset(name, config, revision=revision)
        # datasets itself tells local files by their time of change alone.
        files = datasets.load_dataset_builder(name, config).config.data_files or {}
        content = digest(path for split in files.values() for path in map(Path, split) if path.is_file())
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "tfclm-folders" / content
        return _identified(datasets.load_dataset(name, config, cache_dir=str(cache)))
    except InputError:
        raise
    # datasets trips over files without rows.
    except (RuntimeError, ValueError, OSError, IndexError, StopIteration, datasets.exceptions.DatasetsError) as error:
        raise InputError(_why_not_loaded(name, config, revision, error)) from error


def _identified(splits: datasets.DatasetDict) -> datasets.DatasetDict:
    """The splits under fingerprints that are made from their content, which name all that is cached of them."""
    for rows in splits.values():
        content = digest(Path(file["filename"]) for file in rows.cache_files)
        set_fingerprint(rows, hashlib.sha256(f"{fingerprint(rows)} {content}".encode()).hexdigest()[:32])
    return splits


def _why_not_loaded(name: str, config: str | None, revision: str | None, error: Exception) -> str:
    message = " ".join(str(error.__cause__ or error).split())
    if "Dataset scripts are no longer supported" in message:
        known = " (for eli5 and eli5_category: --dataset dany0407/eli5_category)" if "eli5" in name.lower() else ""
        return (
            f"--dataset {name} is a loading script, which datasets no longer runs: give its parquet version, "
            f"--dataset-revision refs/convert/parquet, or a copy as parquet{known}"
        )
    if isinstance(error, ConnectionError):
        return f"--dataset {name} is not in the cache and the Hub cannot be reached: go online once, or give files"
    if "BuilderConfig" in message or "Config name is missing" in message:
        return f"--dataset-config {config} does not fit --dataset {name}: {message}"
    if "Revision" in message and revision:
        return f"--dataset-revision {revision} does not exist for --dataset {name}: give a branch, tag or commit"
    if isinstance(error, NotImplementedError) or (
        isinstance(error, OSError) and error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
    ):
        return (
            f"--dataset {name} cannot be prepared, because the cache's filesystem has no file locks ({message}): "
            "let HF_DATASETS_CACHE name a folder on a local disk"
        )
    if isinstance(error, IndexError | StopIteration) or any(
        part in message for part in ("corresponds to no data", "at least one example", "No columns to parse")
    ):
        return f"--dataset {name} has no text: its files hold no rows"
    if isinstance(error, FileNotFoundError):
        return f"--dataset {name} is neither on the Hub (or not open to you) nor a folder with data files: {message}"
    return f"--dataset {name} cannot be read: {message}"


def python_documentation() -> list[str]:
    """Python's own language reference, as every interpreter holds it: a document a paragraph."""
    from pydoc_data.topics import topics

    return [part for _, text in sorted(topics.items()) for part in re.split(r"(?<=\n)\n+(?=\S)", text)]


def _ranges(splits: datasets.DatasetDict, expression: str, named: str) -> list[tuple[str, int, int]]:
    """The rows that a split expression stands for, as (split, first, end); `named` is what messages call it."""
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
            raise InputError(
                f"{named} takes none of the {len(splits[name])} rows of {name}: give a range that has some"
            )
    return ranges


def _take(splits: datasets.DatasetDict, source: str, expression: str, named: str, text_column: str) -> Split:
    """The texts of the rows that a split expression stands for; `named` is what messages call it."""
    import datasets

    parts = [splits[name].select(range(first, end)) for name, first, end in _ranges(splits, expression, named)]
    rows = datasets.concatenate_datasets(parts)
    head, rest = locate(rows.features.arrow_schema, text_column, source)
    texts = (
        rows.select_columns([head])
        .with_format("arrow")
        .map(
            _text_only,
            batched=True,
            remove_columns=[head],
            fn_kwargs={"head": head, "rest": rest, "made_by": made_by()},
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


def _text_only(table: pa.Table, head: str, rest: str, made_by: Any) -> pa.Table:
    import pyarrow as pa

    texts = [text for text in texts_of(table[head], rest) if not is_blank(text)]
    return pa.table({"text": pa.array(texts, pa.string())})


def _bases(expression: str) -> list[str]:
    return [re.sub(r"[(\[].*", "", part).strip() for part in expression.split("+")]


def _own_validation(split: str, names: list[str]) -> str | None:
    """The split of the dataset that goes with `split`: `validation_asks` for `train_asks[:5000]`."""
    bases = _bases(split)
    for kind in VALIDATION_NAMES:
        wanted = [base.replace("train", kind) if "train" in base else kind for base in bases]
        if set(wanted) <= set(names) - set(bases):
            return "+".join(dict.fromkeys(wanted))
    return None


def _check_disjoint(splits: datasets.DatasetDict, split: str, validation_split: str) -> None:
    for name, first, end in _ranges(splits, split, "--train-split"):
        for other, other_first, other_end in _ranges(splits, validation_split, "--validation-split"):
            both = min(end, other_end) - max(first, other_first)
            if name == other and both > 0:
                raise InputError(
                    f"--validation-split {validation_split} shares {both} rows with --train-split {split}: "
                    f"give rows that are not trained on, for example {name}[:90%] and {name}[90%:]"
                )

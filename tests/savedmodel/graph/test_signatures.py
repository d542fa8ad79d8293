"""The exported graph, called through the signatures of a reloaded SavedModel, as a client does."""

from __future__ import annotations

import gc
import json
import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import forked
import numpy as np
import pytest
import tensorflow as tf
from conftest import EXTRAS_OFF, LONG, put_bos, tiny_config
from tensorflow.core.protobuf import saved_model_pb2
from test_decoding import is_tie
from tokenizers import decoders
from transformers import AutoTokenizer, pipeline
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

from tfclm.checkpoint import create
from tfclm.corpus import prefix_ids
from tfclm.metrics.perplexity import perplexity
from tfclm.savedmodel import saving, warmup
from tfclm.savedmodel.graph.signatures import MAX_REQUEST_TOKENS, GenerationModule
from tfclm.savedmodel.settings import ServableSettings
from tfclm.savedmodel.tokenizer import GraphTokenizer

pytestmark = pytest.mark.slow

CONTEXT = 96
EOS = [0, 40, 80, 120, 160]
LIMIT = 20  # max_new_tokens_limit of the compiled export
TYPES = {
    "max_new_tokens": tf.int32,
    "temperature": tf.float32,
    "top_k": tf.int32,
    "top_p": tf.float32,
    "repetition_penalty": tf.float32,
    "seed": tf.int64,
    "input_ids": tf.int32,
    "attention_mask": tf.int32,
    "min_p": tf.float32,
    "presence_penalty": tf.float32,
    "frequency_penalty": tf.float32,
    "min_new_tokens": tf.int32,
    "logit_bias_ids": tf.int32,
    "logit_bias": tf.float32,
    "top_logprobs": tf.int32,
    "token_ids": tf.int32,
}
PARAMS = {
    "max_new_tokens": [16],
    "temperature": [0.0],
    "top_k": [0],
    "top_p": [1.0],
    "repetition_penalty": [1.0],
    "seed": [-1],
}
Row = dict[str, Any]


class Export(NamedTuple):
    """A model, the folder that it was exported to, and the signatures loaded from there."""

    model: Any
    folder: Path
    signatures: Any

    def ask(self, signature: str, **inputs: Any) -> dict[str, Any]:
        """The answer to a request, with default parameters if not given; rows as lists, texts as bytes."""
        function = self.signatures[signature]
        # Loaded in Python, a signature has no defaults.
        names = getattr(function, "structured_input_signature", ((), {}))[1]
        extras = {name: value for name, value in EXTRAS_OFF.items() if signature == "generate_tokens" and name in names}
        return {k: v.numpy().tolist() for k, v in function(**to_tensors(signature, extras | inputs)).items()}

    def generate(self, rows: list[Row]) -> list[dict[str, Any]]:
        """The answer for each row to one request with these rows."""
        answer = self.ask("generate", **{name: [row[name] for row in rows] for name in rows[0]})
        return [dict(zip(answer, values, strict=True)) for values in zip(*answer.values(), strict=True)]


def to_tensors(signature: str, inputs: dict[str, Any]) -> dict[str, tf.Tensor]:
    """The inputs of a signature, with default parameters if not given."""
    params: dict[str, Any] = PARAMS if signature.startswith("gen") else {}
    stop = {"stop": [""]} if signature == "generate" else {}
    given = params | stop | inputs
    return {name: tf.constant(value, TYPES.get(name, tf.string)) for name, value in given.items()}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Any:
    """The tokenizer of all exports."""
    return AutoTokenizer.from_pretrained(tokenizer_dir)


def prefix_of_tokens(tokenizer: Any, text: str, size: int) -> str:
    """The shortest prefix of a text that has this many tokens."""
    return next(text[:end] for end in range(len(text)) if len(tokenizer(text[:end])["input_ids"]) == size)


def export(
    folder: Path, tokenizer: Any, seed: int, architecture: str = "gpt2", layers: int = 2, **settings: Any
) -> Export:
    """A tiny model, exported as a SavedModel and loaded again."""
    from conftest import tiny_config
    from tf_keras.utils import set_random_seed

    from tfclm.checkpoint import create

    set_random_seed(seed)
    model = create(tiny_config(architecture, context=CONTEXT, layers=layers))
    # Initial weights are so small that all logits are nearly equal.
    model.set_weights([3 * weight for weight in model.get_weights()])
    model.generation_config.eos_token_id = EOS
    module = GenerationModule(model, tokenizer, ServableSettings(**settings))
    saving.write(module, folder)
    warmup.write(module, folder)
    return Export(module.network.model, folder, tf.saved_model.load(str(folder)).signatures)


@pytest.fixture(scope="module")
def exported(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Default settings, except that a request waits only 2 ms for others."""
    return export(tmp_path_factory.mktemp("default"), tokenizer, 1)


@pytest.fixture(scope="module")
def compiled(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Compiled by XLA, with other weights: one layer, because XLA takes as long again for each."""
    settings: dict[str, Any] = {
        "compile": "xla",
        "buckets": (8,),
        "max_batch_size": 2,
        "max_new_tokens_limit": LIMIT,
    }
    folder = tmp_path_factory.mktemp("xla")
    return export(folder, tokenizer, 2, layers=1, **settings)


@pytest.fixture(scope="module")
def unsupported_tokenizer(tokenizer_dir: Path) -> Any:
    """A tokenizer that cannot be put into the graph."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.backend_tokenizer.decoder = decoders.CTC()
    return tokenizer


@pytest.fixture(scope="module")
def tokens_only(unsupported_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """An export with such a tokenizer, which truncates prompts."""
    return export(tmp_path_factory.mktemp("tokens"), unsupported_tokenizer, 1, truncate_prompts=True)


@pytest.fixture(scope="module")
def rows(documents: list[str]) -> list[Row]:
    """Prompts of many lengths, with parameters and seeds per row."""
    rng = random.Random(3)
    return [
        {
            "prompt": documents[number % len(documents)][: rng.choice([1, 5, 20, 60])],
            "max_new_tokens": rng.choice([1, 5, 16, LIMIT]),
            "temperature": rng.choice([0.0, 0.7, 1.0, 1.5]),
            "top_k": rng.choice([0, 1, 20]),
            "top_p": rng.choice([0.8, 1.0]),
            "repetition_penalty": rng.choice([1.0, 1.2]),
            "seed": rng.randrange(2**62),
            "stop": rng.choice(["", "e", "\n", "import"]),
        }
        for number in range(30)
    ]


@pytest.fixture(scope="module")
def alone(exported: Export, rows: list[Row]) -> list[dict[str, Any]]:
    """The answer to each row in a request with that row alone."""
    return [exported.generate([row])[0] for row in rows]


# Text


def test_text_equals_the_pipelines(exported: Export, tokenizer: Any, documents: list[str]) -> None:
    """Prompts tokenized, continued or joined to the completion in another way than in transformers' pipeline."""
    prompts = [text[:length] for text, length in zip(documents[20:26], [1, 3, 10, 25, 50, 80], strict=True)]
    generator = pipeline("text-generation", model=exported.model, tokenizer=tokenizer, framework="tf", torch_dtype=None)
    options = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}
    expected = [generator(prompt, **options)[0]["generated_text"].encode() for prompt in prompts]
    answer = exported.ask("generate", prompt=prompts)
    assert answer["generated_text"] == expected
    assert [prompt.encode() + text for prompt, text in zip(prompts, answer["completion"], strict=True)] == expected
    assert answer["prompt_tokens"] == [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    default = exported.ask("serving_default", prompt=prompts)["generated_text"]
    # Its max_new_tokens is 95, or fewer for longer prompts.
    ended = [reason == b"stop" for reason in answer["finish_reason"]]
    assert all(long.startswith(text.rstrip("\ufffd".encode())) for long, text in zip(default, expected, strict=True))
    assert all(long == text for long, text, end in zip(default, expected, ended, strict=True) if end)


def test_text_is_valid_and_bytes_are_raw(exported: Export) -> None:
    """Invalid UTF-8 in `completion`, which JSON cannot hold, or bytes in `completion_bytes` that were made valid."""
    prompts = [b"x", b"\xc3", "né\ud83d".encode("utf-8", "surrogatepass"), "漢字".encode()]
    answer = exported.ask(
        "generate", prompt=[prompt for prompt in prompts for _ in range(8)], temperature=[2.0], seed=list(range(32))
    )
    broken, shown = 0, []
    for raw, text, whole in zip(
        *(answer[n] for n in ("completion_bytes", "completion", "generated_text")), strict=True
    ):
        assert text.decode() == raw.decode("utf-8", "replace")
        broken += text != raw
        shown.append(whole.decode().removesuffix(text.decode()))
    assert broken > 5
    assert shown == [prompt.decode("utf-8", "replace") for prompt in prompts for _ in range(8)]


def test_greedy_is_transformers(exported: Export) -> None:
    """Tokens of another prompt, or that change with the size of the request."""
    # Without a penalty; the compiled export is asked for one.
    assert_like_generate(exported, 150, penalty=1.0)


def test_a_long_text_among_many(exported: Export, tokenizer: Any, documents: list[str]) -> None:
    """Memory for all rows times the longest text, exhausted by one long prompt in a large request."""
    encode = GraphTokenizer(tokenizer).encode
    texts = ["x", "".join(documents)[:400_000], "", documents[0][:30]]
    whole, lengths = encode(tf.constant(texts))
    cut, same = encode(tf.constant(texts), last=CONTEXT)
    assert lengths.numpy().tolist() == same.numpy().tolist()
    assert whole.shape[1] > 50_000
    assert cut.shape == (4, CONTEXT)
    for row, size in enumerate(lengths.numpy()):
        assert cut[row, : min(size, CONTEXT)].numpy().tolist() == whole[row, :size][-CONTEXT:].numpy().tolist()
        assert not cut[row, size:].numpy().any()
    # `score` returns ids and log-probabilities of whole texts, so it refuses this many.
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"text has \d+ tokens with padding: give at most 1048576"):
        exported.ask("score", text=["import x"] * 300 + [texts[1]])


# Seeds and neighbours


def test_a_row_depends_on_itself_alone(exported: Export, rows: list[Row], alone: list[dict[str, Any]]) -> None:
    """Parameters, seeds or stop strings of another row; a request of many rows refused or reassembled wrongly."""
    assert exported.generate(rows) == alone
    order = random.Random(0).sample(range(30), 30)
    assert exported.generate([rows[number] for number in order]) == [alone[number] for number in order]
    assert exported.generate(rows[3:8]) == alone[3:8]
    assert len({answer["completion"] for answer in alone}) > 15


def test_hundreds_of_rows(exported: Export) -> None:
    """A request refused because it is larger than a batch, or rows returned in another order."""
    rng = random.Random(8)
    count = 2 * 256 + 5
    ids = [[rng.randrange(512)] for _ in range(count)]
    params = {"max_new_tokens": [2], "temperature": [1.0], "seed": [3]}
    together = exported.ask("generate_tokens", input_ids=ids, attention_mask=[[1]] * len(ids), **params)
    for row in (0, 7, 8, count - 6, count - 5, count - 1):
        single = exported.ask("generate_tokens", input_ids=[ids[row]], attention_mask=[[1]], **params)
        size = single["completion_tokens"][0]
        assert together["completion_tokens"][row] == size
        assert together["output_ids"][row][:size] == single["output_ids"][0]
    assert len({tuple(row) for row in together["output_ids"]}) > 100


def test_seeds(exported: Export, tokens_only: Export) -> None:
    """A seed that applies to the batch, to one signature only, or not at all; seed -1 that is always the same."""
    params: dict[str, Any] = {"prompt": ["x"] * 6, "temperature": [1.5]}
    texts = exported.ask("generate", seed=[4, 5, 4, -1, -1, 2**63 - 1], **params)["completion_bytes"]
    assert texts[0] == texts[2]
    assert len(set(texts)) == 5
    again = exported.ask("generate", seed=[5, -1, -1, -1, 4, 4], **params)["completion_bytes"]
    assert again[0] == texts[1]
    assert again[4:] == [texts[0]] * 2
    assert not set(again[1:4]) & set(texts)
    ids = {"input_ids": [[55]], "attention_mask": [[1]], "temperature": [1.5], "seed": [4]}
    answer = exported.ask("generate_tokens", **ids)
    assert answer.items() >= tokens_only.ask("generate_tokens", **ids).items()


# Ends of rows


def test_stop_strings(exported: Export) -> None:
    """Text not cut before the stop string, cut at another occurrence, or at one in the prompt."""
    plain = [
        {"prompt": "a stop ", "max_new_tokens": 40, "temperature": 1.5, "seed": seed, "stop": b""} for seed in range(24)
    ]
    before = exported.generate(plain)
    rng = random.Random(1)
    stops = []
    for answer in before:
        raw = answer["completion_bytes"]
        start = rng.randrange(max(1, len(raw)))
        stops.append(raw[start : start + rng.randrange(1, 12)])
    stops[:4] = [b"a stop", b"", b"not in the text", "é".encode()]
    after = exported.generate([row | {"stop": stop} for row, stop in zip(plain, stops, strict=True)])
    found = 0
    for old, new, stop in zip(before, after, stops, strict=True):
        if stop and stop in old["completion_bytes"]:
            found += 1
            assert new["completion_bytes"] == old["completion_bytes"][: old["completion_bytes"].find(stop)]
            assert new["finish_reason"] == b"stop"
            assert new["completion_tokens"] <= old["completion_tokens"]
        else:
            assert new == old
    assert found > 15


def test_characters_as_stop_strings(exported: Export) -> None:
    """A stop string of several bytes that is missed if its bytes come from several tokens."""
    sampled = [{"prompt": "x", "max_new_tokens": 90, "temperature": 8.0, "seed": seed} for seed in range(48)]
    texts = [answer["completion"].decode() for answer in exported.generate([row | {"stop": ""} for row in sampled])]
    wide = [
        (row, text, c) for row, text in zip(sampled, texts, strict=True) for c in text if c > "\x7f" and c != "\ufffd"
    ]
    assert wide
    answers = exported.generate([row | {"stop": character} for row, _, character in wide])
    assert [answer["completion"].decode() for answer in answers] == [text[: text.index(c)] for _, text, c in wide]
    assert {answer["finish_reason"] for answer in answers} == {b"stop"}


def test_eos(exported: Export) -> None:
    """An EOS that is not counted, does not end its row or ends others, or tokens after it."""
    ids = [[number] for number in range(60, 100)]
    ones = [[1]] * 40
    answer = exported.ask("generate_tokens", input_ids=ids, attention_mask=ones, max_new_tokens=[30])
    ended = 0
    for row, count in zip(answer["output_ids"], answer["completion_tokens"], strict=True):
        assert set(row[count:]) <= {EOS[0]}
        assert not set(row[: count - 1]) & set(EOS)
        assert count == 30 or row[count - 1] in EOS
        ended += count < 30
    assert 0 < ended < 40
    assert max(answer["completion_tokens"]) == len(answer["output_ids"][0])


def test_lengths(exported: Export, tokenizer: Any, documents: list[str]) -> None:
    """A row that continues beyond its max_new_tokens or the context, or a wrong finish_reason."""
    prompt = prefix_of_tokens(tokenizer, documents[9], CONTEXT - 2)
    answer = exported.ask(
        "generate", prompt=[prompt, "x", "x", prompt], max_new_tokens=[95, 1, 3, 1], temperature=[0.5]
    )
    assert answer["prompt_tokens"] == [CONTEXT - 2, *[len(tokenizer("x")["input_ids"])] * 2, CONTEXT - 2]
    most = [2, 1, 3, 1]
    for count, limit, reason in zip(answer["completion_tokens"], most, answer["finish_reason"], strict=True):
        assert count == limit if reason == b"length" else 0 < count <= limit
    assert b"length" in answer["finish_reason"]


def test_ends_when_all_rows_are_finished(exported: Export) -> None:
    """A loop that runs to the limit although every row has stopped."""
    long = next(
        row
        for seed in range(100)
        for row in [{"prompt": "x", "max_new_tokens": 90, "temperature": 8.0, "seed": seed, "stop": b""}]
        if exported.generate([row])[0]["completion_tokens"] == 90
    )
    first = exported.generate([long | {"max_new_tokens": 2}])[0]["completion_bytes"]
    assert first

    def seconds(row: Row) -> float:
        began = time.perf_counter()
        exported.generate([row])
        return time.perf_counter() - began

    short = long | {"stop": first[:1]}
    assert exported.generate([short])[0]["completion_tokens"] <= 2
    assert min(seconds(long) for _ in range(5)) > 3 * min(seconds(short) for _ in range(5))


# Refusals

TWO = {"prompt": ["x", "y"]}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"prompt": ["x", ""]}, r"prompt\[1\] is empty"),
        ({"prompt": []}, "prompt is empty: give at least one row"),
        ({"prompt": "x"}, "prompt has rank 0"),
        ({"prompt": [["x"]]}, "prompt has rank 2"),
        ({"prompt": ["x", "x" * 2000]}, rf"prompt\[1\] has \d+ tokens, and the context holds {CONTEXT}"),
        (TWO | {"temperature": [0.0, -1.0]}, r"temperature\[1\] is -1"),
        (TWO | {"temperature": [math.nan]}, r"temperature\[0\] is nan"),
        (TWO | {"temperature": [1.0, math.inf]}, r"temperature\[1\] is inf"),
        (TWO | {"top_p": [1.0, 0.0]}, r"top_p\[1\] is 0"),
        (TWO | {"top_p": [1.5, 1.0]}, r"top_p\[0\] is 1.5"),
        (TWO | {"top_p": [1.0, math.nan]}, r"top_p\[1\] is nan"),
        (TWO | {"top_k": [5, -1]}, r"top_k\[1\] is -1"),
        (TWO | {"repetition_penalty": [0.0, 1.0]}, r"repetition_penalty\[0\] is 0"),
        (TWO | {"repetition_penalty": [1.0, math.inf]}, r"repetition_penalty\[1\] is inf"),
        (TWO | {"seed": [-1, -2]}, r"seed\[1\] is -2"),
        (TWO | {"max_new_tokens": [0, 1]}, r"max_new_tokens\[0\] is 0: give 1 to 95"),
        (TWO | {"max_new_tokens": [1, 96]}, r"max_new_tokens\[1\] is 96"),
        (TWO | {"top_k": [1, 2, 3]}, "top_k has 3 values for 2 rows"),
        (TWO | {"stop": []}, "stop has 0 values for 2 rows"),
        (TWO | {"stop": ["", "é" * 32 + "x"]}, r"stop\[1\] is too long: give at most 64 bytes"),
        ({"prompt": ["x"] * 4097}, "prompt has 4097 rows: give at most 4096"),
        ({"prompt": ["x" * 2**22, "x"]}, "prompt has 4194305 bytes in all rows together: give at most 4194304"),
    ],
)
def test_refused(exported: Export, inputs: dict[str, Any], message: str) -> None:
    """An invalid request that is answered, or an error that does not name the input and the row."""
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        exported.ask("generate", **inputs)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1], [512]], [[1], [1]], r"input_ids\[1\] has an id that is no token: give 0 to 511"),
        ([[-1], [5]], [[1], [1]], r"input_ids\[0\] has an id that is no token"),
        ([[1, 2]], [[1]], "attention_mask has another shape"),
        ([[1], [2]], [[1]], "attention_mask has another shape"),
        ([[1, 2], [3, 4]], [[1, 1], [1, 2]], r"attention_mask\[1\] has other values"),
        ([[1, 2], [3, 4]], [[1, 1], [0, 0]], r"input_ids\[1\] has no token"),
        ([[]], [[]], r"input_ids\[0\] has no token"),
        ([1, 2], [1, 1], "input_ids has rank 1"),
        ([[1, 2]], [1, 1], "attention_mask has rank 1"),
        ([[[1]]], [[[1]]], "input_ids has rank 3"),
        (np.zeros([0, 3]), np.zeros([0, 3]), "input_ids is empty"),
        (np.ones([4097, 1]), np.ones([4097, 1]), "input_ids has 4097 rows: give at most 4096"),
        (
            [[1]],
            np.ones([2, MAX_REQUEST_TOKENS]),
            r"attention_mask has 2097152 tokens with padding: give at most 1048576",
        ),
        ([[1] * CONTEXT] * 2, [[1] * 5 + [0] * (CONTEXT - 5), [1] * CONTEXT], r"input_ids\[1\] has 96 tokens"),
    ],
)
def test_tokens_refused(exported: Export, ids: Any, mask: Any, message: str) -> None:
    """Invalid ids that are read as others or fail without naming the input, or padding taken for tokens."""
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        exported.ask("generate_tokens", input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (["import x", "x"], r"text\[1\] has fewer than 2 tokens"),
        ([""], r"text\[0\] has fewer than 2 tokens"),
        ([], "text is empty"),
        ("x", "text has rank 0"),
    ],
)
def test_scores_refused(exported: Export, text: Any, message: str) -> None:
    """A mean over no tokens, which is NaN."""
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        exported.ask("score", text=text)


@pytest.mark.parametrize("signature", ["generate", "generate_tokens", "score", "serving_default"])
def test_too_many_rows_take_no_memory(exported: Export, signature: str) -> None:
    """A small compressed request with millions of rows, for each of which a whole context is allocated."""
    rows = 1_000_000
    inputs: dict[str, Any] = {
        "generate": {"prompt": np.full(rows, "a")},
        "generate_tokens": EXTRAS_OFF | {"input_ids": np.ones([rows, 1]), "attention_mask": np.ones([rows, 1])},
        "score": {"text": np.full(rows, "a")},
        "serving_default": {"prompt": np.full(rows, "a")},
    }[signature]
    tensors = to_tensors(signature, inputs)
    before = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    with pytest.raises(tf.errors.InvalidArgumentError, match="has 1000000 rows: give at most 4096"):
        exported.signatures[signature](**tensors)
    assert memory_mib("VmHWM") - before < 100


def memory_mib(figure: str) -> float:
    """A figure of this process's memory in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[figure].split()[0]) / 1024


def test_params_of_any_rank(exported: Export) -> None:
    """A parameter as a scalar or a column, which JSON clients send, refused or broadcast the wrong way."""
    flat = exported.ask("generate", prompt=["x", "y"], max_new_tokens=[2, 9])
    assert exported.ask("generate", prompt=["x", "y"], max_new_tokens=[[2], [9]]) == flat
    assert exported.ask("generate", prompt=["x", "y"], max_new_tokens=[2, 9], temperature=0.0, stop="") == flat


def test_padding_does_not_matter(exported: Export) -> None:
    """Padding that is supported on one side only, or masked ids that are read."""
    clean = exported.ask("generate_tokens", input_ids=[[5, 6, 7]], attention_mask=[[1, 1, 1]])
    ids = [[5, 6, 7, 9999, -1, 0], [0, 0, 0, 5, 6, 7], [5, 1, 6, 1, 1, 7]]
    mask = [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 0, 1]]
    padded = exported.ask("generate_tokens", input_ids=ids, attention_mask=mask)
    # Products of one row and of three are rounded differently.
    logprobs = clean.pop("token_logprobs")
    np.testing.assert_allclose(padded.pop("token_logprobs"), logprobs * 3, rtol=0, atol=1e-5)
    assert padded == {name: value * 3 for name, value in clean.items()}
    wide = exported.ask("generate_tokens", input_ids=[[5, 6, 7] + [0] * 200], attention_mask=[[1] * 3 + [0] * 200])
    assert wide.pop("token_logprobs") == logprobs
    assert wide == clean


def test_truncated_prompts(tokens_only: Export) -> None:
    """A prompt cut on the wrong side, too short, or because another row is long."""
    rng = random.Random(2)
    prompts = [[rng.randrange(512) for _ in range(length)] for length in (300, 90, 10, 96, 86)]
    new = [10, 10, 10, 95, 10]
    width = 300
    together = tokens_only.ask(
        "generate_tokens",
        input_ids=[prompt + [0] * (width - len(prompt)) for prompt in prompts],
        attention_mask=[[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts],
        max_new_tokens=new,
    )
    for row, (prompt, count) in enumerate(zip(prompts, new, strict=True)):
        cut = prompt[-(CONTEXT - count) :]
        single = tokens_only.ask(
            "generate_tokens", input_ids=[cut], attention_mask=[[1] * len(cut)], max_new_tokens=[count]
        )
        size = single["completion_tokens"][0]
        assert together["completion_tokens"][row] == size
        assert together["output_ids"][row][:size] == single["output_ids"][0][:size]


def test_tokens_alone(tokens_only: Export) -> None:
    """An unsupported tokenizer that is exported all the same, or no signature `serving_default`."""
    assert sorted(tokens_only.signatures) == ["describe", "generate_tokens", "serving_default"]
    ids = {name: tf.constant([[3, 4]]) for name in ("input_ids", "attention_mask")} | {
        "attention_mask": tf.ones([1, 2], 3)
    }
    given = {name: value for name, value in (PARAMS | EXTRAS_OFF).items() if name != "stop"}
    params = {name: tf.constant(value, TYPES[name]) for name, value in given.items()}
    answer = tokens_only.signatures["serving_default"](**ids, **params)
    assert answer["completion_tokens"].numpy() > 0
    assert "completion_bytes" not in answer


# Parameters and outputs of `generate_tokens` alone


def expected_row(model: Any, pieces: list[bytes], row: Row) -> dict[str, Any]:
    """The greedy tokens of a row and their log-probabilities, by the model's own logits and a plain loop in NumPy."""
    text, new, logprobs = b"", [], []
    while True:
        logits = model(tf.constant([row["input_ids"] + new]), training=False).logits[0, -1].numpy().astype(np.float64)
        exact = logits - np.log(np.exp(logits).sum())
        for token, bias in zip(row["logit_bias_ids"], row["logit_bias"], strict=True):
            logits[token] += bias if token >= 0 else 0
        early = len(new) < row["min_new_tokens"]
        logits[EOS] -= np.inf if early else 0
        for token in {*row["input_ids"], *new}:
            penalty = row["repetition_penalty"]
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        for token in set(new):
            logits[token] -= row["frequency_penalty"] * new.count(token) + row["presence_penalty"]
        new.append(int(logits.argmax()))
        logprobs.append(exact)
        ends = range(len(text) + 1, len(text) + len(pieces[new[-1]]) + 1)
        text += pieces[new[-1]]
        found = [end - len(s) for end in ends for s in sorted(row["stop"])[::-1] if s and text[:end].endswith(s)]
        if (found and not early) or new[-1] in EOS or len(new) == row["max_new_tokens"]:
            break
    stopped = bool(found and not early)
    return {
        "output_ids": new,
        "finish_reason": b"stop" if stopped or new[-1] in EOS else b"length",
        "completion_bytes": text[: found[0]] if stopped else text,
        "logprobs": logprobs,
    }


def random_row(rng: random.Random) -> Row:
    """A greedy row with some of the parameters."""
    return {
        "input_ids": [rng.randrange(512) for _ in range(rng.choice([1, 6, 20]))],
        "max_new_tokens": rng.choice([6, LIMIT]),
        "repetition_penalty": rng.choice([1.0, 1.2]),
        "min_p": rng.choice([0.0, 0.5]),
        "presence_penalty": rng.choice([0.0, 0.0, -0.5, 2.0]),
        "frequency_penalty": rng.choice([0.0, 0.0, -0.5, 1.0]),
        "min_new_tokens": rng.choice([0, 0, 3, 6]),
        # EOS are likely enough to end many rows.
        "logit_bias_ids": rng.choice([[-1, -1], [EOS[1], 300], [300, 301], [EOS[2], -1]]),
        "logit_bias": rng.choice([[2.0, -3.0], [0.5, 1.5]]),
        "top_logprobs": rng.choice([0, 0, 1, 5, 20]),
        "stop": rng.choice([[b"", b""], [b"e", b"the"], [b"t", b"it"], [b"\n", b" "]]),
    }


def ask_rows(one: Export, rows: list[Row]) -> list[dict[str, Any]]:
    """The answers to rows in one request to `generate_tokens`, without padding."""
    width = max(len(row["input_ids"]) for row in rows)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns["input_ids"] = [[0] * (width - len(ids)) + ids for ids in columns["input_ids"]]
    columns["attention_mask"] = [[0] * (width - len(row["input_ids"])) + [1] * len(row["input_ids"]) for row in rows]
    answer = one.ask("generate_tokens", **columns)
    result = [dict(zip(answer, values, strict=True)) for values in zip(*answer.values(), strict=True)]
    most = max(row["top_logprobs"] for row in rows)
    for row, values in zip(rows, result, strict=True):
        count, top = values["completion_tokens"], row["top_logprobs"]
        assert {len(ids) for ids in values["top_ids"]} == {most}
        # Where there is none, an id is -1 and a log-probability 0.
        assert not any(values["token_logprobs"][count:])
        for number, (ids, logprobs) in enumerate(zip(values["top_ids"], values["top_logprobs"], strict=True)):
            there = top if number < count else 0
            assert ids[there:] == [-1] * (most - there)
            assert not any(logprobs[there:])
        for name in ("output_ids", "token_logprobs", "top_ids", "top_logprobs"):
            values[name] = values[name][:count]
        for name in ("top_ids", "top_logprobs"):
            values[name] = [each[:top] for each in values[name]]
    return result


def pieces_of(tokenizer: Any) -> list[bytes]:
    """The bytes of each token, by the decoder of `tokenizers`."""
    vocabulary = {number: token for token, number in tokenizer.get_vocab().items()}
    points = bytes_to_unicode()
    bytes_of = {character: byte for byte, character in points.items()}
    return [bytes(bytes_of[c] for c in vocabulary[i]) if i else b"" for i in range(512)]


@pytest.mark.parametrize("name", ["exported", "compiled"])
def test_parameters_of_tokens(name: str, tokenizer: Any, request: pytest.FixtureRequest) -> None:
    """A penalty, bias or end by another definition, or another row's; log-probabilities of what was sampled from."""
    one, rng = request.getfixturevalue(name), random.Random(12)
    rows = [random_row(rng) for _ in range(40 if name == "exported" else 12)]
    pieces, ties = pieces_of(tokenizer), 0
    alone = [ask_rows(one, [row])[0] for row in rows]
    for start in range(0, len(rows), 7):
        together = ask_rows(one, rows[start : start + 7])
        for row, answer, single in zip(rows[start:], together, alone[start:], strict=False):
            expected = expected_row(one.model, pieces, row)
            if answer["output_ids"] != expected["output_ids"]:
                ties += 1  # as in `assert_like_generate`
                continue
            assert answer["finish_reason"] == expected["finish_reason"]
            assert answer["completion_bytes"] == expected["completion_bytes"]
            for number, exact in enumerate(expected["logprobs"]):
                ids = [answer["output_ids"][number], *answer["top_ids"][number]]
                found = [answer["token_logprobs"][number], *answer["top_logprobs"][number]]
                np.testing.assert_allclose(found, exact[ids], atol=1e-4)
                likeliest = np.sort(exact)[::-1][: row["top_logprobs"]]
                np.testing.assert_allclose(found[1:], likeliest, atol=1e-4)
            exactly = ("output_ids", "top_ids", "finish_reason", "completion_bytes")
            assert [answer[key] for key in exactly] == [single[key] for key in exactly]
            np.testing.assert_allclose(answer["token_logprobs"], single["token_logprobs"], atol=1e-5)
    assert ties <= 1
    ends = [answer["finish_reason"] for answer in alone]
    assert len(rows) // 6 < ends.count(b"stop") < len(rows)
    assert len({tuple(answer["output_ids"]) for answer in alone}) > len(rows) // 2


def test_sampled_parameters_of_tokens(exported: Export, rows: list[Row]) -> None:
    """Parameters of rows that join others while these are decoded, and log-probabilities in another row's place."""
    rng = random.Random(13)
    some = [random_row(rng) | {"temperature": rng.choice([0.0, 1.0]), "seed": number} for number in range(24)]
    alone = [ask_rows(exported, [row])[0] for row in some]
    with ThreadPoolExecutor(8) as pool:
        numbers = [rng.sample(range(24), rng.randrange(1, 6)) for _ in range(20)]
        other = pool.map(lambda at: exported.generate([rows[each] for each in at]), numbers)
        answers = list(pool.map(lambda at: ask_rows(exported, [some[each] for each in at]), numbers))
    assert len(list(other)) == 20
    for at, answer in zip(numbers, answers, strict=True):
        for each, found in zip(at, answer, strict=True):
            assert found["output_ids"] == alone[each]["output_ids"]
            assert found["top_ids"] == alone[each]["top_ids"]
            np.testing.assert_allclose(found["token_logprobs"], alone[each]["token_logprobs"], atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"min_p": [0.0, 1.5]}, r"min_p\[1\] is 1.5\d*: give 0 \(off\) to 1"),
        ({"presence_penalty": [math.nan]}, r"presence_penalty\[0\] is nan: give -2 to 2"),
        ({"frequency_penalty": [-2.5]}, r"frequency_penalty\[0\] is -2.5\d*: give -2 to 2"),
        ({"min_new_tokens": [17]}, r"min_new_tokens\[0\] is 17: give 0 \(off\) to max_new_tokens"),
        ({"logit_bias_ids": [[512]]}, r"logit_bias_ids\[0\] has 512: give 0 to 511, or -1 for none"),
        (
            {"logit_bias": [[0.0], [101.0]], "logit_bias_ids": [[1], [2]]},
            r"logit_bias\[1\] has 101.0*: give -100 to 100",
        ),
        ({"logit_bias": [[0.0, 1.0]]}, "logit_bias has another shape than logit_bias_ids"),
        ({"logit_bias_ids": [[[1]]], "logit_bias": [[1.0]]}, r"logit_bias_ids has rank 3: give rank 2, \[B, N\]"),
        ({"stop": [["a"] * 5]}, "stop has 5 values per row: give at most 4"),
        ({"stop": [["a"]] * 3}, "stop has 3 lists for 2 rows: give one, or one per row"),
        ({"stop": [["a", "b" * 65]]}, r"stop\[0\] is too long: give at most 64 bytes"),
        ({"top_logprobs": [21]}, r"top_logprobs\[0\] is 21: give 0 to 20"),
    ],
)
def test_parameters_of_tokens_refused(exported: Export, inputs: dict[str, Any], message: str) -> None:
    """An invalid value that is used, or an error that does not name the input and the row."""
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        exported.ask("generate_tokens", input_ids=[[1], [2]], attention_mask=[[1], [1]], **inputs)


def test_too_many_log_probabilities(exported: Export) -> None:
    """A small request whose answer takes gigabytes."""
    rows = 1024
    ids = {"input_ids": [[1]] * rows, "attention_mask": [[1]] * rows}
    with pytest.raises(tf.errors.InvalidArgumentError, match="top_logprobs has 1945600 log-probabilities"):
        exported.ask("generate_tokens", **ids, max_new_tokens=[95], top_logprobs=[20])


def test_lists_of_one_value(exported: Export) -> None:
    """Clients that send one value per row where a row may have several, as for all other parameters."""
    ids = {"input_ids": [[5], [6]], "attention_mask": [[1], [1]], "max_new_tokens": [8]}
    lists = exported.ask("generate_tokens", **ids, logit_bias_ids=[[7], [8]], logit_bias=[[90.0]] * 2, stop=[["e"]] * 2)
    flat = exported.ask("generate_tokens", **ids, logit_bias_ids=[7, 8], logit_bias=[90.0, 90.0], stop=["e", "e"])
    assert flat == lists
    assert [set(row) for row in flat["output_ids"]] == [{7}, {8}]


# Scores


def test_scores(exported: Export, tokenizer: Any, documents: list[str]) -> None:
    """A loss that differs from `tfclm.perplexity`: padding scored, tokens scored twice, or a mean of means."""
    texts = [documents[3][:size] for size in (4, 20, 150)] + [documents[5][:3000], documents[7][:500]]
    # The edges of the windows.
    for size in (CONTEXT, CONTEXT + 1, CONTEXT + CONTEXT // 2, CONTEXT + CONTEXT // 2 + 1):
        texts.append(prefix_of_tokens(tokenizer, documents[9], size))
    assert_like_perplexity(exported, tokenizer, texts)


def assert_like_perplexity(exported: Export, tokenizer: Any, texts: list[str]) -> None:
    """`score` equals `tfclm.perplexity` up to 1e-5; both sum float32 log-probabilities in float64."""
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    together = exported.ask("score", text=texts)
    for row, text in enumerate(texts):
        tokens = tokenizer(text)["input_ids"]
        if len(tokens) > CONTEXT:
            expected = perplexity(exported.model, tokens, window=CONTEXT, stride=CONTEXT // 2)
        else:
            expected = perplexity(exported.model, [tokens])
        for answer, index in ((together, row), (exported.ask("score", text=[text]), 0)):
            loss, count = answer["loss"][index], answer["token_count"][index]
            assert count == expected.tokens == len(tokens) - 1
            assert loss == pytest.approx(expected.loss, rel=1e-5)
            # The exponential of a loss of 100, which weights this large can give, exceeds float32.
            if expected.loss < 80:
                assert answer["perplexity"][index] == pytest.approx(expected.perplexity, rel=1e-5)
            assert answer["token_ids"][index][: len(tokens)] == tokens
            logprobs = answer["token_logprobs"][index]
            assert logprobs[0] == 0
            assert not any(logprobs[len(tokens) :])
            assert sum(logprobs) == pytest.approx(-loss * count, rel=1e-5)


@pytest.mark.parametrize("bos", [pytest.param("<s>", marks=pytest.mark.long), "<s> <|endoftext|>"])
def test_scores_with_a_bos(tokenizer_dir: Path, documents: list[str], bos: str) -> None:
    """Windows after the first one without the BOS, or a score of the BOS itself; the reference is a plain loop."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = put_bos(AutoTokenizer.from_pretrained(tokenizer_dir))
    added = [("<s>", 512), ("<|endoftext|>", 0)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=added)
    model = create(tiny_config("gpt2", vocab_size=513, context=32))
    model.set_weights([3 * weight for weight in model.get_weights()])
    score = GenerationModule(model, tokenizer, ServableSettings()).signatures()["score"]
    prefix = prefix_ids(tokenizer)
    room = 32 - len(prefix)
    texts = [documents[9][:10], documents[5][:300], documents[7][:150]]
    texts += [prefix_of_tokens(tokenizer, documents[9], size) for size in (32, 33, 48, 49)]
    answer = {name: value.numpy() for name, value in score(text=tf.constant(texts)).items()}
    for row, text in enumerate(texts):
        ids, end_before = tokenizer(text, add_special_tokens=False)["input_ids"], 0
        logprobs, likeliest = [], []
        while end_before < len(ids):
            begin = max(0, end_before - room + 16) if end_before else 0
            window = [*prefix, *ids[begin : begin + room]]
            logits = tf.nn.log_softmax(tf.cast(model(tf.constant([window])).logits[0], tf.float64)).numpy()
            end = min(begin + room, len(ids))
            places = [len(prefix) + i - begin - 1 for i in range(end_before, end)]
            logprobs += [logits[place, ids[i]] for place, i in zip(places, range(end_before, end), strict=True)]
            likeliest += logits[places].argmax(-1).tolist()
            end_before = end
        assert answer["token_count"][row] == len(logprobs) == len(ids)
        found, first = answer["token_logprobs"][row], len(prefix)
        assert not found[: len(prefix)].any()
        assert not found[len(prefix) + len(ids) :].any()
        np.testing.assert_allclose(found[len(prefix) : len(prefix) + len(ids)], logprobs, atol=1e-4)
        greedy = answer["greedy_ids"][row]
        assert (greedy == -1).tolist() == [not first <= at < first + len(ids) for at in range(len(greedy))]
        assert (greedy[first : first + len(ids)] == likeliest).mean() > 0.99
        assert answer["loss"][row] == pytest.approx(-np.mean(logprobs), rel=1e-5)
        library = perplexity(model, tokenizer(text)["input_ids"], window=32, stride=16, prefix=prefix)
        assert (library.tokens, library.loss) == (len(ids), pytest.approx(-np.mean(logprobs), rel=1e-5))
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"fewer than {len(prefix) + 1} tokens"):
        score(text=tf.constant([""]))


# The tokenizer and the description


def test_tokenize_and_detokenize(exported: Export, tokenizer: Any, documents: list[str]) -> None:
    """Padding that looks like a token or is in the text; bytes of a character that are not there to be joined."""
    texts = [documents[9][:70], "", "<|endoftext|>né 漢字", "x"]
    answer = exported.ask("tokenize", text=texts)
    ids = tokenizer(texts)["input_ids"]
    width = max(map(len, ids))
    assert answer["token_count"] == [len(row) for row in ids]
    assert answer["token_ids"] == [row + [-1] * (width - len(row)) for row in ids]
    back = exported.ask("detokenize", token_ids=answer["token_ids"])
    assert [text.decode() for text in back["text"]] == tokenizer.batch_decode(ids, skip_special_tokens=True)
    cut = exported.ask("detokenize", token_ids=[[*row[:-1], -1, row[-1]] for row in answer["token_ids"][2:3]])
    assert cut == {name: values[2:3] for name, values in back.items()}
    half = tokenizer("é")["input_ids"][:1]
    assert len(tokenizer("é")["input_ids"]) == 2
    assert exported.ask("detokenize", token_ids=[half]) == {"text": ["\ufffd".encode()], "text_bytes": [b"\xc3"]}
    for bad in ([[512]], [[-2]]):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"token_ids\[0\] has an id that is no token"):
            exported.ask("detokenize", token_ids=bad)


def test_describe(exported: Export, tokens_only: Export) -> None:
    """What a program needs and cannot find out, or a description that is not JSON."""
    answer = exported.ask("describe", query=["", "x"])["description"]
    assert answer[0] == answer[1]
    told = json.loads(answer[0])
    assert (told["model_type"], told["context"], told["eos_ids"]) == ("gpt2", CONTEXT, EOS)
    assert told["limits"]["max_new_tokens"] == CONTEXT - 1
    assert told["limits"]["top_logprobs"] == 20
    assert told["defaults"]["max_new_tokens"] == CONTEXT - 1
    assert told["special_tokens"]["eos_token"] == {"text": "<|endoftext|>", "id": 0}
    assert told["signatures"] == sorted(exported.signatures)
    assert told["tokenizer_problem"] is None
    assert "CTC" in json.loads(tokens_only.ask("describe", query=["x"])["description"][0])["tokenizer_problem"]


# Unmodified servers

OTHER_PROCESS = """
import json, sys
import tensorflow as tf
from tensorflow.python.framework import op_def_registry

from tfclm.compat import disable_xla

assert disable_xla() is None
request = json.load(sys.stdin)
answers = {"unknown": [op for op in request["ops"] if op_def_registry.get(op) is None], "texts": []}
loaded = {folder: tf.saved_model.load(folder) for folder in {folder for folder, _ in request["requests"]}}
for folder, inputs in request["requests"]:
    generate = loaded[folder].signatures["generate"]
    tensors = {name: tf.constant(value, dtype) for name, (value, dtype) in inputs.items()}
    try:
        answers["texts"].append([data.hex() for data in generate(**tensors)["completion_bytes"].numpy()])
    except tf.errors.OpError as error:
        answers["texts"].append(error.message)
print(json.dumps(answers))
"""


def ask_in_other_process(requests: list[tuple[Path, list[Row]]], ops: set[str]) -> dict[str, Any]:
    """`completion_bytes`, or the error, in another process with XLA disabled, and the ops that TensorFlow lacks."""
    tensors = []
    for folder, rows in requests:
        columns = PARAMS | {"stop": [""]} | {name: [row[name] for row in rows] for name in rows[0]}
        named = {name: (value, TYPES.get(name, tf.string).name) for name, value in columns.items()}
        tensors.append((str(folder), named))
    run = forked.run(OTHER_PROCESS, stdin=json.dumps({"requests": tensors, "ops": sorted(ops)}))
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def ops_and_functions(folder: Path) -> tuple[set[str], list[Any]]:
    """The ops and the functions of a SavedModel."""
    (graph,) = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes()).meta_graphs
    functions = list(graph.graph_def.library.function)
    ops = {node.op for node in graph.graph_def.node} | {node.op for one in functions for node in one.node_def}
    return ops - {one.signature.name for one in functions}, functions


def must_compile(functions: list[Any]) -> list[str]:
    """Functions, and calls in them, that only XLA can run."""
    flags = ("_XlaMustCompile", "jit_compile")
    found = [one.signature.name for one in functions for flag in flags if one.attr[flag].b]
    return found + [node.name for one in functions for node in one.node_def for flag in flags if node.attr[flag].b]


def test_runs_on_unmodified_servers(
    exported: Export, compiled: Export, rows: list[Row], alone: list[dict[str, Any]]
) -> None:
    """An op that an unmodified server lacks, or that needs XLA; a seed that differs between processes."""
    ops, functions = ops_and_functions(exported.folder)
    assert not [op for op in ops if op.startswith("Xla")]
    assert not must_compile(functions)
    # The check can fail.
    assert must_compile(ops_and_functions(compiled.folder)[1])
    unseeded = {"prompt": "x", "temperature": 1.5}
    requests = [(exported.folder, [unseeded]), (exported.folder, rows), (compiled.folder, [unseeded])]
    answers = ask_in_other_process(requests, ops | {"SentencepieceOp"})
    assert answers["unknown"] == ["SentencepieceOp"]
    assert answers["texts"][0] != [exported.generate([unseeded])[0]["completion_bytes"].hex()]
    assert answers["texts"][1] == [answer["completion_bytes"].hex() for answer in alone]
    assert "XLA compilation disabled" in answers["texts"][2]


# Concurrent requests


def test_concurrent_requests(exported: Export, rows: list[Row], alone: list[dict[str, Any]]) -> None:
    """Rows of requests that are decoded together, returned to the wrong client or changed by other rows."""
    rng = random.Random(9)
    requests = [rng.sample(range(30), rng.randrange(1, 12)) for _ in range(24)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda numbers: exported.generate([rows[number] for number in numbers]), requests))
    assert answers == [[alone[number] for number in numbers] for numbers in requests]


@pytest.fixture(scope="module")
def batching(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """An export that samples by default and truncates prompts."""
    settings: dict[str, Any] = {"temperature": 1.5, "max_batch_size": 5}
    return export(tmp_path_factory.mktemp("batching"), tokenizer, 1, layers=1, truncate_prompts=True, **settings)


def test_settings_are_in_the_graph(batching: Export, exported: Export) -> None:
    """Turns of several requests in one batch, which are cancelled together, or a queue without limit."""
    for one in (exported, batching):
        nodes = [
            node
            for function in ops_and_functions(one.folder)[1]
            for node in function.node_def
            if node.op == "BatchFunction"
        ]
        assert nodes
        for node in nodes:
            assert node.attr["max_batch_size"].i == 1
            assert node.attr["num_batch_threads"].i == 1
            assert node.attr["max_enqueued_batches"].i == 1024


def test_defaults_and_truncated_prompts_of_texts(batching: Export, tokenizer: Any, documents: list[str]) -> None:
    """`serving_default` that ignores the default temperature; a long text cut at its end, or refused."""
    texts = batching.ask("serving_default", prompt=["x"] * 5)["generated_text"]
    assert len(set(texts)) > 1
    long = documents[5][:2000]
    params: dict[str, Any] = {"max_new_tokens": [16], "temperature": [0.0]}
    answer = batching.ask("generate", prompt=[long, "x", "y", "z", "import"], **params)
    assert answer["prompt_tokens"][0] == CONTEXT - 16
    assert answer["prompt_tokens"][1] == len(tokenizer("x")["input_ids"])
    ids = tokenizer(long)["input_ids"][-(CONTEXT - 16) :]
    cut = batching.ask("generate_tokens", input_ids=[ids] * 5, attention_mask=[[1] * len(ids)] * 5, **params)
    assert cut["completion_tokens"][0] == answer["completion_tokens"][0]
    shown = tokenizer.decode(cut["output_ids"][0][: cut["completion_tokens"][0]], skip_special_tokens=True)
    assert answer["completion"][0].decode() == shown
    assert answer["generated_text"][0].startswith(long.encode())


def test_two_models_in_one_process(exported: Export, compiled: Export, unsupported_tokenizer: Any) -> None:
    """Two models that share a queue, so that one answers with the other's weights.

    TensorFlow renames the queues of loaded models, so models that were not saved and loaded are tested too.
    """
    ids = {"input_ids": [[5, 6], [7, 8]], "attention_mask": [[1, 1], [1, 1]], "max_new_tokens": [LIMIT]}
    made = [
        GenerationModule(export.model, unsupported_tokenizer, ServableSettings()).signatures()
        for export in (exported, compiled)
    ]
    exports = [exported, compiled, *(Export(None, exported.folder, signatures) for signatures in made)]
    expected = [export.ask("generate_tokens", **ids)["output_ids"] for export in exports]
    assert expected[0] == expected[2] != expected[1] == expected[3]
    with ThreadPoolExecutor(8) as pool:
        asked = pool.map(lambda number: exports[number % 4].ask("generate_tokens", **ids)["output_ids"], range(32))
        answers = list(asked)
    assert answers == expected * 8


def test_loaded_twice(exported: Export, rows: list[Row], alone: list[dict[str, Any]]) -> None:
    """A queue that still runs the functions, or reads the weights, of an unloaded model."""
    loaded = tf.saved_model.load(str(exported.folder))
    first = Export(None, exported.folder, loaded.signatures)
    second = Export(None, exported.folder, tf.saved_model.load(str(exported.folder)).signatures)
    assert first.generate(rows[:3]) == alone[:3]
    assert second.generate(rows[:3]) == alone[:3]
    del first, loaded
    gc.collect()
    assert second.generate(rows) == alone


# Compiled by XLA


def test_compiled_is_transformers(compiled: Export) -> None:
    """Tokens that change because a prompt is padded to its bucket or a batch to its size."""
    assert_like_generate(compiled, 60)


@pytest.mark.long  # test_decoding and test_network test the loop and the network of each
@pytest.mark.parametrize("architecture", ["opt", "mistral"])
def test_other_architectures(architecture: str, tokenizer: Any, documents: list[str], tmp_path: Path) -> None:
    """A model whose code cannot be traced without AutoGraph, or whose cache differs from GPT-2's."""
    other = export(tmp_path, tokenizer, 3, architecture)
    assert_like_generate(other, 12)
    assert_like_perplexity(other, tokenizer, [documents[3][:40], documents[5][:3000]])


def assert_like_generate(exported: Export, count: int, penalty: float = 1.2) -> None:
    """Greedy tokens equal those of `generate`, for prompts of several lengths in requests of 2 to 16 rows."""
    rng = random.Random(6)
    lengths = [rng.choice([1, 2, 3, 7, 20, 31, 70] if LONG else [1, 3, 20, 70]) for _ in range(count)]
    prompts = [[rng.randrange(512) for _ in range(length)] for length in lengths]
    expected: list[list[int]] = [[]] * count
    for length in set(lengths):
        numbers = [row for row in range(count) if lengths[row] == length]
        ids = tf.constant([prompts[row] for row in numbers])
        options = {"do_sample": False, "repetition_penalty": penalty, "pad_token_id": 511}
        whole = exported.model.generate(ids, attention_mask=tf.ones_like(ids), max_new_tokens=LIMIT, **options).numpy()
        for row, tokens in zip(numbers, whole[:, length:].tolist(), strict=True):
            ends = [index for index, token in enumerate(tokens) if token in EOS]
            expected[row] = tokens[: ends[0] + 1] if ends else tokens
    ties = start = 0
    while start < count:
        rows = range(start, min(count, start + rng.randrange(2, 17)))
        start = rows.stop
        width = max(lengths[row] for row in rows)
        answer = exported.ask(
            "generate_tokens",
            input_ids=[prompts[row] + [0] * (width - lengths[row]) for row in rows],
            attention_mask=[[1] * lengths[row] + [0] * (width - lengths[row]) for row in rows],
            max_new_tokens=[LIMIT],
            repetition_penalty=[penalty],
        )
        for row, output, size in zip(rows, answer["output_ids"], answer["completion_tokens"], strict=True):
            if output[:size] != expected[row]:
                assert is_tie(exported.model, prompts[row], output[:size], expected[row], penalty)
                ties += 1
    # About one in 10,000 tokens has two candidates with scores this close.
    assert ties <= 1
    assert len({tuple(tokens) for tokens in expected}) > count // 2


def test_compiled_row_depends_on_itself_alone(compiled: Export, rows: list[Row]) -> None:
    """A row whose text depends on the compiled size."""
    some = rows[:6]
    together = compiled.generate(some)
    assert [compiled.generate([row])[0] for row in some] == together
    assert compiled.generate(some[::-1]) == together[::-1]
    assert len({answer["completion"] for answer in together}) > 3


COMPILED = """
import json, sys
from pathlib import Path
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

folder, dump = sys.argv[1:]
modules = lambda: len({path.name.split(".")[0] for path in Path(dump).glob("module_*")})
loaded = tf.saved_model.load(folder)
counts = [modules()]
for record in tf.data.TFRecordDataset(folder + "/assets.extra/tf_serving_warmup_requests"):
    log = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request
    inputs = {name: tf.constant(tf.make_ndarray(value)) for name, value in log.inputs.items()}
    loaded.signatures[log.model_spec.signature_name](**inputs)
counts.append(modules())
types = json.loads(sys.stdin.read())
for inputs in types:
    tensors = {name: tf.constant(value, kind) for name, (value, kind) in inputs.items()}
    name = "generate_tokens" if "input_ids" in inputs else "generate" if "stop" in inputs else "score"
    loaded.signatures[name](**tensors)
counts.append(modules())
print(json.dumps(counts))
"""


def test_no_request_compiles(compiled: Export, rows: list[Row], tmp_path: Path) -> None:
    """A size, parameter or signature that the warm-up did not compile, which takes seconds in the first request.

    XLA writes a file for each module that it compiles.
    """
    requests: list[dict[str, Any]] = []
    rng = random.Random(4)
    for count in (1, 2, 3, 4, 7):
        some = rows[:count]
        columns = PARAMS | {name: [row[name] for row in some] for name in rows[0]}
        requests.append({name: (value, TYPES.get(name, tf.string).name) for name, value in columns.items()})
        for length in (1, 8, 9, CONTEXT - 1):
            ids = [[rng.randrange(512) for _ in range(length)] for _ in range(count)]
            columns = PARAMS | EXTRAS_OFF | {"input_ids": ids, "attention_mask": [[1] * length] * count}
            columns |= {"max_new_tokens": [LIMIT], "top_logprobs": [length % 5], "stop": [["e", "\n"]]}
            columns |= {"logit_bias_ids": [[5] * count], "logit_bias": [[1.0] * count], "presence_penalty": [0.5]}
            requests.append({name: (value, TYPES.get(name, tf.string).name) for name, value in columns.items()})
    requests.append({"text": (["import x", "x" * 1000], "string")})
    # What is compiled is counted here, not what it computes.
    flags = [f"--xla_dump_to={tmp_path}", "--xla_dump_hlo_as_text", "--xla_backend_optimization_level=0"]
    run = forked.run(COMPILED, compiled.folder, tmp_path, stdin=json.dumps(requests), XLA_FLAGS=" ".join(flags))
    assert run.returncode == 0, run.stderr
    loaded, warm, asked = json.loads(run.stdout.splitlines()[-1])
    # Steps for two buckets times two batch sizes, and pieces of prompts for two buckets.
    assert loaded == 0
    assert warm >= 6
    assert asked == warm


def test_smaller_weights(compiled: Export, tokenizer: Any, tmp_path: Path) -> None:
    """Weights in the wrong layout or rounded in one place only; another text for a row that is decoded alone."""
    settings: dict[str, Any] = {"compile": "xla", "buckets": (CONTEXT,), "max_batch_size": 2}
    small = export(tmp_path, tokenizer, 4, layers=1, weights="bfloat16", max_new_tokens_limit=LIMIT, **settings)
    assert_like_generate(small, 30)
    params = {"attention_mask": [[1, 1, 1]], "max_new_tokens": [LIMIT]}
    alone = small.ask("generate_tokens", input_ids=[[5, 9, 300]], **params)
    both = {"attention_mask": [[1, 1, 1]] * 2, "max_new_tokens": [LIMIT]}
    together = small.ask("generate_tokens", input_ids=[[5, 9, 300], [7, 8, 1]], **both)
    count = alone["completion_tokens"][0]
    assert together["completion_tokens"][0] == count
    assert together["output_ids"][0][:count] == alone["output_ids"][0]
    matrix = small.model.transformer.wte.weights[0]
    assert (tf.cast(tf.cast(matrix, tf.bfloat16), tf.float32).numpy() == matrix.numpy()).all()
    sizes = [sum(file.stat().st_size for file in one.folder.glob("variables/*.data*")) for one in (small, compiled)]
    assert sizes[0] < 0.65 * sizes[1]

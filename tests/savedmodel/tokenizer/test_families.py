"""The tokenizers of families of models in the graph, compared with the fast tokenizers.

Each has the steps, settings and kinds of added tokens of the published tokenizer.json. The vocabularies are made here,
of text that was not split at all: a merge across any boundary gives other ids if the graph splits there, or does not.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import tensorflow as tf
from conftest import LONG, documents
from test_tokenizer import LLAMA3, batches_by_length, differences, in_graph, random_text
from test_tokenizer_kinds import BYTES
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tfclm.savedmodel.tokenizer.detokenizer import GraphDetokenizer
from tfclm.savedmodel.tokenizer.pre_tokenizers.splitting import split_steps
from tfclm.savedmodel.tokenizer.text import ORDINARY, Text

STRINGS = 1_000_000 if LONG else 2_000  # per family
BATCH = 20_000
# To go on after the strings that an earlier run has compared, a multiple of BATCH.
START = int(os.environ.get("TFCLM_FIRST_STRING", "0"))

Part = dict[str, Any]  # of a tokenizer.json
EMPTY: Part = json.loads(Tokenizer(models.BPE()).to_str())


def sequence(kind: str, *parts: Part) -> Part:
    """Steps of one kind: "normalizers", "pretokenizers", "decoders"."""
    return {"type": "Sequence", kind: list(parts)}


def splits(*parts: Part) -> Part:
    """A pre-tokenizer of several steps."""
    return sequence("pretokenizers", *parts)


def split(regex: str) -> Part:
    """A pre-tokenizer that makes each match a piece."""
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def replace(text: str, content: str) -> Part:
    """A normalizer or decoder that replaces a text."""
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def added(*contents: str, special: bool = True, normalized: bool = False, **settings: bool) -> list[AddedToken]:
    """Added tokens with the same settings."""
    return [AddedToken(content, special=special, normalized=normalized, **settings) for content in contents]


SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + SUFFIX
    + r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    + SUFFIX
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ALONE = BYTE_LEVEL | {"use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}
NFC = {"type": "NFC"}
MARKED = sequence("normalizers", {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁"))
FIRST = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
GEMMA_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
FALCON_SPLITS = splits(
    {"type": "Punctuation", "behavior": "Contiguous"},
    BYTE_LEVEL,
    {"type": "Digits", "individual_digits": False},
    split("[0-9][0-9][0-9]"),
)
UNSTRIPPED = [replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIPPED = [*UNSTRIPPED, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
RUNS = [size * character for character in ("\n", "▁", "\t") for size in range(2, 32)]
TAGS = ["<table>", "</table>", "<h1>", "<s>", "<code>", "[multimodal]", *(f"<unused{i}>" for i in range(6_000))]

# Steps that are missing in an entry are those of byte-level BPE, or with byte fallback, those of SentencePiece.
FAMILIES: dict[str, dict[str, Any]] = {
    # Llama 3 and its heirs, SmolLM3.
    "llama-3": {
        "pre_tokenizer": splits(split(LLAMA3), BYTES_ALONE),
        "model": {"ignore_merges": True},
        "bos": "<|begin_of_text|>",
        "added": added("<|begin_of_text|>", "<|eot_id|>", *(f"<|reserved_special_token_{i}|>" for i in range(20))),
        "clean_up": True,
    },
    # Phi-4, OLMo 2, Granite 4, StableLM 2.
    "phi-4": {
        "pre_tokenizer": splits(split(LLAMA3) | {"behavior": "Removed", "invert": True}, BYTES_ALONE),
        "added": [
            *added("<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|endoftext|>", lstrip=True, rstrip=True),
            *added("|||IP_ADDRESS|||", "<|fim_prefix|>", special=False),
        ],
    },
    # Qwen 2, 2.5 and 3.
    "qwen": {
        "normalizer": NFC,
        "pre_tokenizer": splits(split(LLAMA3.replace("{1,3}", "")), BYTES_ALONE),
        "added": [
            *added("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            *added("<tool_call>", "</tool_call>", "<think>", "</think>", special=False),
        ],
    },
    # gpt-oss, Phi-4-mini.
    "gpt-oss": {
        "pre_tokenizer": splits(split(O200K), BYTES_ALONE),
        "model": {"ignore_merges": True},
        "added": added("<|startoftext|>", "<|endoftext|>", "<|channel|>", "<|message|>"),
    },
    # Mistral NeMo and Small 3.
    "mistral-nemo": {
        "pre_tokenizer": splits(split(O200K.replace(SUFFIX, "").replace("{1,3}", "")), BYTES_ALONE),
        "model": {"ignore_merges": True},
        "bos": "<s>",
        "added": added("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
    },
    # DeepSeek 3.
    "deepseek": {
        "normalizer": sequence("normalizers"),
        "pre_tokenizer": splits(split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK), BYTES_ALONE),
        "bos": "<｜begin▁of▁sentence｜>",
        "added": [
            *added("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
            *added("<｜tool▁sep｜>", special=False, normalized=True),
        ],
    },
    # SmolLM, SmolLM2, StarCoder, Granite 3.
    "starcoder": {
        "pre_tokenizer": splits(DIGITS, BYTE_LEVEL),
        "added": added("<|endoftext|>", "<fim_prefix>", "<file_sep>", "<jupyter_code>"),
    },
    # GPT-NeoX, Pythia, OLMo, the first StableLM.
    "neox": {
        "normalizer": NFC,
        "pre_tokenizer": BYTE_LEVEL,
        "added": [
            *added("<|endoftext|>", "<|padding|>"),
            *added(*(" " * size for size in range(24, 1, -1)), special=False, normalized=True),
        ],
    },
    # CodeGen, Phi-1 and Phi-2.
    "codegen": {
        "pre_tokenizer": BYTE_LEVEL,
        "added": [
            *added("<|endoftext|>"),
            *added(*(" " * size for size in range(31, 1, -1)), special=False, normalized=True),
            *added(*("\t" * size for size in range(9, 1, -1)), special=False, normalized=True),
        ],
    },
    "falcon": {"pre_tokenizer": FALCON_SPLITS, "added": added(">>TITLE<<", ">>QUESTION<<", "<|endoftext|>")},
    "bloom": {
        "pre_tokenizer": splits(split(BLOOM), BYTES_ALONE),
        "decoder": BYTES_ALONE,
        "added": added("<unk>", "<s>", "</s>", "<pad>"),
    },
    # Llama 1 and 2, TinyLlama, the first Mistral, and CodeLlama, which has the tokens for infilling.
    "llama": {
        "normalizer": MARKED,
        "decoder": STRIPPED,
        "bos": "<s>",
        "added": added("<unk>", "<s>", "</s>", "▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"),
    },
    "phi-3": {
        "normalizer": MARKED,
        "decoder": STRIPPED,
        "added": [
            *added("<unk>", "<s>", "<|endoftext|>"),
            *added("</s>", special=False, rstrip=True),
            *added("<|assistant|>", "<|system|>", "<|end|>", "<|user|>", rstrip=True),
        ],
    },
    # Llama 2 and Mistral as they are saved now.
    "mistral": {
        "pre_tokenizer": FIRST,
        "decoder": STRIPPED,
        "bos": "<s>",
        "added": added("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
    },
    # Gemma 1 and 2.
    "gemma": {
        "normalizer": replace(" ", "▁"),
        "decoder": UNSTRIPPED,
        "bos": "<bos>",
        "added": [*added("<pad>", "<eos>", "<bos>", "<unk>"), *added("\n", *RUNS[:60], *TAGS[:200], special=False)],
        "without": "<0x09>",  # a tab has a token of its own
    },
    "gemma-3": {
        "normalizer": replace(" ", "▁"),
        "pre_tokenizer": GEMMA_SPLIT,
        "decoder": UNSTRIPPED,
        "bos": "<bos>",
        "added": [
            *added("<pad>", "<eos>", "<bos>", "<unk>", "<image_soft_token>"),
            *added("\n", "\t", *RUNS, *TAGS, special=False),
        ],
    },
}

# These differ from others in their expression, their normalizer or their added tokens alone; test_smollm2 has a
# published tokenizer of StarCoder's form.
RARE = ("mistral-nemo", "codegen", "qwen", "neox", "phi-3", "gemma", "starcoder")
# Each has a pre-tokenizer of its own.
FEW = ("llama-3", "deepseek", "falcon", "gemma-3")

LETTERS = [*"aBsSſtTKéßİǆǅǄʰªαΩяЖ漢字かカกกำ한א", "k", "LL", "re", "the", "Ġ", "ģ", "ＡＢ", "𝒜"]
MARKS = [*"\u0301\u0323\u0307\u0903\u093e\u20dd\u200d\ufe0f\u3099", "e\u0301", "q\u0323\u0307", "\u1100\u1161\u11a8"]
NUMBERS = [*"0179", *"٣५²¼½Ⅷ㉓〇𝟗", "12", "345", "6789", "1234567"]
QUOTES = [*"'’`", "'s", "'S", "'ſ", "'K", "'t", "'T", "'ll", "'LL", "'lL", "'Re", "'vE", "'M", "n't", "''d"]
SIGNS = [*'!?.,;:/|()[]{}<>#$%&*+-=^_~@\\"—«»…。，、।۔،¿£€√©™', "://", "->", "<0x41>", "<|", "|>"]
SPACES = [*" \t\n\r\x0b\x0c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000", " ", " ", "\r\n", "\n ", " \n", "\t "]
ODD = [
    *"\0\x01\x1f\x7f\xad\u0378\u200b\u2581\ufeff\ufffd\ue000\U000e0001\U0010ffff😀👍🏽",
    "👩‍👩‍👧",
    "🇩🇪",
    "▁▁",
    "\u212b",
]
SOURCES = [LETTERS, LETTERS, MARKS, NUMBERS, NUMBERS, QUOTES, SIGNS, SPACES, SPACES, SPACES, ODD]
REPEATS = [1] * 12 + [2, 2, 3, 4, 5, 7, 12, 40]


def hostile_text(rng: random.Random, added: list[str]) -> bytes:
    """Characters of every kind next to each other, in runs, and next to added tokens; a third as in the other tests."""
    if rng.random() < 0.33:
        return random_text(rng, added)
    sources = [*SOURCES, added]
    return "".join(rng.choice(rng.choice(sources)) * rng.choice(REPEATS) for _ in range(rng.randrange(1, 7))).encode()


def hostile_texts(seed: int, count: int, added: list[str]) -> list[bytes]:
    """`count` such texts, UTF-8 or bytes that are not."""
    rng = random.Random(seed)
    return [hostile_text(rng, added) for _ in range(count)]


@functools.cache
def vocabulary(kind: str) -> Part:
    """The model of a tokenizer.json, trained on text that is not split: "bytes", or "characters" with byte tokens."""
    lines = [line for text in documents()[::8] for line in text.split("\n\n")]
    texts = lines + [text.decode("utf-8", "replace") for text in hostile_texts(1, 6_000, ["<|x|>"])]
    backend = Tokenizer(models.BPE())
    settings: dict[str, Any] = {"vocab_size": 3_000, "max_token_length": 12, "show_progress": False}
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        settings["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
        settings |= {"special_tokens": ["<unk>", "<s>", "</s>", *BYTES], "limit_alphabet": 150}
    backend.train_from_iterator(texts, trainers.BpeTrainer(**settings))
    model: Part = json.loads(backend.to_str())["model"]
    return model


@functools.cache
def family(name: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a family."""
    entry = FAMILIES[name]
    byte_level = "ByteLevel" in json.dumps(entry.get("pre_tokenizer"))
    model = vocabulary("bytes" if byte_level else "characters") | entry.get("model", {})
    if without := entry.get("without"):
        tokens = [token for token in sorted(model["vocab"], key=model["vocab"].get) if token != without]
        model["vocab"] = {token: number for number, token in enumerate(tokens)}
    decoder = entry.get("decoder", BYTE_LEVEL)
    if not byte_level:
        model |= {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
        decoder = sequence("decoders", *decoder)
    parts = {"normalizer": entry.get("normalizer"), "pre_tokenizer": entry.get("pre_tokenizer"), "decoder": decoder}
    backend = Tokenizer.from_str(json.dumps(EMPTY | parts | {"model": model}))
    for special, tokens in itertools.groupby(entry["added"], lambda token: token.special):
        (backend.add_special_tokens if special else backend.add_tokens)(list(tokens))
    steps = [processors.ByteLevel(trim_offsets=False)] if byte_level else []
    if bos := entry.get("bos"):
        template = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
        steps.append(template)
    backend.post_processor = processors.Sequence(steps)
    clean_up = entry.get("clean_up", False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=clean_up)


def pieces(pre_tokenizer: Part, texts: list[str]) -> list[str]:
    """The pieces of texts, which are not empty, in the graph."""
    points = [ord(character) for text in texts for character in text]
    begins = [index == 0 for text in texts for index in range(len(text))]
    divided = Text(tf.constant(points), tf.constant(begins), tf.fill([len(points)], ORDINARY))
    for step in split_steps(pre_tokenizer)[1]:
        divided = step(divided)
    return [piece.decode() for piece in divided.pieces().numpy()]


@pytest.mark.parametrize("behavior", ["Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext"])
def test_what_becomes_of_matches(behavior: str) -> None:
    """A match joined to the wrong neighbour, to one that is a match too, or to another text."""
    texts = [text.decode("utf-8", "replace") for text in hostile_texts(3, 500, ["--", "1, 2"])]
    texts += ["".join(random.Random(seed).choices(" a-1,", k=9)) for seed in range(500)]
    digits = {"type": "Split", "pattern": {"Regex": r"\d{1,2}|\s+(?!\S)"}, "behavior": behavior, "invert": False}
    for config in [
        {"type": "Punctuation", "behavior": behavior},
        {"type": "Split", "pattern": {"String": " "}, "behavior": behavior, "invert": False},
        {"type": "Split", "pattern": {"String": "--"}, "behavior": behavior, "invert": True},
        digits,
        digits | {"invert": True},
    ]:
        backend = Tokenizer.from_str(json.dumps(EMPTY | {"pre_tokenizer": config})).pre_tokenizer
        expected = [piece for text in texts for piece, _ in backend.pre_tokenize_str(text)]
        assert pieces(config, texts) == expected


def added_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The added tokens; of many that are alike, a few."""
    tokens = list(tokenizer.get_added_vocab())
    return tokens[:150] + tokens[150::100]


def random_ids(rng: random.Random, tokenizer: PreTrainedTokenizerFast, count: int) -> list[list[int]]:
    """Rows of ids: single bytes, added tokens, any others, and ids without a token."""
    added = sorted(tokenizer.get_added_vocab().values())
    sources = [range(3, 259), range(3, 259), added, range(len(tokenizer) + 2)]
    return [[rng.choice(rng.choice(sources)) for _ in range(rng.randrange(12))] for _ in range(count)]


def decoding_differences(
    tokenizer: PreTrainedTokenizerFast, decode: Callable[..., tf.Tensor], rows: list[list[int]]
) -> list[tuple[list[int], str]]:
    """The rows with another text in the graph, and that text."""
    different = []
    for batch in batches_by_length(rows):
        chosen = [rows[index] for index in batch]
        ids = tf.ragged.constant(chosen, tf.int32, ragged_rank=1)
        found = decode(ids.to_tensor(7), tf.cast(ids.row_lengths(), tf.int32)).numpy().tolist()
        expected = tokenizer.batch_decode(chosen, skip_special_tokens=True)
        different += [
            (row, text.decode())
            for row, text, true in zip(chosen, found, expected, strict=True)
            if text.decode() != true
        ]
    return different


@pytest.mark.parametrize(
    "name",
    [
        name if name in FEW else pytest.param(name, marks=pytest.mark.long if name in RARE else pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_every_id_and_text_is_that_of_the_fast_tokenizer(name: str) -> None:
    """A boundary that is missing or misplaced, an added token not found, the BOS left out; ids with another text."""
    tokenizer = family(name)
    encode = in_graph(tokenizer)
    graph = GraphDetokenizer(tokenizer)
    decode = tf.function(
        graph.decode, input_signature=[tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None], tf.int32)]
    )
    tokens = added_tokens(tokenizer)
    for start in range(START, STRINGS, BATCH):
        seed, count = start // BATCH, min(BATCH, STRINGS - start)
        texts = hostile_texts(seed + 2, count, tokens)
        texts += [text.encode() for text in documents()[seed % 16 :: 16]]
        assert differences(tokenizer, encode, texts)[:3] == []
        rows = random_ids(random.Random(seed + 5), tokenizer, count // 2)
        rows += tokenizer([text.decode("utf-8", "replace") for text in texts[count // 2 :]])["input_ids"]
        assert decoding_differences(tokenizer, decode, rows)[:3] == []
        print(f"{name}: equal for {start:,} to {start + count:,} and {len(texts) - count} documents", flush=True)

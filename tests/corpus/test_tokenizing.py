"""The ids of the texts: those of the tokenizer, whatever way they are made."""

from __future__ import annotations

import importlib.metadata
import logging
import random
from pathlib import Path

import datasets
import pytest
from conftest import put_bos
from transformers import AutoTokenizer

from tfclm.compat import fingerprint
from tfclm.corpus import prefix_ids, tokenize
from tfclm.corpus.tokenizing import fast_encoder


@pytest.fixture
def texts(documents: list[str]) -> datasets.Dataset:
    """Prose, and what tokenizers stumble over."""
    return datasets.Dataset.from_dict({"text": [*documents[:40], "", "ünï 六\x00 \U0001f600", "a<|endoftext|>b"]})


def expected(texts: datasets.Dataset, tokenizer) -> list[list[int]]:
    """The ids of one text at a time."""
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts["text"]]


def test_what_made_the_ids_is_part_of_what_they_are_known_by(
    texts: datasets.Dataset, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches ids of an older version of the tokenizers, or of this code, that are taken from the cache."""
    same = {fingerprint(tokenize(texts, tokenizer)) for _ in range(2)}
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{installed(name)}.1")
    assert len(same | {fingerprint(tokenize(texts, tokenizer))}) == 2


SPACES = [
    "  ",
    "\n\n",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x1f",
    "\x85",
    "\xa0",
    "\u180e",
    "\u2003",
    "\u2028",
    "\u3000",
    "\u200b",
]
LETTERS = ["'s", "'ll", "é", "六", "६", "²", "\U0001f600", "\ufeff", "\x00", "<|endoftext|>", "<|"]
PIECES = [*"ab1 \n\t\r'.!?s_", *SPACES, *LETTERS]


@pytest.mark.parametrize("kind", ["GPT-2", "prefix space", "no words", "digits", "punctuation and newlines"])
def test_random_text_gives_the_tokenizers_ids(kind: str) -> None:
    """Catches a cut between words that changes ids: odd spaces, runs of them, added tokens, words with a newline.

    The vocabulary is made from the same random text, so that it has merges across every place that might be cut.
    """
    from tokenizers import AddedToken, ByteLevelBPETokenizer, Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
    from transformers import PreTrainedTokenizerFast

    draw = random.Random(0)
    drawn = ["".join(draw.choices(PIECES, k=draw.randint(0, 25))) for _ in range(5_000)]
    bpe = ByteLevelBPETokenizer()
    punctuation = Split(Regex(r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    bpe.pre_tokenizer = {
        "GPT-2": ByteLevel(add_prefix_space=False),
        "prefix space": ByteLevel(add_prefix_space=True),
        "no words": ByteLevel(add_prefix_space=False, use_regex=False),
        "digits": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
        "punctuation and newlines": Sequence([punctuation, ByteLevel(add_prefix_space=False, use_regex=False)]),
    }[kind]
    bpe.train_from_iterator(drawn, vocab_size=2_000, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)
    tokenizer.add_tokens(["b 1", AddedToken("<|", lstrip=True, rstrip=True)])
    tokens = tokenize(datasets.Dataset.from_dict({"text": drawn}), tokenizer)["input_ids"]
    wanted = tokenizer(drawn, add_special_tokens=False)["input_ids"]
    assert [pair for pair in zip(drawn, tokens, wanted, strict=True) if pair[1] != pair[2]] == []


@pytest.mark.parametrize("num_proc", [None, 1, 2, 64])
def test_ids_are_the_tokenizers(texts: datasets.Dataset, tokenizer, num_proc: int | None) -> None:
    """Catches rows lost, doubled or out of order between processes, and more processes than rows."""
    tokens = tokenize(texts.select(range(20)) if num_proc == 64 else texts, tokenizer, num_proc)
    assert tokens.features == datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    assert list(tokens["input_ids"]) == expected(texts, tokenizer)[: len(tokens)]


def test_long_batches_are_encoded_in_order(tokenizer, documents: list[str]) -> None:
    """Catches documents that change places where a batch is encoded in several groups."""
    texts = datasets.Dataset.from_dict({"text": ["".join(documents[i : i + 30]) for i in range(0, 70, 10)]})
    assert sum(map(len, texts["text"])) > 1 << 20
    assert list(tokenize(texts, tokenizer)["input_ids"]) == expected(texts, tokenizer)


def test_no_special_tokens_truncation_or_padding(texts: datasets.Dataset, tokenizer_dir: Path) -> None:
    """Catches a BOS in every document, and text cut by what an earlier call had set on the tokenizer."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    plain = expected(texts, tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer(["a long text that is cut"], truncation=True, max_length=3, padding="max_length")["input_ids"]
    state = tokenizer.backend_tokenizer.to_str()
    assert '"max_length":3' in state.replace(" ", "").replace("\n", "")
    assert list(tokenize(texts, tokenizer)["input_ids"]) == plain
    assert tokenizer.backend_tokenizer.to_str() == state


def test_prefix_is_what_the_tokenizer_puts_before_a_text(tokenizer_dir: Path) -> None:
    """Catches a BOS for GPT-2, which puts none before a text, none for Llama, or an EOS after the text taken for it."""
    from tokenizers.processors import TemplateProcessing

    for use_fast in (True, False):
        assert prefix_ids(AutoTokenizer.from_pretrained(tokenizer_dir, use_fast=use_fast)) == []
    tokenizer = put_bos(AutoTokenizer.from_pretrained(tokenizer_dir))
    assert prefix_ids(tokenizer) == tokenizer("")["input_ids"] == [512]
    around = [("<|endoftext|>", 0), ("<s>", 512)]
    for template, ids in (("$A <|endoftext|>", []), ("<s> <|endoftext|> $A <s>", [512, 0])):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=around)
        assert prefix_ids(tokenizer) == ids


def test_special_tokens_in_the_text_follow_the_tokenizer(tokenizer_dir: Path) -> None:
    """Catches split_special_tokens=True being lost on the way to the backend."""
    texts = datasets.Dataset.from_dict({"text": ["a<|endoftext|>b"]})
    for split in (False, True):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, split_special_tokens=split)
        (ids,) = tokenize(texts, tokenizer)["input_ids"]
        assert (0 in ids) is not split


def test_slow_tokenizer_gives_the_same_ids(texts: datasets.Dataset, tokenizer, tokenizer_dir: Path) -> None:
    """Catches a tokenizer without a Rust backend that cannot be used."""
    slow = AutoTokenizer.from_pretrained(tokenizer_dir, use_fast=False)
    assert not slow.is_fast
    few = texts.select(range(3))
    assert list(tokenize(few, slow)["input_ids"]) == expected(few, tokenizer)


def test_second_run_reads_the_cache_whatever_the_tokenizer_did_between(tmp_path: Path, tokenizer) -> None:
    """Catches a fingerprint that depends on what the tokenizer was last asked to do, so that nothing is ever reused."""
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "saved")
    first = tokenize(datasets.load_from_disk(str(tmp_path / "saved")), tokenizer)
    tokenizer("something", truncation=True, max_length=4)
    again = tokenize(datasets.load_from_disk(str(tmp_path / "saved")), tokenizer)
    assert first.cache_files
    assert first.cache_files == again.cache_files


def test_encoder_is_made_once(tokenizer, texts: datasets.Dataset) -> None:
    """Catches one made in vain before the processes fork, and then again in each of them."""
    fast_encoder.cache_clear()
    tokenize(texts, tokenizer)
    assert fast_encoder.cache_info().misses == 1


def test_long_texts_make_no_noise(tokenizer_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches the warning of "sequence length longer than the maximum", which does not concern packed text."""
    texts = datasets.Dataset.from_dict({"text": ["a long text, many tokens"]})
    loggers = [logging.getLogger(name) for name in ("transformers", "datasets")]
    caplog.set_level(logging.WARNING, logger="transformers")  # a command that ran before may have quieted it
    for use_fast in (True, False):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, use_fast=use_fast, model_max_length=4)
        for logger in loggers:
            logger.addHandler(caplog.handler)
        try:
            tokenize(texts, tokenizer)
            assert "maximum" not in caplog.text
            tokenizer("a long text, many tokens")
            assert "maximum" in caplog.text, "the warning is not visible to this test"
        finally:
            for logger in loggers:
                logger.removeHandler(caplog.handler)
        caplog.clear()

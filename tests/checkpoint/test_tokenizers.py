"""Tokenizers as each version of transformers writes them: the same ids, and files that both versions read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tfclm.checkpoint.tokenizers import read_tokenizer
from tfclm.errors import InputError

# What transformers 5.24 writes, besides tokenizer.json.
SPECIAL = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "extra_special_tokens": ["<|user|>", "<|bot|>"]}
BACKEND = SPECIAL | {"backend": "tokenizers", "model_max_length": 1024, "tokenizer_class": "TokenizersBackend"}
GPT2 = SPECIAL | {
    "add_prefix_space": False,
    "backend": "tokenizers",
    "clean_up_tokenization_spaces": False,
    "errors": "replace",
    "is_local": True,
    "local_files_only": False,
    "model_max_length": 1024,
    "pad_token": "<pad>",
    "tokenizer_class": "GPT2Tokenizer",
    "unk_token": "<|endoftext|>",
}
NAMED = GPT2 | {"image_token": "<|bot|>", "model_specific_special_tokens": {"image_token": "<|bot|>"}}
TEXTS = ["Hello<|user|>there <|bot|><|endoftext|> x<pad>", "  def f():\n\treturn '六'", ""]


@pytest.fixture
def original(tokenizer: Any) -> Any:
    """The tokenizer with special tokens of its own, in transformers 4."""
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<|user|>", "<|bot|>"]})
    return tokenizer


def as_version_5(tokenizer: Any, config: dict[str, Any], folder: Path) -> Path:
    """A folder as transformers 5 leaves it: two files, no vocabulary beside them."""
    folder.mkdir()
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("config", [BACKEND, GPT2, NAMED, SPECIAL], ids=["backend", "gpt2", "named", "list"])
def test_a_tokenizer_of_transformers_5_has_the_ids_of_the_original(
    config: dict[str, Any], original: Any, documents: list[str], tmp_path: Path
) -> None:
    """Refused with a message that blames whole files; or special tokens split like text, here or after a save."""
    from transformers import AutoTokenizer

    loaded = read_tokenizer("FOLDER", as_version_5(original, config, tmp_path / "five"))
    loaded.save_pretrained(tmp_path / "saved")
    for tokenizer in (loaded, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert tokenizer.is_fast
        assert len(tokenizer) == len(original)
        for text in TEXTS + documents[20:40]:
            ids = original(text)["input_ids"]
            assert tokenizer(text)["input_ids"] == ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == original.decode(ids, skip_special_tokens=True)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (original.bos_token_id, original.eos_token_id)
        assert tokenizer.pad_token == config.get("pad_token")
        assert tokenizer.additional_special_tokens == ["<|user|>", "<|bot|>"]
        # GPT-2 adds an embedding for token types, so a tokenizer must not give any.
        assert set(tokenizer("a")) == {"input_ids", "attention_mask"}


def test_the_saved_config_is_for_both_versions(original: Any, tmp_path: Path) -> None:
    """A class that transformers 4 does not have, or a list where it wants names."""
    folder = as_version_5(original, GPT2, tmp_path / "five")
    read_tokenizer("FOLDER", folder).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["extra_special_tokens"] == {}
    assert config["additional_special_tokens"] == ["<|user|>", "<|bot|>"]
    assert config["model_max_length"] == 1024
    assert not {"backend", "is_local", "local_files_only"} & config.keys()


def test_a_cased_bert_of_transformers_5_stays_cased(tmp_path: Path) -> None:
    """The class' default of lower case put over the normalizer of tokenizer.json: every capital is unknown."""
    from tokenizers import BertWordPieceTokenizer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", "the", "Cat", "cat", "##s"]
    bert = BertWordPieceTokenizer({word: i for i, word in enumerate(vocabulary)}, lowercase=False)
    bert.save(str(tmp_path / "tokenizer.json"))
    config = {"backend": "tokenizers", "tokenizer_class": "BertTokenizer", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"sep_token": "[SEP]", "pad_token": "[PAD]"}))
    loaded = read_tokenizer("FOLDER", tmp_path)
    assert loaded("The Cats")["input_ids"] == bert.encode("The Cats").ids == [2, 5, 7, 9, 3]
    assert loaded.model_input_names == ["input_ids", "token_type_ids", "attention_mask"]


def test_a_chat_template_of_transformers_5_is_kept(original: Any, tmp_path: Path) -> None:
    """The template, which has a file of its own, lost on the way from one version to the other."""
    from transformers import AutoTokenizer

    folder = as_version_5(original, BACKEND, tmp_path / "five")
    template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    read_tokenizer("FOLDER", folder).save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == template


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", None, "TokenizersBackend of transformers 5 has no tokenizer.json"),
        ("tokenizer.json", '{"version": "1.0"}', "tokenizer.json cannot be used"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is not a JSON object"),
        ("tokenizer_config.json", json.dumps(BACKEND | {"bos_token": {"text": "<s>"}}), '{"text": "<s>"}'),
        (
            "tokenizer_config.json",
            '{"auto_map": {"AutoTokenizer": ["own.Tokenizer", null]}}',
            "no tokenizer can be read",
        ),
    ],
)
def test_broken_files_are_explained(name: str, content: str | None, words: str, original: Any, tmp_path: Path) -> None:
    """A traceback, blame for whole files, or a question at the terminal whether to run the checkpoint's own code."""
    folder = as_version_5(original, BACKEND, tmp_path / "five")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(InputError, match="FOLDER") as caught:
        read_tokenizer("FOLDER", folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)

"""Reads the fast tokenizer of a checkpoint that any version of transformers wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm.checkpoint.locating import read_object, why_unreadable
from tfclm.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Keys of transformers 5 in tokenizer_config.json that are not arguments of a tokenizer of version 4.
VERSION_5_KEYS = {
    "auto_map",
    "backend",
    "extra_special_tokens",
    "is_local",
    "local_files_only",
    "model_specific_special_tokens",
    "tokenizer_class",
}


def read_tokenizer(where: str, folder: Path) -> PreTrainedTokenizerFast:
    """Reads the fast tokenizer in a checkpoint's directory.

    Args:
        where: the checkpoint's name, for messages.
        folder: its directory.

    Raises:
        InputError: the files are missing or broken, or the tokenizer has no fast version.
    """
    from transformers import AutoTokenizer

    settings = {}
    if os.path.lexists(folder / "tokenizer_config.json"):
        settings = read_object(where, folder / "tokenizer_config.json")
    if os.path.lexists(folder / "tokenizer.json"):
        read_object(where, folder / "tokenizer.json")
    try:
        if _is_of_version_5(settings):
            tokenizer = _read_version_5(where, folder, settings)
        else:
            # Never runs the checkpoint's own code, and never asks for permission at the terminal.
            tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # its type depends on which file is missing or broken
        raise InputError(
            f"{where}: no tokenizer can be read from its files (tokenizer.json, or vocab.json and merges.txt): "
            f"{first_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(f"{where}: {type(tokenizer).__name__} has no fast version: provide a tokenizer.json")
    return tokenizer


def _is_of_version_5(settings: dict[str, Any]) -> bool:
    return (
        "backend" in settings
        or settings.get("tokenizer_class") == "TokenizersBackend"
        or isinstance(settings.get("extra_special_tokens"), list)
    )


def _read_version_5(where: str, folder: Path, settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Reads a tokenizer.json as a plain PreTrainedTokenizerFast.

    Version 5 keeps settings in tokenizer.json that version 4 keeps in its classes, such as BERT's lower casing. These
    classes would override them with their defaults, so they are not used.
    """
    import transformers
    from transformers import AddedToken, PreTrainedTokenizerFast

    path = folder / "tokenizer.json"
    name = str(settings.get("tokenizer_class"))
    if not os.path.lexists(path):
        raise InputError(f"{where}: its {name} of transformers 5 has no tokenizer.json: provide one")
    extra: Any = settings.get("extra_special_tokens") or []
    named: Any = settings.get("model_specific_special_tokens") or {}
    if isinstance(extra, dict):
        extra, named = [], extra | named

    def token(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if not isinstance(value.get("content"), str):
            raise InputError(
                f"{where}: tokenizer_config.json has {json.dumps(value)}, which is not a token: it needs content"
            )
        return AddedToken(**{key: item for key, item in value.items() if key != "__type"})

    options = {
        key: token(value) if key.endswith("_token") else value
        for key, value in settings.items()
        if key not in VERSION_5_KEYS and key not in named
    }
    options["additional_special_tokens"] = [token(value) for value in extra]
    options["extra_special_tokens"] = {key: token(value) for key, value in named.items()}
    # Without it a plain tokenizer returns token type ids, for which GPT-2 would add embeddings.
    known = getattr(transformers, f"{name.removesuffix('Fast')}Fast", PreTrainedTokenizerFast)
    untyped = known is PreTrainedTokenizerFast
    options.setdefault("model_input_names", ["input_ids", "attention_mask"] if untyped else known.model_input_names)
    if (folder / "chat_template.jinja").is_file():
        options["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(path), **options)
    except Exception as error:  # tokenizers raises plain Exception; wrong settings raise others
        raise InputError(f"{where}: tokenizer.json cannot be used: {why_unreadable(path, error)}") from error

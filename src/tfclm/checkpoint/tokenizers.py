"""A checkpoint's fast tokenizer, whichever version of transformers wrote it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tfclm.checkpoint.locating import read_object, why_unreadable
from tfclm.errors import InputError, first_line

# What transformers 5 writes into tokenizer_config.json about the machine and itself, not about the tokenizer.
OF_VERSION_5 = {
    "auto_map",
    "backend",
    "extra_special_tokens",
    "is_local",
    "local_files_only",
    "model_specific_special_tokens",
    "tokenizer_class",
}


def read_tokenizer(where: str, folder: Path) -> Any:
    """The fast tokenizer in a checkpoint's folder.

    Raises `InputError` where its files are missing or broken, or make up no fast tokenizer.
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
            # Never code of the checkpoint's own, and never a question at the terminal whether to run it.
            tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # of many types, depending on which file is missing or broken
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


def _read_version_5(where: str, folder: Path, settings: dict[str, Any]) -> Any:
    """The tokenizer of a tokenizer.json as it is.

    Version 5 keeps there what version 4 keeps in its classes' settings, such as BERT's lower case: those classes would
    put their own defaults over it, so the tokenizer becomes one of no class.
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
                f"{where}: tokenizer_config.json has {json.dumps(value)}, which is no token: give it content"
            )
        return AddedToken(**{key: item for key, item in value.items() if key != "__type"})

    options = {
        key: token(value) if key.endswith("_token") else value
        for key, value in settings.items()
        if key not in OF_VERSION_5 and key not in named
    }
    options["additional_special_tokens"] = [token(value) for value in extra]
    options["extra_special_tokens"] = {key: token(value) for key, value in named.items()}
    # GPT-2 would add embeddings for the token types that a tokenizer of no class gives.
    known = getattr(transformers, f"{name.removesuffix('Fast')}Fast", PreTrainedTokenizerFast)
    untyped = known is PreTrainedTokenizerFast
    options.setdefault("model_input_names", ["input_ids", "attention_mask"] if untyped else known.model_input_names)
    if (folder / "chat_template.jinja").is_file():
        options["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(path), **options)
    except Exception as error:  # tokenizers' own, which are of no type, and Python's for settings of another
        raise InputError(f"{where}: tokenizer.json cannot be used: {why_unreadable(path, error)}") from error

"""A folder or Hub id ⇄ (model, tokenizer): always both, every weight accounted for, tied where the config says so.

transformers' own loading leaves a weight that a file lacks at random, with a warning; drops weights that the model has
no place for; forgets `generation_config.json` beside PyTorch weights; and has no sharded safetensors from the Hub. So
the weights are read and written here, by their PyTorch names, and whatever does not fit exactly is an `InputError`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm import disk
from tfclm.checkpoint.configs import config_json, read_config
from tfclm.checkpoint.locating import choose_weights, locate, read_object
from tfclm.checkpoint.model import build, context_size, first_position, is_tied, tie
from tfclm.checkpoint.tokenizers import read_tokenizer
from tfclm.checkpoint.weights import restore, state
from tfclm.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase, TFPreTrainedModel

__all__ = ["context_size", "create", "first_position", "load", "save", "tie"]

STAGING = ".saving"


def load(name_or_dir: str | os.PathLike[str], *, revision: str | None = None) -> tuple[TFPreTrainedModel, Any]:
    """The causal LM and its fast tokenizer from a folder or a Hub id, complete and ready to train or generate.

    Reads `model.safetensors` (PyTorch or TensorFlow names, single or sharded, float32, float16 or bfloat16) or
    `tf_model.h5`, without torch. Variables are float32. `model.generation_config` is the folder's
    `generation_config.json` where there is one. `revision` is a branch, tag or commit of a Hub id.

    Raises `InputError` where anything is missing, unreadable, of another shape, left over, or of an unsupported type,
    and where the tokenizer has more entries than the model's vocabulary.
    """
    where = os.fspath(name_or_dir)
    with _quiet():
        folder = locate(where, revision)
        config = read_config(where, folder)
        weights = choose_weights(where, {path.name for path in folder.iterdir()})
        tokenizer = read_tokenizer(where, folder)
        # A tokenizer with fewer entries is common: vocabularies are padded to round sizes.
        if len(tokenizer) > config.vocab_size:
            raise InputError(
                f"{where}: the tokenizer has {len(tokenizer)} entries but the model's vocab_size is "
                f"{config.vocab_size}; use the tokenizer that the model was trained with"
            )
        model = build(where, config)
        restore(model, where, folder / weights)
        _read_generation_config(model, where, folder)
    model.config.name_or_path = where
    return model, tokenizer


def create(config: PretrainedConfig) -> TFPreTrainedModel:
    """A new causal LM of this config, built, tied if the config says so; random weights by TensorFlow's global seed.

    Raises `InputError` for a type that is no causal LM in TensorFlow and for sizes that do not fit together.
    """
    with _quiet():
        model = build("config", config)
    if model.config.tie_word_embeddings and not config.tie_word_embeddings:
        raise InputError(
            f"TensorFlow's {config.model_type} always shares its output matrix with its embeddings: "
            "set tie_word_embeddings to true"
        )
    return model


def save(
    model: TFPreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | os.PathLike[str]
) -> list[str]:
    """Write a checkpoint that transformers opens with TensorFlow and with PyTorch; the sorted names of its files.

    `config.json`, `generation_config.json`, the tokenizer's files and `model.safetensors`: float32, PyTorch's names and
    layouts, a tied matrix once. Each file appears under its name complete or not at all, the weights last. Raises
    `InputError` if the folder cannot be written.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    staging = folder / STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)  # what a killed save left
        staging.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write to the folder {folder}: {disk.reason(error)}") from error
    try:
        if tokenizer is not None:
            with _quiet():
                tokenizer.save_pretrained(staging)
        architecture = type(model).__name__.removeprefix("TF")
        text = config_json(model.config, architecture, is_tied(model))
        (staging / "config.json").write_text(text, encoding="utf-8")
        if model.generation_config is not None:
            # Not its own save_pretrained, which refuses settings that loading accepts (top_k without do_sample).
            text = model.generation_config.to_json_string(use_diff=True)
            (staging / "generation_config.json").write_text(text, encoding="utf-8")
        save_file(state(model), staging / "model.safetensors", metadata={"format": "pt"})
        names = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
        mode = (staging / "config.json").stat().st_mode
        for name in names:
            disk.set_mode(staging / name, mode)  # safetensors' own files are for their owner alone
            disk.sync(staging / name)
        for name in sorted(names, key=lambda name: name.endswith(".safetensors")):
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(staging / name, folder / name)
        disk.sync(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return names


def _read_generation_config(model: TFPreTrainedModel, where: str, folder: Path) -> None:
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not os.path.lexists(path):
        return  # it stays what the model's config implies
    fields = read_object(where, path)
    # Else TensorFlow's generate goes by config.json again, and not by this file.
    fields.pop("_from_model_config", None)
    try:
        model.generation_config = GenerationConfig.from_dict(fields)
    except Exception as error:
        raise InputError(f"{where}: generation_config.json cannot be used: {first_line(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No advice from transformers and Keras meanwhile (what matters is raised); their settings are restored."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)

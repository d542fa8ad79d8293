"""Loads and saves checkpoints: model and tokenizer together, every weight checked, tied if the config says so.

transformers' own loading initializes missing weights at random with a warning, drops unexpected weights, ignores
`generation_config.json` next to PyTorch weights, and cannot load sharded safetensors from the Hub. So weights are read
and written here by their PyTorch names, and anything that does not match exactly is an `InputError`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tfclm import disk
from tfclm.checkpoint.configs import config_json, read_config
from tfclm.checkpoint.locating import choose_weights, locate, read_object
from tfclm.checkpoint.model import build, context_size, first_position, is_tied, tie
from tfclm.checkpoint.tokenizers import read_tokenizer
from tfclm.checkpoint.weights import layout, restore, state_dict
from tfclm.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast, TFPreTrainedModel

__all__ = ["context_size", "create", "first_position", "layout", "load", "save", "tie"]

STAGING = ".saving"


def load(
    name_or_dir: str | os.PathLike[str], *, revision: str | None = None
) -> tuple[TFPreTrainedModel, PreTrainedTokenizerFast]:
    """Loads a causal language model and its tokenizer, without PyTorch.

    Reads `model.safetensors` (PyTorch or TensorFlow names, in one file or in shards; float32, float16 or bfloat16) or
    `tf_model.h5`, and `generation_config.json` if there is one.

    Args:
        name_or_dir: directory of a checkpoint, or Hub id.
        revision: branch, tag or commit of a Hub model.

    Returns:
        The model with float32 variables, for training or generation, and its fast tokenizer.

    Raises:
        InputError: a file is missing or unreadable; a weight is missing, unexpected, of another shape or quantized;
            the model type or a config setting is not supported; or the tokenizer has more entries than the model's
            vocabulary. The message names the checkpoint, the file, and what to do.

    Example:
        >>> model, tokenizer = tfclm.load("distilgpt2")
        >>> model(**tokenizer("Hello", return_tensors="tf")).logits.shape
        TensorShape([1, 1, 50257])
    """
    where = os.fspath(name_or_dir)
    with _quiet():
        folder = locate(where, revision)
        config = read_config(where, folder)
        weights = choose_weights(where, {path.name for path in folder.iterdir()})
        tokenizer = read_tokenizer(where, folder)
        # Fewer entries are fine: vocabularies are often padded to a round size.
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
    """Creates a causal language model with random weights, which depend on TensorFlow's global seed.

    Args:
        config: a config of transformers.

    Returns:
        The built model, with tied embeddings if the config says so.

    Raises:
        InputError: the model type is not a causal language model in TensorFlow, or its sizes do not fit together.

    Example:
        >>> model = create(GPT2Config(n_layer=2, n_embd=256, n_head=4))
    """
    with _quiet():
        model = build("config", config)
    if model.config.tie_word_embeddings and not config.tie_word_embeddings:
        raise InputError(
            f"TensorFlow's {config.model_type} always ties its output matrix to its embeddings: "
            "set tie_word_embeddings to true"
        )
    return model


def save(
    model: TFPreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | os.PathLike[str]
) -> list[str]:
    """Writes a checkpoint that transformers opens with TensorFlow and with PyTorch.

    Each file appears under its name only when complete, and the weights come last.

    Args:
        model: a causal language model of transformers for TensorFlow.
        tokenizer: its tokenizer; None saves the model alone.
        folder: the directory, which is created if needed. Files of the same names are replaced.

    Returns:
        The sorted names of the files: `config.json`, `generation_config.json`, the tokenizer's files, and
        `model.safetensors` with float32 weights in PyTorch's names and layouts, a tied matrix once.

    Raises:
        InputError: the directory cannot be created or written.
        OSError: a file cannot be written, for example because the disk is full.

    Example:
        >>> model, tokenizer = tfclm.load("distilgpt2")
        >>> tfclm.save(model, tokenizer, "runs/copy")
        ['config.json', 'generation_config.json', 'merges.txt', 'model.safetensors', ...]
    """
    folder = Path(folder)
    staging = folder / STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of a save that was killed
        staging.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write to the directory {folder}: {disk.reason(error)}") from error
    try:
        _write_files(model, tokenizer, staging)
        names = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
        mode = (staging / "config.json").stat().st_mode
        for name in names:
            disk.set_mode(staging / name, mode)  # safetensors makes files that only their owner can read
            disk.sync(staging / name)
        for name in sorted(names, key=lambda name: name.endswith(".safetensors")):
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(staging / name, folder / name)
        disk.sync(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return names


def _write_files(model: TFPreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    from safetensors.numpy import save_file

    if tokenizer is not None:
        with _quiet():
            tokenizer.save_pretrained(folder)
    architecture = type(model).__name__.removeprefix("TF")
    text = config_json(model.config, architecture, is_tied(model))
    (folder / "config.json").write_text(text, encoding="utf-8")
    if model.generation_config is not None:
        # Not by save_pretrained, which refuses settings that loading accepts (top_k without do_sample).
        text = model.generation_config.to_json_string(use_diff=True)
        (folder / "generation_config.json").write_text(text, encoding="utf-8")
    save_file(state_dict(model), folder / "model.safetensors", metadata={"format": "pt"})


def _read_generation_config(model: TFPreTrainedModel, where: str, folder: Path) -> None:
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not os.path.lexists(path):
        return  # keep what the model's config implies
    fields = read_object(where, path)
    # With this field, TensorFlow's generate would use config.json in place of this file.
    fields.pop("_from_model_config", None)
    try:
        model.generation_config = GenerationConfig.from_dict(fields)
    except Exception as error:
        raise InputError(f"{where}: generation_config.json cannot be used: {first_line(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences warnings of transformers and Keras within a block: what matters is raised as an error."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)

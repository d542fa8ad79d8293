"""Says what a directory or file that is not a checkpoint is, and what to give instead."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

CONVERT = (
    "needs PyTorch: convert it with transformers where PyTorch is installed (AutoModelForCausalLM.from_pretrained, "
    "then save_pretrained, which writes model.safetensors)"
)

# A pattern of file names (with at most one directory), what they are, and what to do; the first match counts. These
# also apply to directories with weights.
WITH_WEIGHTS: tuple[tuple[str, str, str], ...] = (
    (
        r"adapter_(config\.json|model\..*)",
        "a LoRA adapter, which is not a complete model",
        "merge it into its base model with PEFT (merge_and_unload, then save_pretrained) and give that directory",
    ),
    (
        r"modules\.json|config_sentence_transformers\.json",
        "a sentence-transformers model, which returns vectors, not text",
        "give the checkpoint directory or Hub id of a causal language model",
    ),
)
WITHOUT_WEIGHTS: tuple[tuple[str, str, str], ...] = (
    (
        r"(\d+/)?saved_model\.pb",
        "a SavedModel, which is for serving and cannot be trained or exported again",
        "give the checkpoint that it was made from",
    ),
    (r".*\.gguf", "GGUF weights (llama.cpp)", "give the checkpoint that they were made from, with model.safetensors"),
    (
        r"model_index\.json",
        "a diffusers pipeline, which generates images or sound",
        "give the checkpoint directory or Hub id of a causal language model",
    ),
    (
        r"task\.json|model\.weights\.h5|.*\.keras|.*\.weights\.h5",
        "a Keras or KerasHub model",
        "give a checkpoint of transformers, with config.json and model.safetensors or tf_model.h5",
    ),
    (
        r"params\.json|consolidated\..*",
        "weights in their publisher's own format",
        "give the checkpoint that was converted for transformers, with config.json and model.safetensors",
    ),
    (
        r"model\.ckpt.*|.*\.ckpt\.(index|meta|data.*)|ckpt-\d+\.index",
        "a TensorFlow checkpoint, which has weights but no model",
        "convert it with transformers to config.json and model.safetensors",
    ),
    (
        r"(snapshots|blobs|refs)/.*",
        "the cache of a Hub model",
        "give its Hub id, owner/name, or the directory of a commit below snapshots",
    ),
    (
        r"resume/.*",
        "an incomplete run of tfclm.fit",
        "resume it with the same command, then give the directory",
    ),
    (r"checkpoint-\d+/.*", "the checkpoints of a training run", "give one of them, such as {name}"),
    (
        r"openvino_model.*|shared_vocabulary\.(json|txt)|.*\.tflite|.*\.mlmodel|.*\.mlpackage|.*\.engine|.*\.pte|.*\.nemo",
        "a model that was converted for another runtime",
        "give the checkpoint that it was made from, with config.json and model.safetensors",
    ),
    (
        r"pytorch_model.*|(?!training_args|optimizer|scheduler|scaler|rng_state).*\.(bin|pth?|ckpt)",
        "PyTorch's pickled weights",
        CONVERT,
    ),
    (r"(onnx/)?.*\.onnx(_data)?", "an ONNX model", "give the checkpoint that it was made from, with model.safetensors"),
    (
        r"flax_model.*\.msgpack|.*\.orbax.*|_CHECKPOINT_METADATA",
        "Flax (JAX) weights",
        "convert them with transformers to model.safetensors",
    ),
    (r"rust_model\.ot", "rust-bert weights", "give the checkpoint that they were made from, with model.safetensors"),
    (
        r"(weights|model)\.npz|.*\.distcp|zero_to_fp32\.py",
        "weights in a format that transformers does not read",
        "convert them to model.safetensors",
    ),
    (
        r"(?!model(-\d+-of-\d+)?\.safetensors).*\.safetensors",
        "{name}, weights under a name that transformers does not look for",
        "give a checkpoint with model.safetensors",
    ),
    (r"(?!tf_model).*\.h5", "{name}, Keras weights", "give a checkpoint with tf_model.h5 or model.safetensors"),
    (
        r".*\.(zip|tar|tgz|gz|bz2|xz|zst)",
        "an archive, {name}",
        "unpack it and give the directory with config.json",
    ),
)
# The same for directories that have no config.json either.
WITHOUT_CONFIG: tuple[tuple[str, str, str], ...] = (
    (
        r"tokenizer(_config)?\.json|vocab\.(json|txt)|merges\.txt|spiece\.model|tokenizer\.model",
        "a tokenizer without a model",
        "give a directory that also has config.json and model.safetensors",
    ),
    (
        r".*\.(parquet|arrow|jsonl|csv|txt)|dataset_info\.json",
        "data, not a model",
        "give it as `dataset` or `train_file`, and a checkpoint directory or Hub id as `model`",
    ),
)


def explain(where: str, given: Path | Iterable[str]) -> str | None:
    """One line that says what a directory is instead of a checkpoint; None if that is not known.

    Args:
        where: its name, for the message.
        given: the directory, or the names of all files of a Hub repository.
    """
    names = _list_names(given) if isinstance(given, Path) else sorted(given)
    if not names:
        is_local = isinstance(given, Path)
        return f"{where} is an empty directory: give a checkpoint directory or a Hub id" if is_local else None
    patterns = WITH_WEIGHTS
    if not any(re.match(r"(tf_)?model\.(safetensors|h5)", name) for name in names):
        patterns += WITHOUT_WEIGHTS if "config.json" in names else WITHOUT_WEIGHTS + WITHOUT_CONFIG
    for pattern, contents, remedy in patterns:
        for name in names:
            if re.fullmatch(pattern, name) and ("/" in pattern or "/" not in name):
                return f"{where} holds {contents.format(name=name)}: {remedy.format(name=name.split('/')[0])}"
    for name in names:
        if re.fullmatch(r"[^/]+/config\.json", name):
            return f"{where} has no config.json, but its subdirectory {name.split('/')[0]} has one: give that"
    return None


def explain_file(where: str, file: Path) -> str:
    """One line that says what to give instead of a file."""
    for pattern, contents, remedy in WITH_WEIGHTS + WITHOUT_WEIGHTS:
        if re.fullmatch(pattern, file.name) and file.suffix not in (".json", ".txt", ".model"):
            return f"{where} is a file that holds {contents.format(name=file.name)}: {remedy}"
    return f"{where} is a file: give the directory that holds it"


def _list_names(folder: Path) -> list[str]:
    """The names of the entries of a directory and of its subdirectories, as far as they can be read."""
    names = []
    try:
        for path in sorted(folder.iterdir()):
            names.append(path.name)
            if path.is_dir():
                names += [f"{path.name}/{inner.name}" for inner in sorted(path.iterdir())]
    except OSError:
        pass
    return names

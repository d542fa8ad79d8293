"""A folder or Hub id ⇄ (model, tokenizer): always both, every weight accounted for, tied where the config says so.

transformers' own loading leaves a weight that a file lacks at random, with a warning; drops weights that the model has
no place for; forgets `generation_config.json` beside PyTorch weights; and has no sharded safetensors from the Hub. So
the weights are read and written here, by their PyTorch names, and whatever does not fit exactly is an `InputError`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tfclm.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase, TFPreTrainedModel

__all__ = ["create", "load", "save", "tie"]

DECODERS = ("ctrl", "gpt-sw3", "gpt2", "gptj", "mistral", "openai-gpt", "opt", "xglm")
# These read in both directions unless their config says is_decoder. Left out on purpose, though transformers lists
# them: roformer and xlnet (later tokens change earlier logits), xlm and transfo-xl (broken or gone in TensorFlow).
ENCODERS = ("bert", "camembert", "rembert", "roberta", "roberta-prelayernorm", "xlm-roberta")

# In the order of preference; the first that is there is read.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "tf_model.h5", "tf_model.h5.index.json")
# PyTorch's names of an output matrix that may share the input embeddings, and second names of an output bias.
HEADS = ("lm_head.weight", "lm_head.decoder.weight", "cls.predictions.decoder.weight")
BIASES = ("lm_head.decoder.bias", "cls.predictions.decoder.bias")
# Constants that PyTorch models of these types store among their weights: masks, rotary and sinusoidal tables.
BUFFERS = re.compile(r"(attn|attention)\.(masked_)?bias$|inv_freq$|position_ids$|embed_positions(\.weights)?$")

# Settings that TensorFlow's classes ignore, with the one value that they compute.
FIXED: dict[str, dict[str, Any]] = {
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    "mistral": {"rope_scaling": None},
    "openai-gpt": {"afn": "gelu"},
    "opt": {"enable_bias": True, "layer_norm_elementwise_affine": True},
    **{encoder: {"position_embedding_type": "absolute"} for encoder in ENCODERS},
}

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
        folder = _locate(where, revision)
        config = _read_config(where, folder)
        tokenizer = _read_tokenizer(where, folder)
        # A tokenizer with fewer entries is common: vocabularies are padded to round sizes.
        if len(tokenizer) > config.vocab_size:
            raise InputError(
                f"{where}: the tokenizer has {len(tokenizer)} entries but the model's vocab_size is "
                f"{config.vocab_size}; use the tokenizer that the model was trained with"
            )
        weights = _choose_weights(where, {path.name for path in folder.iterdir()})
        model = _build(where, config)
        _restore(model, where, folder / weights)
        _read_generation_config(model, where, folder)
    model.config.name_or_path = where
    return model, tokenizer


def create(config: PretrainedConfig) -> TFPreTrainedModel:
    """A new causal LM of this config, built, tied if the config says so; random weights by TensorFlow's global seed.

    Raises `InputError` for a type that is no causal LM in TensorFlow and for sizes that do not fit together.
    """
    with _quiet():
        model = _build("config", config)
    if model.config.tie_word_embeddings and not config.tie_word_embeddings:
        raise InputError(
            f"TensorFlow's {config.model_type} always shares its output matrix with its embeddings: "
            "set tie_word_embeddings to true"
        )
    return model


def tie(model: TFPreTrainedModel) -> None:
    """Make the output matrix the embedding matrix, in place, if the config says `tie_word_embeddings`.

    For classes that ignore that setting and have an `lm_head` of their own (Mistral, XGLM, GPT-J): afterwards there is
    one variable, [vocabulary, hidden], and the gradients of both uses go to it; the values of `lm_head` are gone, its
    bias is kept. Other models, and tied ones, are left as they are. Call it before building an optimizer.
    """
    import tensorflow as tf
    import tf_keras

    old = getattr(model, "lm_head", None)
    if not (model.config.tie_word_embeddings and isinstance(old, tf_keras.layers.Dense)):
        return
    stem = getattr(model, model.base_model_prefix)
    embedding = stem.embed_tokens if hasattr(stem, "embed_tokens") else stem.wte
    model.lm_head = new = _tied_head()(embedding, use_bias=old.use_bias, name=old.name)
    if old.built:
        with tf.name_scope(f"{model.name}/{new.name}"):
            new.build(None)
        if old.use_bias:
            new.bias.assign(old.bias)


def save(model: TFPreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike[str]) -> list[str]:
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
        raise InputError(f"cannot write to the folder {folder}: {error.strerror}") from error
    try:
        with _quiet():
            tokenizer.save_pretrained(staging)
        (staging / "config.json").write_text(_config_json(model), encoding="utf-8")
        if model.generation_config is not None:
            # Not its own save_pretrained, which refuses settings that loading accepts (top_k without do_sample).
            text = model.generation_config.to_json_string(use_diff=True)
            (staging / "generation_config.json").write_text(text, encoding="utf-8")
        save_file(_state(model), staging / "model.safetensors", metadata={"format": "pt"})
        names = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
        mode = (staging / "config.json").stat().st_mode
        for name in names:
            os.chmod(staging / name, mode)  # safetensors' own files are for their owner alone
            _sync(staging / name)
        for name in sorted(names, key=lambda name: name.endswith(".safetensors")):
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(staging / name, folder / name)
        _sync(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return names


# Finding the files


def _locate(where: str, revision: str | None) -> Path:
    """The local folder of a checkpoint; what a Hub id needs, and no more, is downloaded into the Hub's cache."""
    folder = Path(where).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"{where} is a folder, and a revision ({revision}) applies to Hub ids only")
        return folder
    if folder.exists():
        raise InputError(f"{where} is a file: give the folder that holds it")
    return _download(where, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        files = [file for file in HfApi().list_repo_files(name, revision=revision) if "/" not in file]
        weights = _choose_weights(name, files)
        shards = weights.removesuffix(".index.json")
        stem, suffix = shards.rsplit(".", 1)
        wanted = [file for file in files if file.endswith((".json", ".txt", ".model", ".jinja"))]
        wanted += [f"{stem}-*.{suffix}"] if shards != weights else [weights]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except HFValidationError as error:
        raise InputError(f"there is no folder {name}, and a Hub id looks like owner/name") from error
    except GatedRepoError as error:
        raise InputError(f"{name}: accept its terms on the Hub, then log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"there is no folder {name} and no such model on the Hub, or it is private") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name} has no revision {revision} on the Hub") from error
    except OSError as error:  # offline, or the Hub does not answer
        with contextlib.suppress(OSError):
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        raise InputError(
            f"there is no folder {name}, the Hub cannot be reached, and its cache has no such model: {_line(error)}"
        ) from error


def _choose_weights(where: str, files: Collection[str]) -> str:
    for name in WEIGHTS:
        if name in files:
            return name
    if any(name.startswith("pytorch_model") for name in files):
        raise InputError(
            f"{where} has only pytorch_model.bin, which needs PyTorch: convert it with PyTorch's save_pretrained to "
            "model.safetensors, or give a checkpoint that has one"
        )
    raise InputError(f"{where} has no weights: expected one of {', '.join(WEIGHTS)}")


# Reading config and tokenizer


def _read_config(where: str, folder: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = fields["model_type"]
    except FileNotFoundError as error:
        raise InputError(f"{where} has no config.json: give a checkpoint's folder or a Hub id") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: config.json is no JSON object with a model_type") from error
    _check_type(where, model_type, bool(fields.get("is_decoder")))
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # a config class raises whatever its fields provoke
        raise InputError(f"{where}: config.json is no {model_type} config: {_line(error)}") from error


def _check_type(where: str, model_type: str, is_decoder: bool) -> None:
    if model_type in ENCODERS and not is_decoder:
        raise InputError(
            f"{where}: a {model_type} model is an encoder, no causal LM, unless it was trained as one and its config "
            f"has is_decoder; types that are: {', '.join(DECODERS)}"
        )
    if model_type not in DECODERS + ENCODERS:
        raise InputError(
            f"{where}: model type {model_type} is no causal LM in TensorFlow; supported: {', '.join(DECODERS)} and, "
            f"with is_decoder, {', '.join(ENCODERS)}"
        )


def _read_tokenizer(where: str, folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
    except Exception as error:  # of many types, depending on which file is missing or broken
        raise InputError(
            f"{where}: no tokenizer can be read from its files (tokenizer.json, or vocab.json and merges.txt): "
            f"{_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(f"{where}: {type(tokenizer).__name__} has no fast version: provide a tokenizer.json")
    return tokenizer


def _read_generation_config(model: TFPreTrainedModel, where: str, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():  # else it stays what the model's config implies
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise InputError(f"{where}: generation_config.json cannot be used: {_line(error)}") from error


# The model


def _build(where: str, config: PretrainedConfig) -> TFPreTrainedModel:
    """The model with all its variables; its own copy of the config tells truly whether it is tied."""
    from transformers import TFAutoModelForCausalLM

    _check_type(where, config.model_type, bool(getattr(config, "is_decoder", False)))
    fixed = FIXED.get(config.model_type, {})
    if getattr(config, "head_dim", None) is not None:
        fixed = fixed | {"head_dim": config.hidden_size // config.num_attention_heads}
    for setting, value in fixed.items():
        if getattr(config, setting, value) != value:
            raise InputError(
                f"{where}: TensorFlow's {config.model_type} ignores {setting}={getattr(config, setting)!r} "
                f"and would compute something else; only {value!r} is supported"
            )
    config = copy.deepcopy(config)
    if getattr(config, "sliding_window", None):
        # TensorFlow's Mistral attends to everything, which is the same up to one window.
        config.max_position_embeddings = min(config.max_position_embeddings, config.sliding_window)
    try:
        model = TFAutoModelForCausalLM.from_config(config)
        tie(model)
        _mend_mask(model)
        model.build_in_name_scope()
    except Exception as error:  # layers raise whatever sizes that do not fit provoke
        raise InputError(f"{where}: no {config.model_type} model has this config: {_line(error)}") from error
    model.config.tie_word_embeddings = _is_tied(model)
    return model


def _mend_mask(model: TFPreTrainedModel) -> None:
    """TensorFlow's Mistral mixes float32 and the compute type in its attention mask, which fails in half precision."""
    import tensorflow as tf

    if model.config.model_type != "mistral" or model.compute_dtype == "float32":
        return
    stem = model.model
    original = stem._prepare_decoder_attention_mask

    def mask(attention_mask: Any, input_shape: Any, inputs_embeds: Any, past_key_values_length: int) -> Any:
        exact = original(attention_mask, input_shape, tf.cast(inputs_embeds, tf.float32), past_key_values_length)
        # The sum of two masks is below the smallest number of either type.
        return tf.cast(tf.maximum(exact, inputs_embeds.dtype.min), inputs_embeds.dtype)

    stem._prepare_decoder_attention_mask = mask


def _is_tied(model: TFPreTrainedModel) -> bool:
    """What the model does, for a config that says so: most classes ignore the setting, PyTorch's go by it."""
    return not any(name in HEADS for _, name, _ in _layout(model))


@functools.cache
def _tied_head() -> Any:
    """The class of a tied output layer; made on the first use because importing this module imports no TensorFlow."""
    import tensorflow as tf
    import tf_keras

    class TiedHead(tf_keras.layers.Layer):
        """Logits by the transpose of the embeddings: [..., hidden] -> [..., vocabulary]."""

        def __init__(self, embedding: Any, use_bias: bool, **options: Any) -> None:
            super().__init__(**options)
            self.embedding = embedding
            self.use_bias = use_bias

        def build(self, input_shape: Any) -> None:
            if self.use_bias:
                size = getattr(self.embedding, "vocab_size", None) or self.embedding.input_dim
                self.bias = self.add_weight(name="bias", shape=(size,), initializer="zeros")
            super().build(input_shape)

        def call(self, hidden: Any) -> Any:
            table = self.embedding.weight if hasattr(self.embedding, "weight") else self.embedding.embeddings
            # Two dimensions: the gradient of a batched product would hold one matrix a row.
            flat = tf.matmul(tf.reshape(hidden, (-1, hidden.shape[-1])), table, transpose_b=True)
            if self.use_bias:
                flat = flat + self.bias
            logits = tf.reshape(flat, tf.concat([tf.shape(hidden)[:-1], tf.shape(flat)[-1:]], axis=0))
            return tf.ensure_shape(logits, hidden.shape[:-1] + table.shape[:1])

    return TiedHead


def _layout(model: TFPreTrainedModel) -> Iterator[tuple[Any, str, Any]]:
    """Each variable with its name in PyTorch's state dict and how the two layouts are transposed."""
    from transformers.modeling_tf_pytorch_utils import convert_tf_weight_name_to_pt_weight_name

    for variable in model.weights:
        yield variable, *convert_tf_weight_name_to_pt_weight_name(variable.name, tf_weight_shape=variable.shape)


# Reading weights


class _Tensors:
    """The weights of a file or its shards, by PyTorch name, read one at a time; raises `InputError`."""

    def __init__(self, where: str, path: Path, base: str) -> None:
        self._where = where
        self._read: dict[str, tuple[Path, Callable[[], Any]]] = {}
        self.pytorch = False  # whether the layouts are PyTorch's, too
        sharded = path.suffix == ".json"
        files = [path]
        if sharded:
            with self._reading(path):
                index = json.loads(path.read_text(encoding="utf-8"))
                files = [path.parent / name for name in sorted(set(index["weight_map"].values()))]
        for file in files:
            with self._reading(file):
                if file.suffix == ".h5":
                    self._add_h5(file, sharded)
                else:
                    self._add_safetensors(file)
        # Some files, GPT-2's own among them, were saved from the model without head, whose names have no prefix.
        if not any(name.startswith(f"{base}.") for name in self._read):
            heads = ("lm_head.", "cls.")
            self._read = {n if n.startswith(heads) else f"{base}.{n}": read for n, read in self._read.items()}
        self.names = set(self._read)

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        import tensorflow as tf

        file, read = self._read[name]
        with self._reading(file):
            return np.asarray(tf.cast(read(), tf.float32))  # NumPy itself has no bfloat16

    @contextlib.contextmanager
    def _reading(self, file: Path) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # safetensors, h5py and JSON each have errors of their own
            reason = _line(error)
            if not file.is_file():
                reason = "there is no such file"
            else:
                with file.open("rb") as stream:
                    if stream.read(8) == b"version ":
                        reason = "it is a git-lfs pointer, run `git lfs pull`"
            raise InputError(f"{self._where}: {file.name} cannot be read: {reason}") from error

    def _add_safetensors(self, file: Path) -> None:
        from safetensors import safe_open

        archive: Any = safe_open(file, framework="tf")
        self.pytorch = (archive.metadata() or {}).get("format") != "tf"
        for key in archive.keys():  # noqa: SIM118 (an archive is no mapping)
            name = key if self.pytorch else _pytorch_name(f"model/{key}")
            name = re.sub(r"\bgamma$", "weight", re.sub(r"\bbeta$", "bias", name))  # of old BERT files
            self._read[name] = file, functools.partial(archive.get_tensor, key)

    def _add_h5(self, file: Path, sharded: bool) -> None:
        import h5py  # type: ignore[import-untyped]

        archive = h5py.File(file, "r")

        def add(key: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                # A single file puts "layer/model/" before a name where shards put nothing.
                name = f"model/{key}" if sharded else key.split("/", 1)[1]
                self._read[_pytorch_name(name)] = file, functools.partial(item.__getitem__, ())

        archive.visititems(add)


def _pytorch_name(name: str) -> str:
    from transformers.modeling_tf_pytorch_utils import convert_tf_weight_name_to_pt_weight_name

    return str(convert_tf_weight_name_to_pt_weight_name(name, tf_weight_shape=())[0])


def _restore(model: TFPreTrainedModel, where: str, path: Path) -> None:
    """Give every variable its value from the file; whatever does not fit exactly is an `InputError`."""
    from transformers.modeling_tf_pytorch_utils import apply_transpose

    tensors = _Tensors(where, path, model.base_model_prefix)
    missing, mismatched, expected = [], [], set()
    for variable, name, transpose in _layout(model):
        expected.add(name)
        if name not in tensors.names:
            missing.append(name)
            continue
        array = tensors[name]
        if tensors.pytorch:
            array = apply_transpose(transpose, array)
        # A dimension of 1 is no difference: TensorFlow's GPT-2 has biases of [1, n].
        if [size for size in array.shape if size > 1] != [size for size in variable.shape if size > 1]:
            mismatched.append(f"{name} {list(array.shape)} instead of {list(variable.shape)}")
            continue
        variable.assign(array.reshape(variable.shape))

    def refuse(problem: str, items: list[str], hint: str = "") -> None:
        if items:
            shown = ", ".join(sorted(items)[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")
            raise InputError(f"{where}: {path.name} {problem} {shown}{hint}")

    headless = "; if the embeddings are to serve as that, config.json must say tie_word_embeddings"
    refuse("lacks", missing, headless if set(missing) & set(HEADS) else "")
    refuse("does not fit config.json:", mismatched)
    refuse("has weights that the model has no place for:", _without_place(tensors.names - expected, expected, model))
    heads = [name for name in tensors.names - expected if name in HEADS]
    untied = [name for name in heads if not np.array_equal(tensors[name], _embeddings(model))]
    refuse("differs from the embeddings, which serve as the output matrix, in", untied)


def _without_place(left: set[str], expected: set[str], model: TFPreTrainedModel) -> list[str]:
    """The unread weights inside modules that the model has: without them it would compute something else.

    Modules that it does not have (a pooler, a classifier) do not reach the logits; neither do constants.
    """

    def module(name: str) -> str:
        return ".".join(name.split(".")[:2])

    modules = {module(name) for name in expected if name.startswith(f"{model.base_model_prefix}.")}
    inside = [name for name in left if module(name) in modules and not BUFFERS.search(name)]
    return inside + [
        name for name in left if name.startswith(("lm_head.", "cls.predictions.")) and name not in HEADS + BIASES
    ]


def _embeddings(model: TFPreTrainedModel) -> np.ndarray[Any, Any]:
    """The input embeddings, [vocabulary, hidden]."""
    table = re.compile(r"(wte|\.w|tokens_embed|embed_tokens|word_embeddings)\.weight$")
    return next(np.asarray(variable.numpy()) for variable, name, _ in _layout(model) if table.search(name))


# Writing


def _state(model: TFPreTrainedModel) -> dict[str, np.ndarray[Any, Any]]:
    """PyTorch's state dict of the model, float32."""
    from transformers.modeling_tf_pytorch_utils import apply_transpose

    state = {}
    for variable, name, transpose in _layout(model):
        array = apply_transpose(transpose, np.asarray(variable.numpy(), np.float32), pt_to_tf=False)
        if name.endswith(".bias"):
            array = array.reshape(-1)
        state[name] = np.ascontiguousarray(array)
    return state


def _config_json(model: TFPreTrainedModel) -> str:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("TF")]
    config.tie_word_embeddings = _is_tied(model)
    config.torch_dtype = "float32"
    return str(config.to_json_string(use_diff=True))


def _sync(path: Path) -> None:
    """Onto the disk, so that a rename after it never outlives the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Quiet


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


def _line(error: Exception) -> str:
    """The first line that says something, of an error that may have many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

"""A model's weights by their PyTorch names: reads them from any format of transformers, and checks every one."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm.checkpoint.locating import read_object, why_unreadable
from tfclm.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from transformers import TFPreTrainedModel

# PyTorch's names of an output matrix that may be tied to the input embeddings, and second names of an output bias.
HEADS = (
    "lm_head.weight",
    "lm_head.decoder.weight",
    "cls.predictions.decoder.weight",
    "embed_out.weight",
    "output_projection.weight",
)
BIASES = ("lm_head.decoder.bias", "cls.predictions.decoder.bias")
# Constants that PyTorch models store with their weights: masks, rotary and sinusoidal tables.
BUFFERS = re.compile(
    r"(attn|attention)\.(masked_)?bias$|causal_mask$|inv_freq$|position_ids$|embed_positions(\.weights)?$"
)


def layout(model: TFPreTrainedModel) -> Iterator[tuple[Any, str, Any]]:
    """Yields each variable with its name in PyTorch's state dict and how its layout is transposed there."""
    from tfclm.compat import pytorch_weight_name

    for variable in model.weights:
        yield variable, *pytorch_weight_name(variable.name, tf_weight_shape=variable.shape)


def state_dict(model: TFPreTrainedModel) -> dict[str, np.ndarray[Any, Any]]:
    """PyTorch's state dict of the model, float32."""
    import numpy as np

    from tfclm.compat import apply_transpose

    arrays = {}
    for variable, name, transpose in layout(model):
        array = apply_transpose(transpose, np.asarray(variable.numpy(), np.float32), pt_to_tf=False)
        if name.endswith(".bias"):
            array = array.reshape(-1)
        arrays[name] = np.ascontiguousarray(array)
    return arrays


def restore(model: TFPreTrainedModel, where: str, path: Path) -> None:
    """Assigns every variable its value from a file or its shards.

    Args:
        model: the built model.
        where: the checkpoint's name, for messages.
        path: the weights, or the index of the shards.

    Raises:
        InputError: a weight is missing, unexpected, of another shape or quantized, or the file cannot be read.
    """
    import numpy as np

    from tfclm.compat import apply_transpose

    tensors = _Tensors(where, path, model.base_model_prefix)
    missing, mismatched, expected = [], [], set()
    for variable, name, transpose in layout(model):
        expected.add(name)
        if name not in tensors.names:
            missing.append(name)
            continue
        array = tensors[name]
        if tensors.pytorch:
            array = apply_transpose(transpose, array)
        # Dimensions of 1 are ignored: TensorFlow's GPT-2 has biases of [1, n].
        if [size for size in array.shape if size > 1] != [size for size in variable.shape if size > 1]:
            mismatched.append(f"{name} {list(array.shape)} instead of {list(variable.shape)}")
            continue
        variable.assign(array.reshape(variable.shape))

    def refuse(problem: str, items: list[str], hint: str = "") -> None:
        if items:
            shown = ", ".join(sorted(items)[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")
            raise InputError(f"{where}: {path.name} {problem} {shown}{hint}")

    tie_hint = "; if the embeddings are the output matrix, too, config.json must have tie_word_embeddings"
    refuse("lacks", missing, tie_hint if set(missing) & set(HEADS) else "")
    refuse("does not fit config.json:", mismatched)
    refuse("has weights that the model does not have:", _find_unexpected(tensors.names - expected, expected, model))
    heads = [name for name in tensors.names - expected if name in HEADS]
    untied = [name for name in heads if not np.array_equal(tensors[name], _embeddings(model))]
    refuse("differs from the embeddings, which are the output matrix of this model, in", untied)


def _find_unexpected(unread: set[str], expected: set[str], model: TFPreTrainedModel) -> list[str]:
    """The unread weights that belong to modules of the model: without them it would compute something else.

    Other modules (a pooler, a classifier) do not affect the logits; neither do constants.
    """

    def module(name: str) -> str:
        return ".".join(name.split(".")[:2])

    modules = {module(name) for name in expected if name.startswith(f"{model.base_model_prefix}.")}
    inside = [name for name in unread if module(name) in modules and not BUFFERS.search(name)]
    return inside + [
        name for name in unread if name.startswith(("lm_head.", "cls.predictions.")) and name not in HEADS + BIASES
    ]


def _embeddings(model: TFPreTrainedModel) -> np.ndarray[Any, Any]:
    """The input embeddings, [vocab_size, hidden]."""
    import numpy as np

    table = re.compile(r"(wte|\.w|tokens_embed|embed_tokens|word_embeddings|embed_in)\.weight$")
    return next(np.asarray(variable.numpy()) for variable, name, _ in layout(model) if table.search(name))


class _Tensors:
    """The weights of a file or its shards by their PyTorch names, read one at a time."""

    def __init__(self, where: str, path: Path, base: str) -> None:
        self._where = where
        self._read: dict[str, tuple[Path, Callable[[], Any]]] = {}
        self.pytorch = False  # whether the layouts are PyTorch's
        sharded = path.suffix == ".json"
        files = [path]
        if sharded:
            with self._reading(path):
                shards = sorted(set(read_object(where, path)["weight_map"].values()))
                files = [path.parent / Path(name).name for name in shards]
        for file in files:
            with self._reading(file):
                if file.suffix == ".h5":
                    self._add_h5(file, sharded)
                else:
                    self._add_safetensors(file)
        # Some files, such as GPT-2's own, were saved from the model without its head, whose names have no prefix.
        if not any(name.startswith(f"{base}.") for name in self._read):
            heads = ("lm_head.", "cls.", "embed_out.", "output_projection.")
            self._read = {n if n.startswith(heads) else f"{base}.{n}": read for n, read in self._read.items()}
        self.names = set(self._read)

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        import numpy as np
        import tensorflow as tf

        file, read = self._read[name]
        with self._reading(file):
            tensor = tf.convert_to_tensor(read())
            if tensor.dtype not in (tf.float32, tf.float16, tf.bfloat16, tf.float64):
                raise InputError(
                    f"{self._where}: {file.name} has {name} as {tensor.dtype.name}, so its weights are quantized: give "
                    "the model before quantization, or dequantize it and save float32 or bfloat16"
                )
            return np.asarray(tf.cast(tensor, tf.float32))  # NumPy itself has no bfloat16

    @contextlib.contextmanager
    def _reading(self, file: Path) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # safetensors, h5py and JSON each raise their own
            reason = why_unreadable(file, error)
            raise InputError(f"{self._where}: {file.name} cannot be read: {reason}") from error

    def _add_safetensors(self, file: Path) -> None:
        from safetensors import safe_open

        archive: Any = safe_open(file, framework="tf")
        self.pytorch = (archive.metadata() or {}).get("format") != "tf"
        keys: list[str] = archive.keys()
        for key in keys:
            name = key if self.pytorch else _pytorch_name(f"model/{key}")
            name = re.sub(r"\bgamma$", "weight", re.sub(r"\bbeta$", "bias", name))  # names in old BERT files
            self._read[name] = file, functools.partial(archive.get_tensor, key)

    def _add_h5(self, file: Path, sharded: bool) -> None:
        import h5py

        archive = h5py.File(file, "r")

        def add(key: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                # A single file puts "layer/model/" before a name where shards put nothing.
                name = f"model/{key}" if sharded else key.split("/", 1)[1]
                self._read[_pytorch_name(name)] = file, functools.partial(item.__getitem__, ())

        archive.visititems(add)


def _pytorch_name(name: str) -> str:
    from tfclm.compat import pytorch_weight_name

    return str(pytorch_weight_name(name, tf_weight_shape=())[0])

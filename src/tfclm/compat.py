"""All private and undocumented API of TensorFlow, Keras, transformers, datasets and huggingface_hub that tfclm uses.

Each name is imported on first use, so that this module imports none of them. `tests/test_compat.py` fails by name when
a version within the range of pyproject.toml lacks one.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import operator
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets
    import tensorflow as tf
    import tf_keras

# Name in this module -> module and attribute in the other library.
_TENSORFLOW = {  # tensorflow>=2.20,<2.22
    "config_pb2": "tensorflow.core.protobuf.config_pb2:",
    "saved_model_pb2": "tensorflow.core.protobuf.saved_model_pb2:",
    "tensor_shape_pb2": "tensorflow.core.framework.tensor_shape_pb2:",
    "types_pb2": "tensorflow.core.framework.types_pb2:",
    "FINGERPRINT_FILENAME": "tensorflow.python.saved_model.pywrap_saved_model:constants.FINGERPRINT_FILENAME",
    "create_fingerprint": "tensorflow.python.saved_model.pywrap_saved_model:fingerprinting.CreateFingerprintDef",
    "new_buffer": "tensorflow.python.client.pywrap_tf_session:TF_NewBufferFromString",
    "delete_buffer": "tensorflow.python.client.pywrap_tf_session:TF_DeleteBuffer",
    "call_session_run": "tensorflow.python.client.session:BaseSession._call_tf_sessionrun",
    # The public one cannot be traced outside of a jit-compiled function.
    "xla_optimization_barrier": "tensorflow.compiler.tf2xla.ops.gen_xla_ops:xla_optimization_barrier",
}
_KERAS = {  # tf-keras>=2.20.1,<2.22
    "BaseRandomLayer": "tf_keras:__internal__.layers.BaseRandomLayer",
    "create_all_weights": "tf_keras:optimizers.legacy.Optimizer._create_all_weights",
    # `tfclm.training.step` overrides it.
    "load_initial_counters": "tf_keras:Model._maybe_load_initial_counters_from_ckpt",
}
_TRANSFORMERS = {  # transformers>=4.54.1,<4.55
    "CAUSAL_LM_NAMES": "transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "TFBaseModelOutputWithPast": "transformers.modeling_tf_outputs:TFBaseModelOutputWithPast",
    "TFCausalLMOutputWithPast": "transformers.modeling_tf_outputs:TFCausalLMOutputWithPast",
    "TFCausalLanguageModelingLoss": "transformers.modeling_tf_utils:TFCausalLanguageModelingLoss",
    "apply_transpose": "transformers.modeling_tf_pytorch_utils:apply_transpose",
    "get_initializer": "transformers.modeling_tf_utils:get_initializer",
    "get_tf_activation": "transformers.activations_tf:get_tf_activation",
    "global_generation_defaults": "transformers:PretrainedConfig._get_global_generation_defaults",
    "pytorch_weight_name": "transformers.modeling_tf_pytorch_utils:convert_tf_weight_name_to_pt_weight_name",
    "unpack_inputs": "transformers.modeling_tf_utils:unpack_inputs",
}
_HUGGINGFACE_HUB = {  # huggingface_hub>=0.34,<1.0
    "UploadInfo": "huggingface_hub.lfs:UploadInfo",
    "post_lfs_batch_info": "huggingface_hub.lfs:post_lfs_batch_info",
    "hub_api_logger": "huggingface_hub.hf_api:logger",
    "hub_http_logger": "huggingface_hub.utils._http:logger",
}
PRIVATE_API = _TENSORFLOW | _KERAS | _TRANSFORMERS | _HUGGINGFACE_HUB


def __getattr__(name: str) -> Any:
    if name not in PRIVATE_API:
        raise AttributeError(f"module 'tfclm.compat' has no attribute {name!r}")
    module, _, attribute = PRIVATE_API[name].partition(":")
    value: Any = importlib.import_module(module)
    if attribute:
        value = operator.attrgetter(attribute)(value)
    globals()[name] = value
    return value


def call_after_import(name: str, function: Callable[[], None]) -> None:
    """Calls a function once a module has been imported: at once if it is there already, else right after its import."""
    if name in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _AfterImport(name, function))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, and calls a function when it has been executed."""

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self._name, self._function = name, function

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute, function = spec.loader.exec_module, self._function

            def exec_module(module: ModuleType) -> None:
                execute(module)
                function()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def disable_xla(folder: Path | None = None) -> str | None:
    """Makes ops that compile with XLA fail, as an unmodified server does, for the rest of this process.

    Args:
        folder: directory of TensorFlow's library; that of the installed TensorFlow if not given.

    Returns:
        None if that worked, else the reason why this build of TensorFlow cannot do it.
    """
    if folder is None:
        import tensorflow as tf

        folder = Path(tf.__file__).parent
    library = next(folder.glob("libtensorflow_cc.*"), None)
    if library is None:
        return f"{folder} has no libtensorflow_cc"
    try:
        ctypes.CDLL(str(library))._ZN10tensorflow21DisableXlaCompilationEv()
    except (OSError, AttributeError) as error:  # another build may give the symbol another name
        return str(error)
    return None


def stateful_generator(layer: tf_keras.layers.Layer, seed: int) -> tf.random.Generator:
    """Gives a random layer of Keras a generator whose state is a variable, which can be saved and restored."""
    kind = type(layer._random_generator)
    layer._random_generator = kind(seed=seed, rng_type=kind.RNG_STATEFUL)
    layer._random_generator._maybe_init()
    return layer._random_generator._generator


def fingerprint(rows: datasets.Dataset) -> str:
    """The name under which `datasets` caches what is computed from these rows."""
    return str(rows._fingerprint)


def set_fingerprint(rows: datasets.Dataset, value: str) -> None:
    """Gives rows the name under which `datasets` caches what is computed from them."""
    rows._fingerprint = value


def is_selection(rows: datasets.Dataset) -> bool:
    """Whether rows are a list of indices into another table, as `select` and `shuffle` leave them."""
    return rows._indices is not None


def import_tensorflow() -> None:
    """Imports TensorFlow for a command, without its startup log, which would hide the command's own output.

    Example:
        >>> import_tensorflow()
        >>> import tensorflow as tf
    """
    # TensorFlow keeps millions of objects alive, which the garbage collector would scan again and again.
    gc.set_threshold(200_000, 20, 100)
    # Otherwise TensorFlow would import Keras 3 in addition to tf_keras.
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    # transformers would import PyTorch if it is installed, and some versions of PyTorch fail then (triton).
    os.environ.setdefault("USE_TORCH", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.stderr.flush()
    terminal = os.dup(2)
    # In another process, so that the last messages get through if the import of TensorFlow aborts this one.
    read, write = os.pipe()
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", _RELAY], stdin=read, stderr=terminal) as relay:
        os.close(read)
        os.dup2(write, 2)
        os.close(write)
        try:
            importlib.import_module("tensorflow")
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            # The relay ends when its input closes, unless a process that TensorFlow started keeps it open.
            with contextlib.suppress(subprocess.TimeoutExpired):
                relay.wait(timeout=5)
            relay.kill()


# Copies stderr without TensorFlow's own log: informational lines, which begin with I and a date, and the line that says
# that they are not in the log file yet.
_RELAY = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
for line in sys.stdin.buffer:
    if not line.startswith((b"I0000", b"WARNING: All log messages before absl")):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
"""

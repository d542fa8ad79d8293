"""Size, CPU time to load and memory of each kind of export.

    python -m pip install 'tfclm[benchmarks]'
    python -m benchmarks.exports

DistilGPT2's shape with random weights. A new process loads each version by TensorFlow's C API, without Python's
TensorFlow, as a server does, and calls `generate_tokens` with 1 row and with 8. Its memory is the increase over that
of TensorFlow's libraries, once the memory that is not used any more has been returned to the system.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"weights": "int8"},
    "xla": {"compile": "xla", "max_batch_size": 8, "buckets": (128,)},
    "xla-bfloat16": {"compile": "xla", "max_batch_size": 8, "buckets": (128,), "weights": "bfloat16"},
}
PROMPT = 16  # tokens
TYPES = {1: ctypes.c_float, 3: ctypes.c_int32, 9: ctypes.c_int64}
STRING, EMPTY_STRING = 7, 24  # the type, and the zero bytes that are an empty text in memory


class _Output(ctypes.Structure):
    _fields_ = (("operation", ctypes.c_void_p), ("index", ctypes.c_int))


class _Library:
    """The functions of TensorFlow's C API that load a version and call it."""

    def __init__(self, folder: Path) -> None:
        ctypes.CDLL(str(folder / "libtensorflow_framework.so.2"), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(folder / "libtensorflow_cc.so.2"), mode=ctypes.RTLD_GLOBAL)
        self._status, self._graph = self._pointer("TF_NewStatus"), self._pointer("TF_NewGraph")
        self._session: Any = None

    def load(self, version: Path) -> None:
        """Loads a version into a session."""
        tags = (ctypes.c_char_p * 1)(b"serve")
        options = ctypes.c_void_p(self._pointer("TF_NewSessionOptions"))
        arguments = (options, None, str(version).encode(), tags, 1, ctypes.c_void_p(self._graph), None)
        self._session = self._pointer("TF_LoadSessionFromSavedModel", *arguments, ctypes.c_void_p(self._status))
        self._check()

    def run(self, inputs: list[dict[str, Any]], output: str) -> None:
        """Computes an output for inputs with their names, types, shapes and values."""
        names = (_Output * len(inputs))(*(self._find(each["name"]) for each in inputs))
        values = (ctypes.c_void_p * len(inputs))(*(self._tensor(each) for each in inputs))
        result, session, status = (ctypes.c_void_p * 1)(), ctypes.c_void_p(self._session), ctypes.c_void_p(self._status)
        wanted = (_Output * 1)(self._find(output))
        self._library.TF_SessionRun(session, None, names, values, len(inputs), wanted, result, 1, None, 0, None, status)
        self._check()

    def _pointer(self, name: str, *arguments: Any) -> Any:
        function = getattr(self._library, name)
        function.restype = ctypes.c_void_p
        return function(*arguments)

    def _find(self, name: str) -> _Output:
        operation, _, index = name.partition(":")
        pointer = self._pointer("TF_GraphOperationByName", ctypes.c_void_p(self._graph), operation.encode())
        return _Output(pointer, int(index))

    def _tensor(self, given: dict[str, Any]) -> Any:
        shape, values = given["shape"], given["values"]
        if given["type"] == STRING:
            data = (ctypes.c_char * (EMPTY_STRING * len(values)))()
        else:
            data = (TYPES[given["type"]] * len(values))(*values)
        dims = (ctypes.c_int64 * len(shape))(*shape)
        size = ctypes.c_size_t(ctypes.sizeof(data))
        tensor = self._pointer("TF_AllocateTensor", given["type"], dims, len(shape), size)
        ctypes.memmove(self._pointer("TF_TensorData", ctypes.c_void_p(tensor)), data, ctypes.sizeof(data))
        return tensor

    def _check(self) -> None:
        if self._library.TF_GetCode(ctypes.c_void_p(self._status)):
            self._library.TF_Message.restype = ctypes.c_char_p
            raise RuntimeError(self._library.TF_Message(ctypes.c_void_p(self._status)).decode())


def resident_bytes() -> int:
    """The memory of this process, without what it does not use any more."""
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def child(request: dict[str, Any]) -> None:
    """Loads and calls a version; prints CPU seconds and bytes."""
    library = _Library(Path(request["library"]))
    before, start = resident_bytes(), time.process_time()
    library.load(Path(request["version"]))
    seconds, loaded = time.process_time() - start, resident_bytes()
    for inputs in request["calls"]:
        library.run(inputs, request["output"])
    print(json.dumps({"seconds": seconds, "loaded": loaded - before, "called": resident_bytes() - before}))


def measure(version: Path) -> dict[str, float]:
    """CPU seconds to load a version in a new process, and bytes that it takes, `loaded` and once it was `called`."""
    import numpy as np
    import tensorflow as tf
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString((version / "saved_model.pb").read_bytes())
    signature = saved.meta_graphs[0].signature_def["generate_tokens"]
    calls = []
    for rows in (1, 8):
        ids = np.random.default_rng(0).integers(0, 50256, [rows, PROMPT])
        values = {"input_ids": ids, "attention_mask": np.ones_like(ids), "max_new_tokens": np.array([16])}
        values |= {name: np.array([1]) for name in ("top_p", "repetition_penalty")}
        values |= {name: np.array([0]) for name in signature.inputs if name not in values}
        calls.append(
            [
                {
                    "name": signature.inputs[name].name,
                    "type": signature.inputs[name].dtype,
                    "shape": value.shape,
                    "values": value.reshape(-1).tolist(),
                }
                for name, value in values.items()
            ]
        )
    request = {
        "library": str(Path(tf.__file__).parent),
        "version": str(version),
        "calls": calls,
        "output": signature.outputs["completion_tokens"].name,
    }
    # The child does not import this module's package, which would import TensorFlow.
    command = [sys.executable, __file__, json.dumps(request)]
    quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=quiet)
    measured: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return measured


def size(version: Path) -> int:
    """The bytes of a version's files."""
    return sum(file.stat().st_size for file in version.rglob("*") if file.is_file())


def main() -> None:
    """Prints one row per kind of export."""
    from benchmarks.decoding import make_checkpoint, write

    print("| | on disk | CPU seconds to load | memory when loaded | after calls |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "checkpoint"
        make_checkpoint(folder)
        for name, settings in SETTINGS.items():
            version = write(folder, Path(work) / name, settings)
            figures = measure(version)
            megabytes = [f"{value / 1e6:.0f} MB" for value in (size(version), figures["loaded"], figures["called"])]
            print(
                f"| {name} | {megabytes[0]} | {figures['seconds']:.1f} | {megabytes[1]} | {megabytes[2]} |", flush=True
            )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(json.loads(sys.argv[1]))
    else:
        main()

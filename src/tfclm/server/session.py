"""A SavedModel in its own TensorFlow session, run as the C++ server runs it."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfclm.compat import call_session_run, config_pb2, delete_buffer, new_buffer
from tfclm.server.execution import THREAD_POOLS, Step
from tfclm.server.status import Code, StatusError, from_tensorflow, invalid

MAX_INTER_OP_THREADS = 4  # per run, by default


class Session:
    """A loaded SavedModel: `signatures` are its SignatureDefs by name.

    Args:
        path: the SavedModel's directory.
        tags: the tags of the graph to load.
        inter_op_threads: ops that a run executes in parallel; 0 for automatic.
        intra_op_threads: threads per op; 0 for automatic.

    Raises:
        StatusError: the directory holds no SavedModel that can be loaded.
        OSError: the directory cannot be read.
    """

    def __init__(self, path: Path, tags: Sequence[str], inter_op_threads: int, intra_op_threads: int) -> None:
        # Closing a session waits for its runs, which may have been abandoned: then the last run closes it.
        self._lock = threading.Lock()
        self._running = 0
        self._closed = False
        if not any((path / file).exists() for file in ("saved_model.pb", "saved_model.pbtxt")):
            raise StatusError(
                Code.NOT_FOUND, f"Could not find SavedModel .pb or .pbtxt at supplied export directory path: {path}"
            )
        config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=intra_op_threads)
        threads = max(inter_op_threads or min(os.cpu_count() or 1, MAX_INTER_OP_THREADS), 1)
        for pool in range(THREAD_POOLS + 1):
            # A pool with a global name is shared by all sessions.
            config.session_inter_op_thread_pool.add(num_threads=threads, global_name=f"tfclm-{threads}-{pool}")
        graph = tf.Graph()
        self._session = tf.compat.v1.Session(graph=graph, config=config)
        try:
            with graph.as_default():
                meta = tf.compat.v1.saved_model.loader.load(self._session, list(tags), str(path))
        except tf.errors.OpError as error:
            self.close()
            raise from_tensorflow(error) from error
        except OSError:
            self.close()
            raise
        except Exception as error:
            # The loader has no specific error class for an invalid file or missing tags.
            self.close()
            raise invalid(f"{path}: {' '.join(str(error).split())}") from error
        self.signatures: dict[str, Any] = dict(meta.signature_def)

    def close(self) -> None:
        """Frees the memory. No call may be in progress, except abandoned runs, the last of which closes the session."""
        with self._lock:
            self._closed = True
            running = self._running
        if not running:
            self._session.close()
        self.signatures = {}
        del self._session
        gc.collect()

    def step(self, feeds: Mapping[str, Any], fetches: Sequence[str]) -> Step[list[Any]]:
        """A step that feeds arrays by the names of their tensors and returns the values of the tensors in `fetches`.

        Raises:
            StatusError: the graph has no such tensor.
        """
        try:
            inputs = {self._tensor(name): value for name, value in feeds.items()}
            outputs = [self._tensor(name) for name in fetches]
        except (KeyError, ValueError) as error:
            raise invalid(" ".join(str(error).split())) from error
        session = self._session

        def run(pool: int, timeout_ms: int) -> list[Any]:
            options = config_pb2.RunOptions(timeout_in_ms=timeout_ms, inter_op_thread_pool=pool)
            buffer = new_buffer(options.SerializeToString())
            with self._lock:
                self._running += 1
            try:
                # `Session.run` would check feeds against the static shapes of the graph, which the C++ server does
                # not, and would add Python's traceback of the graph to its errors. It calls this function itself.
                return [_as_array(value) for value in call_session_run(session, buffer, inputs, outputs, [], None)]
            finally:
                delete_buffer(buffer)
                with self._lock:
                    self._running -= 1
                    last = self._closed and not self._running
                if last:
                    session.close()

        return run

    def _tensor(self, name: str) -> Any:
        return self._session.graph.get_tensor_by_name(name)._as_tf_output()


@contextmanager
def tensorflow_errors() -> Iterator[None]:
    """Turns errors of a run into StatusError: those of the graph, and those about inputs that cannot be fed."""
    try:
        yield
    except tf.errors.OpError as error:
        raise from_tensorflow(error) from error
    except UnicodeDecodeError as error:
        # The status message is not UTF-8. Such bytes can only come from the request.
        raise invalid(error.object.decode("utf-8", "replace")) from error
    except (TypeError, ValueError) as error:
        raise invalid(" ".join(str(error).split())) from error


def _as_array(value: Any) -> Any:
    """An output as an array: a scalar string comes as bytes, whose trailing NULs NumPy would drop."""
    if not isinstance(value, bytes):
        return np.asarray(value)
    array = np.empty((), object)
    array[()] = value
    return array

"""One version of a model: a SavedModel in a session of its own, run as the C++ server runs it."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import (
    classification_pb2,
    inference_pb2,
    input_pb2,
    predict_pb2,
    prediction_log_pb2,
    regression_pb2,
)

from tfclm.compat import call_session_run, config_pb2, delete_buffer, new_buffer
from tfclm.server.execution import POOLS, Caller, Runs, Step
from tfclm.server.monitoring import Metrics
from tfclm.server.status import Code, StatusError, from_tensorflow, invalid
from tfclm.server.wire.messages import MAX_REPEATED_BYTES, classifications, read_tensors, regressions

DEFAULT_SIGNATURE = "serving_default"
CLASSIFY, REGRESS, PREDICT = (f"tensorflow/serving/{method}" for method in ("classify", "regress", "predict"))
MAX_WARMUP_RECORDS = 1000
# What TensorFlow says of a batch that was cancelled, while it ran or before it began.
_CANCELLED_BATCH = ("Loop execution was cancelled", "Missing 0-th output from", "cancelled before it was started")
MAX_INTER_OP_THREADS = 4  # of a run, unless the option says otherwise


@dataclass(frozen=True)
class LoadOptions:
    """How a version is loaded."""

    tags: tuple[str, ...] = ("serve",)
    warmup: bool = True
    warmup_iterations: int = 1
    check_method_names: bool = False
    inter_op_threads: int = 0
    intra_op_threads: int = 0


class Servable:
    """A loaded version. Its methods may be called from many threads.

    They take a `timeout_ms`, 0 for as long as it takes, or a `caller`, who may also leave.
    """

    def __init__(self, name: str, version: int, path: Path, options: LoadOptions, metrics: Metrics, runs: Runs) -> None:
        """Loads the SavedModel and replays its warm-up records.

        Raises:
            StatusError: the folder holds no SavedModel that can be loaded, or a warm-up record fails.
            OSError: the folder cannot be read.
        """
        self.name, self.version, self.path = name, version, path
        self._options, self._metrics, self._runs = options, metrics, runs
        self._loaded = False
        # To close a session waits for its runs, and whoever closes it must not.
        self._lock = threading.Lock()
        self._running = 0
        self._closed = False
        if not any((path / file).exists() for file in ("saved_model.pb", "saved_model.pbtxt")):
            raise StatusError(
                Code.NOT_FOUND, f"Could not find SavedModel .pb or .pbtxt at supplied export directory path: {path}"
            )
        config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=options.intra_op_threads)
        inter_op_threads = max(options.inter_op_threads or min(os.cpu_count() or 1, MAX_INTER_OP_THREADS), 1)
        for pool in range(POOLS + 1):
            # Under a name, the threads are shared by all sessions.
            name = f"tfclm-{inter_op_threads}-{pool}"
            config.session_inter_op_thread_pool.add(num_threads=inter_op_threads, global_name=name)
        graph = tf.Graph()
        self._session = tf.compat.v1.Session(graph=graph, config=config)
        try:
            with graph.as_default():
                meta = tf.compat.v1.saved_model.loader.load(self._session, list(options.tags), str(path))
            self.signatures: dict[str, Any] = dict(meta.signature_def)
            if options.warmup:
                self._warm_up()
            self._loaded = True
        except tf.errors.OpError as error:
            self.close()
            raise from_tensorflow(error) from error
        except (StatusError, OSError):
            self.close()
            raise
        except Exception as error:
            # The loader has no error of its own for a file that is no SavedModel, or has not the tags.
            self.close()
            raise invalid(f"{path}: {' '.join(str(error).split())}") from error

    def close(self) -> None:
        """Gives the memory back. No call may be under way; an abandoned run keeps the session until it ends."""
        with self._lock:
            self._closed = True
            running = self._running
        if not running:
            self._session.close()
        self.signatures = {}
        del self._session
        gc.collect()

    def signature_inputs(self, signature_name: str) -> Mapping[str, Any]:
        """The inputs of a signature, by name, as REST asks for them."""
        name = signature_name or DEFAULT_SIGNATURE
        if name not in self.signatures:
            raise invalid(f'Serving signature name: "{name}" not found in signature def')
        inputs: Mapping[str, Any] = self.signatures[name].inputs
        return inputs

    def predict(
        self,
        signature_name: str,
        inputs: Mapping[str, Any],
        *,
        only: Sequence[str] = (),
        timeout_ms: int = 0,
        caller: Caller | None = None,
    ) -> dict[str, Any]:
        """Runs a signature on arrays; gives its outputs, or those of `only`. Inputs with a default may be left out.

        Raises:
            StatusError: the inputs are not the signature's, or the graph refuses them.
        """
        name = signature_name or DEFAULT_SIGNATURE
        if name not in self.signatures:
            raise StatusError(Code.FAILED_PRECONDITION, f'Serving signature key "{name}" not found.')
        signature = self.signatures[name]
        if self._options.check_method_names and signature.method_name not in (PREDICT, CLASSIFY, REGRESS):
            raise StatusError(
                Code.INTERNAL,
                f"Expected prediction signature method_name to be one of {{{PREDICT}, {CLASSIFY}, {REGRESS}}}. "
                f"Was: {signature.method_name}",
            )
        feeds = self._feeds(signature, inputs)
        chosen = _chosen(signature.outputs, only)
        values = self._run(signature, feeds, caller or _within(timeout_ms), "Predict")
        return {name: values[info.name] for name, info in chosen.items()}

    def classify(
        self,
        signature_name: str,
        examples: input_pb2.Input,
        *,
        timeout_ms: int = 0,
        caller: Caller | None = None,
    ) -> classification_pb2.ClassificationResult:
        """Runs a classification signature on `tf.train.Example`s."""
        signature = self._signature_of_examples(signature_name)
        self._check_classify(signature)
        count, outputs = self._run_examples(signature, examples, caller or _within(timeout_ms), "Classify")
        return classifications(signature, count, outputs)

    def regress(
        self,
        signature_name: str,
        examples: input_pb2.Input,
        *,
        timeout_ms: int = 0,
        caller: Caller | None = None,
    ) -> regression_pb2.RegressionResult:
        """Runs a regression signature on `tf.train.Example`s."""
        signature = self._signature_of_examples(signature_name)
        self._check_regress(signature)
        count, outputs = self._run_examples(signature, examples, caller or _within(timeout_ms), "Regress")
        return regressions(signature, count, outputs)

    def multi_inference(
        self,
        tasks: Iterable[inference_pb2.InferenceTask],
        examples: input_pb2.Input,
        *,
        timeout_ms: int = 0,
        caller: Caller | None = None,
    ) -> list[inference_pb2.InferenceResult]:
        """Runs several classification and regression signatures on the same examples, one after the other."""
        signatures: dict[str, tuple[str, Any]] = {}
        model_name = ""
        for task in tasks:
            if not task.model_spec.name:
                raise invalid("Found ModelSpec with an empty model name.")
            model_name = model_name or task.model_spec.name
            if task.model_spec.name != model_name:
                raise invalid("All ModelSpecs in a MultiInferenceRequest must access the same model name.")
            name = task.model_spec.signature_name or DEFAULT_SIGNATURE
            if name in signatures:
                raise invalid(f"Duplicate evaluation of signature: {name}")
            if name not in self.signatures:
                raise invalid(f"Requested signature not found in model graph: {name}")
            if task.method_name == CLASSIFY:
                self._check_classify(self.signatures[name])
            elif task.method_name == REGRESS:
                self._check_regress(self.signatures[name])
            else:
                raise StatusError(Code.UNIMPLEMENTED, f"Unsupported signature method_name: {task.method_name}")
            signatures[name] = (task.method_name, self.signatures[name])
        caller = caller or _within(timeout_ms)
        count, results = 0, []
        for name, (method, signature) in signatures.items():
            count, outputs = self._run_examples(signature, examples, caller, None)
            result = inference_pb2.InferenceResult()
            result.model_spec.name, result.model_spec.signature_name = self.name, name
            result.model_spec.version.value = self.version
            if method == CLASSIFY:
                result.classification_result.CopyFrom(classifications(signature, count, outputs))
            else:
                result.regression_result.CopyFrom(regressions(signature, count, outputs))
            results.append(result)
        self._metrics.example_count.add(count, model=self.name)
        self._metrics.example_counts.observe(count, model=self.name)
        return results

    def _feeds(self, signature: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        needed, given, defaults = set(signature.inputs), set(inputs), signature.defaults
        if len(given) > len(needed) or (len(given) < len(needed) and not defaults):
            raise invalid(
                f"input size does not match signature: {len(given)}!={len(needed)} len({_names(given)}) != "
                f"len({_names(needed)}). Sent extra: {_names(given - needed)}. "
                f"Missing but required: {_names(needed - given)}."
            )
        for name in sorted(given - needed):
            raise invalid(
                f"input tensor alias not found in signature: {name}. Inputs expected to be in the set {_names(needed)}."
            )
        for name in sorted(needed - given - set(defaults)):
            raise invalid(f"Signature input {name} was not found in request and does not have a default value.")
        return {
            info.name: inputs[name] if name in inputs else tf.make_ndarray(defaults[name])
            for name, info in signature.inputs.items()
        }

    def _run(self, signature: Any, feeds: Mapping[str, Any], caller: Caller, api: str | None) -> dict[str, Any]:
        """All outputs of a signature, by the name of their tensor.

        The session keeps an executor for each set of feeds and of fetches. That takes seconds and much memory, so
        a request must have no choice in it: whatever it asks for, a signature has one set of each.
        """
        fetches = sorted({info.name for info in signature.outputs.values()})
        try:
            given = {self._tensor(name): value for name, value in feeds.items()}
            wanted = [self._tensor(name) for name in fetches]
        except (KeyError, ValueError) as error:
            raise invalid(" ".join(str(error).split())) from error
        session = self._session

        def step(pool: int, timeout_ms: int) -> list[Any]:
            options = config_pb2.RunOptions(timeout_in_ms=timeout_ms, inter_op_thread_pool=pool)
            buffer = new_buffer(options.SerializeToString())
            with self._lock:
                self._running += 1
            try:
                # `Session.run` would check feeds against the static shapes of the graph, which the C++ server does
                # not, and would add Python's traceback of the graph to its errors. This is what runs beneath it.
                return [_array(value) for value in call_session_run(session, buffer, given, wanted, [], None)]
            finally:
                delete_buffer(buffer)
                with self._lock:
                    self._running -= 1
                    last = self._closed and not self._running
                if last:
                    session.close()

        start = time.perf_counter()
        try:
            # While it loads, the warm-up is nobody's request.
            values = self._run_until_answered(step, caller) if self._loaded else step(0, 0)
        except tf.errors.OpError as error:
            raise from_tensorflow(error) from error
        except UnicodeDecodeError as error:
            # Of a status whose message is no UTF-8. Such bytes can only be the request's own.
            raise invalid(error.object.decode("utf-8", "replace")) from error
        except (TypeError, ValueError) as error:
            raise invalid(" ".join(str(error).split())) from error
        if api is not None:
            self._metrics.runtime_latency.observe(
                (time.perf_counter() - start) * 1e6, model_name=self.name, API=api, runtime="TF1"
            )
        return dict(zip(fetches, values, strict=True))

    def _run_until_answered(self, step: Step[list[Any]], caller: Caller) -> list[Any]:
        """Runs a step again where it failed because of another request, until it is done or the caller has gone.

        TensorFlow runs a batch of several requests under the deadline of the last one. When that passes, the others
        are cancelled, or get no output if the batch had not begun.
        """
        while True:
            try:
                return self._runs.run(self.name, step, caller)
            except (tf.errors.CancelledError, tf.errors.InternalError) as error:
                if not any(words in error.message for words in _CANCELLED_BATCH):
                    raise
                caller.remaining()  # raises if it was this caller's own deadline

    def _tensor(self, name: str) -> Any:
        return self._session.graph.get_tensor_by_name(name)._as_tf_output()

    def _run_examples(
        self, signature: Any, examples: input_pb2.Input, caller: Caller, api: str | None
    ) -> tuple[int, dict[str, Any]]:
        """The number of examples, and the outputs by the name of their tensor."""
        with_context = examples.WhichOneof("kind") == "example_list_with_context"
        given = examples.example_list_with_context if with_context else examples.example_list
        if not given.examples:
            raise invalid("Input is empty.")
        # Two messages one after the other are one message with the fields of both.
        context = given.context.SerializeToString() if with_context else b""
        count = len(given.examples)
        if len(context) * (count - 1) > MAX_REPEATED_BYTES:
            raise invalid(
                f"The context is {len(context)} bytes for each of {count} examples: at most "
                f"{MAX_REPEATED_BYTES} bytes may be repeated"
            )
        batch = np.array([context + example.SerializeToString() for example in given.examples], object)
        return count, self._run(signature, {signature.inputs["inputs"].name: batch}, caller, api)

    def _signature_of_examples(self, signature_name: str) -> Any:
        name = signature_name or DEFAULT_SIGNATURE
        if name not in self.signatures:
            raise invalid(f"No signature was found with the name: {name}")
        return self.signatures[name]

    def _check_classify(self, signature: Any) -> None:
        self._check_examples(signature, "classification", CLASSIFY)
        if len(signature.outputs) not in (1, 2):
            raise invalid(f"Expected one or two output Tensors, found {len(signature.outputs)}")
        if not {"classes", "scores"} & set(signature.outputs):
            raise invalid(
                "Expected classification signature outputs to contain at least one of "
                f'"classes" or "scores". Signature was: {signature}'
            )

    def _check_regress(self, signature: Any) -> None:
        self._check_examples(signature, "regression", REGRESS)
        if len(signature.outputs) != 1:
            raise invalid("Expected one output Tensor.")
        if "outputs" not in signature.outputs:
            raise invalid(f"No regression outputs found in SignatureDef: {signature}")

    def _check_examples(self, signature: Any, kind: str, method: str) -> None:
        if self._options.check_method_names and signature.method_name != method:
            raise invalid(f"Expected {kind} signature method_name to be {method}. Was: {signature.method_name}")
        if len(signature.inputs) != 1:
            raise invalid("Expected one input Tensor.")
        if "inputs" not in signature.inputs:
            raise invalid(f"No {kind} inputs found in SignatureDef: {signature}")

    def _warm_up(self) -> None:
        path = self.path / "assets.extra" / "tf_serving_warmup_requests"
        if not path.exists():
            return
        start, count = time.perf_counter(), 0
        try:
            for record in tf.compat.v1.io.tf_record_iterator(str(path)):
                count += 1
                if count > MAX_WARMUP_RECORDS:
                    raise invalid(f"Number of warmup records exceeds the maximum ({MAX_WARMUP_RECORDS}) at {path}")
                for _ in range(self._options.warmup_iterations):
                    self._replay(prediction_log_pb2.PredictionLog.FromString(record))
        except tf.errors.DataLossError as error:
            raise StatusError(
                Code.DATA_LOSS, f"{error.message}. Please verify your warmup data is in TFRecord format."
            ) from error
        taken = (time.perf_counter() - start) * 1e6
        self._metrics.warmup_latency.observe(taken, model_path=str(self.path), status="OK")
        self._metrics.warmup_records_read.add(count, model_path=str(self.path), status="OK")

    def _replay(self, log: prediction_log_pb2.PredictionLog) -> None:
        kind = log.WhichOneof("log_type")
        if kind == "predict_log":
            predict: predict_pb2.PredictRequest = log.predict_log.request
            self.predict(predict.model_spec.signature_name, read_tensors(predict.inputs), only=predict.output_filter)
        elif kind == "classify_log":
            self.classify(log.classify_log.request.model_spec.signature_name, log.classify_log.request.input)
        elif kind == "regress_log":
            self.regress(log.regress_log.request.model_spec.signature_name, log.regress_log.request.input)
        elif kind == "multi_inference_log":
            self.multi_inference(log.multi_inference_log.request.tasks, log.multi_inference_log.request.input)
        elif kind is not None:
            raise StatusError(Code.UNIMPLEMENTED, f"Unsupported log_type for warmup: {kind}")


def _within(timeout_ms: int) -> Caller:
    return Caller(timeout_ms / 1000 if timeout_ms else None)


def _array(value: Any) -> Any:
    """An output as an array: a scalar string comes as bytes, of which NumPy would drop NULs at the end."""
    if not isinstance(value, bytes):
        return np.asarray(value)
    array = np.empty((), object)
    array[()] = value
    return array


def _names(names: Iterable[str]) -> str:
    return "{" + ",".join(sorted(names)) + "}"


def _chosen(outputs: Mapping[str, Any], only: Sequence[str]) -> Mapping[str, Any]:
    chosen: dict[str, Any] = {}
    for name in only:
        if name not in outputs:
            raise invalid(
                f"output tensor alias not found in signature: {name} Outputs expected to be in the set "
                f"{_names(outputs)}."
            )
        if name in chosen:
            raise invalid(f"duplicate output tensor alias: {name}")
        chosen[name] = outputs[name]
    return chosen or outputs

"""One loaded version of a model: runs its signatures for the APIs of TensorFlow Serving."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow_serving.apis import (
    classification_pb2,
    inference_pb2,
    input_pb2,
    predict_pb2,
    prediction_log_pb2,
    regression_pb2,
)

from tfclm.server.examples import (
    CLASSIFY,
    DEFAULT_SIGNATURE,
    PREDICT,
    REGRESS,
    check_classify,
    check_regress,
    check_tasks,
    serialize_examples,
)
from tfclm.server.execution import Caller, Runs
from tfclm.server.monitoring import Metrics
from tfclm.server.session import Session, tensorflow_errors
from tfclm.server.status import Code, StatusError, from_tensorflow, invalid
from tfclm.server.wire.messages import classifications, read_tensors, regressions

MAX_WARMUP_RECORDS = 1000


@dataclass(frozen=True)
class LoadOptions:
    """How a version is loaded; the fields are settings of the server."""

    tags: tuple[str, ...] = ("serve",)
    warmup: bool = True
    warmup_iterations: int = 1
    check_method_names: bool = False
    inter_op_threads: int = 0
    intra_op_threads: int = 0


class Servable:
    """A loaded version. Its methods may be called from many threads.

    They take a `timeout_ms`, 0 for no limit, or a `caller`, who may also cancel.

    Raises:
        StatusError: the directory holds no SavedModel that can be loaded, or a warm-up record fails.
        OSError: the directory cannot be read.
    """

    def __init__(self, name: str, version: int, path: Path, options: LoadOptions, metrics: Metrics, runs: Runs) -> None:
        """Loads the SavedModel and replays its warm-up records."""
        self.name, self.version, self.path = name, version, path
        self._options, self._metrics, self._runs = options, metrics, runs
        self._loaded = False
        self._session = Session(path, options.tags, options.inter_op_threads, options.intra_op_threads)
        try:
            if options.warmup:
                self._warm_up()
        except tf.errors.OpError as error:
            self.close()
            raise from_tensorflow(error) from error
        except (StatusError, OSError):
            self.close()
            raise
        except Exception as error:
            self.close()
            raise invalid(f"{path}: {' '.join(str(error).split())}") from error
        self._loaded = True

    def close(self) -> None:
        """Frees the memory. No call may be in progress; an abandoned run keeps the session until it ends."""
        self._session.close()

    @property
    def signatures(self) -> Mapping[str, Any]:
        """The SignatureDefs by name."""
        return self._session.signatures

    def signature_inputs(self, signature_name: str) -> Mapping[str, Any]:
        """The inputs of a signature by name, for a REST request."""
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
        """Runs a signature on arrays; returns its outputs, or only some. Inputs with a default are optional.

        Raises:
            StatusError: the inputs do not match the signature, or the graph refuses them.
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
        feeds = _match_inputs(signature, inputs)
        selected = _select_outputs(signature.outputs, only)
        values = self._run(signature, feeds, caller or _caller(timeout_ms), "Predict")
        return {name: values[info.name] for name, info in selected.items()}

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
        check_classify(signature, method_name=self._options.check_method_names)
        count, outputs = self._run_examples(signature, examples, caller or _caller(timeout_ms), "Classify")
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
        check_regress(signature, method_name=self._options.check_method_names)
        count, outputs = self._run_examples(signature, examples, caller or _caller(timeout_ms), "Regress")
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
        methods = check_tasks(tasks, self.signatures, method_name=self._options.check_method_names)
        caller = caller or _caller(timeout_ms)
        count, results = 0, []
        for name, method in methods.items():
            signature = self.signatures[name]
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

    def _signature_of_examples(self, signature_name: str) -> Any:
        name = signature_name or DEFAULT_SIGNATURE
        if name not in self.signatures:
            raise invalid(f"No signature was found with the name: {name}")
        return self.signatures[name]

    def _run_examples(
        self, signature: Any, examples: input_pb2.Input, caller: Caller, api: str | None
    ) -> tuple[int, dict[str, Any]]:
        """The number of examples, and the outputs by the names of their tensors."""
        batch = serialize_examples(examples)
        return len(batch), self._run(signature, {signature.inputs["inputs"].name: batch}, caller, api)

    def _run(self, signature: Any, feeds: Mapping[str, Any], caller: Caller, api: str | None) -> dict[str, Any]:
        """All outputs of a signature, by the names of their tensors.

        The session caches an executor for each set of feeds and of fetches, which costs seconds and much memory. So
        every request runs a signature with the same set of each, whatever outputs it asks for.
        """
        fetches = sorted({info.name for info in signature.outputs.values()})
        step = self._session.step(feeds, fetches)
        start = time.perf_counter()
        with tensorflow_errors():
            # Warm-up requests have no caller who could cancel.
            values = self._runs.run(self.name, step, caller) if self._loaded else step(0, 0)
        if api is not None:
            self._metrics.runtime_latency.observe(
                (time.perf_counter() - start) * 1e6, model_name=self.name, API=api, runtime="TF1"
            )
        return dict(zip(fetches, values, strict=True))

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
        elapsed = (time.perf_counter() - start) * 1e6
        self._metrics.warmup_latency.observe(elapsed, model_path=str(self.path), status="OK")
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


def _caller(timeout_ms: int) -> Caller:
    return Caller(timeout_ms / 1000 if timeout_ms else None)


def _match_inputs(signature: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs, with defaults for those that are missing, by the names of their tensors."""
    needed, given, defaults = set(signature.inputs), set(inputs), signature.defaults
    if len(given) > len(needed) or (len(given) < len(needed) and not defaults):
        raise invalid(
            f"input size does not match signature: {len(given)}!={len(needed)} len({_set(given)}) != "
            f"len({_set(needed)}). Sent extra: {_set(given - needed)}. "
            f"Missing but required: {_set(needed - given)}."
        )
    for name in sorted(given - needed):
        raise invalid(
            f"input tensor alias not found in signature: {name}. Inputs expected to be in the set {_set(needed)}."
        )
    for name in sorted(needed - given - set(defaults)):
        raise invalid(f"Signature input {name} was not found in request and does not have a default value.")
    return {
        info.name: inputs[name] if name in inputs else tf.make_ndarray(defaults[name])
        for name, info in signature.inputs.items()
    }


def _select_outputs(outputs: Mapping[str, Any], only: Sequence[str]) -> Mapping[str, Any]:
    selected: dict[str, Any] = {}
    for name in only:
        if name not in outputs:
            raise invalid(
                f"output tensor alias not found in signature: {name} Outputs expected to be in the set {_set(outputs)}."
            )
        if name in selected:
            raise invalid(f"duplicate output tensor alias: {name}")
        selected[name] = outputs[name]
    return selected or outputs


def _set(names: Iterable[str]) -> str:
    return "{" + ",".join(sorted(names)) + "}"

"""The inputs of Classify, Regress and MultiInference: batches of `tf.train.Example`s, and signature checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from tensorflow_serving.apis import inference_pb2, input_pb2

from tfclm.server.status import Code, StatusError, invalid
from tfclm.server.wire.messages import MAX_REPEATED_BYTES

DEFAULT_SIGNATURE = "serving_default"
CLASSIFY, REGRESS, PREDICT = (f"tensorflow/serving/{method}" for method in ("classify", "regress", "predict"))


def serialize_examples(request: input_pb2.Input) -> Any:
    """The examples of a request, each with the context that all share, as a string array of shape [B].

    Raises:
        StatusError: INVALID_ARGUMENT, for no example, or a context that is too large to be repeated for each.
    """
    with_context = request.WhichOneof("kind") == "example_list_with_context"
    given = request.example_list_with_context if with_context else request.example_list
    if not given.examples:
        raise invalid("Input is empty.")
    # Two concatenated serialized messages are one message with the fields of both.
    context = given.context.SerializeToString() if with_context else b""
    count = len(given.examples)
    if len(context) * (count - 1) > MAX_REPEATED_BYTES:
        raise invalid(
            f"The context is {len(context)} bytes for each of {count} examples: at most "
            f"{MAX_REPEATED_BYTES} bytes may be repeated"
        )
    return np.array([context + example.SerializeToString() for example in given.examples], object)


def check_classify(signature: Any, *, method_name: bool) -> None:
    """Raises StatusError for a signature that Classify cannot run; `method_name`: one of another method too."""
    _check_inputs(signature, "classification", CLASSIFY if method_name else None)
    if len(signature.outputs) not in (1, 2):
        raise invalid(f"Expected one or two output Tensors, found {len(signature.outputs)}")
    if not {"classes", "scores"} & set(signature.outputs):
        raise invalid(
            "Expected classification signature outputs to contain at least one of "
            f'"classes" or "scores". Signature was: {signature}'
        )


def check_regress(signature: Any, *, method_name: bool) -> None:
    """Raises StatusError for a signature that Regress cannot run; `method_name`: one of another method too."""
    _check_inputs(signature, "regression", REGRESS if method_name else None)
    if len(signature.outputs) != 1:
        raise invalid("Expected one output Tensor.")
    if "outputs" not in signature.outputs:
        raise invalid(f"No regression outputs found in SignatureDef: {signature}")


def check_tasks(
    tasks: Iterable[inference_pb2.InferenceTask], signatures: Mapping[str, Any], *, method_name: bool
) -> dict[str, str]:
    """The tasks of a MultiInference request, signature name -> method.

    Raises:
        StatusError: the tasks name several models, a signature twice, or a signature that their method cannot run.
    """
    methods: dict[str, str] = {}
    model_name = ""
    for task in tasks:
        if not task.model_spec.name:
            raise invalid("Found ModelSpec with an empty model name.")
        model_name = model_name or task.model_spec.name
        if task.model_spec.name != model_name:
            raise invalid("All ModelSpecs in a MultiInferenceRequest must access the same model name.")
        name = task.model_spec.signature_name or DEFAULT_SIGNATURE
        if name in methods:
            raise invalid(f"Duplicate evaluation of signature: {name}")
        if name not in signatures:
            raise invalid(f"Requested signature not found in model graph: {name}")
        if task.method_name == CLASSIFY:
            check_classify(signatures[name], method_name=method_name)
        elif task.method_name == REGRESS:
            check_regress(signatures[name], method_name=method_name)
        else:
            raise StatusError(Code.UNIMPLEMENTED, f"Unsupported signature method_name: {task.method_name}")
        methods[name] = task.method_name
    return methods


def _check_inputs(signature: Any, kind: str, method: str | None) -> None:
    if method is not None and signature.method_name != method:
        raise invalid(f"Expected {kind} signature method_name to be {method}. Was: {signature.method_name}")
    if len(signature.inputs) != 1:
        raise invalid("Expected one input Tensor.")
    if "inputs" not in signature.inputs:
        raise invalid(f"No {kind} inputs found in SignatureDef: {signature}")

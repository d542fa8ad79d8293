"""Warm-up records: requests that a server replays when it loads a version, before anybody waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfclm.savedmodel.graph.signatures import GenerationModule

__all__ = ["PATH", "requests", "write"]

PATH = "assets.extra/tf_serving_warmup_requests"
PROMPTS = ["The", "The quick brown fox jumps over the lazy dog, again and again: 1, 2, 3.\n"]
EXTRA = 4  # tokens that may come to those of a prompt's bytes: special ones, a leading space


def requests(servable: GenerationModule) -> Iterator[tuple[str, dict[str, Any]]]:
    """Signature and inputs of each record: every signature, and with XLA every size that is compiled for."""
    new = min(4, servable.limit)
    params = {
        "max_new_tokens": np.array([new], np.int32),
        "temperature": np.array([1], np.float32),
        "top_k": np.array([50], np.int32),
        "top_p": np.array([0.95], np.float32),
        "repetition_penalty": np.array([1.1], np.float32),
        "seed": np.array([0], np.int64),
    }
    sizes = [
        (rows, min(length, servable.network.context - 1))
        for rows in servable.batch_sizes()
        for length in servable.buckets
    ]
    for rows, length in sizes or [(1, min(8, servable.network.context - 1))]:
        ids = np.zeros([rows, length], np.int32)
        yield "generate_tokens", {"input_ids": ids, "attention_mask": np.ones_like(ids), **params}
    if servable.tokenizer_problem is None:
        # A token is a byte at least, and what does not fit into the context would be refused.
        prompts = [prompt[: max(1, servable.network.context - EXTRA)] for prompt in PROMPTS]
        yield "generate", {"prompt": np.array(prompts, object), **params, "stop": np.array(["\n\n"], object)}
        yield "serving_default", {"prompt": np.array(prompts[:1], object)}
        yield "score", {"text": np.array(PROMPTS[1:], object)}


def write(servable: GenerationModule, folder: Path) -> int:
    """Writes the records of a servable; how many there are."""
    from tensorflow_serving.apis import model_pb2, predict_pb2, prediction_log_pb2

    path = folder / PATH
    path.parent.mkdir(exist_ok=True)
    count = 0
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature, inputs in requests(servable):
            request = predict_pb2.PredictRequest(
                model_spec=model_pb2.ModelSpec(signature_name=signature),
                inputs={name: tf.make_tensor_proto(value) for name, value in inputs.items()},
            )
            log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
            writer.write(log.SerializeToString(deterministic=True))
            count += 1
    return count

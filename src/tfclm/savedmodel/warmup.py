"""Warm-up records: requests that a server replays when it loads a version, before it serves clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

if TYPE_CHECKING:
    # The canary, which reads what is written here, starts without transformers.
    from tfclm.savedmodel.graph.signatures import GenerationModule

__all__ = ["PATH", "requests", "write"]

PATH = "assets.extra/tf_serving_warmup_requests"
PROMPTS = ["The", "The quick brown fox jumps over the lazy dog, again and again: 1, 2, 3.\n"]
EXTRA_TOKENS = 4  # that a tokenizer may add to a prompt: special tokens, a leading space


def requests(module: GenerationModule) -> Iterator[tuple[str, dict[str, Any]]]:
    """Signature and inputs of each record, one for every signature. With XLA, the first one compiles all sizes."""
    params = {
        "max_new_tokens": np.array([min(4, module.limit)], np.int32),
        "temperature": np.array([1], np.float32),
        "top_k": np.array([50], np.int32),
        "top_p": np.array([0.95], np.float32),
        "repetition_penalty": np.array([1.1], np.float32),
        "seed": np.array([0], np.int64),
    }
    ids = np.zeros([1, min(8, module.network.context - 1)], np.int32)
    extra = {
        "min_p": np.array([0.01], np.float32),
        "presence_penalty": np.array([0.1], np.float32),
        "frequency_penalty": np.array([0.1], np.float32),
        "min_new_tokens": np.array([1], np.int32),
        "logit_bias_ids": np.array([[0]], np.int32),
        "logit_bias": np.array([[1]], np.float32),
        "top_logprobs": np.array([min(2, module.max_top_logprobs)], np.int32),
        **({"stop": np.array([["\n\n", "."]], object)} if module.tokenizer_problem is None else {}),
    }
    yield "generate_tokens", {"input_ids": ids, "attention_mask": np.ones_like(ids), **params, **extra}
    if module.tokenizer_problem is None:
        # A token has at least one byte. A prompt that does not fit into the context would be refused.
        prompts = [prompt[: max(1, module.network.context - EXTRA_TOKENS)] for prompt in PROMPTS]
        yield "generate", {"prompt": np.array(prompts, object), **params, "stop": np.array(["\n\n"], object)}
        yield "serving_default", {"prompt": np.array(prompts[:1], object)}
        yield "score", {"text": np.array(PROMPTS[1:], object)}
        yield "tokenize", {"text": np.array(PROMPTS, object)}
        yield "detokenize", {"token_ids": ids}
    yield "describe", {"query": np.array([""], object)}


def write(module: GenerationModule, folder: Path) -> int:
    """Writes the records of a module into its version's directory; returns their number."""
    from tensorflow_serving.apis import model_pb2, predict_pb2, prediction_log_pb2

    path = folder / PATH
    path.parent.mkdir(exist_ok=True)
    count = 0
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature, inputs in requests(module):
            request = predict_pb2.PredictRequest(
                model_spec=model_pb2.ModelSpec(signature_name=signature),
                inputs={name: tf.make_tensor_proto(value) for name, value in inputs.items()},
            )
            log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
            writer.write(log.SerializeToString(deterministic=True))
            count += 1
    return count

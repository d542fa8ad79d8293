"""Generates over gRPC with tensorflow-serving-api; prints the text: rpc.py [HOST:PORT [MODEL [PROMPT]]]."""

from __future__ import annotations

import sys

import grpc
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc


def main(address: str = "localhost:8500", model: str = "quickstart", prompt: str = "The import statement") -> None:
    """Sends one row. Parameters could be omitted here: with gRPC, the server uses the defaults of the export."""
    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = "generate"
    for name, value, dtype in (
        ("prompt", prompt.encode(), tf.string),
        ("max_new_tokens", 20, tf.int32),
        ("temperature", 0.8, tf.float32),
        ("top_k", 50, tf.int32),
        ("top_p", 0.95, tf.float32),
        ("repetition_penalty", 1.0, tf.float32),
        ("seed", 7, tf.int64),
        ("stop", b"", tf.string),
    ):
        request.inputs[name].CopyFrom(tf.make_tensor_proto([value], dtype))
    # Only the output that is needed.
    request.output_filter.append("generated_text")
    with grpc.insecure_channel(address) as channel:
        try:
            reply = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=120)
        except grpc.RpcError as error:
            sys.exit(f"{error.code().name}: {error.details()}")
    print(reply.outputs["generated_text"].string_val[0].decode())


if __name__ == "__main__":
    main(*sys.argv[1:])

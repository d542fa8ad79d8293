"""Writes a `GenerationModule` as a SavedModel, with the record of where it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfclm.compat import FINGERPRINT_FILENAME, create_fingerprint, saved_model_pb2, tensor_shape_pb2
from tfclm.savedmodel.graph.signatures import GenerationModule

__all__ = ["RECORD", "read_record", "write", "write_record"]

RECORD = "assets.extra/tfclm.json"

# The inputs that have rank 2 in the signatures' metadata; all others have rank 1. In the graph the ranks are unknown,
# so that the graph itself checks them.
RANK_2 = {"input_ids", "attention_mask", "token_ids", "logit_bias_ids", "logit_bias"}


def write(module: GenerationModule, folder: Path) -> None:
    """Writes `saved_model.pb`, the fingerprint and the variables into a directory."""
    # No debug info: it holds paths of this machine.
    options = tf.saved_model.SaveOptions(save_debug_info=False)
    tf.saved_model.save(module, str(folder), signatures=module.signatures(), options=options)
    path = folder / "saved_model.pb"
    model = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    for graph in model.meta_graphs:
        for signature in graph.signature_def.values():
            # `generate` takes one stop string per row.
            rank_2 = RANK_2 | ({"stop"} if "input_ids" in signature.inputs else set())
            for name, info in signature.inputs.items():
                sizes = [tensor_shape_pb2.TensorShapeProto.Dim(size=-1)] * (2 if name in rank_2 else 1)
                info.tensor_shape.CopyFrom(tensor_shape_pb2.TensorShapeProto(dim=sizes))
    path.write_bytes(model.SerializeToString(deterministic=True))
    # TensorFlow's fingerprint is that of the file before this change; servers report it in their metrics.
    fingerprint = folder / FINGERPRINT_FILENAME
    if fingerprint.exists():
        fingerprint.write_bytes(create_fingerprint(str(folder)))


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes `assets.extra/tfclm.json`."""
    path = folder / RECORD
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(version: str) -> dict[str, Any]:
    """The record of a version's directory or address; empty for a SavedModel that was exported by other software."""
    path = f"{version.rstrip('/')}/{RECORD}"
    if not tf.io.gfile.exists(path):
        return {}
    with tf.io.gfile.GFile(path) as file:
        record: dict[str, Any] = json.loads(file.read())
    return record

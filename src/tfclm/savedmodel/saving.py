"""Writing a servable as a SavedModel, with the record of where it came from."""

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

# The inputs' ranks as clients are told; in the graph they are open, for it to refuse others itself.
RANKS = {"input_ids": 2, "attention_mask": 2}


def write(servable: GenerationModule, folder: Path) -> None:
    """Writes `saved_model.pb`, the fingerprint and the variables into a folder."""
    # Without what Python's own loading would need beyond the signatures: other paths of this machine among it.
    options = tf.saved_model.SaveOptions(save_debug_info=False)
    tf.saved_model.save(servable, str(folder), signatures=servable.signatures(), options=options)
    path = folder / "saved_model.pb"
    model = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    for graph in model.meta_graphs:
        for signature in graph.signature_def.values():
            for name, info in signature.inputs.items():
                info.tensor_shape.CopyFrom(
                    tensor_shape_pb2.TensorShapeProto(
                        dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=-1)] * RANKS.get(name, 1)
                    )
                )
    path.write_bytes(model.SerializeToString(deterministic=True))
    # TensorFlow's own, of the file that it wrote, would name another one in a server's metrics.
    fingerprint = folder / FINGERPRINT_FILENAME
    if fingerprint.exists():
        fingerprint.write_bytes(create_fingerprint(str(folder)))


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes `assets.extra/tfclm.json`."""
    path = folder / RECORD
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(version: str) -> dict[str, Any]:
    """The record of a version's folder or address; empty where somebody else's export has none."""
    path = f"{version.rstrip('/')}/{RECORD}"
    if not tf.io.gfile.exists(path):
        return {}
    with tf.io.gfile.GFile(path) as file:
        record: dict[str, Any] = json.loads(file.read())
    return record

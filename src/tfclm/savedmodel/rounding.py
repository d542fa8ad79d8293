"""Weights kept in a smaller type, and computed with in float32."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras
from transformers import TFAutoModelForCausalLM

from tfclm import checkpoint

__all__ = ["rounded"]


def rounded(model: Any, dtype: str) -> Any:
    """A copy of a model whose floating-point weights are kept in `dtype`; each is cast where it is used."""
    # tf_keras has policies that compute in the smaller type; this is the other way round.
    policy = tf_keras.mixed_precision.Policy("float32")
    policy._variable_dtype = dtype
    former = tf_keras.mixed_precision.global_policy()
    tf_keras.mixed_precision.set_global_policy(policy)
    try:
        copy = TFAutoModelForCausalLM.from_config(model.config)
        checkpoint.tie(copy)
        for layer in copy.submodules:
            if isinstance(layer, tf_keras.layers.LayerNormalization):
                layer._set_dtype_policy("float32")  # it does not cast its weights
        copy.build_in_name_scope()
    finally:
        tf_keras.mixed_precision.set_global_policy(former)
    for old, new in zip(model.weights, copy.weights, strict=True):
        if old.shape != new.shape:
            raise ValueError(f"{old.name} {old.shape} and {new.name} {new.shape} are not the same weight")
        new.assign(tf.cast(old, new.dtype))
    copy.generation_config = model.generation_config
    return copy

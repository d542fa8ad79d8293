"""A causal language model as the decoding loop calls it: first the prompts, then one token per row and step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from tfclm import checkpoint
from tfclm.compat import xla_optimization_barrier
from tfclm.errors import InputError
from tfclm.models.decoder import Cache, Decoded, decode_tokens, head_logits, layer_norm, rms_norm
from tfclm.models.families import FAMILIES, spec_of
from tfclm.models.registration import decoder_class
from tfclm.models.shapes import sizes
from tfclm.models.spec import Module, Spec
from tfclm.savedmodel.graph import key_value_cache
from tfclm.savedmodel.graph.products import product

if TYPE_CHECKING:
    from transformers import TFPreTrainedModel

__all__ = ["Network", "Weights"]

Tensor = Any
Weights = Mapping[str, Tensor]  # by their names in PyTorch, those of the stem without its name

DEFAULT_CONTEXT = 2048  # tokens, of a model without a limit
MAX_CHECKED_TOKENS = 1100  # longer texts would take minutes and gigabytes in a large model


class Network:
    """The decoder of a causal LM, called with prompts padded on the right and a cache that is written in place.

    Each row has its own length; the causal mask hides the padding after it. With a `dtype` smaller than float32, the
    embeddings, dense layers and head are stored in it and cast where they are used; `model` is then a copy with
    rounded weights. With `transposed`, matrices are stored as [out, in], which is faster when compiled by XLA.

    Raises:
        InputError: the decoder does not support the model, or its logits differ from the model's.
    """

    def __init__(self, model: TFPreTrainedModel, dtype: str = "float32", *, transposed: bool = False) -> None:
        model_type = model.config.model_type
        if model_type not in FAMILIES:
            raise InputError(f"a model of type {model_type} cannot be exported; supported: {', '.join(FAMILIES)}")
        self.dtype = tf.as_dtype(dtype)
        self._transposed = transposed
        self.spec = spec_of(model.config)
        self.model = model if dtype == "float32" else _rounded(model, self.dtype)
        self.vocab_size = self.spec.vocab_size
        self.context = checkpoint.context_size(model) or DEFAULT_CONTEXT
        self._prefix = f"{self.spec.names.stem}."
        self._modules = {module.name.removeprefix(self._prefix): module for module in self.spec.modules()}
        # A tied matrix is stored once, in the head's layout.
        self._embedding_transposed = self.spec.tied and not transposed
        self._variables = dict(self._stored_variables())
        _check_logits(self, model_type)

    @property
    def variables(self) -> list[Any]:
        """All variables that the graph reads."""
        return list(self._variables.values())

    def weights(self) -> Weights:
        """The weights, read once: inside a loop, each read of a variable that is gathered from copies it."""
        return {name: variable.read_value() for name, variable in self._variables.items()}

    def logits(self, hidden: Tensor, weights: Weights, *, small_batch: bool, xla: bool = False) -> Tensor:
        """Logits float32 [..., V] of hidden states [..., D].

        `small_batch`: the hidden states are a few rows. `xla`: XLA compiles the call.
        """
        return head_logits(self.spec, self._products(weights, small_batch, xla), hidden)

    def hidden(self, ids: Tensor, weights: Weights, lengths: Tensor | None = None) -> Tensor:
        """The hidden states [B, L, D] of texts `ids` int32 [B, L] of `lengths` [B], by default L."""
        return self._decode(ids, lengths, weights, xla=False).hidden

    def prefill(
        self, ids: Tensor, lengths: Tensor, capacity: Tensor, weights: Weights, *, xla: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits float32 [B, V] after prompts `ids` int32 [B, L] of `lengths` [B], and the cache's buffers.

        `xla`: XLA compiles the call.
        """
        out = self._decode(ids, lengths, weights, xla=xla)
        last = tf.gather(out.hidden, lengths - 1, batch_dims=1)
        logits = self.logits(last, weights, small_batch=True, xla=xla)
        return logits, [key_value_cache.allocate(part, capacity) for pair in out.pairs for part in pair]

    def step(
        self, tokens: Tensor, positions: Tensor, buffers: Sequence[Tensor], weights: Weights, *, xla: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits float32 [B, V] after one more token [B] per row, at `positions` [B], and the updated buffers.

        The given buffers must not be used afterwards. `xla`: XLA compiles the step.
        """
        cache = Cache(
            pairs=list(zip(buffers[::2], buffers[1::2], strict=True)),
            slots=positions[:, None],
            keys=tf.shape(buffers[0])[2],
            append=key_value_cache.Writer(buffers[0], positions, xla=xla).write,
        )
        out = decode_tokens(
            self.spec,
            self._products(weights, True, xla),
            tokens[:, None],
            positions=positions[:, None],
            cache=cache,
        )
        logits = self.logits(out.hidden[:, 0], weights, small_batch=True, xla=xla)
        return logits, [part for pair in out.pairs for part in pair]

    def _decode(self, ids: Tensor, lengths: Tensor | None, weights: Weights, *, xla: bool) -> Decoded:
        return decode_tokens(self.spec, self._products(weights, False, xla), ids, lengths=lengths)

    def _products(self, weights: Weights, small_batch: bool, xla: bool) -> _Products:
        return _Products(
            self.spec,
            self._modules,
            weights,
            transposed=self._transposed,
            embedding_transposed=self._embedding_transposed,
            small_batch=small_batch,
            xla=xla,
        )

    def _stored_variables(self) -> list[tuple[str, Any]]:
        """The variables that the graph reads, by name: the model's own where type and layout are the same."""
        own, by_rows = {}, set()
        for variable, name, transpose in checkpoint.layout(self.model):
            own[name.removeprefix(self._prefix)] = variable
            if not transpose.value.startswith("simple"):
                by_rows.add(name.removeprefix(self._prefix))
        stored = []
        for name, module in self._modules.items():
            if module.kind != "bias":
                # Dense layers are [in, out], but for those of transformers' classes that are stored as in PyTorch.
                swapped = module.kind == "linear" and f"{name}.weight" in by_rows
                stored.append((f"{name}.weight", self._store(own[f"{name}.weight"], name, module, swapped)))
            if module.bias or module.kind == "bias":
                stored.append((f"{name}.bias", own[f"{name}.bias"]))
        return stored

    def _store(self, variable: Any, name: str, module: Module, swapped: bool) -> Any:
        if module.kind == "norm":
            return variable
        dense = module.kind in ("linear", "conv1d")
        transpose = self._transposed if dense else self._embedding_transposed and name == self.spec.names.embedding
        transpose ^= swapped
        if self.dtype == tf.float32 and not transpose:
            return variable
        value = tf.cast(variable, self.dtype)
        return tf.Variable(tf.transpose(value) if transpose else value, trainable=False)


class _Products:
    """The weights of a decoder as tensors, and the products with them; see `tfclm.models.decoder.Weights`."""

    def __init__(
        self,
        spec: Spec,
        modules: Mapping[str, Module],
        weights: Weights,
        *,
        transposed: bool,
        embedding_transposed: bool,
        small_batch: bool,
        xla: bool,
    ) -> None:
        self._spec, self._modules, self._weights = spec, modules, weights
        self._transposed, self._embedding_transposed = transposed, embedding_transposed
        self._small_batch, self._xla = small_batch, xla

    def embed(self, name: str, ids: Tensor) -> Tensor:
        table = self._weights[f"{name}.weight"]
        if self._embedding_transposed and name == self._spec.names.embedding:
            return tf.cast(tf.transpose(tf.gather(table, ids, axis=1), [1, 2, 0]), tf.float32)
        return tf.cast(tf.gather(table, ids), tf.float32)

    def dense(self, names: Sequence[str], inputs: Tensor) -> list[Tensor]:
        rows = tf.reshape(inputs, [-1, inputs.shape[-1]])
        return [self._dense(name, rows, inputs) for name in names]

    def _dense(self, name: str, rows: Tensor, inputs: Tensor) -> Tensor:
        outputs = self._multiply(rows, self._weights[f"{name}.weight"], transposed=self._transposed)
        if self._modules[name].bias:
            outputs = tf.nn.bias_add(outputs, tf.reshape(self._weights[f"{name}.bias"], [-1]))
        return tf.reshape(outputs, [*sizes(inputs)[:-1], self._modules[name].outputs])

    def _multiply(self, rows: Tensor, matrix: Tensor, *, transposed: bool) -> Tensor:
        return product(rows, matrix, transposed=transposed, small_batch=self._small_batch, compiled=self._xla)

    def norm(self, name: str, inputs: Tensor) -> Tensor:
        weight, module = self._weights[f"{name}.weight"], self._modules[name]
        if self._spec.norm == "layer":
            bias = self._weights[f"{name}.bias"] if module.bias else None
            return layer_norm(inputs, weight, bias, self._spec.eps)
        return rms_norm(inputs, weight, self._spec.eps, plus_one=self._spec.norm == "rms_plus_one")

    def logits(self, inputs: Tensor) -> Tensor:
        spec = self._spec
        rows = tf.reshape(inputs, [-1, inputs.shape[-1]])
        name = spec.names.embedding if spec.tied else spec.names.head
        logits = self._multiply(rows, self._weights[f"{name}.weight"], transposed=self._transposed)
        if spec.head_bias:
            bias = self._weights[f"{spec.names.head_bias or spec.names.head}.bias"]
            logits = tf.nn.bias_add(logits, tf.reshape(bias, [-1]))
        if self._xla:
            # Without the barrier, XLA may choose a layout of the logits that swaps the product's operands back.
            (logits,) = xla_optimization_barrier(input=[tf.reshape(logits, [-1])])
        return tf.reshape(logits, [*sizes(inputs)[:-1], spec.vocab_size])

    def dropout(self, kind: str, inputs: Tensor) -> Tensor:
        return inputs


def _rounded(model: TFPreTrainedModel, dtype: tf.DType) -> TFPreTrainedModel:
    """A copy of the model whose embeddings and matrices are rounded to a smaller type."""
    copy = decoder_class(model.config.model_type)(model.config)
    copy.build_in_name_scope()
    values = {name: variable for variable, name, _ in checkpoint.layout(model)}
    kinds = {module.name: module.kind for module in copy.spec.modules()}
    for variable, name, _ in checkpoint.layout(copy):
        value = tf.reshape(tf.cast(values[name], tf.float32), variable.shape)
        module, _, part = name.rpartition(".")
        if part == "weight" and kinds[module] != "norm":
            value = tf.cast(tf.cast(value, dtype), tf.float32)
        variable.assign(value)
    copy.generation_config = model.generation_config
    return copy


def _check_logits(network: Network, model_type: str) -> None:
    """Raises `InputError` if the logits with the cache differ from the model's own."""

    # Unknown shapes, as in the exported graph.
    @tf.function(
        autograph=False, input_signature=[tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None], tf.int32)]
    )
    def cached(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        weights = network.weights()
        first, buffers = network.prefill(ids[:, :-1], lengths, tf.shape(ids)[1], weights)
        second, _ = network.step(tf.gather(ids, lengths, batch_dims=1), lengths, buffers, weights)
        return first, second

    for lengths in _checked_lengths(network):
        ids = (
            np.random.default_rng(0).integers(0, network.vocab_size, [len(lengths), max(lengths) + 1]).astype(np.int32)
        )
        if network.spec.padding_id is not None:
            # After a padding id, RoBERTa's own positions depend on whether it is called with a cache.
            ids[ids == network.spec.padding_id] = network.vocab_size - 1
        first, second = cached(tf.constant(ids), tf.constant(lengths))
        for row, length in enumerate(lengths):
            # Without the next token, because a rotation may depend on the length.
            for ours, count in ((first[row], length), (second[row], length + 1)):
                theirs = network.model(tf.constant(ids[row : row + 1, :count]), training=False).logits[0, -1]
                if not np.allclose(ours, tf.cast(theirs, tf.float32), rtol=1e-3, atol=1e-3):
                    raise InputError(
                        f"a model of type {model_type} cannot be exported: after {count} tokens, the logits of the "
                        "exported decoder differ from the model's"
                    )


def _checked_lengths(network: Network) -> Iterator[list[int]]:
    """The lengths of the texts, in batches, after which logits are compared."""
    spec, last = network.spec, network.context - 1
    short = max(1, min(8, last - 1))
    yield [short, max(1, short // 2)]
    # Beyond each window and the original context of each rope, and at the end of the context.
    limits = [window for window in spec.windows if window]
    limits += [rope.threshold or (rope.dynamic or (0, 0, 0))[2] for rope in spec.ropes]
    for length in sorted({limit + 2 for limit in limits} | {last}):
        if short < length <= min(last, MAX_CHECKED_TOKENS):
            yield [length]

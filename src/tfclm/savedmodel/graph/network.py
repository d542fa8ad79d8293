"""A causal language model as the decoding loop calls it: first the prompts, then one token per row and step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from tfclm import checkpoint
from tfclm.errors import InputError
from tfclm.models.decoder import Cache, decode_tokens, head_logits
from tfclm.models.families import FAMILIES, spec_of
from tfclm.models.registration import decoder_class
from tfclm.models.spec import Module
from tfclm.savedmodel.graph import int8, key_value_cache
from tfclm.savedmodel.graph.products import INT8_PARTS, FloatProducts, Int8Products, Weights

if TYPE_CHECKING:
    from transformers import TFPreTrainedModel

__all__ = ["Network", "Weights"]

Tensor = Any

HIDDEN_SLOT = 2**31 - 1  # of keys that no token attends to
DEFAULT_CONTEXT = 2048  # tokens, of a model without a limit
MAX_CHECKED_TOKENS = 1100  # longer texts would take minutes and gigabytes in a large model


class Network:
    """The decoder of a causal LM, called with prompts padded on the right and a cache that is written in place.

    Each row has its own length; the causal mask hides the padding after it. With a `dtype` smaller than float32, the
    embeddings, dense layers and head are stored in it and cast where they are used; `model` is then a copy with
    rounded weights. With int8, the inputs of dense layers and head are rounded too, and `model` is the same decoder
    without a cache. With `transposed`, matrices are stored as [out, in], which is faster when compiled by XLA.

    Raises:
        InputError: the decoder does not support the model, or its logits differ from the model's.
    """

    def __init__(self, model: TFPreTrainedModel, dtype: str = "float32", *, transposed: bool = False) -> None:
        model_type = model.config.model_type
        if model_type not in FAMILIES:
            raise InputError(f"a model of type {model_type} cannot be exported; supported: {', '.join(FAMILIES)}")
        self._int8 = dtype == "int8"
        if self._int8:
            int8.check_available()
            Network(model)  # compares its logits with the model's, before anything is rounded
        self.dtype = tf.float32 if self._int8 else tf.as_dtype(dtype)
        self._transposed = transposed
        self.spec = spec_of(model.config)
        self.model = model if self.dtype == tf.float32 else _rounded(model, self.dtype)
        self.vocab_size = self.spec.vocab_size
        self.context = checkpoint.context_size(model) or DEFAULT_CONTEXT
        self._prefix = f"{self.spec.names.stem}."
        self._modules = {module.name.removeprefix(self._prefix): module for module in self.spec.modules()}
        # A tied matrix is stored once, in the head's layout.
        self._embedding_transposed = self.spec.tied and not transposed
        self._variables = dict(self._quantized_variables() if self._int8 else self._stored_variables())
        if self._int8:
            self.model = _without_weights(model, self._products(self._variables, False, False))
        _check_logits(self, model_type)

    @property
    def bytes_per_token(self) -> int:
        """The bytes of a token's keys and values, float32."""
        return 4 * 2 * self.spec.layers * self.spec.kv_heads * self.spec.head_dim

    @property
    def variables(self) -> list[Any]:
        """All variables that the graph reads."""
        return list(self._variables.values())

    def weights(self) -> Weights:
        """The weights, read once: inside a loop, each read of a variable that is gathered from copies it."""
        return {name: variable.read_value() for name, variable in self._variables.items()}

    def with_float32_products(self, weights: Weights) -> Weights:
        """The weights with those in float32 that are multiplied, and not only looked up."""
        multiplied = {name for name, module in self._modules.items() if module.kind in ("linear", "conv1d")}
        if self.spec.tied:
            multiplied.add(self.spec.names.embedding)
        return {
            name: tf.cast(weight, tf.float32) if name.rpartition(".")[0] in multiplied else weight
            for name, weight in weights.items()
        }

    def buffers(self, batch: Tensor | int, capacity: Tensor | int) -> list[Tensor]:
        """Empty buffers of a key-value cache, [batch, key-value heads, capacity, head size] each."""
        shape = [batch, self.spec.kv_heads, capacity, self.spec.head_dim]
        return key_value_cache.zeros(shape, 2 * self.spec.layers)

    def logits(self, hidden: Tensor, weights: Weights, *, small_batch: bool, xla: bool = False) -> Tensor:
        """Logits float32 [..., V] of hidden states [..., D].

        `small_batch`: the hidden states are a few rows. `xla`: XLA compiles the call.
        """
        return head_logits(self.spec, self._products(weights, small_batch, xla), hidden)

    def extend(
        self, rows: Tensor, start: Tensor, count: Tensor, lengths: Tensor, buffers: Sequence[Tensor], weights: Weights
    ) -> tuple[Tensor, list[Tensor]]:
        """The hidden states [B, count, D] of `count` [] more tokens per row, and the buffers [B, ...] of their cache.

        `rows` int32 [B, L] begin with texts of `lengths` [B] tokens, of which the buffers hold the first `start` [].
        The given buffers must not be used afterwards.
        """
        slots = (start + tf.range(count))[None]
        append = key_value_cache.Writer(buffers[0], slots).write
        cache = Cache(_pairs(buffers), slots, tf.range(tf.shape(buffers[0])[2])[None], append)
        return self._read(rows[:, start : start + count], slots, rows, lengths, cache, weights, xla=False)

    def extension(
        self, rows: Tensor, start: Tensor, count: int, lengths: Tensor, buffers: Sequence[Tensor], weights: Weights
    ) -> list[Tensor]:
        """What `extend` writes, [B, key-value heads, count, head size] each, for a call that XLA compiles.

        The buffers are only read. Tokens from `lengths` on are padding.
        """
        slots = (start + tf.range(count))[None]
        past = tf.range(tf.shape(buffers[0])[2])[None]
        key_slots = tf.concat([tf.where(past < start, past, HIDDEN_SLOT), slots], 1)
        cache = Cache(_pairs(buffers), slots, key_slots, lambda past, new: (past, new))
        # XLA would compile a slice once for each start.
        ids = _columns(rows, slots)
        _, parts = self._read(ids, slots, rows, lengths, cache, weights, xla=True)
        return [new for _, new in parts]

    def _read(
        self, ids: Tensor, slots: Tensor, rows: Tensor, lengths: Tensor, cache: Cache, weights: Weights, *, xla: bool
    ) -> tuple[Tensor, list[Any]]:
        positions = slots
        if self.spec.padding_id is not None:
            # These models do not count padding ids.
            positions = _columns(tf.cumsum(tf.cast(rows != self.spec.padding_id, tf.int32), 1) - 1, slots)
        products = self._products(weights, False, xla)
        out = decode_tokens(self.spec, products, ids, positions=positions, lengths=lengths, cache=cache)
        return out.hidden, [part for pair in out.pairs for part in pair]

    def step(
        self, tokens: Tensor, positions: Tensor, buffers: Sequence[Tensor], weights: Weights
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits float32 [B, V] after one more token [B] per row, at `positions` [B], and the updated buffers.

        The given buffers must not be used afterwards.
        """
        slots = positions[:, None]
        append = key_value_cache.Writer(buffers[0], slots).write
        cache = Cache(_pairs(buffers), slots, tf.range(tf.shape(buffers[0])[2])[None], append)
        return self._step(tokens, slots, cache, weights, xla=False)

    def compiled_step(
        self,
        tokens: Tensor,
        starts: Tensor,
        number: Tensor,
        buffers: Sequence[Tensor],
        recent: Sequence[Tensor],
        weights: Weights,
    ) -> tuple[Tensor, list[Tensor]]:
        """The same for a call that XLA compiles, which would copy buffers that it writes to.

        The keys and values of the last `number` [] tokens per row, from the positions `starts` [B] on, are in `recent`
        [B, key-value heads, steps, head size] each, which are returned with those of the new token.
        """
        steps = recent[0].shape[2]
        slots = (starts + number)[:, None]
        past = tf.range(tf.shape(buffers[0])[2])[None]
        key_slots = tf.concat(
            [tf.where(past < starts[:, None], past, HIDDEN_SLOT), starts[:, None] + tf.range(steps)], 1
        )
        here = tf.reshape(tf.range(steps) == number, [1, 1, steps, 1])

        def append(past: tuple[Tensor, Tensor], new: Tensor) -> tuple[Tensor, Tensor]:
            return past[0], tf.where(here, new, past[1])

        cache = Cache(_pairs(list(zip(buffers, recent, strict=True))), slots, key_slots, append)
        logits, parts = self._step(tokens, slots, cache, weights, xla=True)
        return logits, [new for _, new in parts]

    def _step(
        self, tokens: Tensor, slots: Tensor, cache: Cache, weights: Weights, *, xla: bool
    ) -> tuple[Tensor, list[Any]]:
        products = self._products(weights, True, xla)
        out = decode_tokens(self.spec, products, tokens[:, None], positions=slots, cache=cache)
        logits = self.logits(out.hidden[:, 0], weights, small_batch=True, xla=xla)
        return logits, [part for pair in out.pairs for part in pair]

    @property
    def rounding(self) -> float:
        """How far two computations of the same logits may differ, as a fraction of their range."""
        # A value in the middle of two integers may be rounded to either.
        return 0.01 if self._int8 else 0.0

    def _products(self, weights: Weights, small_batch: bool, xla: bool) -> FloatProducts | Int8Products:
        if self._int8:
            return Int8Products(self.spec, self._modules, weights, self._groups(), small_batch=small_batch)
        return FloatProducts(
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

    def _groups(self) -> list[tuple[str, ...]]:
        """The dense layers and the head; those of the same inputs together."""
        spec, names = self.spec, self.spec.names
        fused: dict[str, tuple[str, ...]] = {}
        for index in range(spec.layers):
            for together in ((names.q, names.k, names.v), (names.gate, names.up)):
                layers = tuple(spec.layer(index, name) for name in together)
                if all(layer in self._modules for layer in layers):
                    fused |= dict.fromkeys(layers, layers)
        dense = [name for name, module in self._modules.items() if module.kind in ("linear", "conv1d")]
        return list(dict.fromkeys(fused.get(name, (name,)) for name in dense))

    def _quantized_variables(self) -> list[tuple[str, Any]]:
        """The variables that the graph reads with int8 weights, by name."""
        stored = dict(self._stored_variables())
        tables = [name for name, module in self._modules.items() if module.kind == "embedding"]
        for names in (*self._groups(), *((name,) for name in tables)):
            values = [stored.pop(f"{name}.weight").numpy() for name in names]
            by_rows = names[0] in tables and not (self._embedding_transposed and names[0] == self.spec.names.embedding)
            matrix = int8.quantize(np.concatenate([value.T if by_rows else value for value in values], 1))
            stored |= {
                f"{names[0]}.{part}": tf.Variable(value, trainable=False)
                for part, value in zip(INT8_PARTS, matrix, strict=True)
            }
            biases = [stored.pop(f"{name}.bias") for name in names if f"{name}.bias" in stored]
            if biases:
                stored[f"{names[0]}.bias"] = tf.Variable(
                    np.concatenate([bias.numpy().reshape(-1) for bias in biases]), trainable=False
                )
        return list(stored.items())

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


def _columns(rows: Tensor, slots: Tensor) -> Tensor:
    """The columns `slots` [1, L] of rows [B, N]; of those beyond the last one, the last one."""
    return tf.gather(rows, tf.minimum(slots[0], tf.shape(rows)[1] - 1), axis=1)


def _pairs(buffers: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Keys and values of each layer."""
    return list(zip(buffers[::2], buffers[1::2], strict=True))


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


def _without_weights(model: TFPreTrainedModel, products: FloatProducts | Int8Products) -> TFPreTrainedModel:
    """A model of the same config that computes with these products, and has no variables of its own."""
    copy = decoder_class(model.config.model_type)(model.config)
    stem = getattr(copy, copy.base_model_prefix)
    stem.weights_by_name = products
    copy.built = stem.built = True
    copy.generation_config = model.generation_config
    return copy


def _check_logits(network: Network, model_type: str) -> None:
    """Raises `InputError` if the logits with the cache differ from the model's own."""

    # Unknown shapes, as in the exported graph.
    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int32)])
    def cached(ids: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        weights, half = network.weights(), length // 2
        rows, lengths, buffers = ids[None], length[None], network.buffers(1, length + 1)
        _, buffers = network.extend(rows, tf.constant(0), half, lengths, buffers, weights)
        _, buffers = network.extend(rows, half, length - 1 - half, lengths, buffers, weights)
        first, buffers = network.step(rows[:, length - 1], lengths - 1, buffers, weights)
        second, _ = network.step(rows[:, length], lengths, buffers, weights)
        return first[0], second[0]

    for length in _checked_lengths(network):
        ids = np.random.default_rng(length).integers(0, network.vocab_size, [length + 1]).astype(np.int32)
        if network.spec.padding_id is not None:
            # After a padding id, RoBERTa's own positions depend on whether it is called with a cache.
            ids[ids == network.spec.padding_id] = network.vocab_size - 1
        # Without the next token, because a rotation may depend on the length.
        for ours, count in zip(cached(tf.constant(ids), tf.constant(length)), (length, length + 1), strict=True):
            theirs = network.model(tf.constant(ids[None, :count]), training=False).logits[0, -1]
            theirs = tf.cast(theirs, tf.float32).numpy()
            if not np.allclose(ours, theirs, rtol=1e-3, atol=max(1e-3, network.rounding * np.ptp(theirs))):
                raise InputError(
                    f"a model of type {model_type} cannot be exported: after {count} tokens, the logits of the "
                    "exported decoder differ from the model's"
                )


def _checked_lengths(network: Network) -> Iterator[int]:
    """The lengths of the texts after which logits are compared."""
    spec, last = network.spec, network.context - 1
    short = max(1, min(8, last - 1))
    yield short
    # Beyond each window and the original context of each rope, and at the end of the context.
    limits = [window for window in spec.windows if window]
    limits += [rope.threshold or (rope.dynamic or (0, 0, 0))[2] for rope in spec.ropes]
    for length in sorted({limit + 2 for limit in limits} | {last}):
        if short < length <= min(last, MAX_CHECKED_TOKENS):
            yield length

"""The products of a decoder with its stored weights, in the operand order that is fast for a few rows.

Each step multiplies large matrices by one row per prompt, so most of its time goes into reading the matrices.
TensorFlow's kernels for two or more rows are fastest with a matrix [in, out] on the right, with and without oneDNN;
XLA's kernel for one row is fastest with a transposed matrix [out, in] on the left.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from tfclm.compat import xla_optimization_barrier
from tfclm.models.decoder import layer_norm, rms_norm
from tfclm.models.shapes import sizes
from tfclm.models.spec import Module, Spec
from tfclm.savedmodel.graph import int8

__all__ = ["INT8_PARTS", "FloatProducts", "Int8Products", "Weights", "product"]

Tensor = Any
Weights = Mapping[str, Tensor]  # by their names in PyTorch, those of the stem without its name

INT8_PARTS = ("weight", "scale", "offset")  # names of an int8 matrix's variables


def product(rows: Tensor, matrix: Tensor, *, transposed: bool, small_batch: bool, compiled: bool) -> Tensor:
    """Rows [N, in] times a matrix [in, out], or [out, in] if `transposed`, cast to the type of the rows; [N, out]."""
    smaller = matrix.dtype != rows.dtype
    matrix = tf.cast(matrix, rows.dtype)
    if not transposed:
        return tf.matmul(rows, matrix)
    if not small_batch:
        return tf.matmul(rows, matrix, transpose_b=True)
    if compiled and smaller:
        # XLA casts the matrix inside the product's loop and would fuse the computation of the rows into it too,
        # repeating it for each output. It does not move a division into such a loop, and the barrier hides that this
        # one divides by 1.
        flat, one = xla_optimization_barrier(input=[tf.reshape(rows, [-1]), tf.constant(1, rows.dtype)])
        rows = tf.reshape(flat / one, tf.shape(rows))
    columns = tf.matmul(matrix, rows, transpose_b=True)
    if compiled:
        # Without the barrier, XLA folds the transposition into the product and swaps the operands back.
        (columns,) = xla_optimization_barrier(input=[columns])
    return tf.transpose(columns)


class _Products(ABC):
    """The weights of a decoder as tensors, and the products with them; see `tfclm.models.decoder.Weights`."""

    def __init__(self, spec: Spec, modules: Mapping[str, Module], weights: Weights) -> None:
        self._spec, self._modules, self._weights = spec, modules, weights

    def norm(self, name: str, inputs: Tensor) -> Tensor:
        weight, module = self._weights[f"{name}.weight"], self._modules[name]
        if self._spec.norm == "layer":
            bias = self._weights[f"{name}.bias"] if module.bias else None
            return layer_norm(inputs, weight, bias, self._spec.eps)
        return rms_norm(inputs, weight, self._spec.eps, plus_one=self._spec.norm == "rms_plus_one")

    def logits(self, inputs: Tensor) -> Tensor:
        spec = self._spec
        rows = tf.reshape(inputs, [-1, inputs.shape[-1]])
        logits = self._multiply(rows, spec.names.embedding if spec.tied else spec.names.head)
        if spec.head_bias:
            logits = self._add_bias(spec.names.head_bias or spec.names.head, logits)
        return tf.reshape(self._as_computed(logits), [*sizes(inputs)[:-1], spec.vocab_size])

    def dropout(self, kind: str, inputs: Tensor) -> Tensor:
        return inputs

    def _add_bias(self, name: str, outputs: Tensor) -> Tensor:
        return tf.nn.bias_add(outputs, tf.reshape(self._weights[f"{name}.bias"], [-1]))

    @abstractmethod
    def _multiply(self, rows: Tensor, name: str) -> Tensor:
        """The product [N, out] of rows [N, in] with the matrix of a module."""

    def _as_computed(self, logits: Tensor) -> Tensor:
        return logits


class FloatProducts(_Products):
    """Products with matrices of floating-point numbers."""

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
        super().__init__(spec, modules, weights)
        self._transposed, self._embedding_transposed = transposed, embedding_transposed
        self._small_batch, self._xla = small_batch, xla

    def embed(self, name: str, ids: Tensor) -> Tensor:
        """The embeddings float32 [..., D] of ids int32 [...]."""
        table = self._weights[f"{name}.weight"]
        if self._embedding_transposed and name == self._spec.names.embedding:
            return tf.cast(tf.transpose(tf.gather(table, ids, axis=1), [1, 2, 0]), tf.float32)
        return tf.cast(tf.gather(table, ids), tf.float32)

    def dense(self, names: Sequence[str], inputs: Tensor) -> list[Tensor]:
        """The outputs [..., out] of dense layers that have the same inputs [..., in]."""
        rows = tf.reshape(inputs, [-1, inputs.shape[-1]])
        return [self._dense(name, rows, inputs) for name in names]

    def _dense(self, name: str, rows: Tensor, inputs: Tensor) -> Tensor:
        outputs = self._multiply(rows, name)
        if self._modules[name].bias:
            outputs = self._add_bias(name, outputs)
        return tf.reshape(outputs, [*sizes(inputs)[:-1], self._modules[name].outputs])

    def _multiply(self, rows: Tensor, name: str) -> Tensor:
        matrix = self._weights[f"{name}.weight"]
        return product(rows, matrix, transposed=self._transposed, small_batch=self._small_batch, compiled=self._xla)

    def _as_computed(self, logits: Tensor) -> Tensor:
        if not self._xla:
            return logits
        # Without the barrier, XLA may choose a layout of the logits that swaps the product's operands back.
        (logits,) = xla_optimization_barrier(input=[tf.reshape(logits, [-1])])
        return logits


class Int8Products(_Products):
    """Products with int8 matrices; layers with the same inputs are one matrix, named as the first of them."""

    def __init__(
        self,
        spec: Spec,
        modules: Mapping[str, Module],
        weights: Weights,
        groups: Sequence[Sequence[str]],
        *,
        small_batch: bool,
    ) -> None:
        super().__init__(spec, modules, weights)
        self._groups = {names[0]: names for names in groups}
        self._small_batch = small_batch

    def in_call(self, training: Any) -> Int8Products:
        """As the layers of a `DecoderForCausalLM`, which is not trained with these weights."""
        return self

    def embed(self, name: str, ids: Tensor) -> Tensor:
        """The embeddings float32 [..., D] of ids int32 [...]."""
        return int8.dequantize(self._matrix(name), ids)

    def dense(self, names: Sequence[str], inputs: Tensor) -> list[Tensor]:
        """The outputs [..., out] of dense layers that have the same inputs [..., in]."""
        assert list(names) == list(self._groups[names[0]])
        outputs = self._multiply(tf.reshape(inputs, [-1, inputs.shape[-1]]), names[0])
        if self._modules[names[0]].bias:
            outputs = self._add_bias(names[0], outputs)
        widths = [self._modules[name].outputs for name in names]
        outputs = tf.reshape(outputs, [*sizes(inputs)[:-1], sum(widths)])
        return tf.split(outputs, widths, -1) if len(widths) > 1 else [outputs]

    def _multiply(self, rows: Tensor, name: str) -> Tensor:
        return int8.product(rows, self._matrix(name), small_batch=self._small_batch)

    def _matrix(self, name: str) -> int8.Matrix:
        return int8.Matrix(*(self._weights.get(f"{name}.{part}") for part in INT8_PARTS))

"""The layers that hold a decoder's weights, named as its modules are in PyTorch."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from tfclm.compat import get_initializer
from tfclm.models.decoder import layer_norm, rms_norm
from tfclm.models.gradients import recomputed
from tfclm.models.shapes import sizes
from tfclm.models.spec import Module, Spec

__all__ = ["Group", "make_layer", "product", "resize"]

Tensor = Any


class _Weighted(tf_keras.layers.Layer):
    """A module with weights. It is built without an input shape, because its sizes are known."""

    built: bool

    def __init__(self, module: Module, name: str, initializer: Any = None) -> None:
        super().__init__(name=name)
        self._module, self._initializer = module, initializer

    def _add_bias(self, size: int) -> None:
        self.bias = self.add_weight("bias", (size,), initializer="zeros") if self._module.bias else None


class Dense(_Weighted):
    """A dense layer [..., in] -> [..., out], whose kernel is [in, out]."""

    def build(self, input_shape: Any = None) -> None:
        """Creates the kernel and the bias."""
        if not self.built:
            self.built = True
            name = "kernel" if self._module.kind == "linear" else "weight"  # Conv1D's is not transposed in PyTorch
            shape = (self._module.inputs, self._module.outputs)
            self.kernel = self.add_weight(name, shape, initializer=self._initializer)
            self._add_bias(self._module.outputs)

    def call(self, inputs: Tensor) -> Tensor:
        """The outputs [..., out]."""
        outputs = product(inputs, self.kernel)
        return outputs if self.bias is None else outputs + self.bias


class Embedding(_Weighted):
    """A table of embeddings [rows, D]."""

    def build(self, input_shape: Any = None) -> None:
        """Creates the table."""
        if not self.built:
            self.built = True
            shape = (self._module.inputs, self._module.outputs)
            # Rows are gathered before they are cast.
            self.weight = self.add_weight("weight", shape, initializer=self._initializer, experimental_autocast=False)

    def call(self, ids: Tensor) -> Tensor:
        """The embeddings [..., D] of ids [...]."""
        # Once rows are gathered from a variable, TensorFlow copies it each time that all of it is read.
        table = tf.convert_to_tensor(self.weight)
        return tf.cast(tf.gather(table, ids), self.compute_dtype)


class Norm(_Weighted):
    """An RMS norm or a layer norm of [..., D]."""

    def __init__(self, module: Module, name: str, spec: Spec) -> None:
        super().__init__(module, name)
        self._kind, self._eps = "layer" if module.bias else spec.norm, spec.eps

    def build(self, input_shape: Any = None) -> None:
        """Creates weight and bias."""
        if not self.built:
            self.built = True
            initializer = "zeros" if self._kind == "rms_plus_one" else "ones"
            self.weight = self.add_weight("weight", (self._module.inputs,), initializer=initializer)
            self._add_bias(self._module.inputs)

    def call(self, inputs: Tensor) -> Tensor:
        """The normalized inputs [..., D]."""
        weights = [tf.convert_to_tensor(each) for each in (self.weight, self.bias) if each is not None]
        return recomputed(self._normalize)(inputs, *weights)

    def _normalize(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._kind == "layer":
            return layer_norm(inputs, weight, bias, self._eps)
        return rms_norm(inputs, weight, self._eps, plus_one=self._kind == "rms_plus_one")


class Bias(_Weighted):
    """The bias of an output matrix that is the input embedding."""

    def build(self, input_shape: Any = None) -> None:
        """Creates the bias."""
        if not self.built:
            self.built = True
            self.bias = self.add_weight("bias", (self._module.inputs,), initializer="zeros")

    def call(self, inputs: Tensor) -> Tensor:
        """The inputs [..., V] plus the bias."""
        return inputs + self.bias


class Group(tf_keras.layers.Layer):
    """A module that holds others, which are its attributes as in PyTorch; numbered ones are in a list."""

    built: bool

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        self.children: list[Any] = []

    def child(self, name: str) -> Any:
        """The child of this name; None if there is none."""
        return next((child for child in self.children if child.name == name), None)

    def add(self, path: str, layer: Any) -> None:
        """Adds a layer under a dotted path; a number in it is part of the name before it, such as `layers.0`."""
        name, _, rest = path.partition(".")
        number, _, behind = rest.partition(".")
        if number.isdigit():
            name, rest = f"{name}.{number}", behind
        if not rest:
            self._attach(name, layer)
            return
        if self.child(name) is None:
            self._attach(name, Group(name))
        self.child(name).add(rest, layer)

    def _attach(self, name: str, layer: Any) -> None:
        self.children.append(layer)
        attribute, _, number = name.partition(".")
        if hasattr(type(self), attribute):
            return  # BERT's `output` is a property of Keras' layers
        if number:
            setattr(self, attribute, [*getattr(self, attribute, []), layer])
        else:
            setattr(self, attribute, layer)

    def build(self, input_shape: Any = None) -> None:
        """Builds all modules, each under its own name."""
        if not self.built:
            self.built = True
            for child in self.children:
                with tf.name_scope(child.name):
                    child.build(None)


def _own_name(path: str) -> str:
    """The last part of a dotted path, with the number that follows it."""
    parts = path.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def make_layer(module: Module, path: str, spec: Spec, config: Any) -> Any:
    """The layer of a module, under the last part of its dotted path."""
    name = _own_name(path)
    if module.kind == "norm":
        return Norm(module, name, spec)
    if module.kind == "bias":
        return Bias(module, name)
    # One initializer per layer: used again, it would give the same values.
    initializer = get_initializer(getattr(config, "initializer_range", 0.02))
    return (Embedding if module.kind == "embedding" else Dense)(module, name, initializer)


def resize(layer: Any, module: Module, config: Any) -> None:
    """Gives a layer the sizes of another module, and its weights the values that they have in common."""
    old = [(variable, variable.numpy()) for variable in layer.weights]
    layer._module, layer.built = module, False
    layer._initializer = get_initializer(getattr(config, "initializer_range", 0.02))
    layer._trainable_weights.clear()
    scope = old[0][0].name.rpartition("/")[0]
    with tf.name_scope(""), tf.name_scope(f"{scope}/"):
        layer.build(None)
    for new, (_, values) in zip(layer.weights, old, strict=True):
        common = tuple(slice(min(sizes)) for sizes in zip(new.shape, values.shape, strict=True))
        grown = new.numpy()
        grown[common] = values[common]
        new.assign(grown)


def product(inputs: Tensor, matrix: Tensor, *, transposed: bool = False) -> Tensor:
    """Inputs [..., in] times a matrix [in, out], or [out, in] if `transposed`."""
    # As a product of two matrices: the gradient of a batched product would hold a matrix per row.
    rows = tf.matmul(tf.reshape(inputs, [-1, inputs.shape[-1]]), matrix, transpose_b=transposed)
    return tf.reshape(rows, [*sizes(inputs)[:-1], rows.shape[-1]])

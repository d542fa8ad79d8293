"""The decoder as a model of transformers: its weights as Keras layers, named as in PyTorch, and a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras
from transformers import TFPreTrainedModel

from tfclm.compat import (
    TFBaseModelOutputWithPast,
    TFCausalLanguageModelingLoss,
    TFCausalLMOutputWithPast,
    unpack_inputs,
)
from tfclm.models.decoder import Cache, decode_tokens, head_logits
from tfclm.models.families import spec_of
from tfclm.models.gradients import recomputed
from tfclm.models.layers import Group, make_layer, product, resize
from tfclm.models.rope import translate_rope
from tfclm.models.spec import Spec

__all__ = ["DecoderForCausalLM", "DecoderStem"]

Tensor = Any


class DecoderStem(Group):
    """All of the decoder but its head: token ids [B, L] to hidden states [B, L, D].

    The weights are layers named as in PyTorch, so that `model.model.layers[0].trainable = False` freezes a layer.
    """

    def __init__(self, config: Any, spec: Spec, name: str) -> None:
        super().__init__(name=name)
        self.config, self.spec = config, spec
        self.weights_by_name = _LayerWeights(spec)
        prefix = f"{spec.names.stem}."
        for module in spec.modules():
            if module.name.startswith(prefix):
                path = module.name.removeprefix(prefix)
                layer = make_layer(module, path, spec, config)
                self.add(path, layer)
                self.weights_by_name.layers[path] = layer
        for kind in ("embedding", "attention", "residual", "activation"):
            rate = getattr(spec, f"{kind}_dropout")
            if rate:
                layer = tf_keras.layers.Dropout(rate, name=f"{kind}_dropout")
                setattr(self, layer.name, layer)
                self.weights_by_name.dropouts[kind] = layer

    @unpack_inputs
    def call(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool = False,
    ) -> Any:
        """As the stems of transformers.

        Args:
            input_ids: int [B, L].
            attention_mask: int [B, L], with the length of the past; 0 for padding.
            position_ids: int [B, L] or [1, L]; counted from 0 by default.
            past_key_values: keys and values of earlier tokens, as an earlier call returned them.
            inputs_embeds: float [B, L, D], in place of `input_ids`.
            use_cache: whether to return keys and values.
            output_attentions: whether to return the attention's weights of each layer.
            output_hidden_states: whether to return the input of each layer.
            return_dict: whether to return an object with names, not a tuple.
            training: whether dropout is applied.
        """
        weights = self.weights_by_name.in_call(training)
        cache = None
        if past_key_values and past_key_values[0] is not None:
            length = tf.shape(input_ids if inputs_embeds is None else inputs_embeds)[1]
            past = tf.shape(past_key_values[0][0])[2]
            cache = Cache(past_key_values, (past + tf.range(length))[None], tf.range(past + length)[None], _concatenate)
        if position_ids is not None and len(position_ids.shape) == 1:
            position_ids = position_ids[None]
        out = decode_tokens(
            self.spec,
            weights,
            input_ids,
            embeddings=inputs_embeds,
            mask=attention_mask,
            positions=None if position_ids is None else tf.cast(position_ids, tf.int32),
            cache=cache,
            elementwise=recomputed,
        )
        result = TFBaseModelOutputWithPast(
            last_hidden_state=out.hidden,
            past_key_values=out.pairs if use_cache else None,
            hidden_states=out.hidden_states if output_hidden_states else None,
            attentions=out.attentions if output_attentions else None,
        )
        return result if return_dict else result.to_tuple()


class _LayerWeights:
    """The weights of a decoder as Keras layers, by their names within the stem; see `tfclm.models.decoder.Weights`."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.layers: dict[str, Any] = {}
        self.dropouts: dict[str, Any] = {}
        self.training: Any = False

    def in_call(self, training: Any) -> _LayerWeights:
        """The same layers in a call that trains or does not."""
        self.training = training
        return self

    def embed(self, name: str, ids: Tensor) -> Tensor:
        return self.layers[name](ids)

    def dense(self, names: Sequence[str], inputs: Tensor) -> list[Tensor]:
        return [self.layers[name](inputs) for name in names]

    def norm(self, name: str, inputs: Tensor) -> Tensor:
        return self.layers[name](inputs)

    def logits(self, inputs: Tensor) -> Tensor:
        spec = self.spec
        if spec.names.head in self.layers and not spec.tied:
            logits = self.layers[spec.names.head](inputs)
        else:
            table = self.layers[spec.names.embedding].weight
            logits = product(inputs, tf.cast(table, inputs.dtype), transposed=True)
        if spec.head_bias and (spec.tied or spec.names.head_bias):
            logits = self.layers[spec.names.head_bias or spec.names.head](logits)
        return logits

    def dropout(self, kind: str, inputs: Tensor) -> Tensor:
        layer = self.dropouts.get(kind)
        return inputs if layer is None else layer(inputs, training=self.training)


class DecoderForCausalLM(TFPreTrainedModel, TFCausalLanguageModelingLoss):
    """A causal language model of any of the types in `tfclm.models.families`: the base of one class per type.

    Example:
        >>> import tfclm
        >>> from transformers import TFAutoModelForCausalLM
        >>> model = TFAutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        >>> type(model).__name__
        'TFLlamaForCausalLM'
    """

    built: bool
    base_model_prefix = "model"
    # Constants that some PyTorch checkpoints hold, and the second name of a tied output matrix.
    _keys_to_ignore_on_load_unexpected = (
        r"rotary_emb\.inv_freq",
        r"attn\.(masked_)?bias",
        r"attention\.(masked_)?bias",
    )

    def __init__(self, config: Any, *inputs: Any, **options: Any) -> None:
        translate_rope(vars(config), by_layer_type=hasattr(config, "rope_local_base_freq"), check=False)
        super().__init__(config, *inputs, **options)
        spec = spec_of(config)
        stem = DecoderStem(config, spec, name=spec.names.stem)
        setattr(self, self.base_model_prefix, stem)
        self._stem = stem
        head = Group(name="head")
        prefix = f"{spec.names.stem}."
        for module in spec.modules():
            if not module.name.startswith(prefix):
                layer = make_layer(module, module.name, spec, config)
                head.add(module.name, layer)
                stem.weights_by_name.layers[module.name] = layer
        self._head = head.children
        for child in self._head:
            setattr(self, child.name, child)

    @property
    def spec(self) -> Spec:
        """What the model computes."""
        spec: Spec = self._stem.spec
        return spec

    @property
    def weights_by_name(self) -> _LayerWeights:
        """The layers that have weights; see `tfclm.models.decoder.Weights`."""
        return self._stem.weights_by_name

    def head(self, hidden: Tensor) -> Tensor:
        """Logits float32 [B, L, V] of hidden states [B, L, D]."""
        return head_logits(self.spec, self.weights_by_name, hidden)

    def get_input_embeddings(self) -> Any:
        """The layer of the token embeddings; its `weight` is [V, D]."""
        return self.weights_by_name.layers[self.spec.names.embedding]

    def set_input_embeddings(self, value: Any) -> None:
        """Assigns new values to the token embeddings, [V, D]."""
        self.get_input_embeddings().weight.assign(value)

    def get_output_embeddings(self) -> Any:
        """The layer of the output matrix; that of the token embeddings if they are tied."""
        if self.spec.tied:
            return self.get_input_embeddings()
        return self.weights_by_name.layers[self.spec.names.head]

    # AutoGraph would take seconds to convert it, and nothing branches on the value of a tensor.
    @tf.autograph.experimental.do_not_convert
    @unpack_inputs
    def call(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool = False,
    ) -> Any:
        """As the causal language models of transformers: logits float32 [B, L, V], and the loss if `labels` are given.

        The other arguments are those of `DecoderStem.call`. The label of a token is the token itself; -100 is ignored.
        """
        out = self._stem(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            training=training,
        )
        logits = self.head(out.last_hidden_state)
        loss = None if labels is None else self.hf_compute_loss(labels[:, 1:], logits[:, :-1])
        result = TFCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return result if return_dict else result.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, attention_mask: Tensor | None = None, **options: Any
    ) -> dict[str, Any]:
        """The inputs of the next step of `generate`."""
        positions = options.get("position_ids")
        if attention_mask is not None and positions is None:
            positions = tf.maximum(tf.cumsum(attention_mask, axis=-1) - 1, 0)
        if past_key_values and past_key_values[0][0].shape[2] == self.spec.threshold:
            past_key_values = None  # with the next token, all positions are rotated otherwise
        if past_key_values:
            input_ids = input_ids[:, -1:]
            positions = None if positions is None else positions[:, -1:]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": positions,
            "past_key_values": past_key_values,
            "use_cache": options.get("use_cache"),
        }

    def resize_token_embeddings(self, new_num_tokens: int | None = None) -> Any:
        """Changes the number of tokens, in place; new rows are initialized at random.

        Args:
            new_num_tokens: entries of the vocabulary; None changes nothing.

        Returns:
            The layer of the token embeddings.
        """
        if new_num_tokens is None or new_num_tokens == self.config.vocab_size:
            return self.get_input_embeddings()
        self.build_in_name_scope()
        layers = self._stem.weights_by_name.layers
        config = type(self.config).from_dict({**self.config.to_dict(), "vocab_size": new_num_tokens})
        spec = spec_of(config)
        sizes = {module.name.removeprefix(f"{spec.names.stem}."): module for module in spec.modules()}
        for name, layer in layers.items():
            module = sizes[name]
            if module != layer._module:
                resize(layer, module, config)
        self.config.vocab_size = new_num_tokens
        self._stem.spec = self._stem.weights_by_name.spec = spec
        return self.get_input_embeddings()

    def build(self, input_shape: Any = None) -> None:
        """Creates all weights."""
        if not self.built:
            self.built = True
            with tf.name_scope(self._stem.name):
                self._stem.build(None)
            for child in self._head:
                with tf.name_scope(child.name):
                    child.build(None)


def _concatenate(past: Tensor, new: Tensor) -> Tensor:
    return tf.concat([past, new], 2)

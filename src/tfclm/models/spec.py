"""What a decoder computes: sizes, variants of its layers, and the names of its weights in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from tfclm.models.rope import Rope

__all__ = ["Module", "Names", "Spec"]


@dataclass(frozen=True)
class Names:
    """The modules of a decoder by their names in PyTorch; the defaults are Llama's.

    Modules of a layer are relative to the layer. Of fused modules (`qkv`, `gate_up`) only those exist that the `Spec`
    asks for.
    """

    stem: str = "model"  # what is before the head
    embedding: str = "embed_tokens"
    position_embedding: str = ""
    token_types: str = ""  # a table whose first row is added to every embedding
    embedding_norm: str = ""
    project_in: str = ""
    project_out: str = ""
    layer: str = "layers"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str = "self_attn.qkv_proj"
    o: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    gate_up: str = "mlp.gate_up_proj"
    down: str = "mlp.down_proj"
    # Norms before and after the attention, before and after the feed-forward part.
    norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    final_norm: str = "norm"
    head_dense: str = ""  # a dense layer, activation and norm before the output matrix
    head_norm: str = ""
    head: str = "lm_head"
    head_bias: str = ""  # of a tied head


class Module(NamedTuple):
    """A module with weights: its name in PyTorch, and the sizes of its weights."""

    name: str
    kind: Literal["linear", "conv1d", "embedding", "norm", "bias"]
    inputs: int  # rows of an embedding; size of a norm or bias
    outputs: int = 0
    bias: bool = False


@dataclass(frozen=True)
class Spec:
    """A decoder of any of the supported model types."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner_size: int  # of the feed-forward part
    context: int | None  # positions; None if there is no limit
    activation: str
    names: Names = field(default_factory=Names)

    # Embeddings.
    embedding_size: int | None = None  # if it is not the hidden size
    embedding_scale: float = 1.0
    project_in_bias: bool = False
    positions: Literal["none", "learned", "sinusoidal", "ctrl"] = "none"
    position_rows: int = 0  # of the table of learned positions
    position_offset: int = 0  # row of the first position
    positions_from_mask: bool = False  # padding is not counted, even without position ids
    token_type_rows: int = 0
    padding_id: int | None = None  # its tokens are not counted as positions (RoBERTa)
    output_embedding_size: int | None = None

    # Norms and residuals.
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    norm_bias: bool = True  # of layer norms
    eps: float = 1e-6
    post_norm: bool = False  # norms 2 and 4 follow the sum with the residual
    parallel: bool = False  # attention and feed-forward part read the same residual
    residual_from_norm: bool = False  # the residual is what the norm before gives
    residual_scale: float = 1.0

    # Attention.
    fused_qkv: Literal["", "parts", "groups", "codegen"] = ""
    qkv_bias: bool = False
    o_bias: bool = False
    qkv_limit: float | None = None  # queries, keys and values are clipped to ± this
    qk_norm: Literal["", "head", "whole"] = ""
    attention_scale: float = 1.0
    attention_scale_by_layer: bool = False  # divided by the layer's number, from 1
    attention_cap: float | None = None
    ropes: tuple[Rope, ...] = ()
    layer_ropes: tuple[int | None, ...] = ()  # index into `ropes` of each layer
    interleaved: bool = False  # neighbouring dimensions are rotated together, not those of two halves
    windows: tuple[int | None, ...] = ()  # sliding window of each layer
    alibi: tuple[float, ...] = ()  # slope of each head
    alibi_bfloat16: bool = False  # rounded as Falcon's

    # Feed-forward part.
    gated: bool = True
    fused_gate_up: bool = False
    mlp_bias: bool = False
    conv1d: bool = False  # dense layers are stored as [in, out]

    # Head.
    tied: bool = False
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_cap: float | None = None

    # Dropout, in training.
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    activation_dropout: float = 0.0

    def layer(self, index: int, name: str) -> str:
        """The name of a layer's module within the stem."""
        return f"{self.names.layer}.{index}.{name}"

    @property
    def depends_on_length(self) -> bool:
        """Whether a position's rotation depends on the length of the text."""
        return any(rope.depends_on_length for rope in self.ropes)

    @property
    def threshold(self) -> int:
        """The length beyond which all positions are rotated otherwise, so that a cache cannot be used; 0 if none."""
        return max((rope.threshold for rope in self.ropes), default=0)

    def modules(self) -> Iterator[Module]:
        """All modules with weights; those of the stem are named within it, and so is the head."""
        stem = f"{self.names.stem}." if self.names.stem else ""
        for module in self._stem_modules():
            yield module._replace(name=stem + module.name)
        yield from self._head_modules()

    def _norm(self, name: str, size: int | None = None) -> Module:
        return Module(name, "norm", size or self.hidden_size, bias=self.norm == "layer" and self.norm_bias)

    def _dense(self, name: str, inputs: int, outputs: int, bias: bool) -> Module:
        return Module(name, "conv1d" if self.conv1d else "linear", inputs, outputs, bias)

    def _stem_modules(self) -> Iterator[Module]:
        names, width = self.names, self.embedding_size or self.hidden_size
        yield Module(names.embedding, "embedding", self.vocab_size, width)
        if self.positions == "learned":
            # BERT-like models add them before the norm, OPT after the projection to the hidden size.
            size = width if names.embedding_norm else self.hidden_size
            yield Module(names.position_embedding, "embedding", self.position_rows, size)
        if names.token_types:
            yield Module(names.token_types, "embedding", self.token_type_rows, width)
        if names.embedding_norm:
            yield self._norm(names.embedding_norm, width)
        if names.project_in:
            yield Module(names.project_in, "linear", width, self.hidden_size, self.project_in_bias)
        for index in range(self.layers):
            for module in self._layer_modules():
                yield module._replace(name=self.layer(index, module.name))
        if names.final_norm:
            yield self._norm(names.final_norm)
        if names.project_out:
            yield Module(names.project_out, "linear", self.hidden_size, width)

    def _layer_modules(self) -> Iterator[Module]:
        names, hidden, inner = self.names, self.hidden_size, self.inner_size
        heads, groups = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.fused_qkv:
            yield self._dense(names.qkv, hidden, heads + 2 * groups, self.qkv_bias)
        else:
            for name, width in ((names.q, heads), (names.k, groups), (names.v, groups)):
                yield self._dense(name, hidden, width, self.qkv_bias)
        yield self._dense(names.o, heads, hidden, self.o_bias)
        if self.qk_norm:
            sizes = (heads, groups) if self.qk_norm == "whole" else (self.head_dim, self.head_dim)
            for name, size in zip((names.q_norm, names.k_norm), sizes, strict=True):
                yield self._norm(name, size)
        if self.fused_gate_up:
            yield self._dense(names.gate_up, hidden, 2 * inner, self.mlp_bias)
        else:
            if self.gated:
                yield self._dense(names.gate, hidden, inner, self.mlp_bias)
            yield self._dense(names.up, hidden, inner, self.mlp_bias)
        yield self._dense(names.down, inner, hidden, self.mlp_bias)
        for name in dict.fromkeys(names.norms):
            if name:
                yield self._norm(name)

    def _head_modules(self) -> Iterator[Module]:
        names, width = self.names, self.output_embedding_size or self.embedding_size or self.hidden_size
        if names.head_dense:
            yield Module(names.head_dense, "linear", self.hidden_size, width, True)
            yield Module(names.head_norm, "norm", width, bias=True)
        if not self.tied:
            yield Module(names.head, "linear", width, self.vocab_size, self.head_bias and not names.head_bias)
        if self.head_bias and (self.tied or names.head_bias):
            yield Module(names.head_bias or names.head, "bias", self.vocab_size)

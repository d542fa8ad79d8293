"""Frequencies of rotary position embeddings for every `rope_scaling`, computed in float32 as PyTorch's classes do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tfclm.errors import InputError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Rope", "rope", "translate_rope"]

Frequencies = tuple[float, ...]

# The parameters of each kind, and those of them that may be left out.
PARAMETERS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
        },
    ),
    "longrope": (
        {"short_factor", "long_factor"},
        {"factor", "attention_factor", "original_max_position_embeddings"},
    ),
}


@dataclass(frozen=True)
class Rope:
    """What turns positions into angles.

    Attributes:
        frequencies: radians per position of each rotated pair of dimensions.
        factor: multiplies cosines and sines.
        long_frequencies: of texts that are longer than `threshold` positions; None if they are the same.
        threshold: for `long_frequencies`.
        dynamic: base, scaling factor and context of frequencies that change with the length of the text beyond the
            context; None for others.
    """

    frequencies: Frequencies
    factor: float = 1.0
    long_frequencies: Frequencies | None = None
    threshold: int = 0
    dynamic: tuple[float, float, int] | None = None

    @property
    def depends_on_length(self) -> bool:
        """Whether the angle of a position depends on how long the text is."""
        return self.long_frequencies is not None or self.dynamic is not None


def rope(
    base: float,
    size: int,
    scaling: Mapping[str, Any] | None,
    context: int,
    original_context: int | None = None,
) -> Rope:
    """The rotary position embedding of a config.

    Args:
        base: `rope_theta`.
        size: number of rotated dimensions of a head.
        scaling: `rope_scaling`; None for none.
        context: `max_position_embeddings`.
        original_context: the config's `original_max_position_embeddings`, outside of `rope_scaling`.

    Raises:
        InputError: the kind, or one of its parameters, is not known.

    Example:
        >>> rope(10000.0, 4, {"rope_type": "linear", "factor": 2.0}, context=4096).frequencies
        (0.5, 0.004999999888241291)
    """
    import numpy as np

    parameters = dict(scaling or {})
    # Older configs call it `type`; where both are given, transformers reads this one.
    kind = parameters.pop("rope_type", None) or parameters.get("type") or "default"
    parameters.pop("type", None)
    kind = {"su": "longrope"}.get(kind, kind)
    _check(kind, parameters)
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    powers = (np.float32(base) ** exponents).astype(np.float32)
    plain = (np.float32(1) / powers).astype(np.float32)
    if kind == "linear":
        return Rope(_frequencies(plain / np.float32(parameters["factor"])))
    if kind == "dynamic":
        return Rope(_frequencies(plain), dynamic=(float(base), float(parameters["factor"]), context))
    if kind == "llama3":
        return Rope(_frequencies(_llama3(plain, parameters)))
    if kind == "yarn":
        return _yarn(base, size, powers, parameters, context)
    if kind == "longrope":
        return _longrope(size, powers, parameters, context, original_context)
    return Rope(_frequencies(plain))


def _check(kind: str, parameters: Mapping[str, Any]) -> None:
    if kind not in PARAMETERS:
        raise InputError(f"rope_scaling has the type {kind!r}; supported: {', '.join(PARAMETERS)}")
    required, optional = PARAMETERS[kind]
    given = {name for name, value in parameters.items() if value is not None}
    if missing := required - given:
        raise InputError(f"rope_scaling of the type {kind} lacks {', '.join(sorted(missing))}")
    # transformers itself writes `original_max_position_embeddings` in some of the other kinds, and ignores it there.
    if unknown := given - required - optional - {"original_max_position_embeddings"}:
        raise InputError(f"rope_scaling of the type {kind} has {', '.join(sorted(unknown))}, which is unknown")
    for name in given:
        values = parameters[name] if name in ("short_factor", "long_factor") else [parameters[name]]
        if not isinstance(values, Sequence) or not all(
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
            for value in values
        ):
            raise InputError(f"rope_scaling has {name} {parameters[name]!r}: give numbers above 0")


def _frequencies(values: np.ndarray[Any, Any]) -> Frequencies:
    import numpy as np

    return tuple(float(value) for value in values.astype(np.float32))


def _llama3(plain: np.ndarray[Any, Any], parameters: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Low frequencies are divided by the factor, high ones are kept, and those between are interpolated."""
    import numpy as np

    factor, low, high = (np.float32(parameters[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = np.float32(parameters["original_max_position_embeddings"])
    length = np.float32(2 * math.pi) / plain
    smooth = (original / length - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    scaled = np.where(length > original / low, plain / factor, plain)
    medium = (length >= original / high) & (length <= original / low)
    return np.where(medium, between, scaled).astype(np.float32)


def _yarn(base: float, size: int, powers: np.ndarray[Any, Any], parameters: Mapping[str, Any], context: int) -> Rope:
    import numpy as np

    factor = parameters["factor"]
    original = parameters.get("original_max_position_embeddings")
    if original:
        factor = context / original  # as PyTorch's classes do, whatever `factor` says
    original = original or context

    def magnitude(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention = parameters.get("attention_factor")
    if attention is None:
        scale, all_dimensions = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention = magnitude(scale) / magnitude(all_dimensions) if scale and all_dimensions else magnitude()

    def dimension(rotations: float) -> float:
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension(parameters.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dimension(parameters.get("beta_slow") or 1)), size - 1)
    ramp = np.clip((np.arange(size // 2, dtype=np.float32) - low) / ((high - low) or 0.001), 0, 1).astype(np.float32)
    kept = 1 - ramp
    return Rope(
        _frequencies(1 / (np.float32(factor) * powers) * (1 - kept) + 1 / powers * kept), factor=float(attention)
    )


def _longrope(
    size: int,
    powers: np.ndarray[Any, Any],
    parameters: Mapping[str, Any],
    context: int,
    original_context: int | None,
) -> Rope:
    import numpy as np

    original = original_context or context
    factor = context / original if original_context else parameters.get("factor", 1.0)
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    for name in ("short_factor", "long_factor"):
        if len(parameters[name]) != size // 2:
            raise InputError(f"rope_scaling has {len(parameters[name])} values in {name}: give {size // 2}")
    short, long = (
        _frequencies(1 / (np.asarray(parameters[name], np.float32) * powers))
        for name in ("short_factor", "long_factor")
    )
    return Rope(short, float(attention), long_frequencies=long, threshold=original)


def translate_rope(fields: dict[str, Any], *, by_layer_type: bool, check: bool = True) -> None:
    """Translates the `rope_parameters` that transformers 5 writes to the fields of version 4, in place.

    Args:
        fields: of a config.json, or of a config.
        by_layer_type: whether the model has a rope for layers with full attention and one for those with a window.
        check: whether a field that is there already must be equal; those of a config may be defaults.

    Raises:
        InputError: a field is there already and differs, or the layers have ropes that no decoder computes.
    """
    given = fields.pop("rope_parameters", None)
    if isinstance(fields.get("rope_scaling"), dict) and _kind(fields["rope_scaling"]) == "default":
        fields["rope_scaling"] = None
    if given is None:
        return
    if not isinstance(given, dict):
        raise InputError(f"config.json has rope_parameters {given!r}: give an object")
    translated = {}
    rope_of_layers = given
    if any(isinstance(value, dict) for value in given.values()):
        if not by_layer_type or given.keys() != {"full_attention", "sliding_attention"}:
            expected = "one for full_attention and one for sliding_attention" if by_layer_type else "one for all layers"
            raise InputError(f"config.json has rope_parameters of {', '.join(given)}: the model has {expected}")
        rope_of_layers = given.get("full_attention") or {}
        local = dict(given.get("sliding_attention") or {})
        translated["rope_local_base_freq"] = local.pop("rope_theta", None)
        if local not in ({}, {"rope_type": "default"}):
            raise InputError(
                f"config.json has rope_parameters of sliding attention with {local}: only default is known"
            )
    scaling = dict(rope_of_layers)
    for name in ("rope_theta", "partial_rotary_factor"):
        translated[name] = scaling.pop(name, None)
    if _kind(scaling) == "longrope":
        translated["original_max_position_embeddings"] = scaling.get("original_max_position_embeddings")
    if _kind(scaling) != "default":
        translated["rope_scaling"] = scaling
    for name, value in translated.items():
        if value is None:
            continue
        if check and fields.get(name) not in (None, value):
            raise InputError(
                f"config.json has {name} {fields[name]!r} and, in rope_parameters, {name} {value!r}: remove the one "
                "that the model was not trained with"
            )
        fields[name] = value


def _kind(scaling: Mapping[str, Any]) -> Any:
    return scaling.get("rope_type", scaling.get("type", "default"))

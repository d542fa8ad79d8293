"""The normalizer of a tokenizer.json as steps in the graph."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tokenizers import pre_tokenizers

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.character_classes import (
    CodePointTable,
    Tensor,
    isolated_and_removed,
    normalized_code_points,
)
from tfclm.savedmodel.tokenizer.normalizers.code_point_map import CodePointMap
from tfclm.savedmodel.tokenizer.normalizers.composing import Composer, Decomposer
from tfclm.savedmodel.tokenizer.normalizers.precompiled import Precompiled
from tfclm.savedmodel.tokenizer.text import Text

__all__ = ["Step", "flatten_sequences", "normalization_steps"]

Step = Callable[[Text], Text]

# Regular expressions that RE2 and tokenizers' engine match in the same way.
SUPPORTED_REGEX = re.compile(r" (?:\{\d+,?\d*\}|\+)?")


def normalization_steps(config: dict[str, Any] | None) -> list[Step]:
    """The steps of the normalizer of a tokenizer.json, in order.

    Raises:
        InputError: a normalizer, which it names, is unsupported in the graph.
    """
    return [step for stage in flatten_sequences(config, "normalizers") for step in _steps(stage)]


def flatten_sequences(config: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A component of a tokenizer.json as a list; a Sequence has its components under `inner`."""
    if config is None:
        return []
    if config["type"] == "Sequence":
        return [stage for part in config[inner] for stage in flatten_sequences(part, inner)]
    return [config]


def _steps(config: dict[str, Any]) -> list[Step]:
    kind = config["type"]
    if kind in ("NFC", "NFKC"):
        return [Composer(kind)]
    if kind in ("NFD", "NFKD"):
        return [Decomposer(kind)]
    if kind in ("Lowercase", "StripAccents", "Nmt"):
        return [CodePointMap(*normalized_code_points(kind))]
    if kind == "Precompiled":
        return [Precompiled(base64.b64decode(config["precompiled_charsmap"]))]
    if kind == "BertNormalizer":
        return _bert(config)
    if kind == "Strip":
        return [Stripper(config["strip_left"], config["strip_right"])]
    if kind == "Prepend" and len(config["prepend"]) == 1:
        return [lambda text: text.insert_before(text.starts & text.is_ordinary, ord(config["prepend"]))]
    if kind == "Replace":
        return [_replacement_step(config["pattern"], config["content"])]
    raise InputError(f"the tokenizer's normalizer {kind} is unsupported in the graph")


def _bert(config: dict[str, Any]) -> list[Step]:
    lowercase = config["lowercase"]
    strip = lowercase if config["strip_accents"] is None else config["strip_accents"]

    first = normalized_code_points("BertNormalizer", config["clean_text"], config["handle_chinese_chars"], False, False)
    # Text that is already decomposed loses its marks one by one.
    last = normalized_code_points("BertNormalizer", False, False, strip, lowercase)
    return [CodePointMap(*first), *([Decomposer("NFD")] if strip else []), CodePointMap(*last)]


class Stripper(tf.Module):
    """Removes white space from the ends of pieces."""

    def __init__(self, left: bool, right: bool) -> None:
        super().__init__()
        self._left, self._right = left, right
        self._space = CodePointTable(isolated_and_removed(pre_tokenizers.WhitespaceSplit())[1])

    def __call__(self, text: Text) -> Text:
        """Strips the ordinary pieces; one that is all white space disappears."""
        position, piece = tf.range(tf.size(text.points)), text.piece_index
        visible = (self._space(text.points) == 0) | ~text.is_ordinary
        kept = tf.ones_like(visible)
        if self._left:
            first = tf.math.segment_min(tf.where(visible, position, position.dtype.max), piece)
            kept &= position >= tf.gather(first, piece)
        if self._right:
            last = tf.math.segment_max(tf.where(visible, position, -1), piece)
            kept &= position <= tf.gather(last, piece)
        return text.select(kept)


def _replacement_step(pattern: dict[str, str], content: str) -> Step:
    """Replaces matches of `pattern`, {"String": ...} or {"Regex": ...}, in the ordinary pieces."""
    text = pattern.get("String")
    if text is not None and len(text) == len(content) == 1:
        old, new = ord(text), ord(content)
        return lambda text: text._replace(points=tf.where(text.is_ordinary & (text.points == old), new, text.points))
    if text:
        regex = "".join(f"\\x{{{ord(character):x}}}" for character in text)
    elif text is None and SUPPORTED_REGEX.fullmatch(pattern["Regex"]):
        regex = pattern["Regex"]
    else:
        raise InputError(f"the tokenizer's normalizer Replace of {pattern} is unsupported in the graph")
    rewrite = content.replace("\\", "\\\\")

    def replace(text: Text) -> Text:
        pieces: Tensor = tf.raw_ops.StaticRegexReplace(
            input=text.pieces(), pattern=regex, rewrite=rewrite, replace_global=True
        )
        return text.replace_pieces(pieces)

    return replace

"""Normalizers in the graph: what a text is changed to before it is split."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tokenizers import pre_tokenizers

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.character_classes import Table, Tensor, respelled, split_apart
from tfclm.savedmodel.tokenizer.normalizers.code_point_map import CodePointMap
from tfclm.savedmodel.tokenizer.normalizers.composing import Composer, Decomposer
from tfclm.savedmodel.tokenizer.normalizers.precompiled import Precompiled
from tfclm.savedmodel.tokenizer.text import Text

__all__ = ["Step", "flatten", "normalizing", "replaced"]

Step = Callable[[Text], Text]

# Regular expressions that mean the same to RE2 and to tokenizers' engine.
REGEX = re.compile(r" (?:\{\d+,?\d*\}|\+)?")


def normalizing(config: dict[str, Any] | None) -> list[Step]:
    """What the normalizer of a tokenizer.json does, in order.

    Raises `InputError` naming what the graph has nothing for.
    """
    return [step for stage in flatten(config, "normalizers") for step in _steps(stage)]


def flatten(config: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The components of a tokenizer.json without Sequences, which hold theirs under `inner`."""
    if config is None:
        return []
    if config["type"] == "Sequence":
        return [stage for part in config[inner] for stage in flatten(part, inner)]
    return [config]


def _steps(config: dict[str, Any]) -> list[Step]:
    kind = config["type"]
    if kind in ("NFC", "NFKC"):
        return [Composer(kind)]
    if kind in ("NFD", "NFKD"):
        return [Decomposer(kind)]
    if kind in ("Lowercase", "StripAccents", "Nmt"):
        return [CodePointMap(*respelled(kind))]
    if kind == "Precompiled":
        return [Precompiled(base64.b64decode(config["precompiled_charsmap"]))]
    if kind == "BertNormalizer":
        return _bert(config)
    if kind == "Strip":
        return [Stripper(config["strip_left"], config["strip_right"])]
    if kind == "Prepend" and len(config["prepend"]) == 1:
        return [lambda text: text.prepend(text.starts & text.plain, ord(config["prepend"]))]
    if kind == "Replace":
        return [replaced(config["pattern"], config["content"])]
    raise InputError(f"the tokenizer's normalizer {kind} is unsupported in the graph")


def _bert(config: dict[str, Any]) -> list[Step]:
    lowercase = config["lowercase"]
    strip = lowercase if config["strip_accents"] is None else config["strip_accents"]

    first = respelled("BertNormalizer", config["clean_text"], config["handle_chinese_chars"], False, False)
    # What is already decomposed loses its marks one by one.
    last = respelled("BertNormalizer", False, False, strip, lowercase)
    return [CodePointMap(*first), *([Decomposer("NFD")] if strip else []), CodePointMap(*last)]


class Stripper(tf.Module):
    """White space taken away from the ends of pieces."""

    def __init__(self, left: bool, right: bool) -> None:
        super().__init__()
        self._left, self._right = left, right
        self._space = Table(split_apart(pre_tokenizers.WhitespaceSplit())[1])

    def __call__(self, text: Text) -> Text:
        """Each plain piece stripped; one of white space alone is gone."""
        here, piece = tf.range(tf.size(text.points)), text.piece
        solid = (self._space(text.points) == 0) | ~text.plain
        kept = tf.ones_like(solid)
        if self._left:
            kept &= here >= tf.gather(tf.math.segment_min(tf.where(solid, here, here.dtype.max), piece), piece)
        if self._right:
            kept &= here <= tf.gather(tf.math.segment_max(tf.where(solid, here, -1), piece), piece)
        return text.keep(kept)


def replaced(pattern: dict[str, str], content: str) -> Step:
    """What matches `pattern`, {"String": ...} or {"Regex": ...}, replaced in the plain pieces."""
    text = pattern.get("String")
    if text is not None and len(text) == len(content) == 1:
        old, new = ord(text), ord(content)
        return lambda text: text._replace(points=tf.where(text.plain & (text.points == old), new, text.points))
    if text:
        regex = "".join(f"\\x{{{ord(character):x}}}" for character in text)
    elif text is None and REGEX.fullmatch(pattern["Regex"]):
        regex = pattern["Regex"]
    else:
        raise InputError(f"the tokenizer's normalizer Replace of {pattern} is unsupported in the graph")
    rewrite = content.replace("\\", "\\\\")

    def replace(text: Text) -> Text:
        pieces: Tensor = tf.raw_ops.StaticRegexReplace(
            input=text.pieces(), pattern=regex, rewrite=rewrite, replace_global=True
        )
        return text.replace(pieces)

    return replace

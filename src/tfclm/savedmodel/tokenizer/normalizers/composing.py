"""Unicode's normal forms in the graph, with tables from the fast tokenizer's own normalizers."""

from __future__ import annotations

import functools
import unicodedata

import numpy as np
import tensorflow as tf
from tokenizers import normalizers

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.character_classes import (
    NUM_CODE_POINTS,
    PAGE_SIZE,
    Array,
    CodePointTable,
    Tensor,
    all_code_points,
    normalized_code_points,
)
from tfclm.savedmodel.tokenizer.text import ORDINARY, UNCHANGED, Text

__all__ = ["Composer", "Decomposer"]

NONE = -1  # no composition
MAX_CLASSES = 64  # more than the number of combining classes


class Decomposer(tf.Module):
    """Converts text to `form`, NFD or NFKD: decomposes it and puts marks into order.

    Most text has that form already, and is only checked.
    """

    def __init__(self, form: str) -> None:
        super().__init__()
        rows = np.full(NUM_CODE_POINTS, UNCHANGED, np.int32)
        parts: list[str] = []
        for character, decomposed in _normal_forms(form).items():
            rows[ord(character)] = len(parts)
            parts.append(decomposed)
        classes = _combining_classes()
        self._may_change = CodePointTable((rows != UNCHANGED) | (classes > 0))
        self._classes = CodePointTable(classes)
        self._rows = CodePointTable(rows)
        self._parts = tf.constant([ord(c) for part in parts for c in part], tf.int32)
        self._splits = tf.constant(np.cumsum([0, *map(len, parts)]), tf.int64)

    def __call__(self, text: Text) -> Text:
        """Decomposes the ordinary pieces."""
        may_change = tf.reduce_any((self._may_change(text.points) > 0) & text.is_ordinary)
        decomposed: Text = tf.cond(may_change, lambda: self.decompose(text)[0], lambda: text)
        return decomposed

    def decompose(self, text: Text) -> tuple[Text, Tensor]:
        """Decomposes any text; also returns the combining class of each code point."""
        text = text.replace_code_points(
            tf.where(text.is_ordinary, self._rows(text.points), UNCHANGED), self._parts, self._splits
        )
        classes = tf.where(text.is_ordinary, self._classes(text.points), 0)
        run = tf.cast(tf.cumsum(tf.cast((classes == 0) | text.starts, tf.int32)), tf.int64)
        size = tf.size(text.points, tf.int64)
        order = tf.argsort((run * MAX_CLASSES + tf.cast(classes, tf.int64)) * size + tf.range(size))
        return text._replace(points=tf.gather(text.points, order)), tf.gather(classes, order)


class Composer(tf.Module):
    """Converts text to `form`, NFC or NFKC: decomposes and composes it.

    Most text has that form already, and is only checked.
    """

    def __init__(self, form: str) -> None:
        super().__init__()
        self._decomposer = Decomposer(form.replace("C", "D"))
        pairs: dict[int, int] = {}
        composed = _normal_forms("NFC")
        for character, decomposed in _normal_forms("NFD").items():
            if character not in composed:
                first, second = normalizers.NFC().normalize_str(decomposed[:-1]), decomposed[-1]
                pairs[_key(first, second)] = ord(character)
        changed = np.zeros(NUM_CODE_POINTS, bool)
        changed[[ord(character) for character in _normal_forms(form)]] = True
        classes = _combining_classes()
        seconds = np.zeros(NUM_CODE_POINTS, bool)
        seconds[[key & 0x1FFFFF for key in pairs]] = True
        if any(seconds[key >> 21] and classes[key >> 21] == 0 for key in pairs):
            raise InputError(f"the tokenizer's normalizer {form} has compositions that the graph cannot put into order")
        self._may_change = CodePointTable(changed | (classes > 0) | seconds)
        keys, values = tf.constant(list(pairs), tf.int64), tf.constant(list(pairs.values()), tf.int32)
        self._pairs = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, values), NONE)

    def __call__(self, text: Text) -> Text:
        """Composes the ordinary pieces."""
        may_change = tf.reduce_any((self._may_change(text.points) > 0) & text.is_ordinary)
        composed: Text = tf.cond(may_change, lambda: self._compose(*self._decomposer.decompose(text)), lambda: text)
        return composed

    def _compose(self, text: Text, classes: Tensor) -> Text:
        def compose(
            points: Tensor, starts: Tensor, kinds: Tensor, classes: Tensor, skipped: Tensor, _changed: Tensor
        ) -> tuple[Tensor, ...]:
            position = tf.range(tf.size(points))
            # A head is a starter, or a mark that begins a piece. `base` is the head of a code point's run, or, for a
            # head, the code point before it.
            head = (classes == 0) | starts
            heads = tf.cast(tf.where(head)[:, 0], tf.int32)
            run = tf.cumsum(tf.cast(head, tf.int32)) - 1
            before = tf.maximum(position - 1, 0)
            base = tf.where(head, before, tf.gather(heads, run))
            # A code point composes with its base unless what is between blocks it: anything before a starter, a mark of
            # the same class before a mark.
            adjacent = ~starts & tf.gather(head, before)
            unblocked = tf.where(head, adjacent, ~skipped & (classes != tf.gather(classes, before))) & (
                tf.gather(classes, base) == 0
            )
            key = tf.cast(tf.gather(points, base), tf.int64) * (1 << 21) + tf.cast(points, tf.int64)
            result = self._pairs.lookup(key)
            composes = unblocked & (result != NONE) & (kinds == ORDINARY)
            # One mark of a run at a time; the marks before it are not tried again.
            first = tf.math.segment_min(tf.where(composes & ~head, position, tf.size(points)), run)
            first = tf.gather(first, run)
            merged = composes & (head | (position == first))
            skipped |= ~head & (first < tf.size(points)) & (position < first)
            indices = tf.where(merged)[:, 0]
            points = tf.tensor_scatter_nd_update(points, tf.gather(base, indices)[:, None], tf.gather(result, indices))
            kept = tf.where(~merged)[:, 0]
            remaining = tuple(tf.gather(array, kept) for array in (points, starts, kinds, classes, skipped))
            return *remaining, tf.size(indices) > 0

        vector = tf.TensorShape([None])
        composed = tf.while_loop(
            lambda *state: state[-1],
            compose,
            (*text, classes, tf.zeros_like(text.starts), True),
            shape_invariants=(*[vector] * 5, tf.TensorShape([])),
        )
        return Text(*composed[:3])


def _normal_forms(form: str) -> dict[str, str]:
    """Character -> its normal form, for the characters that are not normal."""
    rows, texts = normalized_code_points(form)
    return {chr(point): texts[rows[point]] for point in np.flatnonzero(rows != UNCHANGED)}


def _key(first: str, second: str) -> int:
    return ord(first) << 21 | ord(second)


@functools.cache
def _combining_classes() -> Array:
    """Canonical combining classes, numbered from 1 in their order, 0 for starters: int32 [NUM_CODE_POINTS].

    Found by how NFD orders two marks, because the fast tokenizer's version of Unicode may differ from Python's.
    """
    nfd = normalizers.NFD()

    def order(characters: str, form: str) -> list[str]:
        text: str = nfd.normalize_str("\n".join(form.format(character) for character in characters))
        return text.split("\n")

    # A character that is reordered with a mark of the lowest or the highest class is a mark.
    low, high = "\u0334", "\u0345"
    characters = ""
    for page in (all_code_points()[start : start + PAGE_SIZE] for start in range(0, NUM_CODE_POINTS, PAGE_SIZE)):
        text = f"a{high}" + f"{low}\na{high}".join(page) + low
        if nfd.normalize_str(text) != text:
            characters += page.replace("\n", "")
    downs, ups = order(characters, f"a{{}}{low}"), order(characters, f"a{high}{{}}")
    marks = [
        character
        for character, down, up in zip(characters, downs, ups, strict=True)
        if character in (low, high) or down[1] == low or up[-1] == high
    ]
    known: dict[int, str] = {}
    for mark in marks:
        if number := unicodedata.combining(mark):
            known.setdefault(number, mark)
    classes = np.zeros(NUM_CODE_POINTS, np.int32)
    texts = "".join(marks)
    for mark in known.values():
        for character, found in zip(texts, order(texts, f"a{{}}{mark}"), strict=True):
            classes[ord(character)] += found[1] == mark and character != mark
    classes[[ord(character) for character in texts]] += 1
    return classes

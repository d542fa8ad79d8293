"""Unicode's normal form C in the graph; the tables come from the fast tokenizer's own normalizers."""

from __future__ import annotations

import unicodedata

import numpy as np
import tensorflow as tf
from tokenizers import normalizers

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.classes import POINTS, Array, Table, Tensor, everything
from tfclm.savedmodel.tokenizer.merging import ragged_gather

__all__ = ["Composer"]

NONE = -1
CLASSES = 64  # more than there are combining classes


class Composer(tf.Module):
    """Text to NFC: decomposed, marks put into order, composed. Most text is in that form, and is only looked at."""

    def __init__(self) -> None:
        super().__init__()
        characters = everything()
        # A line feed composes with nothing, so each character is normalized alone.
        decomposed = normalizers.NFD().normalize_str("\n".join(characters)).replace("\n\n\n", "\n\0\n").split("\n")
        composed = normalizers.NFC().normalize_str("\n".join(characters)).replace("\n\n\n", "\n\0\n").split("\n")
        rows = np.full(POINTS, NONE, np.int32)
        parts: list[str] = []
        pairs: dict[int, int] = {}
        changed = np.zeros(POINTS, bool)
        classes = _combining_classes()
        for character, apart, again in zip(characters, decomposed, composed, strict=True):
            if character == "\n" or apart == character:
                continue
            rows[ord(character)] = len(parts)
            parts.append(apart)
            if again != character:
                changed[ord(character)] = True
            else:
                first, second = normalizers.NFC().normalize_str(apart[:-1]), apart[-1]
                pairs[_key(first, second)] = ord(character)
        seconds = np.zeros(POINTS, bool)
        seconds[[key & 0x1FFFFF for key in pairs]] = True
        if any(seconds[key >> 21] and classes[key >> 21] == 0 for key in pairs):
            raise InputError("the tokenizer's normalizer NFC has compositions that the graph has no order for")
        self._suspect = Table(changed | (classes > 0) | seconds)
        self._classes = Table(classes)
        self._rows = Table(rows)
        self._parts = tf.constant([ord(c) for part in parts for c in part], tf.int32)
        self._splits = tf.constant(np.cumsum([0, *map(len, parts)]), tf.int64)
        keys, values = tf.constant(list(pairs), tf.int64), tf.constant(list(pairs.values()), tf.int32)
        self._pairs = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, values), NONE)

    def __call__(self, points: Tensor, starts: Tensor, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Code points [N] -> composed [M], each piece (they begin at `starts`) for itself and those in `whole` not.

        The other two results are the new `starts` and, for each code point, the index of one that it came from: [M].
        """
        suspect = tf.reduce_any((self._suspect(points) > 0) & ~whole)
        composed: tuple[Tensor, Tensor, Tensor] = tf.cond(
            suspect,
            lambda: self._compose(*self._decompose(points, starts, whole)),
            lambda: (points, starts, tf.range(tf.size(points))),
        )
        return composed

    def _decompose(self, points: Tensor, starts: Tensor, whole: Tensor) -> tuple[Tensor, ...]:
        """Decomposed and in canonical order: points, starts, sources, combining classes; `whole` as it was."""
        here = tf.range(tf.size(points))
        rows = tf.where(whole, NONE, self._rows(points))
        rows = tf.where(rows == NONE, tf.size(self._splits) - 1 + here, rows)
        splits = tf.concat([self._splits, self._splits[-1] + 1 + tf.cast(here, tf.int64)], 0)
        points, splits = ragged_gather(tf.concat([self._parts, points], 0), splits, rows)
        begin, size = splits[:-1][:, None], tf.size(points, tf.int64)[None]
        source = tf.cumsum(tf.scatter_nd(begin, tf.ones_like(here), size)) - 1
        starts = tf.scatter_nd(begin, tf.cast(starts, tf.int32), size) > 0
        classes = tf.where(tf.gather(whole, source), 0, self._classes(points))
        run = tf.cast(tf.cumsum(tf.cast((classes == 0) | starts, tf.int32)), tf.int64)
        order = tf.argsort((run * CLASSES + tf.cast(classes, tf.int64)) * size + tf.range(size[0]))
        return tf.gather(points, order), starts, source, tf.gather(classes, order), whole

    def _compose(
        self, points: Tensor, starts: Tensor, source: Tensor, classes: Tensor, whole: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        def compose(
            points: Tensor, starts: Tensor, source: Tensor, classes: Tensor, closed: Tensor, _more: Tensor
        ) -> tuple[Tensor, ...]:
            here = tf.range(tf.size(points))
            # A head is a starter, or a mark that begins a piece; `base` is the head that a code point belongs to, or,
            # for a head, the one before it.
            head = (classes == 0) | starts
            heads = tf.cast(tf.where(head)[:, 0], tf.int32)
            run = tf.cumsum(tf.cast(head, tf.int32)) - 1
            before = tf.maximum(here - 1, 0)
            base = tf.where(head, before, tf.gather(heads, run))
            # What stands between must not hide it: nothing before another starter, no mark of its class before a mark.
            bare = ~starts & tf.gather(head, before)
            seen = tf.where(head, bare, ~closed & (classes != tf.gather(classes, before))) & (
                tf.gather(classes, base) == 0
            )
            key = tf.cast(tf.gather(points, base), tf.int64) * (1 << 21) + tf.cast(points, tf.int64)
            result = self._pairs.lookup(key)
            fits = seen & (result != NONE) & ~tf.gather(whole, source)
            # One mark of a run at a time; those that it has overtaken had their turn.
            first = tf.math.segment_min(tf.where(fits & ~head, here, tf.size(points)), run)
            first = tf.gather(first, run)
            taken = fits & (head | (here == first))
            closed |= ~head & (first < tf.size(points)) & (here < first)
            where = tf.where(taken)[:, 0]
            points = tf.tensor_scatter_nd_update(points, tf.gather(base, where)[:, None], tf.gather(result, where))
            kept = tf.where(~taken)[:, 0]
            left = tuple(tf.gather(array, kept) for array in (points, starts, source, classes, closed))
            return *left, tf.size(where) > 0

        one = tf.TensorShape([None])
        points, starts, source, *_ = tf.while_loop(
            lambda *state: state[-1],
            compose,
            (points, starts, source, classes, tf.zeros_like(starts), True),
            shape_invariants=(one, one, one, one, one, tf.TensorShape([])),
        )
        return points, starts, source


def _key(first: str, second: str) -> int:
    return ord(first) << 21 | ord(second)


def _combining_classes() -> Array:
    """Canonical combining classes, numbered in their order from 1 on, 0 for starters: int32 [POINTS].

    They are read off how NFD puts two marks into order, as the fast tokenizer's Unicode may be another than Python's.
    """
    nfd = normalizers.NFD()

    def order(characters: str, form: str) -> list[str]:
        text: str = nfd.normalize_str("\n".join(form.format(character) for character in characters))
        return text.split("\n")

    # Whatever goes past a mark of the lowest or the highest class has one itself.
    low, high = "\u0334", "\u0345"
    characters = everything().replace("\n", "")
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
    classes = np.zeros(POINTS, np.int32)
    texts = "".join(marks)
    for mark in known.values():
        for character, found in zip(texts, order(texts, f"a{{}}{mark}"), strict=True):
            classes[ord(character)] += found[1] == mark and character != mark
    classes[[ord(character) for character in texts]] += 1
    return classes

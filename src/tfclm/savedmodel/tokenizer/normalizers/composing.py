"""Unicode's normal forms in the graph; the tables come from the fast tokenizer's own normalizers."""

from __future__ import annotations

import functools
import unicodedata

import numpy as np
import tensorflow as tf
from tokenizers import normalizers

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.character_classes import POINTS, Array, Table, Tensor, everything
from tfclm.savedmodel.tokenizer.text import KEEP, PLAIN, Text

__all__ = ["Composer", "Decomposer"]

NONE = -1
CLASSES = 64  # more than there are combining classes


class Decomposer(tf.Module):
    """Text to `form`, NFD or NFKD: taken apart, marks put into order. Most text is so already, and only looked at."""

    def __init__(self, form: str) -> None:
        super().__init__()
        rows = np.full(POINTS, KEEP, np.int32)
        parts: list[str] = []
        for character, apart in _forms(form).items():
            if apart != character:
                rows[ord(character)] = len(parts)
                parts.append(apart)
        classes = _combining_classes()
        self._suspect = Table((rows != KEEP) | (classes > 0))
        self._classes = Table(classes)
        self._rows = Table(rows)
        self._parts = tf.constant([ord(c) for part in parts for c in part], tf.int32)
        self._splits = tf.constant(np.cumsum([0, *map(len, parts)]), tf.int64)

    def __call__(self, text: Text) -> Text:
        """Each plain piece decomposed."""
        suspect = tf.reduce_any((self._suspect(text.points) > 0) & text.plain)
        decomposed: Text = tf.cond(suspect, lambda: self.decompose(text)[0], lambda: text)
        return decomposed

    def decompose(self, text: Text) -> tuple[Text, Tensor]:
        """The same, whatever the text, and the combining class of each code point."""
        text = text.respell(tf.where(text.plain, self._rows(text.points), KEEP), self._parts, self._splits)
        classes = tf.where(text.plain, self._classes(text.points), 0)
        run = tf.cast(tf.cumsum(tf.cast((classes == 0) | text.starts, tf.int32)), tf.int64)
        size = tf.size(text.points, tf.int64)
        order = tf.argsort((run * CLASSES + tf.cast(classes, tf.int64)) * size + tf.range(size))
        return text._replace(points=tf.gather(text.points, order)), tf.gather(classes, order)


class Composer(tf.Module):
    """Text to `form`, NFC or NFKC: decomposed, and composed. Most text is so already, and is only looked at."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self._decomposer = Decomposer(form.replace("C", "D"))
        pairs: dict[int, int] = {}
        composed = _forms("NFC")
        for character, apart in _forms("NFD").items():
            if apart != character and composed[character] == character:
                first, second = normalizers.NFC().normalize_str(apart[:-1]), apart[-1]
                pairs[_key(first, second)] = ord(character)
        changed = np.zeros(POINTS, bool)
        changed[[ord(character) for character, again in _forms(form).items() if again != character]] = True
        classes = _combining_classes()
        seconds = np.zeros(POINTS, bool)
        seconds[[key & 0x1FFFFF for key in pairs]] = True
        if any(seconds[key >> 21] and classes[key >> 21] == 0 for key in pairs):
            raise InputError(f"the tokenizer's normalizer {form} has compositions that the graph has no order for")
        self._suspect = Table(changed | (classes > 0) | seconds)
        keys, values = tf.constant(list(pairs), tf.int64), tf.constant(list(pairs.values()), tf.int32)
        self._pairs = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, values), NONE)

    def __call__(self, text: Text) -> Text:
        """Each plain piece composed."""
        suspect = tf.reduce_any((self._suspect(text.points) > 0) & text.plain)
        composed: Text = tf.cond(suspect, lambda: self._compose(*self._decomposer.decompose(text)), lambda: text)
        return composed

    def _compose(self, text: Text, classes: Tensor) -> Text:
        def compose(
            points: Tensor, starts: Tensor, kinds: Tensor, classes: Tensor, closed: Tensor, _more: Tensor
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
            fits = seen & (result != NONE) & (kinds == PLAIN)
            # One mark of a run at a time; those that it has overtaken had their turn.
            first = tf.math.segment_min(tf.where(fits & ~head, here, tf.size(points)), run)
            first = tf.gather(first, run)
            taken = fits & (head | (here == first))
            closed |= ~head & (first < tf.size(points)) & (here < first)
            where = tf.where(taken)[:, 0]
            points = tf.tensor_scatter_nd_update(points, tf.gather(base, where)[:, None], tf.gather(result, where))
            kept = tf.where(~taken)[:, 0]
            left = tuple(tf.gather(array, kept) for array in (points, starts, kinds, classes, closed))
            return *left, tf.size(where) > 0

        one = tf.TensorShape([None])
        composed = tf.while_loop(
            lambda *state: state[-1],
            compose,
            (*text, classes, tf.zeros_like(text.starts), True),
            shape_invariants=(one, one, one, one, one, tf.TensorShape([])),
        )
        return Text(*composed[:3])


def _forms(form: str) -> dict[str, str]:
    """Every character and what a normalizer makes of it alone."""
    # A line feed composes with nothing, so each character is normalized alone.
    normalized = getattr(normalizers, form)().normalize_str("\n".join(everything())).split("\n")
    normalized.remove("")  # the line feed itself is two empty lines
    return dict(zip(everything(), normalized, strict=True)) | {"\n": "\n"}


def _key(first: str, second: str) -> int:
    return ord(first) << 21 | ord(second)


@functools.cache
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

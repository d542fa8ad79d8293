"""Added tokens (`<|endoftext|>`, `<mask>`) in the graph: found before the text is split into words."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.character_classes import Table, Tensor, word
from tfclm.savedmodel.tokenizer.text import PLAIN, Text, encode

__all__ = ["AddedTokens"]

MARK = 0xFF  # around what is found; UTF-8 does not have this byte
# White_Space, of which RE2's \s is the ASCII part.
SPACES = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*"


class AddedTokens(tf.Module):
    """Entries of `added_tokens` in a tokenizer.json that are looked for together; `kinds` names each in the graph.

    Raises `InputError` for combinations that one regular expression cannot find exactly.
    """

    def __init__(self, tokens: list[dict[str, Any]], kinds: list[int]) -> None:
        super().__init__()
        for token in tokens:
            _check(token, tokens)
        # Of those that begin in one place the longest is meant.
        ordered = sorted(tokens, key=lambda token: -len(token["content"].encode()))
        pattern = "|".join(
            (SPACES if token["lstrip"] else "") + _quote(token["content"]) + (SPACES if token["rstrip"] else "")
            for token in ordered
        )
        self._pattern = f"(?:{pattern})"
        self._strips = any(token["lstrip"] or token["rstrip"] for token in tokens)
        contents = tf.constant([token["content"] for token in tokens])
        self._kinds = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(contents, tf.constant(kinds, tf.int32)), PLAIN
        )
        self._word: Table | None = None
        alone = [kind for kind, token in zip(kinds, tokens, strict=True) if token["single_word"]]
        if alone:
            self._word = Table(word())
            self._alone = tf.constant(alone, tf.int32)

    def __call__(self, text: Text) -> Text:
        """Make each added token within the plain pieces a piece."""
        pieces = text.pieces()
        there = tf.reduce_any(tf.strings.regex_full_match(pieces, rf"\C*{self._pattern}\C*"))
        found: Text = tf.cond(there, lambda: self._find(text, pieces), lambda: text)
        return found

    def _find(self, text: Text, pieces: Tensor) -> Text:
        points, starts, kinds = text
        mark = bytes([MARK])
        marked = tf.raw_ops.StaticRegexReplace(
            input=pieces, pattern=self._pattern, rewrite=mark + rb"\0" + mark, replace_global=True
        )
        marked = tf.where(tf.boolean_mask(kinds, starts) == PLAIN, marked, pieces)
        raw = tf.cast(tf.io.decode_raw(tf.strings.reduce_join(marked), tf.uint8), tf.int32)
        marks = raw == MARK
        # A code point begins at a byte that continues none.
        lead = ~marks & (tf.bitwise.bitwise_and(raw, 0xC0) != 0x80)
        within = tf.boolean_mask(tf.cumsum(tf.cast(marks, tf.int32)) % 2 == 1, lead)
        cut = starts | tf.boolean_mask(tf.concat([[False], marks[:-1]], 0), lead)

        first = tf.where(cut)[:, 0]
        names = encode(points, cut)
        if self._strips:
            names = tf.strings.regex_replace(names, f"^{SPACES}(\\C*?){SPACES}$", r"\1")
        kind = tf.where(tf.gather(within, first), self._kinds.lookup(names), tf.gather(kinds, first))
        if self._word is not None:
            # Beside a letter it is no token; what it would have hidden stays hidden.
            letter = (self._word(points) > 0) & (kinds == PLAIN)
            before = tf.concat([[False], letter[:-1]], 0) & ~starts
            after = tf.concat([(letter & ~starts)[1:], [False]], 0)
            last = tf.concat([first[1:], tf.size(points, tf.int64)[None]], 0) - 1
            alone = tf.reduce_any(kind[:, None] == self._alone, 1) & tf.gather(within, first)
            kind = tf.where(alone & (tf.gather(before, first) | tf.gather(after, last)), PLAIN, kind)
        special = (kind != PLAIN) & tf.gather(within, first)
        cuts = special | tf.concat([[False], special[:-1]], 0) | tf.gather(starts, first)
        kind = tf.gather(kind, tf.cumsum(tf.cast(cut, tf.int32)) - 1)
        where = tf.boolean_mask(first, cuts)[:, None]
        return Text(points, tf.scatter_nd(where, tf.ones_like(where[:, 0]), tf.shape(starts, tf.int64)) > 0, kind)


def _check(token: dict[str, Any], tokens: list[dict[str, Any]]) -> None:
    content = token["content"]
    if not content or "\0" in content or any(0xD800 <= ord(character) < 0xE000 for character in content):
        raise InputError(f"the added token {content!r} is unsupported: it is empty or has NUL or a surrogate in it")
    if token["lstrip"] or token["rstrip"]:
        if token["single_word"]:
            raise InputError(f"the added token {content!r} with single_word and lstrip or rstrip is unsupported")
        for other in tokens:
            if other["content"] != other["content"].strip():
                raise InputError(
                    f"the added tokens {content!r}, which takes white space, and {other['content']!r}, which begins or "
                    "ends with it, are unsupported together"
                )


def _quote(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)

"""Added tokens (`<|endoftext|>`, `<mask>`) in the graph, which are found before the text is split into words."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.character_classes import CodePointTable, Tensor, word_code_points
from tfclm.savedmodel.tokenizer.text import ORDINARY, Text, encode

__all__ = ["AddedTokens"]

DELIMITER = 0xFF  # the byte put around matches; UTF-8 never contains it
# White_Space, of which RE2's \s is the ASCII part.
WHITE_SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*"


class AddedTokens(tf.Module):
    """Finds added tokens in text.

    Args:
        tokens: entries of `added_tokens` in a tokenizer.json that are searched for together.
        kinds: the number of each, which becomes the kind of its pieces.

    Raises:
        InputError: a combination of tokens that one regular expression cannot find exactly.
    """

    def __init__(self, tokens: list[dict[str, Any]], kinds: list[int]) -> None:
        super().__init__()
        for token in tokens:
            _check(token, tokens)
        # Of the tokens that match at one position, the longest counts.
        ordered = sorted(tokens, key=lambda token: -len(token["content"].encode()))
        pattern = "|".join(
            (WHITE_SPACE if token["lstrip"] else "")
            + _quote(token["content"])
            + (WHITE_SPACE if token["rstrip"] else "")
            for token in ordered
        )
        self._pattern = f"(?:{pattern})"
        self._strips = any(token["lstrip"] or token["rstrip"] for token in tokens)
        contents = tf.constant([token["content"] for token in tokens])
        self._kinds = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(contents, tf.constant(kinds, tf.int32)), ORDINARY
        )
        self._is_word: CodePointTable | None = None
        single_word = [kind for kind, token in zip(kinds, tokens, strict=True) if token["single_word"]]
        if single_word:
            self._is_word = CodePointTable(word_code_points())
            self._single_word = tf.constant(single_word, tf.int32)

    def __call__(self, text: Text) -> Text:
        """Makes each added token in ordinary pieces a separate piece."""
        pieces = text.pieces()
        any_found = tf.reduce_any(tf.strings.regex_full_match(pieces, rf"\C*{self._pattern}\C*"))
        split: Text = tf.cond(any_found, lambda: self._split(text, pieces), lambda: text)
        return split

    def _split(self, text: Text, pieces: Tensor) -> Text:
        inside, boundaries = self._match(text, pieces)
        points, starts, kinds = text
        first = tf.where(boundaries)[:, 0]
        contents = encode(points, boundaries)
        if self._strips:
            contents = tf.strings.regex_replace(contents, f"^{WHITE_SPACE}(\\C*?){WHITE_SPACE}$", r"\1")
        kind = tf.where(tf.gather(inside, first), self._kinds.lookup(contents), tf.gather(kinds, first))
        if self._is_word is not None:
            # Next to a word character it is no token. Tokens that overlap with it are not searched for again.
            letter = (self._is_word(points) > 0) & (kinds == ORDINARY)
            before = tf.concat([[False], letter[:-1]], 0) & ~starts
            after = tf.concat([(letter & ~starts)[1:], [False]], 0)
            last = tf.concat([first[1:], tf.size(points, tf.int64)[None]], 0) - 1
            single_word = tf.reduce_any(kind[:, None] == self._single_word, 1) & tf.gather(inside, first)
            kind = tf.where(single_word & (tf.gather(before, first) | tf.gather(after, last)), ORDINARY, kind)
        added = (kind != ORDINARY) & tf.gather(inside, first)
        begins_piece = added | tf.concat([[False], added[:-1]], 0) | tf.gather(starts, first)
        kind = tf.gather(kind, tf.cumsum(tf.cast(boundaries, tf.int32)) - 1)
        indices = tf.boolean_mask(first, begins_piece)[:, None]
        starts = tf.scatter_nd(indices, tf.ones_like(indices[:, 0]), tf.shape(starts, tf.int64)) > 0
        return Text(points, starts, kind)

    def _match(self, text: Text, pieces: Tensor) -> tuple[Tensor, Tensor]:
        """Which code points are in a match, and which begin a piece, a match or what follows one; bool [N] each."""
        delimiter = bytes([DELIMITER])
        marked = tf.raw_ops.StaticRegexReplace(
            input=pieces, pattern=self._pattern, rewrite=delimiter + rb"\0" + delimiter, replace_global=True
        )
        marked = tf.where(tf.boolean_mask(text.kinds, text.starts) == ORDINARY, marked, pieces)
        raw = tf.cast(tf.io.decode_raw(tf.strings.reduce_join(marked), tf.uint8), tf.int32)
        delimiters = raw == DELIMITER
        # Whether a byte is the first one of a code point.
        lead = ~delimiters & (tf.bitwise.bitwise_and(raw, 0xC0) != 0x80)
        inside = tf.boolean_mask(tf.cumsum(tf.cast(delimiters, tf.int32)) % 2 == 1, lead)
        return inside, text.starts | tf.boolean_mask(tf.concat([[False], delimiters[:-1]], 0), lead)


def _check(token: dict[str, Any], tokens: list[dict[str, Any]]) -> None:
    content = token["content"]
    if not content or "\0" in content or any(0xD800 <= ord(character) < 0xE000 for character in content):
        raise InputError(f"the added token {content!r} is unsupported: it is empty, or contains NUL or a surrogate")
    if token["lstrip"] or token["rstrip"]:
        if token["single_word"]:
            raise InputError(f"the added token {content!r} with single_word and lstrip or rstrip is unsupported")
        for other in tokens:
            if other["content"] != other["content"].strip():
                raise InputError(
                    f"the added tokens {content!r}, which strips white space, and {other['content']!r}, which begins "
                    "or ends with it, are unsupported together"
                )


def _quote(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)

"""The pre_tokenizer of a tokenizer.json as steps in the graph.

TensorFlow's regex engine (RE2) has no look-ahead, and its own version of Unicode. So each code point is first replaced
by a symbol of a small alphabet, one for each set of code points that the expression distinguishes (`character_classes`
finds them by tokenizers' engine), and RE2 matches the translated expression. Each white space symbol has a second form
for "something else follows", which stands for the look-ahead of `\\s+(?!\\S)`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import tensorflow as tf
from tokenizers import pre_tokenizers

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.character_classes import (
    NUM_CODE_POINTS,
    Array,
    CodePointTable,
    Tensor,
    digit_code_points,
    distinct_pages,
    isolated_and_removed,
    matching_code_points,
)
from tfclm.savedmodel.tokenizer.models.symbols import BYTE_ALPHABET
from tfclm.savedmodel.tokenizer.normalizers.normalizing import Step, flatten_sequences
from tfclm.savedmodel.tokenizer.text import TEXT_END, Text, encode

__all__ = ["split_steps"]

# The expression of the byte-level pre-tokenizer, which tokenizer.json does not contain.
GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Symbols: the begin and the end of a match; text that is not split; the range of the alphabet.
BEGIN, END, UNSPLIT, FIRST, LAST = 1, 2, 3, 4, 127

LOOKAHEAD = r"\s+(?!\S)"
SYNTAX = re.compile(r"\((?:\?i?:)?|\)|\||[?*+]\??|\{\d+(?:,\d*)?\}\??")
ATOM = re.compile(
    r"\\[pP](?:\{\^?\w+\}|[A-Z])|\\x\{[0-9A-Fa-f]+\}|\\u[0-9A-Fa-f]{4}|\\[sSdDwWrnt]|\\[^\w\s]|[^\\\[\](){}|?*+^$]"
)


def split_steps(config: dict[str, Any] | None) -> tuple[bool, list[Step]]:
    """Whether words are bytes that the vocabulary has in its byte-level alphabet, and the steps that split text.

    If steps follow ByteLevel, they see the characters of that alphabet, and so does the model: words are not bytes.
    `config` is the pre_tokenizer of a tokenizer.json.

    Raises:
        InputError: a pre-tokenizer, which it names, is unsupported in the graph.
    """
    stages = flatten_sequences(config, "pretokenizers")
    kinds = [stage["type"] for stage in stages]
    if any(stage["type"] == "ByteLevel" and stage["add_prefix_space"] for stage in stages[1:]):
        raise InputError(
            "the tokenizer's pre_tokenizer ByteLevel with add_prefix_space after another one is unsupported"
        )
    if kinds.count("ByteLevel") > 1:
        raise InputError("the tokenizer's pre_tokenizer with ByteLevel twice is unsupported")
    steps: list[Step] = []
    for stage in stages:
        steps += _steps(stage)
        if stage["type"] == "ByteLevel" and stage is not stages[-1]:
            steps.append(_to_byte_alphabet)
    return kinds[-1:] == ["ByteLevel"], steps


def _steps(config: dict[str, Any]) -> list[Step]:
    kind = config["type"]
    if kind == "ByteLevel":
        prefix = [_add_prefix_spaces] if config["add_prefix_space"] else []
        return [*prefix, *([RegexSplitter(GPT2_REGEX)] if config.get("use_regex", True) else [])]
    if kind == "Digits":
        return [CodePointSplitter(digit_code_points(), "Isolated" if config["individual_digits"] else "Contiguous")]
    if kind == "Punctuation":
        return [CodePointSplitter(isolated_and_removed(pre_tokenizers.Punctuation())[0], config["behavior"])]
    if kind == "WhitespaceSplit":
        return [CodePointSplitter(isolated_and_removed(pre_tokenizers.WhitespaceSplit())[1], "Removed")]
    if kind == "BertPreTokenizer":
        isolated, removed = isolated_and_removed(pre_tokenizers.BertPreTokenizer())
        return [CodePointSplitter(removed, "Removed"), CodePointSplitter(isolated, "Isolated")]
    if kind == "Metaspace":
        return [Metaspace(config["replacement"], config["prepend_scheme"], config["split"])]
    if kind == "Split":
        text = config["pattern"].get("String")
        regex = config["pattern"]["Regex"] if text is None else "".join(f"\\x{{{ord(c):x}}}" for c in text)
        return [RegexSplitter(regex, config["behavior"], config["invert"])]
    raise InputError(f"the tokenizer's pre_tokenizer {kind} is unsupported in the graph")


def _add_prefix_spaces(text: Text) -> Text:
    """Adds a space before each ordinary piece that does not begin with one."""
    return text.insert_before(text.starts & text.is_ordinary & (text.points != ord(" ")), ord(" "))


def _to_byte_alphabet(text: Text) -> Text:
    """Replaces each code point by its UTF-8 bytes, as characters of the byte-level alphabet."""
    raw = tf.cast(tf.io.decode_raw(tf.strings.reduce_join(text.pieces()), tf.uint8), tf.int32)
    lead = tf.bitwise.bitwise_and(raw, 0xC0) != 0x80
    characters = sorted(BYTE_ALPHABET, key=lambda character: BYTE_ALPHABET[character])
    points = tf.gather(tf.constant([ord(character) for character in characters]), raw)
    return text.derive(points, tf.cumsum(tf.cast(lead, tf.int32)) - 1)


def _divide(text: Text, starts: Tensor, matched: Tensor, behavior: str) -> Text:
    """Divides pieces into matches and what is between them.

    Args:
        text: its `starts` are those of the pieces.
        starts: where matches, and the text between them, start, bool [N].
        matched: what is in a match, bool [N].
        behavior: of tokenizers: matches are "Isolated", "Removed", joined if they are "Contiguous", or joined to their
            neighbours, "MergedWithPrevious" and "MergedWithNext".
    """
    before = tf.concat([matched[:1], matched[:-1]], 0)
    if behavior == "Contiguous":
        starts = tf.math.logical_xor(matched, before)
    elif behavior == "MergedWithPrevious":
        starts &= before | ~matched
    elif behavior == "MergedWithNext":
        starts &= matched | ~before
    text = text._replace(starts=text.starts | starts)
    return text.select(~matched) if behavior == "Removed" else text


class CodePointSplitter:
    """Makes each code point of a set, bool [NUM_CODE_POINTS], a match."""

    def __init__(self, members: Array, behavior: str) -> None:
        self._members, self._behavior = CodePointTable(members), behavior

    def __call__(self, text: Text) -> Text:
        matched = (self._members(text.points) > 0) & text.is_ordinary
        after = tf.concat([[False], matched[:-1]], 0)
        return _divide(text, matched | after, matched, self._behavior)


class Metaspace:
    """Replaces spaces by `replacement`, which begins words, as in SentencePiece.

    Args:
        replacement: one character.
        scheme: where it is added if it is missing: "always" before pieces, "first" at the beginning of a text, "never".
        split: whether it begins a new piece.
    """

    def __init__(self, replacement: str, scheme: str, split: bool) -> None:
        self._point, self._scheme, self._split = ord(replacement), scheme, split

    def __call__(self, text: Text) -> Text:
        text = text._replace(points=tf.where(text.is_ordinary & (text.points == ord(" ")), self._point, text.points))
        if self._scheme != "never":
            missing = text.starts & text.is_ordinary & (text.points != self._point)
            if self._scheme == "first":
                missing &= tf.concat([[True], text.kinds[:-1] == TEXT_END], 0)
            text = text.insert_before(missing, self._point)
        if self._split:
            text = text._replace(starts=text.starts | (text.is_ordinary & (text.points == self._point)))
        return text


class RegexSplitter:
    """Divides pieces into the matches of a regular expression, or with `invert` what is between, and the rest."""

    def __init__(self, regex: str, behavior: str = "Isolated", invert: bool = False) -> None:
        alphabet = _Alphabet(regex)
        self._pattern, self._behavior, self._invert = alphabet.pattern, behavior, invert
        self._num_spaces, self._first_space = alphabet.num_spaces, alphabet.first_space
        self._symbols = CodePointTable(alphabet.symbols)

    def __call__(self, text: Text) -> Text:
        starts = text.starts
        symbols = tf.where(text.is_ordinary, self._symbols(text.points), UNSPLIT)
        if self._num_spaces:
            space = symbols >= self._first_space
            followed = tf.concat([~(space | starts)[1:], [False]], 0)
            symbols += self._num_spaces * tf.cast(space & followed, tf.int32)
        joined = tf.strings.reduce_join(
            tf.raw_ops.StaticRegexReplace(
                input=encode(symbols, starts), pattern=self._pattern, rewrite="\x01\\0\x02", replace_global=True
            )
        )
        marked = tf.io.decode_raw(joined, tf.uint8)
        symbol = marked > END
        starts = tf.boolean_mask(tf.concat([[True], ~symbol[:-1]], 0), symbol)
        if self._behavior == "Isolated":
            return text._replace(starts=text.starts | starts)
        delimiters = tf.cast(marked == BEGIN, tf.int32) - tf.cast(marked == END, tf.int32)
        matched = tf.boolean_mask(tf.cumsum(delimiters) > 0, symbol)
        return _divide(text, starts, (matched != self._invert) & text.is_ordinary, self._behavior)


class _Alphabet:
    """The symbols of the code points for a regular expression, and the expression translated to them.

    `num_spaces` symbols from `first_space` on are white space; as many after them are white space with something else
    following.
    """

    def __init__(self, regex: str) -> None:
        parts = list(_parse(regex))
        atoms = sorted({text for kind, text in parts if kind == "atom"})
        ahead = any(kind == "lookahead" for kind, _ in parts)
        sets = [matching_code_points(atom) for atom in atoms]
        space = matching_code_points(r"\s") if ahead else np.zeros(NUM_CODE_POINTS, bool)
        # The sets that a code point is in, one bit each; white space is the highest bit, so that its symbols come last.
        bits = np.zeros(NUM_CODE_POINTS, np.int64)
        for bit, members in enumerate([*sets, space]):
            bits |= members.astype(np.int64) << bit
        pages, number = distinct_pages(bits)
        kinds, index = np.unique(pages, return_inverse=True)
        signatures = [(kinds >> bit & 1).astype(bool) for bit in range(len(sets) + 1)]
        self.num_spaces = int(signatures[-1].sum())
        self.first_space = FIRST + len(kinds) - self.num_spaces
        if len(sets) > 62 or FIRST + len(kinds) + self.num_spaces > LAST:
            raise InputError(f"the tokenizer's split rule {regex!r} has too many character classes for the graph")
        self.symbols: Array = (FIRST + index.astype(np.int32)).reshape(pages.shape)[number].reshape(-1)

        def translate(members: Array, followed: bool = True) -> str:
            symbols = [FIRST + int(i) for i in np.flatnonzero(members)]
            symbols += [symbol + self.num_spaces for symbol in symbols if symbol >= self.first_space and followed]
            return "[" + "".join(f"\\x{symbol:02x}" for symbol in symbols) + "]" if symbols else r"[^\x00-\x7f]"

        rows = dict(zip(atoms, signatures, strict=False))
        self.pattern = ""
        for kind, text in parts:
            if kind == "atom":
                self.pattern += translate(rows[text])
            else:
                self.pattern += translate(signatures[-1], followed=False) + "+" if kind == "lookahead" else text
        if re.fullmatch(self.pattern, ""):
            raise InputError(f"the tokenizer's split rule {regex!r} is unsupported: it matches an empty text")


def _parse(regex: str) -> list[tuple[str, str]]:
    """The parts of an expression in order: "atom" (matches one character), "lookahead" (`\\s+(?!\\S)`), "syntax"."""
    parts: list[tuple[str, str]] = []
    ignores_case: list[bool] = []  # whether case is ignored in each open group
    position = 0
    while position < len(regex):
        ignore = bool(ignores_case) and ignores_case[-1]
        if regex.startswith(LOOKAHEAD, position):
            parts.append(("lookahead", LOOKAHEAD))
            position += len(LOOKAHEAD)
            continue
        if regex[position] == "[":
            end = _bracket_end(regex, position)
        elif match := ATOM.match(regex, position):
            end = match.end()
        else:
            match = SYNTAX.match(regex, position)
            # A + after a quantifier makes it possessive, which RE2 does not support.
            if match is None or (regex.startswith("(?", position) and match.group() == "("):
                raise InputError(
                    f"the tokenizer's split rule {regex!r} is unsupported from {regex[position : position + 12]!r} on"
                )
            quantifier = match.group()[0] in "?*+{"
            if quantifier and regex[match.end() : match.end() + 1] in ("+", "*", "?", "{"):
                raise InputError(f"the tokenizer's split rule {regex!r} has an unsupported quantifier")
            if match.group().startswith("("):
                ignores_case.append(ignore or "i" in match.group())
            elif match.group() == ")":
                if not ignores_case:
                    raise InputError(f"the tokenizer's split rule {regex!r} has an unbalanced parenthesis")
                ignores_case.pop()
            parts.append(("syntax", "(?:" if match.group().startswith("(") else match.group()))
            position = match.end()
            continue
        atom = regex[position:end]
        parts.append(("atom", f"(?i:{atom})" if ignore else atom))
        position = end
    return parts


def _bracket_end(regex: str, start: int) -> int:
    """The end of the bracket expression at `start`; brackets nest."""
    depth, end = 0, start
    while end < len(regex):
        if regex[end] == "\\":
            end += 1
        elif regex[end] == "[":
            depth += 1
        elif regex[end] == "]":
            depth -= 1
            if depth == 0:
                return end + 1
        end += 1
    raise InputError(f"the tokenizer's split rule {regex!r} has an unbalanced bracket")

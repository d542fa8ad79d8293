"""Pre-tokenizers in the graph: where the words start.

TensorFlow's regex engine (RE2) has no look-ahead, and Unicode tables of its own. So a text is first spelled in a small
alphabet with one symbol for each set of code points that the expression tells apart (`classes` asks tokenizers which),
and RE2 runs the expression over that spelling. White space has two symbols, one of them for "something else follows",
which is what `\\s+(?!\\S)` looks ahead for.
"""

from __future__ import annotations

import re
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.classes import POINTS, Array, Table, Tensor, matched, numeric

__all__ = ["Splitter", "splitters"]

# The byte-level pre-tokenizer's own, which tokenizer.json does not spell out.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

MARK, WHOLE, FIRST, LAST = 1, 2, 3, 127  # symbols: a boundary; of what is not to be split; the alphabet's range

LOOKAHEAD = r"\s+(?!\S)"
SYNTAX = re.compile(r"\((?:\?i?:)?|\)|\||[?*+]\??|\{\d+(?:,\d*)?\}\??")
ATOM = re.compile(
    r"\\[pP](?:\{\^?\w+\}|[A-Z])|\\x\{[0-9A-Fa-f]+\}|\\u[0-9A-Fa-f]{4}|\\[sSdDwWrnt]|\\[^\w\s]|[^\\\[\](){}|?*+^$]"
)


class Splitter(Protocol):
    """Splits pieces into smaller ones."""

    def __call__(self, points: Tensor, starts: Tensor, whole: Tensor) -> Tensor:
        """Where pieces start, bool [N], of code points [N]; given where they did, and what may not be split, [N]."""


def splitters(config: dict[str, Any] | None) -> tuple[bool, list[Splitter]]:
    """Whether a space goes before each text, and what splits it, from the pre_tokenizer of a tokenizer.json.

    Raises `InputError` naming what the graph has nothing for.
    """
    stages = _flatten(config)
    if [stage["type"] for stage in stages].count("ByteLevel") != 1 or stages[-1]["type"] != "ByteLevel":
        kinds = ", ".join(stage["type"] for stage in stages) or "none"
        raise InputError(f"the tokenizer's pre_tokenizer ({kinds}) is not byte-level: only that can go into the graph")
    prefix = bool(stages[-1]["add_prefix_space"])
    if prefix and len(stages) > 1:
        raise InputError(
            "the tokenizer's pre_tokenizer ByteLevel with add_prefix_space after another one is unsupported"
        )
    split: list[Splitter] = []
    for stage in stages:
        if stage["type"] == "Digits":
            split.append(DigitSplitter(bool(stage["individual_digits"])))
        elif stage["type"] == "ByteLevel":
            if stage.get("use_regex", True):
                split.append(RegexSplitter(GPT2))
        elif stage["type"] == "Split":
            if "Regex" not in stage["pattern"] or stage["behavior"] != "Isolated" or stage["invert"]:
                raise InputError(
                    f"the tokenizer's pre_tokenizer Split with pattern {stage['pattern']}, behavior {stage['behavior']}"
                    f", invert {stage['invert']} is unsupported: only isolated matches of a regex are"
                )
            split.append(RegexSplitter(stage["pattern"]["Regex"]))
        else:
            raise InputError(f"the tokenizer's pre_tokenizer {stage['type']} is unsupported")
    return prefix, split


def _flatten(config: dict[str, Any] | None) -> list[dict[str, Any]]:
    if config is None:
        return []
    if config["type"] == "Sequence":
        return [stage for inner in config["pretokenizers"] for stage in _flatten(inner)]
    return [config]


class DigitSplitter:
    """Each digit, or each run of them, is a piece."""

    def __init__(self, individual: bool) -> None:
        self._individual = individual
        self._table = Table(numeric())

    def __call__(self, points: Tensor, starts: Tensor, whole: Tensor) -> Tensor:
        digit = (self._table(points) > 0) & ~whole
        before = tf.concat([digit[:1], digit[:-1]], 0)
        return starts | ((digit | before) if self._individual else tf.math.logical_xor(digit, before))


class RegexSplitter:
    """Each match of a regular expression is a piece, and so is what lies between two."""

    def __init__(self, regex: str) -> None:
        alphabet = _Alphabet(regex)
        self._pattern = alphabet.pattern
        self._spaces, self._space = alphabet.spaces, alphabet.space
        self._symbols = Table(alphabet.symbols)

    def __call__(self, points: Tensor, starts: Tensor, whole: Tensor) -> Tensor:
        symbols = tf.where(whole, WHOLE, self._symbols(points))
        if self._spaces:
            space = symbols >= self._space
            follows = tf.concat([~(space | starts)[1:], [False]], 0)
            symbols += self._spaces * tf.cast(space & follows, tf.int32)
        text = tf.strings.reduce_join(
            tf.raw_ops.StaticRegexReplace(
                input=encode(symbols, starts), pattern=self._pattern, rewrite="\x01\\0\x01", replace_global=True
            ),
            separator="\x01",
        )
        marked = tf.io.decode_raw(text, tf.uint8)
        symbol = marked != MARK
        return tf.boolean_mask(tf.concat([[True], ~symbol[:-1]], 0), symbol)


def encode(points: Tensor, starts: Tensor) -> Tensor:
    """The pieces of code points [N] that start at `starts`, bool [N], as UTF-8 strings."""
    splits = tf.concat([tf.where(starts)[:, 0], tf.size(points, tf.int64)[None]], 0)
    return tf.raw_ops.UnicodeEncode(input_values=points, input_splits=splits, output_encoding="UTF-8")


class _Alphabet:
    """The symbols of a regular expression and the expression spelled in them."""

    def __init__(self, regex: str) -> None:
        parts = list(_parse(regex))
        atoms = sorted({text for kind, text in parts if kind == "atom"})
        ahead = any(kind == "lookahead" for kind, _ in parts)
        sets = [matched(atom) for atom in atoms]
        space = matched(r"\s") if ahead else np.zeros(POINTS, bool)
        # Which sets a code point is in, a bit each; white space is the highest, so that its symbols come last.
        bits = np.zeros(POINTS, np.int64)
        for bit, members in enumerate([*sets, space]):
            bits |= members.astype(np.int64) << bit
        kinds, index = np.unique(bits, return_inverse=True)
        signatures = [(kinds >> bit & 1).astype(bool) for bit in range(len(sets) + 1)]
        self.spaces = int(signatures[-1].sum())
        self.space = FIRST + len(kinds) - self.spaces
        if len(sets) > 62 or FIRST + len(kinds) + self.spaces > LAST:
            raise InputError(f"the tokenizer's split rule {regex!r} tells too many characters apart for the graph")
        self.symbols: Array = (FIRST + index).astype(np.int32)

        def spell(members: Array, followed: bool = True) -> str:
            symbols = [FIRST + int(i) for i in np.flatnonzero(members)]
            symbols += [symbol + self.spaces for symbol in symbols if symbol >= self.space and followed]
            return "[" + "".join(f"\\x{symbol:02x}" for symbol in symbols) + "]" if symbols else r"[^\x00-\x7f]"

        rows = dict(zip(atoms, signatures, strict=False))
        self.pattern = ""
        for kind, text in parts:
            if kind == "atom":
                self.pattern += spell(rows[text])
            else:
                self.pattern += spell(signatures[-1], followed=False) + "+" if kind == "lookahead" else text
        if re.fullmatch(self.pattern, ""):
            raise InputError(f"the tokenizer's split rule {regex!r} matches nothing at all: unsupported")


def _parse(regex: str) -> list[tuple[str, str]]:
    """The parts of an expression in order: "atom" (matches one character), "lookahead" (`\\s+(?!\\S)`), "syntax"."""
    parts: list[tuple[str, str]] = []
    cased: list[bool] = []  # of the groups that are open, whether one ignores case
    at = 0
    while at < len(regex):
        ignore = bool(cased) and cased[-1]
        if regex.startswith(LOOKAHEAD, at):
            parts.append(("lookahead", LOOKAHEAD))
            at += len(LOOKAHEAD)
            continue
        if regex[at] == "[":
            end = _bracket(regex, at)
        elif match := ATOM.match(regex, at):
            end = match.end()
        else:
            match = SYNTAX.match(regex, at)
            # A + after a quantifier makes it possessive, which RE2 has not.
            if match is None or (regex.startswith("(?", at) and match.group() == "("):
                raise InputError(f"the tokenizer's split rule {regex!r} is unsupported from {regex[at : at + 12]!r} on")
            quantifier = match.group()[0] in "?*+{"
            if quantifier and regex[match.end() : match.end() + 1] in ("+", "*", "?", "{"):
                raise InputError(f"the tokenizer's split rule {regex!r} has an unsupported quantifier")
            if match.group().startswith("("):
                cased.append(ignore or "i" in match.group())
            elif match.group() == ")":
                if not cased:
                    raise InputError(f"the tokenizer's split rule {regex!r} has an unbalanced parenthesis")
                cased.pop()
            parts.append(("syntax", "(?:" if match.group().startswith("(") else match.group()))
            at = match.end()
            continue
        atom = regex[at:end]
        parts.append(("atom", f"(?i:{atom})" if ignore else atom))
        at = end
    return parts


def _bracket(regex: str, at: int) -> int:
    """The end of the bracket expression at `at`; brackets nest."""
    depth, end = 0, at
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

"""Pre-tokenizers in the graph: where the words start.

TensorFlow's regex engine (RE2) has no look-ahead, and Unicode tables of its own. So a text is first spelled in a small
alphabet with one symbol for each set of code points that the expression tells apart (`classes` asks tokenizers which),
and RE2 runs the expression over that spelling. White space has two symbols, one of them for "something else follows",
which is what `\\s+(?!\\S)` looks ahead for.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import tensorflow as tf
from tokenizers import pre_tokenizers

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer.character_classes import POINTS, Array, Table, matched, numeric, split_apart
from tfclm.savedmodel.tokenizer.normalizers.normalizing import Step, flatten
from tfclm.savedmodel.tokenizer.text import END, Text, encode

__all__ = ["splitting"]

# The byte-level pre-tokenizer's own, which tokenizer.json does not spell out.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

MARK, WHOLE, FIRST, LAST = 1, 2, 3, 127  # symbols: a boundary; of what is not to be split; the alphabet's range

LOOKAHEAD = r"\s+(?!\S)"
SYNTAX = re.compile(r"\((?:\?i?:)?|\)|\||[?*+]\??|\{\d+(?:,\d*)?\}\??")
ATOM = re.compile(
    r"\\[pP](?:\{\^?\w+\}|[A-Z])|\\x\{[0-9A-Fa-f]+\}|\\u[0-9A-Fa-f]{4}|\\[sSdDwWrnt]|\\[^\w\s]|[^\\\[\](){}|?*+^$]"
)


def splitting(config: dict[str, Any] | None) -> tuple[bool, list[Step]]:
    """Whether words are spelled in the byte-level alphabet, and what splits text into them, in order.

    `config` is the pre_tokenizer of a tokenizer.json. Raises `InputError` naming what the graph has nothing for.
    """
    stages = flatten(config, "pretokenizers")
    kinds = [stage["type"] for stage in stages]
    spelled = "ByteLevel" in kinds
    if spelled and kinds.index("ByteLevel") != len(stages) - 1:
        raise InputError(f"the tokenizer's pre_tokenizer ({', '.join(kinds)}) is unsupported: ByteLevel goes on")
    if len(stages) > 1 and stages[-1].get("add_prefix_space") and spelled:
        raise InputError(
            "the tokenizer's pre_tokenizer ByteLevel with add_prefix_space after another one is unsupported"
        )
    return spelled, [step for stage in stages for step in _steps(stage)]


def _steps(config: dict[str, Any]) -> list[Step]:
    kind = config["type"]
    if kind == "ByteLevel":
        prefix = [_put_spaces] if config["add_prefix_space"] else []
        return [*prefix, *([RegexSplitter(GPT2)] if config.get("use_regex", True) else [])]
    if kind == "Digits" and not config["individual_digits"]:
        return [_split_digits(Table(numeric()))]
    if kind in ("BertPreTokenizer", "WhitespaceSplit", "Digits"):
        settings = {"individual_digits": True} if kind == "Digits" else {}
        return [Separator(getattr(pre_tokenizers, kind)(**settings))]
    if kind == "Metaspace":
        return [Metaspace(config["replacement"], config["prepend_scheme"], config["split"])]
    if kind == "Split":
        if "Regex" not in config["pattern"] or config["behavior"] != "Isolated" or config["invert"]:
            raise InputError(
                f"the tokenizer's pre_tokenizer Split with pattern {config['pattern']}, behavior {config['behavior']}"
                f", invert {config['invert']} is unsupported: only isolated matches of a regex are"
            )
        return [RegexSplitter(config["pattern"]["Regex"])]
    raise InputError(f"the tokenizer's pre_tokenizer {kind} is unsupported in the graph")


def _put_spaces(text: Text) -> Text:
    """A space before each plain piece that does not begin with one."""
    return text.prepend(text.starts & text.plain & (text.points != ord(" ")), ord(" "))


def _split_digits(digits: Table) -> Step:
    """Each run of digits is a piece."""

    def split(text: Text) -> Text:
        digit = (digits(text.points) > 0) & text.plain
        before = tf.concat([digit[:1], digit[:-1]], 0)
        return text._replace(starts=text.starts | tf.math.logical_xor(digit, before))

    return split


class Separator:
    """A pre-tokenizer that looks at each code point alone: some are pieces of their own, some lie between pieces."""

    def __init__(self, pre_tokenizer: Any) -> None:
        alone, removed = split_apart(pre_tokenizer)
        self._table = Table(np.where(removed, 2, alone))
        self._removes = bool(removed.any())

    def __call__(self, text: Text) -> Text:
        apart = tf.where(text.plain, self._table(text.points), 0)
        edge = apart > 0
        text = text._replace(starts=text.starts | edge | tf.concat([edge[:1], edge[:-1]], 0))
        return text.keep(apart != 2) if self._removes else text


class Metaspace:
    """Spaces as `replacement`, which is put before pieces too and begins words, as in SentencePiece.

    `scheme` says where it is put if it is not there: "always" before pieces, "first" where a text begins, "never".
    """

    def __init__(self, replacement: str, scheme: str, split: bool) -> None:
        self._point, self._scheme, self._split = ord(replacement), scheme, split

    def __call__(self, text: Text) -> Text:
        text = text._replace(points=tf.where(text.plain & (text.points == ord(" ")), self._point, text.points))
        if self._scheme != "never":
            wanting = text.starts & text.plain & (text.points != self._point)
            if self._scheme == "first":
                wanting &= tf.concat([[True], text.kinds[:-1] == END], 0)
            text = text.prepend(wanting, self._point)
        if self._split:
            text = text._replace(starts=text.starts | (text.plain & (text.points == self._point)))
        return text


class RegexSplitter:
    """Each match of a regular expression is a piece, and so is what lies between two."""

    def __init__(self, regex: str) -> None:
        alphabet = _Alphabet(regex)
        self._pattern = alphabet.pattern
        self._spaces, self._space = alphabet.spaces, alphabet.space
        self._symbols = Table(alphabet.symbols)

    def __call__(self, text: Text) -> Text:
        starts = text.starts
        symbols = tf.where(text.plain, self._symbols(text.points), WHOLE)
        if self._spaces:
            space = symbols >= self._space
            follows = tf.concat([~(space | starts)[1:], [False]], 0)
            symbols += self._spaces * tf.cast(space & follows, tf.int32)
        joined = tf.strings.reduce_join(
            tf.raw_ops.StaticRegexReplace(
                input=encode(symbols, starts), pattern=self._pattern, rewrite="\x01\\0\x01", replace_global=True
            ),
            separator="\x01",
        )
        marked = tf.io.decode_raw(joined, tf.uint8)
        symbol = marked != MARK
        return text._replace(starts=tf.boolean_mask(tf.concat([[True], ~symbol[:-1]], 0), symbol))


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

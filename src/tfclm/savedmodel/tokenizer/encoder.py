"""Text in, token ids out, as the fast tokenizer of the checkpoint gives them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.checks import require_at_most
from tfclm.savedmodel.tokenizer.added import AddedTokens
from tfclm.savedmodel.tokenizer.character_classes import Tensor
from tfclm.savedmodel.tokenizer.models.bpe import Merger
from tfclm.savedmodel.tokenizer.models.unigram import Unigram
from tfclm.savedmodel.tokenizer.models.wordpiece import WordPiece
from tfclm.savedmodel.tokenizer.models.words import Model, Words
from tfclm.savedmodel.tokenizer.normalizers.normalizing import flatten, normalizing
from tfclm.savedmodel.tokenizer.pre_tokenizers.splitting import splitting
from tfclm.savedmodel.tokenizer.text import END, PLAIN, Text, decode, ragged_gather

__all__ = ["GraphTokenizer"]


class GraphTokenizer(tf.Module):
    """A fast tokenizer as core TensorFlow ops: byte-level and SentencePiece's BPE, WordPiece, Unigram.

    `tokenizer` is a `transformers.PreTrainedTokenizerFast`; its configuration is read once, here. The ids are exactly
    those of `tokenizer(text)`, special tokens of its post-processor included, and without truncation. Raises
    `InputError` naming the component that cannot be put into the graph exactly. Nothing is cached between calls.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        backend = tokenizer.backend_tokenizer
        config = json.loads(backend.to_str())
        spelled, split = splitting(config["pre_tokenizer"])
        first = [stage.get("prepend_scheme") == "first" for stage in flatten(config["pre_tokenizer"], "pretokenizers")]
        if any(first[1:]) or (any(first) and config["normalizer"] is not None):
            raise InputError(
                "the tokenizer's pre_tokenizer Metaspace with prepend_scheme first is unsupported behind other steps"
            )
        model = _model(config["model"], spelled)
        self._words = Words(model, backend.get_vocab(with_added_tokens=False), backend.model.tokenize)
        self._split = [*split, *([model.cut] if isinstance(model, Merger) and model.cut else [])]
        self._normalize = normalizing(config["normalizer"])
        added = config["added_tokens"]
        if self._normalize:  # what is looked for in normalized text is normalized itself
            normalize = backend.normalizer.normalize_str
            added = [t | {"content": normalize(t["content"])} if t["normalized"] else t for t in added]
        self._raw, self._normalized = (
            _group([(kind, token) for kind, token in enumerate(added, END + 1) if token["normalized"] == normalized])
            for normalized in (False, True)
        )
        before, after = _surroundings(config["post_processor"])
        sample = backend.encode("a", add_special_tokens=False).ids
        if tokenizer("a")["input_ids"] != [*before, *sample, *after]:
            raise InputError("the tokenizer's post_processor is unsupported: it does not only put tokens around a text")
        self._before = tf.constant(before, tf.int32)
        self._fixed = tf.constant([*after, *(token["id"] for token in added)], tf.int32)
        self._fixed_ends = tf.constant(len(after) + np.arange(len(added) + 1), tf.int64)

    def encode(
        self, texts: Tensor, last: int | None = None, *, max_tokens: int | None = None, name: str = "text"
    ) -> tuple[Tensor, Tensor]:
        """The token ids of `texts` (string [B]): int32 [B, L], padded with 0 on the right, and lengths int32 [B].

        Of a text of more tokens than `last`, if that is given, only the last ones are there, so that one long text does
        not make all rows wide; its length is that of the whole. If B times L is more than `max_tokens`, an assertion
        that calls the texts by their `name` fails before ids of that size are made. Bytes that are not UTF-8 count as
        U+FFFD, as Python's `errors="replace"` has it.
        """
        with tf.device("CPU:0"):
            # A NUL ends each text, and an empty text the batch: no array is empty from here on.
            texts = tf.strings.join([tf.concat([texts, [""]], 0), "\0"])
            rows, points = decode(texts)
            ends = rows[1:] - 1
            shape = tf.shape(points, tf.int64)
            kinds = tf.scatter_nd(ends[:, None], tf.ones_like(ends, tf.int32), shape) + PLAIN
            edges = tf.concat([rows[:-1], ends], 0)
            starts = tf.scatter_nd(edges[:, None], tf.ones_like(edges, tf.int32), shape) > 0
            text = Text(points, starts, kinds)
            found = [step for step in (self._raw, *self._normalize, self._normalized, *self._split) if step is not None]
            for step in found:
                text = step(text)
            ids, splits = self._ids(text.pieces(), tf.boolean_mask(text.kinds, text.starts))
            begin, size = splits[:-2], splits[1:-1] - splits[:-2]
            ahead = tf.size(self._before, tf.int64)
            length = ahead + size
            kept = length if last is None else tf.minimum(length, last)
            width = tf.reduce_max(tf.concat([ahead[None], kept], 0))
            if max_tokens is not None:
                amount = tf.size(length, tf.int64) * width
                width = require_at_most(amount, max_tokens, width, name, "tokens with padding")
            # Places in the tokens put ahead of every text, the text's own behind them, and a 0 for the padding.
            place = (length - kept)[:, None] + tf.range(width)
            own = tf.where(place < ahead, place, place + begin[:, None])
            padding = ahead + tf.size(ids, tf.int64)
            table = tf.concat([self._before, ids, [0]], 0)
            dense = tf.gather(table, tf.where(place < length[:, None], own, padding))
            return dense, tf.cast(length, tf.int32)

    def _ids(self, words: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [T] of the words [W] of all texts, and where each text's begin, int64 [texts + 1]."""
        distinct, word = tf.unique(words)
        ids, splits = self._words(distinct)
        row = tf.where(kinds == PLAIN, word, tf.size(distinct) + kinds)
        ids, splits = ragged_gather(
            tf.concat([ids, self._fixed], 0), tf.concat([splits, splits[-1] + self._fixed_ends], 0), row
        )
        return ids, tf.concat([[0], tf.boolean_mask(splits[1:], kinds == END)], 0)


def _model(config: dict[str, Any], spelled: bool) -> Model:
    """The model of a tokenizer.json, whose words are spelled in the byte-level alphabet or not."""
    if config["type"] == "BPE":
        return Merger(config, spelled)
    if config["type"] in ("WordPiece", "Unigram") and not spelled:
        return WordPiece(config) if config["type"] == "WordPiece" else Unigram(config)
    raise InputError(
        f"the tokenizer's model {config['type']}{' after ByteLevel' * spelled} is unsupported in the graph"
    )


def _group(tokens: list[tuple[int, dict[str, Any]]]) -> AddedTokens | None:
    return AddedTokens([token for _, token in tokens], [kind for kind, _ in tokens]) if tokens else None


def _surroundings(config: dict[str, Any] | None) -> tuple[list[int], list[int]]:
    """The ids that the post_processor of a tokenizer.json puts before and after a text."""
    if config is None or config["type"] == "ByteLevel":
        return [], []
    if config["type"] in ("RobertaProcessing", "BertProcessing"):
        return [config["cls"][1]], [config["sep"][1]]
    if config["type"] == "Sequence":
        before: list[int] = []
        after: list[int] = []
        for inner in config["processors"]:
            outer = _surroundings(inner)
            before, after = outer[0] + before, after + outer[1]
        return before, after
    if config["type"] == "TemplateProcessing":
        sides: tuple[list[int], list[int]] = ([], [])
        side = 0
        for item in config["single"]:
            if "Sequence" in item:
                side += 1
            else:
                sides[side].extend(config["special_tokens"][item["SpecialToken"]["id"]]["ids"])
        return sides
    raise InputError(f"the tokenizer's post_processor {config['type']} is unsupported")

"""The tokenizer in the graph: text in, exactly the token ids of the fast tokenizer out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.checks import require_at_most
from tfclm.savedmodel.tokenizer.added import AddedTokens
from tfclm.savedmodel.tokenizer.character_classes import Tensor
from tfclm.savedmodel.tokenizer.models.bpe import BPE
from tfclm.savedmodel.tokenizer.models.unigram import Unigram
from tfclm.savedmodel.tokenizer.models.wordpiece import WordPiece
from tfclm.savedmodel.tokenizer.models.words import Model, WordEncoder
from tfclm.savedmodel.tokenizer.normalizers.normalizing import flatten_sequences, normalization_steps
from tfclm.savedmodel.tokenizer.pre_tokenizers.splitting import split_steps
from tfclm.savedmodel.tokenizer.text import ORDINARY, TEXT_END, Text, decode, ragged_gather

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["GraphTokenizer"]


class GraphTokenizer(tf.Module):
    """A fast tokenizer as core TensorFlow ops: byte-level and SentencePiece BPE, WordPiece, Unigram.

    The ids are exactly those of `tokenizer(text)`, including the special tokens of its post-processor, and without
    truncation. Nothing is cached between calls.

    Args:
        tokenizer: a `transformers.PreTrainedTokenizerFast`; its configuration is read once, here.

    Raises:
        InputError: a component, which it names, cannot be put into the graph exactly.

    Example:
        >>> ids, lengths = GraphTokenizer(tokenizer).encode(tf.constant(["The end"]))
        >>> ids.numpy()[0].tolist() == tokenizer("The end")["input_ids"]
        True
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        backend = tokenizer.backend_tokenizer
        config = json.loads(backend.to_str())
        byte_level, split = split_steps(config["pre_tokenizer"])
        first = [
            stage.get("prepend_scheme") == "first"
            for stage in flatten_sequences(config["pre_tokenizer"], "pretokenizers")
        ]
        if any(first[1:]) or (any(first) and flatten_sequences(config["normalizer"], "normalizers")):
            raise InputError(
                "the tokenizer's pre_tokenizer Metaspace with prepend_scheme first is unsupported after other steps"
            )
        model = _model(config["model"], byte_level)
        self._encode_words = WordEncoder(model, backend.get_vocab(with_added_tokens=False), backend.model.tokenize)
        self._split = [*split, *([model.split_step] if isinstance(model, BPE) and model.split_step else [])]
        self._normalize = normalization_steps(config["normalizer"])
        added = config["added_tokens"]
        if self._normalize:  # tokens that are searched for in normalized text are normalized too
            normalize = backend.normalizer.normalize_str
            added = [t | {"content": normalize(t["content"])} if t["normalized"] else t for t in added]
        numbered = list(enumerate(added, TEXT_END + 1))
        self._added_in_raw = _added_tokens([pair for pair in numbered if not pair[1]["normalized"]])
        self._added_in_normalized = _added_tokens([pair for pair in numbered if pair[1]["normalized"]])
        before, after = special_ids_around(config["post_processor"])
        sample = backend.encode("a", add_special_tokens=False).ids
        if tokenizer("a")["input_ids"] != [*before, *sample, *after]:
            raise InputError(
                "the tokenizer's post_processor is unsupported: it does more than adding tokens around a text"
            )
        self.prefix = tuple(before)
        self._prefix = tf.constant(before, tf.int32)
        # By kind, the ids of the end of a text and of the added tokens, and where each ends.
        self._ids_of_kinds = tf.constant([*after, *(token["id"] for token in added)], tf.int32)
        self._ends_of_kinds = tf.constant(len(after) + np.arange(len(added) + 1), tf.int64)
        # Traced once for all signatures.
        self._tokenize = tf.function(
            self._tokenize_texts, autograph=False, input_signature=[tf.TensorSpec([None], tf.string)]
        )

    def encode(
        self, texts: Tensor, last: int | None = None, *, max_tokens: int | None = None, name: str = "text"
    ) -> tuple[Tensor, Tensor]:
        """The token ids of texts.

        Args:
            texts: string [B]; invalid UTF-8 is read as U+FFFD, as with Python's `errors="replace"`.
            last: the maximum number of tokens per text. Of a longer text only the last ones are returned, so that one
                long text does not make all rows wide.
            max_tokens: the largest B times L; an assertion fails for more, before ids of that size are in memory.
            name: name of the texts in the assertion's message.

        Returns:
            Token ids int32 [B, L], padded with 0 on the right, and the lengths of the whole texts, int32 [B].
        """
        with tf.device("CPU:0"):
            ids, splits = self._tokenize(texts)
            begin, size = splits[:-2], splits[1:-1] - splits[:-2]
            prefix = tf.size(self._prefix, tf.int64)
            length = prefix + size
            kept = length if last is None else tf.minimum(length, last)
            width = tf.reduce_max(tf.concat([prefix[None], kept], 0))
            if max_tokens is not None:
                amount = tf.size(length, tf.int64) * width
                width = require_at_most(amount, max_tokens, width, name, "tokens with padding")
            # Indices into one array of the prefix of every text, all texts' ids, and a 0 for the padding.
            position = (length - kept)[:, None] + tf.range(width)
            index = tf.where(position < prefix, position, position + begin[:, None])
            padding = prefix + tf.size(ids, tf.int64)
            values = tf.concat([self._prefix, ids, [0]], 0)
            dense = tf.gather(values, tf.where(position < length[:, None], index, padding))
            return dense, tf.cast(length, tf.int32)

    def _tokenize_texts(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [T] of all texts [B], and their row splits, int64 [B + 2]: an empty text comes last."""
        # A NUL ends each text, and an empty text ends the batch, so that no array is empty from here on.
        texts = tf.strings.join([tf.concat([texts, [""]], 0), "\0"])
        rows, points = decode(texts)
        ends = rows[1:] - 1
        shape = tf.shape(points, tf.int64)
        kinds = tf.scatter_nd(ends[:, None], tf.ones_like(ends, tf.int32), shape) + ORDINARY
        boundaries = tf.concat([rows[:-1], ends], 0)
        starts = tf.scatter_nd(boundaries[:, None], tf.ones_like(boundaries, tf.int32), shape) > 0
        text = Text(points, starts, kinds)
        for step in (self._added_in_raw, *self._normalize, self._added_in_normalized, *self._split):
            if step is not None:
                text = step(text)
        return self._ids(text.pieces(), tf.boolean_mask(text.kinds, text.starts))

    def _ids(self, words: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [T] of the words [W] of all texts, and the texts' row splits, int64 [texts + 1]."""
        distinct, word = tf.unique(words)
        ids, splits = self._encode_words(distinct)
        row = tf.where(kinds == ORDINARY, word, tf.size(distinct) + kinds)
        ids, splits = ragged_gather(
            tf.concat([ids, self._ids_of_kinds], 0), tf.concat([splits, splits[-1] + self._ends_of_kinds], 0), row
        )
        return ids, tf.concat([[0], tf.boolean_mask(splits[1:], kinds == TEXT_END)], 0)


def _model(config: dict[str, Any], byte_level: bool) -> Model:
    """The model of a tokenizer.json; its vocabulary may be in the byte-level alphabet."""
    if config["type"] == "BPE":
        return BPE(config, byte_level)
    if config["type"] in ("WordPiece", "Unigram") and not byte_level:
        return WordPiece(config) if config["type"] == "WordPiece" else Unigram(config)
    raise InputError(
        f"the tokenizer's model {config['type']}{' after ByteLevel' * byte_level} is unsupported in the graph"
    )


def _added_tokens(tokens: list[tuple[int, dict[str, Any]]]) -> AddedTokens | None:
    return AddedTokens([token for _, token in tokens], [kind for kind, _ in tokens]) if tokens else None


def special_ids_around(config: dict[str, Any] | None) -> tuple[list[int], list[int]]:
    """The ids that the post_processor of a tokenizer.json adds before and after a text."""
    if config is None or config["type"] == "ByteLevel":
        return [], []
    if config["type"] in ("RobertaProcessing", "BertProcessing"):
        return [config["cls"][1]], [config["sep"][1]]
    if config["type"] == "Sequence":
        before: list[int] = []
        after: list[int] = []
        for inner in config["processors"]:
            outer = special_ids_around(inner)
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

"""The detokenizer in the graph: the texts of the fast tokenizer's `decode`, in core TensorFlow ops."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer import flatten_sequences, to_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["GraphDetokenizer"]

# The replacements of `clean_up_tokenization_spaces` in transformers, in its order.
CLEAN_UPS = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")),
    *((" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Tensor = Any  # tf.Tensor, whose module is not typed


class GraphDetokenizer(tf.Module):
    """The decoder of a fast tokenizer as core TensorFlow ops: ByteLevel, WordPiece, Metaspace or SentencePiece's.

    Each token adds its own piece to the text, or another one at the beginning of a text.

    Args:
        tokenizer: a `transformers.PreTrainedTokenizerFast`.

    Raises:
        InputError: the decoder is another one.

    Example:
        >>> detokenizer = GraphDetokenizer(tokenizer)
        >>> detokenizer.decode(tf.constant([tokenizer("The end")["input_ids"]]), tf.constant([2])).numpy()
        array([b'The end'], dtype=object)
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        backend = tokenizer.backend_tokenizer
        config = json.loads(backend.to_str())
        kinds = _supported_kinds(config["decoder"])
        tokens = {number: token for token, number in backend.get_vocab().items()}
        special = {added["content"] for added in config["added_tokens"] if added["special"]}
        visible = {number: token for number, token in tokens.items() if token not in special}
        size = max(tokens) + 2  # the last entry is for ids without a token
        byte_tokens: dict[int, bytes] = {}
        if "ByteFallback" in kinds:
            byte_tokens = {number: byte for number, token in visible.items() if (byte := _byte(token)) is not None}

        def table(*, first: bool) -> list[bytes]:
            """The bytes that each id adds to a text, or with which it begins one."""
            pieces = [b""] * size
            for number, token in visible.items():
                if kinds == ["ByteLevel"]:
                    pieces[number] = _byte_level_piece(token)
                elif number in byte_tokens:
                    pieces[number] = byte_tokens[number]
                else:
                    text = backend.decoder.decode([token] if first else ["x", token])
                    pieces[number] = (text if first else text[1:]).encode()
            return pieces

        # A list would be tracked, entry by entry, each time TensorFlow looks for variables.
        self._pieces = tf.constant(table(first=False))
        # Strip is for the whole text, because the first token may be one of several bytes of a character.
        self._strips = "Strip" in kinds
        depends_on_position = kinds != ["ByteLevel"] and "ByteFallback" not in kinds
        self._first_pieces = tf.constant(table(first=True)) if depends_on_position else None
        self._visible = tf.constant([number in visible for number in range(size)])
        self._is_byte = tf.constant([number in byte_tokens for number in range(size)]) if byte_tokens else None
        self._clean_up = bool(tokenizer.clean_up_tokenization_spaces)

    def pieces(self, count: int) -> list[bytes]:
        """The bytes that each of the first `count` ids adds to a text."""
        pieces: list[bytes] = self._pieces.numpy().tolist()
        return (pieces + [b""] * count)[:count]

    def decode_bytes(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """The raw bytes, string [B], of the first `lengths` [B] of `ids` int32 [B, L], which continue other text.

        A leading space is kept. Special tokens and ids without a token are omitted, as in the fast tokenizer.
        """
        with tf.device("CPU:0"):
            return tf.strings.reduce_join(tf.gather(self._pieces, self._mask(ids, lengths)), axis=1)

    def decode_continuation(self, ids: Tensor, lengths: Tensor, size: Tensor) -> Tensor:
        """The text, string [B], of the first `size` int32 [B] bytes of `decode_bytes`, -1 = all: valid UTF-8."""
        with tf.device("CPU:0"):
            ids = self._mask(ids, lengths)
            pieces = tf.gather(self._pieces, ids)
            lengths = tf.strings.length(pieces)
            left = tf.where(size < 0, tf.int32.max, size)[:, None] - tf.cumsum(lengths, axis=1, exclusive=True)
            pieces = tf.strings.substr(pieces, tf.zeros_like(lengths), tf.clip_by_value(left, 0, lengths))
            return self._clean(self._join(ids, pieces))

    def decode(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """`tokenizer.decode(ids, skip_special_tokens=True)` of each row: string [B], valid UTF-8.

        Spaces are cleaned up if that is the tokenizer's setting.
        """
        with tf.device("CPU:0"):
            ids = self._mask(ids, lengths)
            pieces = tf.gather(self._pieces, ids)
            if self._first_pieces is not None:
                visible = tf.gather(self._visible, ids)
                first = visible & (tf.cumsum(tf.cast(visible, tf.int32), axis=1) == 1)
                pieces = tf.where(first, tf.gather(self._first_pieces, ids), pieces)
            texts = self._join(ids, pieces)
            if self._strips:
                texts = tf.strings.regex_replace(texts, "^ ", "", replace_global=False)
            return self._clean(texts)

    def to_valid_utf8(self, data: Tensor) -> Tensor:
        """`data` (string, any shape) with U+FFFD for invalid UTF-8, as Python's `errors="replace"` decodes it."""
        return tf.strings.unicode_transcode(data, "UTF-8", "UTF-8", errors="replace")

    def _mask(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """`ids`, with the last entry of the tables for padding and for ids without a token."""
        no_token = tf.size(self._pieces) - 1
        valid = tf.sequence_mask(lengths, tf.shape(ids)[1]) & (ids >= 0) & (ids < no_token)
        return tf.where(valid, ids, no_token)

    def _join(self, ids: Tensor, pieces: Tensor) -> Tensor:
        """The texts, string [B], valid UTF-8, of `ids` [B, L], which add `pieces` [B, L]."""
        if self._is_byte is None:
            return self.to_valid_utf8(tf.strings.reduce_join(pieces, axis=1))
        # Byte tokens in a row are text if all of them together are valid, and else one U+FFFD each.
        visible = tf.where(tf.gather(self._visible, ids))
        row, pieces = visible[:, 0], tf.gather_nd(pieces, visible)
        is_byte = tf.gather(self._is_byte, tf.gather_nd(ids, visible))
        continues = is_byte[1:] & is_byte[:-1] & (row[1:] == row[:-1])
        begins = tf.concat([[True], ~continues], 0)[: tf.size(row)]
        run = tf.cumsum(tf.cast(begins, tf.int32)) - 1
        runs = tf.strings.unsorted_segment_join(pieces, run, tf.reduce_sum(tf.cast(begins, tf.int32)))
        replaced = tf.where(self.to_valid_utf8(runs) == runs, runs, tf.strings.regex_replace(runs, r"\C", "\ufffd"))
        row = tf.cast(tf.boolean_mask(row, begins), tf.int32)
        texts: Tensor = tf.strings.unsorted_segment_join(replaced, row, tf.shape(ids)[0])
        return texts

    def _clean(self, texts: Tensor) -> Tensor:
        """`texts` (string [B], valid UTF-8) with spaces cleaned up, if that is the tokenizer's setting."""
        for spaced, text in CLEAN_UPS if self._clean_up else ():
            texts = tf.strings.regex_replace(texts, rf"\Q{spaced}\E", text)
        return texts


def _supported_kinds(config: dict[str, Any] | None) -> list[str]:
    """The types of the stages of the decoder of a tokenizer.json."""
    stages = flatten_sequences(config, "decoders")
    kinds = [stage["type"] for stage in stages]
    # With these decoders, the piece depends only on the token and on whether it is the first one.
    sentencepiece = ["Replace", "ByteFallback", "Fuse", "Strip"]
    if kinds not in (
        ["ByteLevel"],
        ["WordPiece"],
        ["Metaspace"],
        ["Replace", "Fuse"],
        sentencepiece[:3],
        sentencepiece,
    ):
        raise InputError(f"the tokenizer's decoder {' '.join(kinds) or 'none'} is unsupported in the graph")
    if "Strip" in kinds and (strip := stages[-1]) != strip | {"content": " ", "start": 1, "stop": 0}:
        raise InputError(
            f"the tokenizer's decoder {strip} is unsupported in the graph: only stripping one leading space is"
        )
    return kinds


def _byte(token: str) -> bytes | None:
    """The byte of a token such as <0x0A>; None for other tokens."""
    found = BYTE_TOKEN.fullmatch(token)
    return bytes([int(found[1], 16)]) if found else None


def _byte_level_piece(token: str) -> bytes:
    # As in the fast tokenizer, a token with characters outside the byte-level alphabet is its own text.
    data = to_bytes(token)
    return token.encode() if data is None else data

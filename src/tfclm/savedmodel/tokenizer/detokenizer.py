"""The detokenizer in the graph: the texts of the fast tokenizer's `decode`, in core TensorFlow ops."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
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
        piece, first_piece = _piece_functions(config["decoder"], backend.decoder)
        tokens = {number: token for token, number in backend.get_vocab().items()}
        special = {added["content"] for added in config["added_tokens"] if added["special"]}
        visible = {number: token for number, token in tokens.items() if token not in special}
        size = max(tokens) + 2  # the last entry is for ids without a token
        self._bytes = [piece(visible[number]) if number in visible else b"" for number in range(size)]
        self._pieces = tf.constant(self._bytes)
        first = [first_piece(visible[number]) if number in visible else b"" for number in range(size)]
        self._first_pieces = tf.constant(first) if first != self._bytes else None
        self._visible = tf.constant([number in visible for number in range(size)])
        self._clean_up = bool(tokenizer.clean_up_tokenization_spaces)

    def pieces(self, count: int) -> list[bytes]:
        """The bytes that each of the first `count` ids adds to a text."""
        return (self._bytes + [b""] * count)[:count]

    def decode_bytes(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """The raw bytes, string [B], of the first `lengths` [B] of `ids` int32 [B, L], which continue other text.

        A leading space is kept. Special tokens and ids without a token are omitted, as in the fast tokenizer.
        """
        with tf.device("CPU:0"):
            return tf.strings.reduce_join(tf.gather(self._pieces, self._mask(ids, lengths)), axis=1)

    def _mask(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """`ids`, with the last entry of the tables for padding and for ids without a token."""
        no_token = tf.size(self._pieces) - 1
        valid = tf.sequence_mask(lengths, tf.shape(ids)[1]) & (ids >= 0) & (ids < no_token)
        return tf.where(valid, ids, no_token)

    def to_valid_utf8(self, data: Tensor) -> Tensor:
        """`data` (string, any shape) with U+FFFD for invalid UTF-8, as Python's `errors="replace"` decodes it."""
        return tf.strings.unicode_transcode(data, "UTF-8", "UTF-8", errors="replace")

    def decode(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """`tokenizer.decode(ids, skip_special_tokens=True)` of each row: string [B], valid UTF-8.

        Spaces are cleaned up if that is the tokenizer's setting.
        """
        with tf.device("CPU:0"):
            if self._first_pieces is None:
                return self.clean_up(self.to_valid_utf8(self.decode_bytes(ids, lengths)))
            ids = self._mask(ids, lengths)
            visible = tf.gather(self._visible, ids)
            first = visible & (tf.cumsum(tf.cast(visible, tf.int32), axis=1) == 1)
            pieces = tf.where(first, tf.gather(self._first_pieces, ids), tf.gather(self._pieces, ids))
            return self.clean_up(self.to_valid_utf8(tf.strings.reduce_join(pieces, axis=1)))

    def clean_up(self, texts: Tensor) -> Tensor:
        """`texts` (string, any shape, valid UTF-8) with spaces cleaned up, if that is the tokenizer's setting."""
        for spaced, text in CLEAN_UPS if self._clean_up else ():
            texts = tf.strings.regex_replace(texts, rf"\Q{spaced}\E", text)
        return texts


def _piece_functions(
    config: dict[str, Any] | None, decoder: Any
) -> tuple[Callable[[str], bytes], Callable[[str], bytes]]:
    """Two functions of a token: the bytes that it adds to a text, and the bytes that it adds as the first token.

    `decoder` is the fast tokenizer's own, and `config` its entry in the tokenizer.json.
    """
    kinds = [stage["type"] for stage in flatten_sequences(config, "decoders")]
    if kinds == ["ByteLevel"]:
        return _byte_level_piece, _byte_level_piece
    # With these decoders, the piece depends only on the token and on whether it is the first one.
    if kinds not in (["WordPiece"], ["Metaspace"], ["Replace", "ByteFallback", "Fuse", "Strip"], ["Replace", "Fuse"]):
        raise InputError(f"the tokenizer's decoder {' '.join(kinds) or 'none'} is unsupported in the graph")
    fallback = "ByteFallback" in kinds
    strip = config["decoders"][-1] if config and fallback else {"content": " ", "start": 1, "stop": 0}
    if (strip["content"], strip["start"], strip["stop"]) != (" ", 1, 0):
        raise InputError(
            f"the tokenizer's decoder {strip} is unsupported in the graph: only stripping one leading space is"
        )

    def byte(token: str) -> bytes | None:
        found = BYTE_TOKEN.fullmatch(token) if fallback else None
        return bytes([int(found[1], 16)]) if found else None

    def piece(token: str) -> bytes:
        single = byte(token)
        return decoder.decode(["x", token])[1:].encode() if single is None else single

    def first_piece(token: str) -> bytes:
        single = byte(token)
        return decoder.decode([token]).encode() if single is None else single.lstrip(b" ")

    return piece, first_piece


def _byte_level_piece(token: str) -> bytes:
    # As in the fast tokenizer, a token with characters outside the byte-level alphabet is its own text.
    data = to_bytes(token)
    return token.encode() if data is None else data

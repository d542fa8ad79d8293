"""Token ids in, text out, as the fast tokenizer's `decode` gives it, in core TensorFlow ops."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer import flatten, to_bytes

__all__ = ["GraphDetokenizer"]

# `clean_up_tokenization_spaces` in transformers, in its order.
CLEAN_UPS = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")),
    *((" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Tensor = Any  # tf.Tensor, whose module is not typed


class GraphDetokenizer(tf.Module):
    """The decoder of a `transformers.PreTrainedTokenizerFast` as core TensorFlow ops.

    Byte-level, WordPiece, Metaspace and SentencePiece's with bytes: each token adds its own piece, or another one where
    a text begins. Raises `InputError` for other decoders.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        backend = tokenizer.backend_tokenizer
        config = json.loads(backend.to_str())
        pieces, openings = _pieces(config["decoder"], backend.decoder)
        tokens = {number: token for token, number in backend.get_vocab().items()}
        special = {added["content"] for added in config["added_tokens"] if added["special"]}
        shown = {number: token for number, token in tokens.items() if token not in special}
        none = max(tokens) + 1  # for ids that no token has
        self._bytes = [pieces(shown[number]) if number in shown else b"" for number in range(none + 1)]
        self._pieces = tf.constant(self._bytes)
        first = [openings(shown[number]) if number in shown else b"" for number in range(none + 1)]
        self._openings = tf.constant(first) if first != self._bytes else None
        self._shown = tf.constant([number in shown for number in range(none + 1)])
        self._clean_up = bool(tokenizer.clean_up_tokenization_spaces)

    def pieces(self, count: int) -> list[bytes]:
        """What each of the first `count` ids adds to a text."""
        return (self._bytes + [b""] * count)[:count]

    def decode_bytes(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """The bytes of the first `lengths` [B] of `ids` int32 [B, L]: string [B], raw; special tokens are left out.

        So are ids that no token has, as in the fast tokenizer. The ids go on from other text: a piece that has a space
        before it has it here too.
        """
        with tf.device("CPU:0"):
            return tf.strings.reduce_join(tf.gather(self._pieces, self._used(ids, lengths)), axis=1)

    def _used(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """`ids`, with an id that no token has for what is left out."""
        none = tf.size(self._pieces) - 1
        used = tf.sequence_mask(lengths, tf.shape(ids)[1]) & (ids >= 0) & (ids < none)
        return tf.where(used, ids, none)

    def to_valid_utf8(self, data: Tensor) -> Tensor:
        """`data` (string, any shape) with U+FFFD for what is not UTF-8, as Python's `errors="replace"` puts it."""
        return tf.strings.unicode_transcode(data, "UTF-8", "UTF-8", errors="replace")

    def decode(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """`tokenizer.decode(ids, skip_special_tokens=True)` of each row: string [B], valid UTF-8.

        Spaces are cleaned up if that is the tokenizer's own setting.
        """
        with tf.device("CPU:0"):
            if self._openings is None:
                return self.clean_up(self.to_valid_utf8(self.decode_bytes(ids, lengths)))
            ids = self._used(ids, lengths)
            shown = tf.gather(self._shown, ids)
            first = shown & (tf.cumsum(tf.cast(shown, tf.int32), axis=1) == 1)
            pieces = tf.where(first, tf.gather(self._openings, ids), tf.gather(self._pieces, ids))
            return self.clean_up(self.to_valid_utf8(tf.strings.reduce_join(pieces, axis=1)))

    def clean_up(self, texts: Tensor) -> Tensor:
        """`texts` (string, any shape, valid UTF-8) without the spaces that the tokenizer's setting takes away."""
        for spaced, text in CLEAN_UPS if self._clean_up else ():
            texts = tf.strings.regex_replace(texts, rf"\Q{spaced}\E", text)
        return texts


def _pieces(config: dict[str, Any] | None, decoder: Any) -> tuple[Callable[[str], bytes], Callable[[str], bytes]]:
    """What a token adds to a text, and what where it is the first; `decoder` is the fast tokenizer's own."""
    kinds = [stage["type"] for stage in flatten(config, "decoders")]
    if kinds == ["ByteLevel"]:
        return _spelled, _spelled
    # With these, a token's piece depends on nothing but the token and whether it is the first.
    if kinds not in (["WordPiece"], ["Metaspace"], ["Replace", "ByteFallback", "Fuse", "Strip"], ["Replace", "Fuse"]):
        raise InputError(f"the tokenizer's decoder {' '.join(kinds) or 'none'} is unsupported in the graph")
    fallback = "ByteFallback" in kinds
    strip = config["decoders"][-1] if config and fallback else {"content": " ", "start": 1, "stop": 0}
    if (strip["content"], strip["start"], strip["stop"]) != (" ", 1, 0):
        raise InputError(f"the tokenizer's decoder {strip} is unsupported in the graph: only one space in front is")

    def byte(token: str) -> bytes | None:
        found = BYTE.fullmatch(token) if fallback else None
        return bytes([int(found[1], 16)]) if found else None

    def piece(token: str) -> bytes:
        single = byte(token)
        return decoder.decode(["x", token])[1:].encode() if single is None else single

    def opening(token: str) -> bytes:
        single = byte(token)
        return decoder.decode([token]).encode() if single is None else single.lstrip(b" ")

    return piece, opening


def _spelled(token: str) -> bytes:
    # As the fast tokenizer's: a token that is not spelled in the byte-level alphabet stands for itself.
    spelled = to_bytes(token)
    return token.encode() if spelled is None else spelled

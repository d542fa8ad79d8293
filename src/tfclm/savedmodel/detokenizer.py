"""Token ids in, text out, as the fast tokenizer's `decode` gives it, in core TensorFlow ops."""

from __future__ import annotations

import json
from typing import Any

import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.tokenizer import to_bytes

__all__ = ["GraphDetokenizer"]

# `clean_up_tokenization_spaces` in transformers, in its order.
CLEAN_UPS = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")),
    *((" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)

Tensor = Any  # tf.Tensor, whose module is not typed


class GraphDetokenizer(tf.Module):
    """The byte-level decoder of a `transformers.PreTrainedTokenizerFast` as core TensorFlow ops.

    Raises `InputError` for other decoders.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        config = json.loads(tokenizer.backend_tokenizer.to_str())
        kind = (config["decoder"] or {"type": "none"})["type"]
        if kind != "ByteLevel":
            raise InputError(f"the tokenizer's decoder {kind} is unsupported in the graph: only ByteLevel is")
        tokens = {number: token for token, number in config["model"]["vocab"].items()}
        tokens |= {added["id"]: added["content"] for added in config["added_tokens"]}
        special = {added["content"] for added in config["added_tokens"] if added["special"]}
        pieces = [b""] * (max(tokens) + 2)  # the last one is for ids that no token has
        for number, token in tokens.items():
            if token not in special:
                # As the fast tokenizer's: a token that is not spelled in the byte-level alphabet stands for itself.
                spelled = to_bytes(token)
                pieces[number] = token.encode() if spelled is None else spelled
        self._bytes = pieces
        self._pieces = tf.constant(pieces)
        self._clean_up = bool(tokenizer.clean_up_tokenization_spaces)

    def pieces(self, count: int) -> list[bytes]:
        """What each of the first `count` ids adds to a text."""
        return (self._bytes + [b""] * count)[:count]

    def decode_bytes(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """The bytes of the first `lengths` [B] of `ids` int32 [B, L]: string [B], raw; special tokens are left out.

        So are ids that no token has, as in the fast tokenizer.
        """
        with tf.device("CPU:0"):
            none = tf.size(self._pieces) - 1
            used = tf.sequence_mask(lengths, tf.shape(ids)[1]) & (ids >= 0) & (ids < none)
            return tf.strings.reduce_join(tf.gather(self._pieces, tf.where(used, ids, none)), axis=1)

    def to_valid_utf8(self, data: Tensor) -> Tensor:
        """`data` (string, any shape) with U+FFFD for what is not UTF-8, as Python's `errors="replace"` puts it."""
        return tf.strings.unicode_transcode(data, "UTF-8", "UTF-8", errors="replace")

    def decode(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """`tokenizer.decode(ids, skip_special_tokens=True)` of each row: string [B], valid UTF-8.

        Spaces are cleaned up if that is the tokenizer's own setting.
        """
        return self.clean_up(self.to_valid_utf8(self.decode_bytes(ids, lengths)))

    def clean_up(self, texts: Tensor) -> Tensor:
        """`texts` (string, any shape, valid UTF-8) without the spaces that the tokenizer's setting takes away."""
        for spaced, text in CLEAN_UPS if self._clean_up else ():
            texts = tf.strings.regex_replace(texts, rf"\Q{spaced}\E", text)
        return texts

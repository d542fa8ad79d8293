"""What a request may hold: the checks of its texts, token ids and sampling parameters, in the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tfclm.savedmodel.checks import broadcast, ranked, require, require_at_most
from tfclm.savedmodel.graph.sampling import SamplingParams
from tfclm.savedmodel.graph.stopping import MAX_STOP_BYTES

__all__ = ["RequestChecks", "first_invalid"]

Tensor = Any

# Bytes of text that a request may have per token that it may have. Checked before the text is tokenized, which takes
# far more memory than the text.
BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class RequestChecks:
    """Checks that return what they are given, and whose failed assertions name the input and the row.

    Attributes:
        max_new_tokens: the largest value of the parameter of this name.
        max_rows: the maximum number of rows of a request.
        max_tokens: the maximum number of tokens of a request, padding included.
        vocab_size: the number of token ids.
    """

    max_new_tokens: int
    max_rows: int
    max_tokens: int
    vocab_size: int

    def params(self, params: SamplingParams, stop: Tensor, batch: Tensor) -> tuple[SamplingParams, Tensor]:
        """The parameters and stop strings, [B] each, if all values are in their ranges."""
        params = SamplingParams(
            *(broadcast(value, name, batch) for value, name in zip(params, SamplingParams._fields, strict=True))
        )
        stop = broadcast(stop, "stop", batch)
        valid = SamplingParams(
            max_new_tokens=(params.max_new_tokens >= 1) & (params.max_new_tokens <= self.max_new_tokens),
            temperature=(params.temperature >= 0) & tf.math.is_finite(params.temperature),
            top_k=params.top_k >= 0,
            top_p=(params.top_p > 0) & (params.top_p <= 1),
            repetition_penalty=(params.repetition_penalty > 0) & tf.math.is_finite(params.repetition_penalty),
            seed=params.seed >= -1,
        )
        ranges = SamplingParams(
            max_new_tokens=f"give 1 to {self.max_new_tokens}",
            temperature="give 0 (greedy) or more",
            top_k="give 0 (off) or more",
            top_p="give a number above 0 and up to 1 (1 = off)",
            repetition_penalty="give a number above 0 (1 = off)",
            seed="give 0 or more, or -1 for a random one",
        )

        def check(value: Tensor, name: str, valid: Tensor, range: str) -> Tensor:
            return require(valid, value, name, tf.strings.join(["is ", first_invalid(value, valid), f": {range}"]))

        params = SamplingParams(*map(check, params, SamplingParams._fields, valid, ranges))
        problem = f"is too long: give at most {MAX_STOP_BYTES} bytes"
        return params, require(tf.strings.length(stop) <= MAX_STOP_BYTES, stop, "stop", problem)

    def texts(self, texts: Tensor, name: str) -> Tensor:
        """The texts [B] of a request, if it is not too large."""
        texts = ranked(texts, name, 1, self.max_rows)
        size = tf.reduce_sum(tf.cast(tf.strings.length(texts), tf.int64))
        limit = BYTES_PER_TOKEN * self.max_tokens
        return require_at_most(size, limit, texts, name, "bytes in all rows together")

    def tokens(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of token ids [B, L] of a request, with the padding moved to the right, and their lengths [B]."""
        ids, mask = self._size(input_ids, "input_ids"), self._size(attention_mask, "attention_mask")
        same = tf.reduce_all(tf.shape(ids) == tf.shape(mask))
        with tf.control_dependencies(
            [tf.debugging.Assert(same, ["attention_mask has another shape than input_ids: give 1 or 0 for each"])]
        ):
            real = tf.identity(mask) == 1
        mask = require(tf.reduce_all((mask == 0) | real, 1), mask, "attention_mask", "has other values than 0 and 1")
        known = ~real | ((ids >= 0) & (ids < self.vocab_size))
        problem = f"has an id that is no token: give 0 to {self.vocab_size - 1}"
        ids = require(tf.reduce_all(known, 1), ids, "input_ids", problem)
        lengths = tf.reduce_sum(mask, 1)
        ids = require(lengths > 0, ids, "input_ids", "has no token: give at least one")
        # A stable sort moves the tokens to the left in their order, wherever the padding was.
        ids = tf.gather(ids, tf.argsort(1 - mask, 1, stable=True), batch_dims=1)
        return tf.where(tf.sequence_mask(lengths, tf.shape(ids)[1]), ids, 0), lengths

    def _size(self, ids: Tensor, name: str) -> Tensor:
        """Token ids, or their mask, [B, L] of a request, if it is not too large."""
        ids = ranked(ids, name, 2, self.max_rows)
        return require_at_most(tf.size(ids, tf.int64), self.max_tokens, ids, name, "tokens with padding")


def first_invalid(values: Tensor, condition: Tensor) -> Tensor:
    """The first value that does not meet the condition, as text."""
    return tf.strings.reduce_join(tf.strings.as_string(tf.boolean_mask(values, ~condition)[:1]))

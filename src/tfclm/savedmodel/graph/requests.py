"""What a request may hold: the checks of its texts, token ids and sampling parameters, in the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tfclm.savedmodel.checks import broadcast, broadcast_lists, ranked, require, require_at_most
from tfclm.savedmodel.graph.sampling import MAX_BIASES, ExtraParams, SamplingParams
from tfclm.savedmodel.graph.stopping import MAX_STOP_BYTES, MAX_STOPS

__all__ = ["RequestChecks", "first_invalid"]

Tensor = Any

# Bytes of text that a request may have per token that it may have. Checked before the text is tokenized, which takes
# far more memory than the text.
BYTES_PER_TOKEN = 4
# The range of vLLM and OpenAI.
MAX_PENALTY = 2
MAX_BIAS = 100


@dataclass(frozen=True)
class RequestChecks:
    """Checks that return what they are given, and whose failed assertions name the input and the row.

    Attributes:
        max_new_tokens: the largest value of the parameter of this name.
        max_rows: the maximum number of rows of a request.
        max_tokens: the maximum number of tokens of a request, padding included.
        vocab_size: the number of token ids.
        max_top_logprobs: the largest value of `top_logprobs`.
    """

    max_new_tokens: int
    max_rows: int
    max_tokens: int
    vocab_size: int
    max_top_logprobs: int = 0

    def params(self, params: SamplingParams, stop: Tensor, batch: Tensor) -> tuple[SamplingParams, Tensor]:
        """The parameters, [B] each, and stop strings [B, N], if all values are in their ranges."""
        params = SamplingParams(
            *(broadcast(value, name, batch) for value, name in zip(params, SamplingParams._fields, strict=True))
        )
        stop = broadcast_lists(stop, "stop", batch, MAX_STOPS)
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

        params = SamplingParams(*map(_check, params, SamplingParams._fields, valid, ranges))
        problem = f"is too long: give at most {MAX_STOP_BYTES} bytes"
        short = tf.reduce_all(tf.strings.length(stop) <= MAX_STOP_BYTES, 1)
        return params, require(short, stop, "stop", problem)

    def extra(self, extra: ExtraParams, max_new_tokens: Tensor, batch: Tensor) -> ExtraParams:
        """The parameters of `generate_tokens` alone if all values are in their ranges; `max_new_tokens` is [B]."""
        ids = broadcast_lists(extra.logit_bias_ids, "logit_bias_ids", batch, MAX_BIASES)
        biases = broadcast_lists(extra.logit_bias, "logit_bias", batch, MAX_BIASES)
        same = tf.reduce_all(tf.shape(ids) == tf.shape(biases))
        with tf.control_dependencies(
            [tf.debugging.Assert(same, ["logit_bias has another shape than logit_bias_ids: give one bias for each id"])]
        ):
            missing = [[0, 0], [0, MAX_BIASES - tf.shape(ids)[1]]]
        ids, biases = tf.pad(ids, missing, constant_values=-1), tf.pad(biases, missing)
        lists = ("logit_bias_ids", "logit_bias")
        values = extra._asdict() | dict(zip(lists, (ids, biases), strict=True))
        extra = ExtraParams(
            **{name: value if name in lists else broadcast(value, name, batch) for name, value in values.items()}
        )
        valid = ExtraParams(
            min_p=(extra.min_p >= 0) & (extra.min_p <= 1),
            presence_penalty=tf.abs(extra.presence_penalty) <= MAX_PENALTY,
            frequency_penalty=tf.abs(extra.frequency_penalty) <= MAX_PENALTY,
            min_new_tokens=(extra.min_new_tokens >= 0) & (extra.min_new_tokens <= max_new_tokens),
            logit_bias_ids=(ids >= -1) & (ids < self.vocab_size),
            logit_bias=tf.abs(biases) <= MAX_BIAS,
            top_logprobs=(extra.top_logprobs >= 0) & (extra.top_logprobs <= self.max_top_logprobs),
        )
        ranges = ExtraParams(
            min_p="give 0 (off) to 1",
            presence_penalty=f"give -{MAX_PENALTY} to {MAX_PENALTY} (0 = off)",
            frequency_penalty=f"give -{MAX_PENALTY} to {MAX_PENALTY} (0 = off)",
            min_new_tokens="give 0 (off) to max_new_tokens",
            logit_bias_ids=f"give 0 to {self.vocab_size - 1}, or -1 for none",
            logit_bias=f"give -{MAX_BIAS} to {MAX_BIAS}",
            top_logprobs=f"give 0 to {self.max_top_logprobs}",
        )
        extra = ExtraParams(*map(_check, extra, ExtraParams._fields, valid, ranges))
        amount = tf.reduce_sum(tf.cast(max_new_tokens, tf.int64) * tf.cast(extra.top_logprobs, tf.int64))
        unit = "log-probabilities for the max_new_tokens of all rows"
        return extra._replace(
            top_logprobs=require_at_most(amount, self.max_tokens, extra.top_logprobs, "top_logprobs", unit)
        )

    def texts(self, texts: Tensor, name: str) -> Tensor:
        """The texts [B] of a request, if it is not too large."""
        texts = ranked(texts, name, 1, self.max_rows)
        size = tf.reduce_sum(tf.cast(tf.strings.length(texts), tf.int64))
        limit = BYTES_PER_TOKEN * self.max_tokens
        return require_at_most(size, limit, texts, name, "bytes in all rows together")

    def ids(self, ids: Tensor, name: str) -> Tensor:
        """The rows of token ids [B, L] of a request, in which -1 is padding."""
        ids = self._size(ids, name)
        problem = f"has an id that is no token: give 0 to {self.vocab_size - 1}, or -1 for padding"
        return require(tf.reduce_all((ids >= -1) & (ids < self.vocab_size), 1), ids, name, problem)

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


def _check(value: Tensor, name: str, valid: Tensor, range: str) -> Tensor:
    """`value` [B] or [B, N] if all of its values are valid."""
    problem = tf.strings.join(["is " if valid.shape.rank == 1 else "has ", first_invalid(value, valid), f": {range}"])
    return require(valid if valid.shape.rank == 1 else tf.reduce_all(valid, 1), value, name, problem)


def first_invalid(values: Tensor, condition: Tensor) -> Tensor:
    """The first value that does not meet the condition, as text."""
    return tf.strings.reduce_join(tf.strings.as_string(tf.boolean_mask(values, ~condition)[:1]))

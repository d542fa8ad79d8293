"""The decoding loop: rows go on by one token per step, with a cache and sampling parameters per row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import tensorflow as tf

from tfclm.compat import xla_optimization_barrier
from tfclm.savedmodel.graph import key_value_cache
from tfclm.savedmodel.graph.network import Network, Weights
from tfclm.savedmodel.graph.sampling import (
    ExtraParams,
    SamplingParams,
    adjust_logits,
    reported_logprobs,
    sample_next_token,
)
from tfclm.savedmodel.graph.stopping import Stop, StopFinder

__all__ = ["CompiledDecoder", "Decoder", "DecodingRows", "NewLogprobs"]

Tensor = Any


class NewLogprobs(NamedTuple):
    """Of the tokens of each step, the token's own id and log-probability, then those of the likeliest tokens."""

    ids: Tensor  # int32 [B, steps, 0 or 1 + the largest top_logprobs]
    values: Tensor  # float32 of the same shape


class DecodingRows(NamedTuple):
    """Rows that are decoded together. The keys and values of all their tokens except the last one are in the cache."""

    tokens: Tensor  # int32 [B, capacity + 1], prompt and generated tokens
    length: Tensor  # int32 [B], their number
    prompt_length: Tensor  # int32 [B]
    finished: Tensor  # bool [B]
    stopped: Tensor  # bool [B], whether an EOS or a stop string ended the row
    stop: Stop
    buffers: tuple[Tensor, ...]  # the key-value cache, [B, key-value heads, capacity, head size] each
    logprobs: Any = None  # NewLogprobs, set by `Decoder.run`


class Decoder:
    """Decodes rows step by step.

    Args:
        network: the model.
        eos_ids: tokens that end a row.
        finder: finds stop strings; None if there are none.
        top_logprobs: the largest value of the parameter.
    """

    def __init__(
        self, network: Network, eos_ids: Sequence[int], finder: StopFinder | None, top_logprobs: int = 0
    ) -> None:
        self._network, self._eos, self._finder = network, list(eos_ids), finder
        self._top_logprobs = top_logprobs

    def run(
        self,
        rows: DecodingRows,
        params: SamplingParams,
        extra: ExtraParams,
        end: Tensor,
        uniform: Tensor,
        weights: Weights,
        go_on: Callable[[Tensor], Tensor],
    ) -> DecodingRows:
        """Continues all rows by the same number of tokens: until one of them is finished, or `go_on` is false.

        At least by one. A row is finished at an EOS, its stop string or its last token.

        Args:
            rows: none is finished; the capacity of the cache is enough for the steps that `go_on` allows.
            params: [B] each.
            extra: [B] each.
            end: int32 [B], the length at which a row is finished.
            uniform: float64 [B, steps], samples in [0, 1), one column per step.
            weights: of the network.
            go_on: takes the number of steps so far, 1 or more.
        """
        rows = rows._replace(logprobs=_no_logprobs(uniform, extra))
        choose = self._chooser(rows, params, extra, uniform, xla=False)

        def step(number: Tensor, rows: DecodingRows) -> tuple[Tensor, DecodingRows]:
            last = tf.gather(rows.tokens, rows.length - 1, batch_dims=1)
            logits, buffers = self._network.step(last, rows.length - 1, rows.buffers, weights)
            rows = choose(number, rows._replace(buffers=tuple(buffers)), logits)
            return number + 1, rows._replace(finished=rows.stopped | (rows.length >= end))

        def again(number: Tensor, rows: DecodingRows) -> Tensor:
            return (number == 0) | (~tf.reduce_any(rows.finished) & go_on(number))

        return cast("DecodingRows", tf.while_loop(again, step, (tf.constant(0), rows), parallel_iterations=1)[1])

    def _chooser(
        self, rows: DecodingRows, params: SamplingParams, extra: ExtraParams, uniform: Tensor, *, xla: bool
    ) -> Callable[[Tensor, DecodingRows, Tensor], DecodingRows]:
        """Returns a function that adds one token to each row, given the number of the step and the logits [B, V]."""
        sample = tf.function(partial(sample_next_token, xla=xla), autograph=False)
        positions = tf.range(tf.shape(rows.tokens)[1])[None]
        indices = tf.range(tf.shape(rows.length)[0])
        all_rows = tf.ones_like(rows.finished)
        not_in_prompt = positions >= rows.prompt_length[:, None]
        adjusts = tf.reduce_any(extra.logit_bias_ids >= 0) | tf.reduce_any(extra.min_new_tokens > 0)
        reports = tf.reduce_any(extra.top_logprobs >= 0)
        # XLA needs a static number.
        top = self._top_logprobs if xla else tf.shape(rows.logprobs.ids)[2] - 1

        def choose(number: Tensor, rows: DecodingRows, logits: Tensor) -> DecodingRows:
            known = positions < rows.length[:, None]
            early = rows.length - rows.prompt_length < extra.min_new_tokens
            adjusted = tf.cond(adjusts, lambda: adjust_logits(logits, extra, early, self._eos), lambda: logits)
            samples = tf.gather(uniform, number, axis=1)
            token = sample(adjusted, rows.tokens, known, known & not_in_prompt, params, extra, samples)
            stop = self._finder.find(rows.stop, token, all_rows, early) if self._finder is not None else rows.stop
            stopped = stop.found
            if self._eos:
                stopped |= tf.reduce_any(token[:, None] == tf.constant(self._eos, tf.int32)[None], 1)
            tokens = tf.tensor_scatter_nd_update(rows.tokens, tf.stack([indices, rows.length], 1), token)

            def reported() -> NewLogprobs:
                at = tf.stack([indices, tf.fill(tf.shape(indices), number)], 1)
                new = reported_logprobs(logits, token, top)
                return NewLogprobs(
                    *(tf.tensor_scatter_nd_update(old, at, each) for old, each in zip(rows.logprobs, new, strict=True))
                )

            logprobs = tf.cond(reports, reported, lambda: rows.logprobs)
            return rows._replace(tokens=tokens, length=rows.length + 1, stop=stop, stopped=stopped, logprobs=logprobs)

        return choose


class CompiledDecoder(Decoder):
    """The same, compiled by XLA, for which buffers have one of a few sizes.

    XLA would copy buffers that it writes to. So it only reads them, for a few steps at a time, and the keys and values
    of these steps are written afterwards.

    Attributes:
        compiled: the function that XLA compiles, which runs a few steps.
    """

    STEPS = 4

    def __init__(
        self, network: Network, eos_ids: Sequence[int], finder: StopFinder | None, top_logprobs: int = 0
    ) -> None:
        super().__init__(network, eos_ids, finder, top_logprobs)
        self.compiled = tf.function(self._run_compiled, autograph=False, jit_compile=True)

    def run(
        self,
        rows: DecodingRows,
        params: SamplingParams,
        extra: ExtraParams,
        end: Tensor,
        uniform: Tensor,
        weights: Weights,
        go_on: Callable[[Tensor], Tensor],
    ) -> DecodingRows:
        """See `Decoder.run`; rows whose `end` is 0 only fill the batch, and are never finished."""
        uniform = tf.pad(uniform, [[0, 0], [0, self.STEPS]])
        rows = rows._replace(logprobs=_no_logprobs(uniform, extra))
        return cast(
            "DecodingRows",
            self._with_fast_weights(
                weights, rows, lambda fast: self._loop(rows, params, extra, end, uniform, fast, go_on)
            ),
        )

    def _with_fast_weights(self, weights: Weights, rows: DecodingRows, run: Callable[[Weights], Any]) -> Any:
        """What `run` returns, given the weights in the type that is fastest for as many rows.

        The products of one row are limited by memory bandwidth: reading the smaller weights at each step is faster. For
        more rows, weights that are cast to float32 once are faster.
        """
        if self._network.dtype == tf.float32:
            return run(weights)
        alone = tf.shape(rows.length)[0] == 1
        return tf.cond(alone, lambda: run(weights), lambda: run(self._network.with_float32_products(weights)))

    def _loop(
        self,
        rows: DecodingRows,
        params: SamplingParams,
        extra: ExtraParams,
        end: Tensor,
        uniform: Tensor,
        weights: Weights,
        go_on: Callable[[Tensor], Tensor],
    ) -> DecodingRows:
        capacity = tf.shape(rows.buffers[0])[2]

        def few_steps(number: Tensor, rows: DecodingRows) -> tuple[Tensor, DecodingRows]:
            remaining = capacity + 1 - tf.reduce_max(rows.length)
            drawn = tf.ensure_shape(uniform[:, number : number + self.STEPS], [None, self.STEPS])
            # XLA would compile for each size of `logprobs`.
            asked = rows._replace(logprobs=None)
            limit = tf.minimum(remaining, self.STEPS)
            taken, after, recent = self.compiled(asked, params, extra, end, drawn, limit, weights)
            slots = rows.length[:, None] - 1 + tf.range(taken)
            write = key_value_cache.Writer(rows.buffers[0], slots).write
            buffers = [write(buffer, new[:, :, :taken]) for buffer, new in zip(rows.buffers, recent, strict=True)]

            def with_new(old: Tensor, new: Tensor) -> Tensor:
                size = tf.shape(old)[2]
                parts = [old[:, :number], new[:, :taken, :size], old[:, number + taken :]]
                return tf.ensure_shape(tf.concat(parts, 1), old.shape)

            logprobs = NewLogprobs(*map(with_new, rows.logprobs, after.logprobs))
            return number + taken, after._replace(buffers=tuple(buffers), logprobs=logprobs)

        def again(number: Tensor, rows: DecodingRows) -> Tensor:
            return (number == 0) | (~tf.reduce_any(rows.finished) & go_on(number))

        specs = tf.nest.map_structure(lambda value: value.shape, rows)
        return cast(
            "DecodingRows",
            tf.while_loop(
                again,
                few_steps,
                (tf.constant(0), rows),
                shape_invariants=(tf.TensorShape([]), specs),
                parallel_iterations=1,
            )[1],
        )

    def compile(self, rows: DecodingRows, params: SamplingParams, extra: ExtraParams, weights: Weights) -> Tensor:
        """Compiles for the sizes of `rows`; returns the number of steps that were run, which is 0."""
        uniform, none = tf.zeros([tf.shape(rows.length)[0], self.STEPS], tf.float64), tf.constant(0)

        def run(weights: Weights) -> Tensor:
            return self.compiled(rows, params, extra, rows.length, uniform, none, weights)[0]

        return self._with_fast_weights(weights, rows, run)

    def _run_compiled(
        self,
        rows: DecodingRows,
        params: SamplingParams,
        extra: ExtraParams,
        end: Tensor,
        uniform: Tensor,
        limit: Tensor,
        weights: Weights,
    ) -> tuple[Tensor, DecodingRows, list[Tensor]]:
        """Runs at most `limit` [] steps: their number, the rows without buffers, and the new keys and values."""
        network, starts, buffers = self._network, rows.length - 1, rows.buffers
        batch, heads, _, size = buffers[0].shape
        batch = tf.shape(buffers[0])[0] if batch is None else batch
        recent = [tf.zeros([batch, heads, self.STEPS, size]) for _ in buffers]
        shape = [batch, self.STEPS, 1 + self._top_logprobs]
        rows = rows._replace(logprobs=NewLogprobs(tf.zeros(shape, tf.int32), tf.zeros(shape)))
        choose = self._chooser(rows, params, extra, uniform, xla=True)

        def step(number: Tensor, rows: DecodingRows, recent: list[Tensor]) -> tuple[Any, ...]:
            last = tf.gather(rows.tokens, rows.length - 1, batch_dims=1)
            now, last = _cast_at_each_step(weights, last)
            logits, recent = network.compiled_step(last, starts, number, buffers, recent, now)
            rows = choose(number, rows, logits)
            return number + 1, rows._replace(finished=(rows.stopped | (rows.length >= end)) & (end > 0)), recent

        return cast(
            "tuple[Tensor, DecodingRows, list[Tensor]]",
            tf.while_loop(
                lambda number, rows, recent: (number < limit) & ~tf.reduce_any(rows.finished),
                step,
                (tf.constant(0), rows._replace(buffers=()), recent),
            ),
        )


def _no_logprobs(uniform: Tensor, extra: ExtraParams) -> NewLogprobs:
    """Zeros, for as many steps as `uniform` [B, steps] is for."""
    shape = [*tf.unstack(tf.shape(uniform)), 1 + tf.reduce_max(extra.top_logprobs)]
    return NewLogprobs(tf.zeros(shape, tf.int32), tf.zeros(shape))


def _cast_at_each_step(weights: Weights, tokens: Tensor) -> tuple[Weights, Tensor]:
    """The same weights and tokens, made to depend on one another.

    So XLA cannot cast smaller weights once before the loop. Both must be used, because XLA removes from its barriers
    what is not.
    """
    smaller = [name for name, weight in weights.items() if weight.dtype != tf.float32]
    if not smaller:
        return weights, tokens
    *barred, tokens = xla_optimization_barrier(input=[*(weights[name] for name in smaller), tokens])
    return {**weights, **dict(zip(smaller, barred, strict=True))}, tokens

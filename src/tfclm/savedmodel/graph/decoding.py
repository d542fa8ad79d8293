"""The decoding loop: prompts in, tokens out, with a cache and sampling parameters per row, for every architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import tensorflow as tf

from tfclm.compat import xla_optimization_barrier
from tfclm.savedmodel.graph.network import Network, Weights
from tfclm.savedmodel.graph.sampling import SamplingParams, sample_next_token
from tfclm.savedmodel.graph.stopping import Stop, StopFinder

__all__ = ["Decoded", "decode"]

Tensor = Any

FILLER_ID = 0  # token id fed for finished rows; a padding id may have no embedding


class Decoded(NamedTuple):
    """The generated tokens of each row."""

    output_ids: Tensor  # int32 [B, limit], padded on the right
    count: Tensor  # int32 [B], tokens, including an EOS and a stop string's
    stopped: Tensor  # bool [B], whether an EOS or a stop string ended the row
    length_in_bytes: Tensor  # int32 [B], bytes of the text before the stop string; -1 if none was found


class _State(NamedTuple):
    """The loop variables."""

    step: Tensor  # int32 [], tokens chosen so far
    token: Tensor  # int32 [B], the last one
    tokens: (
        Tensor  # int32 [B, capacity + 1], prompt and generated tokens, without gaps; finished rows write to the last
    )
    count: Tensor  # int32 [B], generated tokens
    running: Tensor  # bool [B]
    stopped: Tensor  # bool [B]
    stop: Stop
    buffers: Sequence[Tensor]  # the key-value cache


def decode(
    network: Network,
    ids: Tensor,
    lengths: Tensor,
    params: SamplingParams,
    uniform: Tensor,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    limit: int,
    finder: StopFinder | None = None,
    stop: Stop | None = None,
    xla: bool = False,
) -> Decoded:
    """Continues each prompt until an EOS, its stop string, its max_new_tokens or the end of the context.

    Args:
        network: the model.
        ids: int32 [B, L], padded on the right.
        lengths: int32 [B], tokens of each prompt, 1 to the context size - 1.
        params: [B] each.
        uniform: float64 [B, limit], samples in [0, 1), one column per step.
        eos_ids: tokens that end a row.
        pad_id: fills a row after its last token.
        limit: the largest max_new_tokens.
        finder: finds stop strings; required if `stop` is given.
        stop: the search state of the rows' stop strings, from `finder.begin`.
        xla: XLA compiles the function; the cache then always has the capacity for `limit` tokens.
    """
    weights = network.weights()
    loop = _Loop(network, ids, lengths, params, uniform, eos_ids=eos_ids, limit=limit, finder=finder, xla=xla)
    state = loop.run(loop.start(ids, stop, weights), weights)
    # The tokens may be narrower than the limit.
    padded = tf.pad(state.tokens, [[0, 0], [0, limit]], constant_values=pad_id)
    output = tf.gather(padded, lengths[:, None] + tf.range(limit), batch_dims=1)
    output = tf.where(tf.range(limit) < state.count[:, None], output, pad_id)
    return Decoded(output, state.count, state.stopped, tf.where(state.stop.found, state.stop.length, -1))


class _Loop:
    """The steps of `decode`, and the values that they share."""

    def __init__(
        self,
        network: Network,
        ids: Tensor,
        lengths: Tensor,
        params: SamplingParams,
        uniform: Tensor,
        *,
        eos_ids: Sequence[int],
        limit: int,
        finder: StopFinder | None,
        xla: bool,
    ) -> None:
        self._network, self._lengths, self._params, self._uniform = network, lengths, params, uniform
        self._finder, self._xla = finder, xla
        batch, width = tf.unstack(tf.shape(ids))
        self._batch = batch if ids.shape[0] is None else ids.shape[0]
        self._width = width if ids.shape[1] is None else ids.shape[1]
        # Tokens that each row may generate: none beyond the context, or that the cache is of no use for.
        threshold = network.spec.threshold
        end = tf.where(lengths <= threshold, min(threshold, network.context), network.context)
        self._remaining = tf.minimum(params.max_new_tokens, end - lengths)
        longest = limit if xla else tf.reduce_max(self._remaining)
        self._capacity = tf.minimum(self._width + longest, network.context)
        # Traced once for the first token and the further ones.
        self._sample = tf.function(partial(sample_next_token, xla=xla), autograph=False)
        self._eos = tf.constant(list(eos_ids), tf.int32)
        self._rows = tf.range(self._batch)

    def start(self, ids: Tensor, stop: Stop | None, weights: Weights) -> _State:
        """Reads the prompts and chooses the first tokens."""
        logits, buffers = self._network.prefill(ids, self._lengths, self._capacity, weights, xla=self._xla)
        no = tf.zeros_like(self._lengths, tf.bool)
        state = _State(
            step=tf.constant(0),
            token=tf.zeros_like(self._lengths),
            tokens=tf.pad(ids, [[0, 0], [0, self._capacity + 1 - self._width]]),
            count=tf.zeros_like(self._lengths),
            running=self._remaining > 0,
            stopped=no,
            # Without stop strings, only `found` and `length` are read.
            stop=stop
            if stop is not None
            else Stop(self._rows, self._rows, self._rows, no, tf.zeros_like(self._lengths)),
            buffers=buffers,
        )
        return self._choose(state, logits)

    def run(self, state: _State, weights: Weights) -> _State:
        """All further steps."""

        def loop(read_weights: Callable[[Tensor], Weights]) -> _State:
            """Runs with the weights that `read_weights` returns at each step, given the last tokens."""
            (last,) = tf.while_loop(
                lambda state: tf.reduce_any(state.running),
                lambda state: (self._step(state, read_weights(state.token)),),
                (state,),
                parallel_iterations=1,
            )
            return cast("_State", last)

        if self._network.dtype == tf.float32:
            return loop(lambda token: weights)
        # The products of one row are limited by memory bandwidth: reading the smaller weights at each step is faster.
        # For more rows, weights that are cast to float32 once are faster.
        return cast(
            "_State",
            tf.cond(
                self._batch == 1,
                lambda: loop(lambda token: _cast_at_each_step(weights, token)),
                lambda: loop(lambda token: weights),
            ),
        )

    def _step(self, state: _State, weights: Weights) -> _State:
        """Feeds the last tokens and chooses the next ones."""
        # Finished rows are fed too while others run; they must not leave the context.
        positions = tf.minimum(self._lengths + state.step, self._network.context) - 1
        logits, buffers = self._network.step(state.token, positions, state.buffers, weights, xla=self._xla)
        return self._choose(state._replace(buffers=buffers), logits)

    def _choose(self, state: _State, logits: Tensor) -> _State:
        """Chooses one token per row and ends the rows that are finished."""
        slots = tf.range(self._capacity + 1)[None]
        known = slots < (self._lengths + state.step)[:, None]
        uniform = tf.gather(self._uniform, state.step, axis=1)
        token = self._sample(logits, state.tokens, known, self._params, uniform)
        token = tf.where(state.running, token, FILLER_ID)
        # A finished row may be at the end of the capacity while others run.
        indices = tf.stack([self._rows, tf.minimum(self._lengths + state.step, self._capacity)], 1)
        stop = self._finder.find(state.stop, token, state.running) if self._finder is not None else state.stop
        ended = state.running & (tf.reduce_any(token[:, None] == self._eos[None], 1) | stop.found)
        count = state.count + tf.cast(state.running, tf.int32)
        return state._replace(
            step=state.step + 1,
            token=token,
            tokens=tf.tensor_scatter_nd_update(state.tokens, indices, token),
            count=count,
            running=state.running & ~ended & (count < self._remaining),
            stopped=state.stopped | ended,
            stop=stop,
        )


def _cast_at_each_step(weights: Weights, token: Tensor) -> Weights:
    """The same weights, made to depend on the last token, so that XLA cannot cast them once before the loop."""
    flat = tf.nest.flatten(weights)
    *flat, _ = xla_optimization_barrier(input=[*flat, token])
    return cast("Weights", tf.nest.pack_sequence_as(weights, flat))

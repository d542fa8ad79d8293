"""The decoding loop: prompts in, tokens out, with a cache and knobs a row; one loop for every architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import tensorflow as tf

from tfclm.compat import xla_optimization_barrier
from tfclm.savedmodel.graph.network import Network, Weights
from tfclm.savedmodel.graph.sampling import SamplingParams, sample_next_token
from tfclm.savedmodel.graph.stopping import Stop, StopFinder

__all__ = ["Decoded", "decode"]

Tensor = Any

IDLE = 0  # what a row that is done feeds the model meanwhile: a padding id need not have an embedding


class Decoded(NamedTuple):
    """What came out, a row each."""

    output_ids: Tensor  # int32 [B, limit], padded on the right
    count: Tensor  # int32 [B], tokens, an EOS or a stop string's among them
    stopped: Tensor  # bool [B], by an EOS or a stop string
    length_in_bytes: Tensor  # int32 [B], of the text before the stop string; -1 where none was found


class _State(NamedTuple):
    step: Tensor  # int32 []
    token: Tensor  # int32 [B], the last one
    tokens: Tensor  # int32 [B, capacity], prompt and what was generated, without gaps
    count: Tensor  # int32 [B]
    running: Tensor  # bool [B]
    stopped: Tensor  # bool [B]
    stop: Stop
    buffers: Sequence[Tensor]


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
    stop: Tensor | None = None,
    xla: bool = False,
) -> Decoded:
    """Continues each prompt until an EOS, its stop string, its max_new_tokens or the end of the context.

    Args:
        network: the model.
        ids: int32 [B, L], padded on the right.
        lengths: int32 [B], tokens of each prompt, 1 to the context's size - 1.
        knobs: [B] each.
        uniform: float64 [B, limit], in [0, 1), a column a step.
        eos_ids: tokens that end a row.
        pad_id: what stands behind a row's last token.
        limit: the largest max_new_tokens.
        finder: looks for stop strings; needed if stop is given.
        stop: what `finder.begin` gives for the rows' stop strings.
        xla: the function is to be compiled; capacities are then those of the limit.
    """
    weights = network.weights()
    batch, width = tf.unstack(tf.shape(ids))
    if ids.shape[0] is not None:
        batch = ids.shape[0]
    if ids.shape[1] is not None:
        width = ids.shape[1]
    room = tf.minimum(params.max_new_tokens, network.context - lengths)
    # No row goes beyond the context. One slot more: the last one always holds the present position.
    capacity = tf.minimum(width + (limit if xla else tf.reduce_max(room)), network.context) + 1
    eos = tf.constant(list(eos_ids), tf.int32)
    rows = tf.range(batch)

    def pick(state: _State, logits: Tensor) -> _State:
        """Chooses a token a row, and ends the rows that are done."""
        slots = tf.range(capacity)[None]
        known = slots < (lengths + state.step)[:, None]
        numbers = tf.gather(uniform, state.step, axis=1)
        token = sample_next_token(logits, state.tokens, known, params, numbers, xla=xla)
        token = tf.where(state.running, token, IDLE)
        # A row that is done, and others are not, may be at the end.
        place = tf.stack([rows, tf.minimum(lengths + state.step, capacity - 1)], 1)
        found = finder.find(state.stop, token, state.running) if finder is not None else state.stop
        ended = state.running & (tf.reduce_any(token[:, None] == eos[None], 1) | found.found)
        count = state.count + tf.cast(state.running, tf.int32)
        return state._replace(
            step=state.step + 1,
            token=token,
            tokens=tf.tensor_scatter_nd_update(state.tokens, place, token),
            count=count,
            running=state.running & ~ended & (count < room),
            stopped=state.stopped | ended,
            stop=found,
        )

    def step(state: _State, weights: Weights) -> tuple[_State]:
        # A row that is done goes on idly while others run; it must not leave the context.
        positions = tf.minimum(lengths + state.step, network.context) - 1
        logits, buffers = network.step(state.token, positions, state.buffers, weights, xla=xla)
        return (pick(state._replace(buffers=buffers), logits),)

    logits, buffers = network.prefill(ids, lengths, capacity, weights, xla=xla)
    no = tf.zeros_like(lengths, tf.bool)
    state = _State(
        step=tf.constant(0),
        token=tf.zeros_like(lengths),
        tokens=tf.pad(ids, [[0, 0], [0, capacity - width]]),
        count=tf.zeros_like(lengths),
        running=room > 0,
        stopped=no,
        # Without a finder the rest of it is never looked at.
        stop=stop if stop is not None else Stop(rows, rows, rows, no, tf.zeros_like(lengths)),
        buffers=buffers,
    )
    state = pick(state, logits)

    def loop(read: Callable[[Tensor], Weights]) -> _State:
        """All steps, with the weights that `read` gives, given the last tokens."""
        (last,) = tf.while_loop(
            lambda state: tf.reduce_any(state.running),
            lambda state: step(state, read(state.token)),
            (state,),
            parallel_iterations=1,
        )
        return cast("_State", last)

    if network.dtype == tf.float32:
        state = loop(lambda token: weights)
    else:
        # One row's products wait for memory, so that weights are read in the smaller type at each step. More rows'
        # products are faster with float32.
        state = tf.cond(
            batch == 1, lambda: loop(lambda token: _again(weights, token)), lambda: loop(lambda token: weights)
        )
    # The capacity of a call may be less than what the limit asks for.
    behind = tf.pad(state.tokens, [[0, 0], [0, limit]], constant_values=pad_id)
    output = tf.gather(behind, lengths[:, None] + tf.range(limit), batch_dims=1)
    output = tf.where(tf.range(limit) < state.count[:, None], output, pad_id)
    found = state.stop.found if finder is not None else no
    return Decoded(output, state.count, state.stopped, tf.where(found, state.stop.length, -1))


def _again(weights: Weights, token: Tensor) -> Weights:
    """The same weights, which XLA cannot cast once, before the loop, since they seem to come from the last token."""
    flat = tf.nest.flatten(weights)
    *flat, _ = xla_optimization_barrier(input=[*flat, token])
    whole = tf.nest.pack_sequence_as(weights, flat)
    return cast("Weights", whole)

"""A pass of the engine: rows that are done leave, others join, prompts are read further, and rows are decoded."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import tensorflow as tf

from tfclm.savedmodel.graph.branching import apply_if
from tfclm.savedmodel.graph.counting import any_before, at_least, largest, number_of, total, wide
from tfclm.savedmodel.graph.decoding import CompiledDecoder, Decoder, DecodingRows
from tfclm.savedmodel.graph.key_value_cache import CompiledSizes, rearranged, row_of
from tfclm.savedmodel.graph.network import Network
from tfclm.savedmodel.graph.prefill import COMPILED_CHUNK, PromptReader
from tfclm.savedmodel.graph.prefix_cache import PrefixCache
from tfclm.savedmodel.graph.sampling import uniform_samples
from tfclm.savedmodel.graph.state import DECODING, ENDED, FINISHED, READING, WAITING, Rows, SharedState, State

__all__ = ["Passes"]

Tensor = Any

MAX_STEPS = 64
# Steps after which others may take their turn, so that it is noticed if they are gone. There is no clock: TensorFlow
# refuses to tell the time if determinism is enabled.
STEPS_BETWEEN_TURNS = 8
MIN_GROWTH = 64  # slots that are added to the key-value cache at once
# Passes that a request must have missed to be considered gone. They are short if the model is small, and the thread of
# a request may have to wait for a processor.
MISSED_PASSES = 3
MISSED_PASSES_TIMES_WEIGHTS = 2**25
MAX_MISSED_PASSES = 100


class Passes:
    """Runs passes.

    Args:
        network: the model.
        decoder: for its rows.
        cache: the prefix cache.
        shared: where new rows are submitted.
        max_rows: the maximum number of rows that are decoded together.
        max_tokens: the maximum number of tokens whose keys and values are kept; the context or more.
        sizes: what XLA compiles for, if it does.
    """

    def __init__(
        self,
        network: Network,
        decoder: Decoder,
        cache: PrefixCache,
        shared: SharedState,
        *,
        max_rows: int,
        max_tokens: int,
        sizes: CompiledSizes | None,
    ) -> None:
        self._network, self._decoder, self._cache, self._shared = network, decoder, cache, shared
        self._max_rows, self._max_tokens, self._sizes = max_rows, max_tokens, sizes
        weights = sum(int(np.prod(variable.shape)) for variable in network.variables)
        missed = min(MAX_MISSED_PASSES, MISSED_PASSES_TIMES_WEIGHTS // weights)
        self._missed_passes = max(MISSED_PASSES, missed)
        self._prompts = PromptReader(network, cache, shared, max_rows=max_rows, max_tokens=max_tokens, sizes=sizes)

    def compile(self, rows: Rows) -> Tensor:
        """Compiles all sizes with XLA; `rows` has one row. Returns 0."""
        assert self._sizes is not None
        assert isinstance(self._decoder, CompiledDecoder)
        decoder = self._decoder
        weights = self._network.weights()  # outside of the loop: Grappler breaks a loop that reads them for XLA
        pairs = [(count, capacity) for count in self._sizes.rows for capacity in self._sizes.capacities]

        def compile_one(index: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
            count, capacity = tf.unstack(tf.constant(pairs)[index])
            chosen = rows.chosen(tf.zeros([count], tf.int32))
            no = chosen.length > 0
            tokens = tf.zeros([count, capacity + 1], tf.int32)
            buffers = tuple(self._network.buffers(count, capacity))
            length = chosen.length + 1
            decoding = DecodingRows(tokens, length, chosen.prompt_length, no, no, chosen.stop, buffers)
            with tf.control_dependencies(self._prompts.compile(chosen.tokens, buffers)):
                return index + 1, steps + decoder.compile(decoding, chosen.params, chosen.extra, weights)

        return tf.while_loop(lambda index, _: index < len(pairs), compile_one, (0, 0), parallel_iterations=1)[1]

    def run(self, state: State, due: Tensor) -> State:
        """The state after one more pass if `due` bool [], else the state as it is."""
        state = self._without_gone(state, due)
        # Before others begin, which may continue their texts.
        state = apply_if(due & tf.reduce_any(self._leaving(state)), self._leave, state)
        state = apply_if(due & tf.reduce_any(state.rows.status == WAITING), self._prompts.begin, state)
        state = apply_if(due & tf.reduce_any(self._prompts.unread(state) > 0), self._prompts.read, state)
        state = apply_if(due & self._is_rearranged(state), self._rearrange, state)
        state = self._without_ended(state, due)
        state = apply_if(due & self._is_decoded(state), self._decode, state)
        return state._replace(number=state.number + tf.cast(due, tf.int64))

    def _without_gone(self, state: State, due: Tensor) -> State:
        """Ends the rows whose requests have not asked for a while."""
        rows = state.rows
        gone = due & (state.number - rows.seen >= self._missed_passes)
        reading = gone & (rows.status == READING)

        def released() -> Any:
            return self._cache.remove(state.entries, tf.boolean_mask(rows.entry, reading))

        entries = tf.cond(tf.reduce_any(reading), released, lambda: state.entries)
        rows = rows._replace(status=tf.where(gone, ENDED, rows.status), entry=tf.where(reading, -1, rows.entry))
        return state._replace(rows=rows, entries=entries)

    def _is_rearranged(self, state: State) -> Tensor:
        """Whether rows join or leave the key-value cache, or need more slots in it."""
        rows = state.rows
        longest = largest(rows.length, rows.status == DECODING)
        full = longest > tf.shape(state.buffers[0])[2]
        return tf.reduce_any(self._joining(state) | self._leaving(state)) | full

    def _without_ended(self, state: State, due: Tensor) -> State:
        """Removes the rows that have ended, whether they were decoded or not."""
        remaining = tf.where(state.rows.status != ENDED)[:, 0]

        def without_ended() -> State:
            logprobs = state.logprobs.remaining(state.rows, remaining)
            return state._replace(rows=state.rows.chosen(remaining), logprobs=logprobs)

        fewer = due & (tf.size(remaining) < tf.size(state.rows.status))
        return cast("State", tf.cond(fewer, without_ended, lambda: state))

    def _leaving(self, state: State) -> Tensor:
        """Which rows bool [N] are in the key-value cache and no longer decoded."""
        return (state.rows.status >= FINISHED) & (state.rows.slot >= 0)

    def _joining(self, state: State) -> Tensor:
        """Which rows bool [N] have read their prompts and find a place among those that are decoded."""
        rows = state.rows
        read, decoding = self._prompts.unread(state) == 0, rows.status == DECODING
        count = number_of(decoding) + tf.cumsum(tf.cast(read, tf.int32))
        longest = tf.scan(tf.maximum, tf.where(read, rows.end, 0), largest(rows.end, decoding))
        unjoined = tf.where(read, rows.prompt_length, 0)
        prompts = total(rows.prompt_length, rows.status == READING) - tf.cumsum(wide(unjoined))
        fits = (count <= self._max_rows) & (wide(count) * wide(longest) + prompts <= self._max_tokens)
        return read & ~any_before(read & ~fits)

    def _leave(self, state: State) -> State:
        """Copies the keys and values of rows that leave into the prefix cache; `_rearrange` must follow."""
        rows = state.rows
        leaving = tf.where(self._leaving(state))[:, 0]

        def leave(index: Tensor, entries: Any) -> tuple[Tensor, Any]:
            row = tf.cast(leaving[index], tf.int32)
            length = rows.length[row] - 1
            parts = row_of(state.buffers, rows.slot[row], length)
            return index + 1, self._cache.add(entries, state.number, rows.tokens[row], parts, length)

        _, entries = tf.while_loop(
            lambda index, _: index < tf.size(leaving), leave, (tf.constant(0), state.entries), parallel_iterations=1
        )
        return state._replace(entries=entries)

    def _rearrange(self, state: State) -> State:
        """Makes the key-value cache anew, for the rows that are decoded and those that join."""
        rows, joins = state.rows, self._joining(state)
        decoded = tf.where(rows.status == DECODING)[:, 0]
        staying = tf.gather(decoded, tf.argsort(tf.gather(rows.slot, decoded)))
        joining = tf.where(joins)[:, 0]
        order = tf.concat([staying, joining], 0)
        capacity = self._capacity(rows, order, tf.shape(state.buffers[0])[2], tf.size(staying))
        entries = tf.gather(rows.entry, joining)
        buffers = rearranged(
            state.buffers,
            tf.gather(rows.slot, staying),
            entries,
            lambda entry: self._cache.read(state.entries, entry),
            tf.size(order) if self._sizes is None else at_least(self._sizes.rows, tf.size(order)),
            capacity,
        )
        slot = tf.where(rows.status == DECODING, rows.slot, -1)
        rows = rows._replace(
            status=tf.where(joins, DECODING, rows.status),
            entry=tf.where(joins, -1, rows.entry),
            slot=tf.tensor_scatter_nd_update(slot, order[:, None], tf.range(tf.size(order))),
            started=tf.where(joins, state.number, rows.started),
        )
        released = self._cache.within(self._cache.release(state.entries, entries), self._prompts.room(rows))
        return state._replace(rows=rows, buffers=buffers, entries=released)

    def _capacity(self, rows: Rows, order: Tensor, old: Tensor, staying: Tensor) -> Tensor:
        """Slots int32 [] for the rows at `order` [B], of which `staying` [] have `old` [] slots now."""
        longest = tf.reduce_max(tf.concat([tf.gather(rows.length, order), [0]], 0))
        most = tf.reduce_max(tf.concat([tf.gather(rows.end, order), [0]], 0))
        if self._sizes is not None:
            # The keys and values of a row's last token are never needed.
            return at_least(self._sizes.capacities, tf.minimum(most - 1, longest + COMPILED_CHUNK))
        growth = tf.maximum(MIN_GROWTH, longest // 4)
        wanted = tf.minimum(most, (longest + growth + MIN_GROWTH - 1) // MIN_GROWTH * MIN_GROWTH)
        # Shrinking costs a copy that is not worth it for a few slots.
        keep = (staying > 0) & (longest <= old) & (wanted > old // 2) & (old <= most)
        return tf.where(keep, old, wanted)

    def _is_decoded(self, state: State) -> Tensor:
        """Whether a row is decoded in this pass, and with it all others that can be.

        A request gets its answer when all of its rows are done. So its rows are decoded together, which takes fewer
        steps, once all of their prompts are read.
        """
        rows = state.rows
        decoding = tf.boolean_mask(rows.request, rows.status == DECODING)
        unread = tf.boolean_mask(rows.request, self._prompts.unread(state) > 0)
        return tf.reduce_any(~tf.reduce_any(decoding[:, None] == unread, 1))

    def _decode(self, state: State) -> State:
        """Decodes the rows of the key-value cache by a few tokens."""
        rows, weights = state.rows, self._network.weights()
        decoded = tf.where(rows.status == DECODING)[:, 0]
        indices = tf.gather(decoded, tf.argsort(tf.gather(rows.slot, decoded)))
        count, batch = tf.size(indices), tf.shape(state.buffers[0])[0]
        # With XLA there may be more rows in the cache, which are decoded like the first one.
        chosen = rows.chosen(tf.concat([indices, tf.fill([batch - count], indices[0])], 0))
        end = tf.where(tf.range(batch) < count, chosen.end, 0)
        capacity = tf.shape(state.buffers[0])[2]
        others = tf.reduce_any(rows.request != rows.request[0])
        most = tf.where(others, STEPS_BETWEEN_TURNS, MAX_STEPS)
        most = tf.minimum(most, capacity + 1 - tf.reduce_max(chosen.length))
        # While prompts are read, they get a chunk after each step, or after the last step of the row that ends first.
        last = tf.reduce_min(tf.boolean_mask(chosen.end - chosen.length, end > 0))
        between_chunks = tf.where(last <= STEPS_BETWEEN_TURNS, last, 1)
        unread = tf.reduce_any(self._prompts.unread(state) > 0)
        most = tf.minimum(most, tf.where(unread, between_chunks, MAX_STEPS))
        may_join = ~unread & (count < self._max_rows)

        def go_on(steps: Tensor) -> Tensor:
            with tf.control_dependencies([steps]):
                waits = may_join & (self._shared.submitted() > 0)
                return (steps < most) & ~waits

        uniform = tf.cond(
            tf.reduce_any(chosen.params.temperature > 0),
            lambda: uniform_samples(chosen.params.seed, chosen.length, MAX_STEPS),
            lambda: tf.zeros([batch, MAX_STEPS], tf.float64),
        )
        no = tf.zeros_like(end, tf.bool)
        decoding = DecodingRows(
            chosen.tokens[:, : capacity + 1], chosen.length, chosen.prompt_length, no, no, chosen.stop, state.buffers
        )
        done = self._decoder.run(decoding, chosen.params, chosen.extra, end, uniform, weights, go_on)
        tokens = tf.concat([done.tokens, chosen.tokens[:, capacity + 1 :]], 1)
        status = tf.where(done.finished, FINISHED, DECODING)

        def updated(old: Tensor, new: Tensor) -> Tensor:
            return tf.tensor_scatter_nd_update(old, indices[:, None], new[:count])

        rows = rows._replace(
            tokens=updated(rows.tokens, tokens),
            length=updated(rows.length, done.length),
            stopped=updated(rows.stopped, done.stopped),
            status=updated(rows.status, status),
            stop=tf.nest.map_structure(updated, rows.stop, done.stop),
        )
        first, last = chosen.length - chosen.prompt_length, done.length - chosen.prompt_length
        new = [field[:count] for field in (first, last, *done.logprobs)]
        logprobs = tf.cond(
            tf.reduce_any(chosen.extra.top_logprobs >= 0),
            lambda: state.logprobs.updated(rows, indices, *new),
            lambda: state.logprobs,
        )
        return state._replace(rows=rows, buffers=done.buffers, logprobs=logprobs)

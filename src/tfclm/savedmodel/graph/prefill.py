"""The prompts of the engine's rows: rows that wait begin, and their prompts are read in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import tensorflow as tf

from tfclm.savedmodel.graph.counting import any_before, at_least, largest, number_of, total, wide
from tfclm.savedmodel.graph.key_value_cache import CompiledSizes, Writer, fitted, row_of
from tfclm.savedmodel.graph.network import Network, Weights
from tfclm.savedmodel.graph.prefix_cache import Entries, PrefixCache
from tfclm.savedmodel.graph.state import DECODING, READING, WAITING, Rows, SharedState, State

__all__ = ["COMPILED_CHUNK", "PromptReader"]

Tensor = Any

# Tokens of prompts that are read in a pass: few if rows are decoded that began before the prompts arrived, which would
# wait; else many, which is faster.
CHUNK_BETWEEN_STEPS = 64
CHUNK = 256
COMPILED_CHUNK = 64  # with XLA, which compiles for this number and for SHORT; the others are rounded up
# Prompts of up to so many tokens are read at once, because a few tokens take about as long as one: the time to read the
# weights. So are, without XLA, those of at most twice the length of the first one of them, and at least half of it.
SHORT = 16
MAX_OVERTAKEN_PASSES = 100  # for which a row waits while shorter prompts overtake it


class PromptReader:
    """Begins the prompts of rows and reads them into entries of the prefix cache.

    Args:
        network: the model.
        cache: the prefix cache.
        shared: where new rows are submitted.
        max_rows: the maximum number of rows that are decoded together.
        max_tokens: the maximum number of tokens whose keys and values are kept; the context or more.
        sizes: what XLA compiles for, if it does.
    """

    def __init__(
        self,
        network: Network,
        cache: PrefixCache,
        shared: SharedState,
        *,
        max_rows: int,
        max_tokens: int,
        sizes: CompiledSizes | None,
    ) -> None:
        self._network, self._cache, self._shared = network, cache, shared
        self._max_rows, self._max_tokens, self._sizes = max_rows, max_tokens, sizes
        self._extension = tf.function(self._compiled_extension, autograph=False, jit_compile=True)
        self._beginning = tf.function(self._compiled_beginning, autograph=False, jit_compile=True)

    def compile(self, tokens: Tensor, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Compiles for rows of tokens [B, context + 1] and their buffers [B, ...]; returns what must be computed."""
        lengths = tf.ones_like(tokens[:, 0])
        extended = self._extension(tokens[:1], tf.constant(0), lengths[:1], [part[:1] for part in buffers])
        with tf.control_dependencies(extended):
            new: list[Tensor] = self._beginning(tokens, lengths)
            return new

    def begin(self, state: State) -> State:
        """Begins the prompts of rows that wait as far as there is room for their tokens.

        First come first served, but the shortest prompt may overtake those that have not waited for long.
        """
        rows = state.rows
        reading, decoding = rows.status == READING, rows.status == DECODING
        waiting = tf.where(rows.status == WAITING)[:, 0]
        since = tf.reduce_min(tf.concat([tf.gather(rows.arrived, waiting), [state.number]], 0))
        overtaken = ~_in_order(state.number) & (state.number - since < MAX_OVERTAKEN_PASSES)
        order = tf.argsort(tf.where(overtaken, tf.gather(rows.prompt_length, waiting), 0), stable=True)
        waiting = tf.gather(waiting, tf.concat([order[:1], tf.sort(order[1:])], 0))

        prompts = total(rows.prompt_length, reading) + tf.cumsum(wide(tf.gather(rows.prompt_length, waiting)))
        longest = tf.scan(tf.maximum, tf.gather(rows.end, waiting), largest(rows.end, reading | decoding))
        number = tf.range(1, tf.size(waiting) + 1) + number_of(reading)
        # When its prompt is read, a row must find a place beside the rows that are decoded now and the other prompts.
        tokens = wide(number_of(decoding) + 1) * wide(longest) + prompts
        alone = (number == 1) & ~tf.reduce_any(decoding)  # always fits
        fits = (number <= self._max_rows) & (alone | (tokens <= self._max_tokens))
        admitted = tf.boolean_mask(waiting, ~any_before(~fits))

        def begin(index: Tensor, state: State) -> tuple[Tensor, State]:
            return index + 1, self._begin(state, tf.cast(admitted[index], tf.int32))

        shapes = (tf.TensorShape([]), tf.nest.map_structure(lambda spec: spec.shape, self._shared.specs))
        _, state = tf.while_loop(
            lambda index, state: index < tf.size(admitted),
            begin,
            (tf.constant(0), state),
            shape_invariants=shapes,
            parallel_iterations=1,
        )
        return state

    def _begin(self, state: State, row: Tensor) -> State:
        """Gives a row an entry, with the keys and values of the beginning of its prompt if they are in the cache."""
        rows, entries = state.rows, state.entries
        tokens, unread = rows.tokens[row], rows.prompt_length[row] - 1
        best, known = self._cache.longest_match(entries, tokens, unread)
        size = unread if self._sizes is None else at_least(self._sizes.capacities, unread)
        parts = tf.cond(
            known > 0,
            lambda: fitted(self._cache.read(entries, best), known, size),
            lambda: self._network.buffers(1, size),
        )
        used = tf.cond(
            known > 0,
            lambda: tf.tensor_scatter_nd_update(entries.used, best[None, None], state.number[None]),
            lambda: entries.used,
        )
        entries, entry = self._cache.begin(entries._replace(used=used), state.number, tokens, parts, known)
        at = row[None, None]
        rows = rows._replace(
            status=tf.tensor_scatter_nd_update(rows.status, at, [READING]),
            entry=tf.tensor_scatter_nd_update(rows.entry, at, entry[None]),
        )
        return state._replace(rows=rows, entries=self._cache.within(entries, self.room(rows)))

    def room(self, rows: Rows) -> Tensor:
        """The tokens int32 [] that the prefix cache may hold."""
        decoding = rows.status == DECODING
        decoded = wide(number_of(decoding)) * wide(largest(rows.end, decoding))
        prompts = total(rows.prompt_length, rows.status == READING)
        return tf.cast(tf.maximum(self._max_tokens - decoded - prompts, 0), tf.int32)

    def unread(self, state: State) -> Tensor:
        """The tokens int32 [N] of each row's prompt that are still to be read; -1 for rows of another status."""
        rows = state.rows
        read = tf.gather(state.entries.length, tf.maximum(rows.entry, 0))
        return tf.where(rows.status == READING, rows.prompt_length - 1 - read, -1)

    def read(self, state: State) -> State:
        """Reads chunks of prompts: of the shortest rests, or in order of arrival."""
        weights = self._network.weights()
        is_waited_for = self._is_waited_for(state)
        chunk = tf.where(is_waited_for, CHUNK_BETWEEN_STEPS, CHUNK)

        def again(budget: Tensor, entries: Entries) -> Tensor:
            unread = self.unread(state._replace(entries=entries))
            first = budget == chunk
            return (budget > 0) & tf.reduce_any(unread > 0) & (first | (self._shared.submitted() == 0))

        def read(budget: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
            now = state._replace(entries=entries)
            unread = self.unread(now)
            order = tf.where(_in_order(state.number), tf.range(tf.size(unread)), unread)
            row = tf.argmin(tf.where(unread > 0, order, tf.int32.max), output_type=tf.int32)
            together = self._together(now, row, unread, budget)
            longest = tf.reduce_max(tf.gather(unread, together))
            tokens = tf.minimum(longest, budget if self._sizes is None else COMPILED_CHUNK)
            # Rows whose prompts are read can be decoded, so the rest of the budget waits until after that.
            rest = tf.where(is_waited_for & (tokens == longest), 0, budget - tf.size(together) * tokens)
            return rest, self._read_chunk(now, together, tokens, weights)

        entries = tf.while_loop(again, read, (chunk, state.entries), parallel_iterations=1)[1]
        return state._replace(entries=entries)

    def _is_waited_for(self, state: State) -> Tensor:
        """Whether a row that was decoded before the prompts arrived waits until they are read."""
        rows = state.rows
        unread, decoding = self.unread(state) > 0, rows.status == DECODING
        arrived = tf.reduce_min(tf.where(unread, rows.arrived, tf.int64.max))
        return tf.reduce_any(decoding & (rows.started < arrived))

    def _together(self, state: State, row: Tensor, unread: Tensor, budget: Tensor) -> Tensor:
        """The rows int32 [R] that are read at once: `row` [], and if it has not begun, others that are as short."""
        new = (unread > 0) & (unread == state.rows.prompt_length - 1)
        # A batch takes as long as if all of its rows were as long as the longest.
        alike = new & new[row]
        if self._sizes is None:
            alike &= (unread <= tf.maximum(2 * unread[row], SHORT)) & (unread[row] <= tf.maximum(2 * unread, SHORT))
        else:
            alike &= (unread <= SHORT) & (unread[row] <= SHORT)
        others = tf.cast(tf.where(alike & (tf.range(tf.size(unread)) != row))[:, 0], tf.int32)
        others = tf.gather(others, tf.argsort(tf.gather(unread, others), stable=True))
        rows = tf.concat([row[None], others], 0)
        tokens = tf.maximum(tf.gather(unread, rows), unread[row]) * tf.range(1, tf.size(rows) + 1)
        return rows[: tf.maximum(1, number_of(tokens <= budget))]

    def _read_chunk(self, state: State, together: Tensor, tokens: Tensor, weights: Weights) -> Entries:
        """The entries after `tokens` [] more tokens of the prompts of rows [R] are read, or fewer where they end."""
        rows, entries, sizes = state.rows.chosen(together), state.entries, self._sizes
        start = entries.length[rows.entry[0]]
        read = tf.minimum(start + tokens, rows.prompt_length - 1)
        one = tf.size(together) == 1

        def own() -> list[Tensor]:
            return self._cache.read(entries, rows.entry[0])

        if sizes is None:
            parts = tf.cond(one, own, lambda: self._network.buffers(tf.size(together), tokens))
            _, parts = self._network.extend(rows.tokens, start, tokens, rows.prompt_length, parts, weights)
        else:

            def extended() -> list[Tensor]:
                parts = own()
                write = Writer(parts[0], (start + tf.range(tokens))[None]).write
                new = self._extension(rows.tokens, start, rows.prompt_length, parts)
                return [write(part, each[:, :, :tokens]) for part, each in zip(parts, new, strict=True)]

            def begun() -> list[Tensor]:
                batch = at_least(sizes.rows, tf.size(together))
                padded = rows.chosen(tf.minimum(tf.range(batch), tf.size(together) - 1))
                new: list[Tensor] = self._beginning(padded.tokens, padded.prompt_length)
                return new

            one = (start > 0) | (tokens > SHORT)
            parts = tf.cond(one, extended, begun)

        def store(index: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
            part = tf.cond(one, lambda: parts, lambda: row_of(parts, index, read[index]))
            return index + 1, self._cache.write(entries, rows.entry[index], part)

        _, entries = tf.while_loop(
            lambda index, _: index < tf.size(together), store, (tf.constant(0), entries), parallel_iterations=1
        )
        length = tf.tensor_scatter_nd_update(entries.length, rows.entry[:, None], read)
        return cast("Entries", entries._replace(length=length))

    def _compiled_extension(
        self, tokens: Tensor, start: Tensor, lengths: Tensor, parts: Sequence[Tensor]
    ) -> list[Tensor]:
        network = self._network
        return network.extension(tokens, start, COMPILED_CHUNK, lengths, parts, network.weights())

    def _compiled_beginning(self, tokens: Tensor, lengths: Tensor) -> list[Tensor]:
        network = self._network
        return network.extension(
            tokens, tf.constant(0), SHORT, lengths, network.buffers(tf.shape(tokens)[0], 0), network.weights()
        )


def _in_order(number: Tensor) -> Tensor:
    """Whether in this pass, rows that came first go first. In the others, the shortest prompts do."""
    return number % 4 == 0

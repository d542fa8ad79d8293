"""The engine: rows of all requests are decoded together, joining at the next pass and leaving when they are done.

A request submits its rows and then asks again and again, one turn at a time, until they are finished. Turns go through
the queue of one BatchFunction with one thread, so that they never overlap. A turn that finds nothing new runs the next
pass, for the rows of all requests; the others take what that pass has brought. So a request that is cancelled or fails
in a turn takes no other with it: the next one in the queue goes on from the same state. If that fails again and again,
because of a row or because memory runs out, all rows start over.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfclm.savedmodel.graph.decoding import CompiledDecoder, Decoder
from tfclm.savedmodel.graph.key_value_cache import CompiledSizes
from tfclm.savedmodel.graph.network import Network
from tfclm.savedmodel.graph.passes import Passes
from tfclm.savedmodel.graph.prefix_cache import PrefixCache
from tfclm.savedmodel.graph.sampling import PARAM_TYPES, ExtraParams, SamplingParams, no_extras, resolve_seeds
from tfclm.savedmodel.graph.state import ENDED, FINISHED, Logprobs, Rows, SharedState, State, Submission
from tfclm.savedmodel.graph.stopping import Stop, StopFinder

__all__ = ["Completions", "Engine", "EngineLimits"]

Tensor = Any


class EngineLimits(NamedTuple):
    """Sizes of the engine.

    Attributes:
        rows: the maximum number of rows that are decoded together.
        new_tokens: the largest max_new_tokens.
        cached_tokens: the maximum number of tokens whose keys and values are kept; the context or more.
        prefix_cache: whether prompts may start from the keys and values of other rows.
        waiting: the maximum number of requests; a server answers UNAVAILABLE to more.
        top_logprobs: the largest value of the parameter.
    """

    rows: int
    new_tokens: int
    cached_tokens: int
    prefix_cache: bool = True
    waiting: int = 1024
    top_logprobs: int = 0


class Completions(NamedTuple):
    """The generated tokens of each row."""

    output_ids: Tensor  # int32 [B, new_tokens], padded on the right
    count: Tensor  # int32 [B], tokens, including an EOS and a stop string's
    stopped: Tensor  # bool [B], whether an EOS or a stop string ended the row
    length_in_bytes: Tensor  # int32 [B], bytes of the text before the stop string; -1 if none was found
    # Of each new token its own id, then the likeliest ones, int32 [B, the largest count, 0 or 1 + the largest
    # top_logprobs]; -1 where there are none.
    logprob_ids: Tensor
    logprobs: Tensor  # float32 of the same shape, their log-probabilities


class Engine:
    """Continues prompts.

    Args:
        network: the model.
        limits: sizes.
        eos_ids: tokens that end a row.
        pad_id: fills a row after its last token.
        finder: finds stop strings; None if there are none.
        sizes: what XLA compiles for, if it does.

    Example:
        >>> engine = Engine(network, EngineLimits(8, 100, 8192), eos_ids=[0], pad_id=0)
        >>> engine.complete(ids, lengths, params).count.shape
        TensorShape([None])
    """

    def __init__(
        self,
        network: Network,
        limits: EngineLimits,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        finder: StopFinder | None = None,
        sizes: CompiledSizes | None = None,
    ) -> None:
        spec = network.spec
        self._network, self._limits, self._finder, self._pad_id = network, limits, finder, pad_id
        self._width = network.context + 1
        self._cache_shape = [0, spec.kv_heads, 0, spec.head_dim]
        self._cache = PrefixCache(
            # Each row that is decoded may have an entry while its prompt is read, and leave one.
            4 * limits.rows + 8,
            self._width,
            2 * spec.layers,
            spec.kv_heads,
            spec.head_dim,
            # Keys that are rotated by the length of their text cannot be used in another one.
            enabled=limits.prefix_cache and not spec.depends_on_length,
        )
        # A unique name: operations with the same name in one session share their state.
        self._name = f"tfclm-{uuid.uuid4().hex}"
        self._specs = self._submission_specs()
        self._shared = SharedState(self._name, self._empty, self._specs)
        kind = Decoder if sizes is None else CompiledDecoder
        self._passes = Passes(
            network,
            kind(network, eos_ids, finder, limits.top_logprobs),
            self._cache,
            self._shared,
            max_rows=limits.rows,
            max_tokens=limits.cached_tokens,
            sizes=sizes,
        )
        self._compiles = sizes is not None
        self._turn = tf.function(self._take_turn, autograph=False).get_concrete_function(
            tf.TensorSpec([1], tf.int64, "request")
        )

    def complete(
        self,
        ids: Tensor,
        lengths: Tensor,
        params: SamplingParams,
        stop: Tensor | None = None,
        extra: ExtraParams | None = None,
    ) -> Completions:
        """Continues each prompt until an EOS, its stop string, its max_new_tokens or the end of the context.

        Args:
            ids: int32 [B, L], padded on the right.
            lengths: int32 [B], tokens of each prompt, 1 to the context size - 1.
            params: [B] each.
            stop: string [B, up to MAX_STOPS], "" = none; required if there is a finder.
            extra: [B] each; None turns them off.
        """
        extra = no_extras(tf.size(lengths)) if extra is None else extra
        request = resolve_seeds(tf.constant([-1], tf.int64))
        params = params._replace(seed=resolve_seeds(params.seed))
        rows = self._submission(request, ids, lengths, params, stop, extra)

        def turn(known: Tensor, finished: Tensor, *completions: Tensor) -> tuple[Tensor, ...]:
            # Rows that a pass had taken when it failed are unknown: they are submitted again.
            submitted = tf.cond(known, lambda: tf.constant(0), lambda: _after(self._shared.submit(rows)))
            with tf.control_dependencies([submitted]):
                results = self._in_turn(request)
            return tuple(value[0] for value in results)

        none = tf.zeros_like(lengths)
        no_logprobs = tf.zeros([0, 0, 0], tf.int32), tf.zeros([0, 0, 0])
        nothing = (tf.zeros([0, self._limits.new_tokens], tf.int32), none[:0], none[:0] > 0, none[:0], *no_logprobs)
        shapes = [tf.TensorShape([None, self._limits.new_tokens]), *[tf.TensorShape([None])] * 3]
        shapes += [tf.TensorShape([None, None, None])] * 2
        no = tf.constant(False)
        _, _, *completions = tf.while_loop(
            lambda known, finished, *_: ~finished,
            turn,
            (no, no, *nothing),
            shape_invariants=(no.shape, no.shape, *shapes),
            parallel_iterations=1,
        )
        return Completions(*completions)

    def row_count(self) -> Tensor:
        """The number of rows int32 [] that have not ended, as of the last pass. For tests."""
        return tf.reduce_sum(tf.cast(self._shared.read(self._empty).rows.status < FINISHED, tf.int32))

    def _in_turn(self, request: Tensor) -> tuple[Tensor, ...]:
        """Runs `_take_turn` while no other turn runs."""
        results = tf.raw_ops.BatchFunction(
            in_tensors=[request],
            captured_tensors=self._turn.captured_inputs,
            f=self._turn,
            num_batch_threads=1,
            # A turn never shares a batch: what is in a batch is cancelled together.
            max_batch_size=1,
            batch_timeout_micros=0,
            allowed_batch_sizes=[1],
            max_enqueued_batches=self._limits.waiting,
            enable_large_batch_splitting=False,
            Tout=[output.dtype for output in self._turn.outputs],
            shared_name=self._name,
            batching_queue=self._name,
        )
        for result, output in zip(results, self._turn.outputs, strict=True):
            result.set_shape(output.shape)
        return tuple(results)

    def _take_turn(self, request: Tensor) -> tuple[Tensor, ...]:
        """Whether the request's rows are known and finished, [1] each, and the fields of `Completions`, [1, ...].

        Runs a pass unless there is news since the request's last turn. Only finished rows are returned.
        """
        state = self._shared.with_submitted(self._shared.read(self._first))
        mine = state.rows.of(request)
        known = tf.reduce_any(mine)
        news = tf.reduce_any(mine & (state.rows.seen < state.number)) | _all(state.rows.status >= FINISHED, mine)
        seen = tf.where(mine, state.number, state.rows.seen)
        state = state._replace(rows=state.rows._replace(seen=seen))
        due = known & ~news
        with tf.control_dependencies([self._shared.begin(due)]):
            state = self._passes.run(state, tf.identity(due))
        rows = state.rows
        mine = rows.of(request)
        finished = known & _all(rows.status >= FINISHED, mine)
        taken = tf.where(mine & finished)[:, 0]
        completions = self._completions(state, taken)
        # The rows leave with the next pass, which puts their keys and values into the prefix cache.
        state = state._replace(rows=rows._replace(status=tf.where(mine & finished, ENDED, rows.status)))
        with tf.control_dependencies([*completions, self._shared.write(state)]):
            return known[None], tf.identity(finished)[None], *(tf.identity(value)[None] for value in completions)

    def _completions(self, state: State, indices: Tensor) -> Completions:
        """The completions of the rows at `indices` [M]."""
        rows, limit = state.rows.chosen(indices), self._limits.new_tokens
        count = rows.length - rows.prompt_length
        width = tf.shape(rows.tokens)[1]
        positions = tf.minimum(rows.prompt_length[:, None] + tf.range(limit), width - 1)
        generated = tf.gather(rows.tokens, positions, batch_dims=1)
        output = tf.where(tf.range(limit) < count[:, None], generated, self._pad_id)
        output.set_shape([None, limit])
        length_in_bytes = tf.where(rows.stop.found, rows.stop.length, -1)
        return Completions(output, count, rows.stopped, length_in_bytes, *state.logprobs.of(state.rows, indices))

    def _submission(
        self,
        request: Tensor,
        ids: Tensor,
        lengths: Tensor,
        params: SamplingParams,
        stop: Tensor | None,
        extra: ExtraParams,
    ) -> Submission:
        network = self._network
        ids = tf.where(tf.sequence_mask(lengths, tf.shape(ids)[1]), ids, 0)
        # The end of the context, or of the lengths that the cache is of use for; it is not read after the last token.
        threshold = network.spec.threshold
        end = tf.where(lengths <= threshold, min(threshold + 1, network.context), network.context)
        tokens = tf.pad(ids, [[0, 0], [0, self._width]])[:, : self._width]
        return Submission(
            request=tf.broadcast_to(request, tf.shape(lengths)),
            tokens=tf.ensure_shape(tokens, [None, self._width]),
            prompt_length=lengths,
            end=tf.minimum(lengths + params.max_new_tokens, end),
            params=params,
            extra=extra,
            stop=self._stop(stop, lengths),
        )

    def _stop(self, stop: Tensor | None, lengths: Tensor) -> Stop:
        if self._finder is not None:
            return self._finder.begin(stop)
        # Without stop strings, only `found` and `length` are read.
        zeros = tf.zeros_like(lengths)
        return Stop(zeros, zeros, zeros, zeros > 0, zeros)

    def _submission_specs(self) -> Submission:
        params = SamplingParams(*(tf.TensorSpec([None], kind) for kind in PARAM_TYPES))

        def example(ids: Tensor, lengths: Tensor, params: SamplingParams, stop: Tensor) -> Submission:
            extra = no_extras(tf.size(lengths))
            return self._submission(tf.constant([0], tf.int64), ids, lengths, params, stop, extra)

        structure = (
            tf.function(example, autograph=False)
            .get_concrete_function(
                tf.TensorSpec([None, None], tf.int32),
                tf.TensorSpec([None], tf.int32),
                params,
                tf.TensorSpec([None, None], tf.string),
            )
            .structured_outputs
        )
        specs: Submission = tf.nest.map_structure(
            lambda spec: tf.TensorSpec([None, *spec.shape[1:]], spec.dtype), structure, check_types=False
        )
        return specs

    def _empty(self) -> State:
        """A state without rows."""
        buffers = tuple(tf.zeros(self._cache_shape) for _ in range(2 * self._network.spec.layers))
        rows = _no_rows(self._specs)
        logprobs = Logprobs(tf.zeros([0], tf.int32), tf.zeros([0]))
        return State(tf.constant(0, tf.int64), rows, self._cache.empty(), buffers, logprobs)

    def _first(self) -> State:
        """The state before the first pass. With XLA, all sizes are compiled at once here."""
        state = self._empty()
        if not self._compiles:
            return state
        one = tf.nest.map_structure(lambda field: tf.zeros([1, *field.shape[1:]], field.dtype), state.rows)
        with tf.control_dependencies([self._passes.compile(one)]):
            return state._replace(number=tf.identity(state.number))


def _no_rows(submission: Submission) -> Rows:
    fields: Submission = tf.nest.map_structure(lambda spec: tf.zeros([0, *spec.shape[1:]], spec.dtype), submission)
    numbers, flags = tf.zeros([0], tf.int32), tf.zeros([0], tf.bool)
    passes = tf.zeros([0], tf.int64)
    return Rows(
        **fields._asdict(),
        status=numbers,
        length=numbers,
        stopped=flags,
        entry=numbers,
        slot=numbers,
        arrived=passes,
        started=passes,
        seen=passes,
    )


def _all(condition: Tensor, rows: Tensor) -> Tensor:
    """Whether the condition [N] holds for each of the `rows` bool [N]."""
    return tf.reduce_all(condition | ~rows)


def _after(op: Any) -> Tensor:
    with tf.control_dependencies([op]):
        return tf.constant(0)

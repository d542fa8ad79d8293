"""What the passes of the engine share: the rows of all requests, the prefix cache and the key-value cache.

The state outlives a request in a staging area of the session. A pass reads it without taking it out and puts the new
state there in one operation, so that a pass that fails or is cancelled changes nothing: it may only have written to
slots of the key-value cache, and of an entry of the prefix cache, that no token uses yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import tensorflow as tf

from tfclm.savedmodel.graph.prefix_cache import Entries
from tfclm.savedmodel.graph.sampling import ExtraParams, SamplingParams
from tfclm.savedmodel.graph.stopping import Stop

__all__ = [
    *("DECODING", "ENDED", "FINISHED", "READING", "WAITING"),
    *("Logprobs", "Rows", "SharedState", "State", "Submission"),
]

Tensor = Any

# The status of a row, in this order.
WAITING = 0  # for a place among the rows that are decoded together
READING = 1  # its prompt is being read; the keys and values are in an entry of the prefix cache
DECODING = 2
FINISHED = 3  # its request has not taken the tokens yet
ENDED = 4  # the request has its tokens, or is gone

# Passes in a row that fail before all rows start over. Several, because requests that are cancelled at once fail, too.
MAX_FAILURES = 8


class Submission(NamedTuple):
    """The rows of a request."""

    request: Tensor  # int64 [N], the number of the request
    tokens: Tensor  # int32 [N, context + 1]
    prompt_length: Tensor  # int32 [N]
    end: Tensor  # int32 [N], the length at which a row ends
    params: SamplingParams
    extra: ExtraParams
    stop: Stop


class Rows(NamedTuple):
    """The rows of all requests, in the order of their arrival."""

    request: Tensor  # int64 [N]
    tokens: Tensor  # int32 [N, context + 1], prompts and generated tokens
    prompt_length: Tensor  # int32 [N]
    end: Tensor  # int32 [N]
    params: SamplingParams
    extra: ExtraParams
    stop: Stop
    status: Tensor  # int32 [N]
    length: Tensor  # int32 [N], tokens of the prompt and generated ones
    stopped: Tensor  # bool [N], whether an EOS or a stop string ended the row
    entry: Tensor  # int32 [N], of the prefix cache, while READING; else -1
    slot: Tensor  # int32 [N], the row of the key-value cache; -1 if it has none
    arrived: Tensor  # int64 [N], the number of passes when it arrived
    started: Tensor  # int64 [N], the number of passes when its first token was decoded
    seen: Tensor  # int64 [N], the number of passes when the request last asked

    def joined_by(self, new: Submission, number: Tensor) -> Rows:
        """These rows and new ones."""
        none = tf.fill(tf.shape(new.end), -1)
        rows = Rows(
            **new._asdict(),
            status=tf.fill(tf.shape(none), WAITING),
            length=new.prompt_length,
            stopped=none > 0,
            entry=none,
            slot=none,
            arrived=tf.fill(tf.shape(none), number),
            started=tf.fill(tf.shape(none), number),
            seen=tf.fill(tf.shape(none), number),
        )
        return cast("Rows", tf.nest.map_structure(lambda old, added: tf.concat([old, added], 0), self, rows))

    def of(self, request: Tensor) -> Tensor:
        """The rows bool [N] of a request that it has not taken, and that were not dropped."""
        return (self.request == request) & (self.status != ENDED)

    def chosen(self, indices: Tensor) -> Rows:
        """The rows at `indices` int32 [M]."""
        return cast("Rows", tf.nest.map_structure(lambda field: tf.gather(field, indices), self))


class Logprobs(NamedTuple):
    """The log-probabilities of all rows in one array, because few rows ask for any.

    Rows follow one another in their order, each with room for its new tokens: of each token its own log-probability,
    then those of the likeliest ones.
    """

    ids: Tensor  # int32 [F], the tokens whose log-probabilities these are
    values: Tensor  # float32 [F]

    def extended(self, rows: Rows) -> Logprobs:
        """The same with room for the last of the `rows`, which are new."""
        missing = tf.reduce_sum(_logprob_counts(rows)) - tf.size(self.ids)
        return Logprobs(*(tf.pad(field, [[0, missing]]) for field in self))

    def remaining(self, rows: Rows, indices: Tensor) -> Logprobs:
        """Those of the rows at `indices` [M], ascending."""
        keep = tf.scatter_nd(tf.cast(indices, tf.int32)[:, None], tf.ones_like(indices), tf.shape(rows.end)) > 0
        kept = tf.repeat(keep, _logprob_counts(rows))
        return Logprobs(*(tf.boolean_mask(field, kept) for field in self))

    def updated(
        self, rows: Rows, indices: Tensor, first: Tensor, last: Tensor, ids: Tensor, values: Tensor
    ) -> Logprobs:
        """With those of more tokens.

        Args:
            rows: all rows.
            indices: int32 [M], the rows with new tokens.
            first: int32 [M], the number of new tokens that each had.
            last: int32 [M], the number that it has now.
            ids: int32 [M, last - first or more, top].
            values: float32 of the same shape.
        """
        at, inside = _logprob_positions(rows, indices, first, last, tf.shape(ids))
        at = tf.boolean_mask(at, inside)[:, None]
        return Logprobs(
            tf.tensor_scatter_nd_update(self.ids, at, tf.boolean_mask(ids, inside)),
            tf.tensor_scatter_nd_update(self.values, at, tf.boolean_mask(values, inside)),
        )

    def of(self, rows: Rows, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Ids, -1 where there are none, and values [M, tokens, top], of the rows at `indices` [M]."""
        count = tf.gather(rows.length - rows.prompt_length, indices)
        width = 1 + tf.reduce_max(tf.concat([tf.gather(rows.extra.top_logprobs, indices), [-1]], 0))
        shape = tf.stack([tf.size(indices), tf.reduce_max(tf.concat([count, [0]], 0)), width])
        at, inside = _logprob_positions(rows, indices, tf.zeros_like(count), count, shape)
        at = tf.where(inside, at, tf.size(self.ids))
        return tf.gather(tf.pad(self.ids, [[0, 1]], constant_values=-1), at), tf.gather(
            tf.pad(self.values, [[0, 1]]), at
        )


def _logprob_counts(rows: Rows) -> Tensor:
    """The log-probabilities int32 [N] that each row has room for."""
    return (rows.end - rows.prompt_length) * (1 + rows.extra.top_logprobs)


def _logprob_positions(
    rows: Rows, indices: Tensor, first: Tensor, last: Tensor, shape: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the log-probabilities of tokens from `first` [M] on are, int32 [M, tokens, top], and which there are."""
    starts = tf.gather(tf.cumsum(_logprob_counts(rows), exclusive=True), indices)[:, None, None]
    size = tf.gather(1 + rows.extra.top_logprobs, indices)[:, None, None]
    token, rank = first[:, None, None] + tf.range(shape[1])[:, None], tf.range(shape[2])
    return starts + token * size + rank, (token < last[:, None, None]) & (rank < size)


class State(NamedTuple):
    """What a pass leaves to the next one."""

    number: Tensor  # int64 [], passes so far
    rows: Rows
    entries: Entries
    buffers: tuple[Tensor, ...]  # the key-value cache of decoded rows, [B, key-value heads, capacity, head size] each
    logprobs: Logprobs


class SharedState:
    """The staging areas of the state and of submitted rows.

    Only one pass at a time may call `read`, `submitted` and `write`.

    Args:
        name: of the areas, in this session.
        empty: returns a state without rows.
        submission: specs of what `submit` is called with.
    """

    def __init__(self, name: str, empty: Callable[[], State], submission: Submission) -> None:
        structure = tf.function(empty, autograph=False).get_concrete_function().structured_outputs
        self._specs: State = tf.nest.map_structure(_with_unknown_sizes, structure)
        self._state: dict[str, Any] = {"dtypes": _dtypes(self._specs), "shared_name": f"{name}-state"}
        self._submission = submission
        self._submitted: dict[str, Any] = {"dtypes": _dtypes(submission), "shared_name": f"{name}-submitted"}
        # Holds a value for each pass that has begun since a state was written.
        self._begun: dict[str, Any] = {"dtypes": [tf.bool], "shared_name": f"{name}-begun"}

    @property
    def specs(self) -> State:
        """Specs of the state's tensors."""
        return self._specs

    def submit(self, rows: Submission) -> Any:
        """Adds the rows of a request to those that the next pass sees; returns the op."""
        return tf.raw_ops.Stage(values=tf.nest.flatten(rows), shared_name=self._submitted["shared_name"])

    def submitted(self) -> Tensor:
        """The number of requests, int32 [], whose rows were submitted since the last pass."""
        return tf.raw_ops.StageSize(**self._submitted)

    def read(self, first: Callable[[], State]) -> State:
        """The state; before the first pass, and after MAX_FAILURES passes that failed, what `first` returns."""
        size = tf.raw_ops.StageSize(**self._state)
        failed = tf.raw_ops.StageSize(**self._begun) >= MAX_FAILURES

        def last() -> State:
            return cast("State", _packed(self._specs, tf.raw_ops.StagePeek(index=size - 1, **self._state)))

        return cast("State", tf.cond((size > 0) & ~failed, last, first))

    def begin(self, due: Tensor) -> Tensor:
        """Notes that a pass begins if `due` bool []; it has failed if no state is written after it."""

        def note() -> Tensor:
            with tf.control_dependencies([tf.raw_ops.Stage(values=[due], shared_name=self._begun["shared_name"])]):
                return tf.constant(0)

        return tf.cond(due, note, lambda: tf.constant(0))

    def with_submitted(self, state: State) -> State:
        """The state with the rows that were submitted since the last pass."""

        def add(_: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
            new = _packed(self._submission, tf.raw_ops.Unstage(**self._submitted))
            # A request that submits its rows again, because a failed pass had taken them, may have been seen after all.
            unknown = tf.logical_not(tf.reduce_any(rows.of(new.request[0])))
            joined = tf.cond(unknown, lambda: rows.joined_by(new, state.number), lambda: rows)
            with tf.control_dependencies([joined.request]):
                return self.submitted(), joined

        count = self.submitted()
        specs = tf.nest.map_structure(lambda spec: spec.shape, self._specs.rows)
        _, rows = tf.while_loop(
            lambda count, rows: count > 0,
            add,
            (count, state.rows),
            shape_invariants=(tf.TensorShape([]), specs),
            parallel_iterations=1,
        )
        return state._replace(rows=rows, logprobs=state.logprobs.extended(rows))

    def write(self, state: State) -> Any:
        """Replaces the state; returns a tensor that exists once it is done."""
        before = tf.raw_ops.StageSize(**self._state)
        with tf.control_dependencies([before]):
            staged = tf.raw_ops.Stage(values=tf.nest.flatten(state), shared_name=self._state["shared_name"])

        with tf.control_dependencies([staged]):
            removed = _take_out(self._state, before)
        with tf.control_dependencies([removed]):
            return _take_out(self._begun, tf.raw_ops.StageSize(**self._begun))


def _take_out(area: dict[str, Any], count: Tensor) -> Tensor:
    """Removes the `count` [] oldest values of a staging area; returns a tensor that exists once it is done."""

    def remove(index: Tensor) -> tuple[Tensor]:
        old = tf.raw_ops.Unstage(**area)
        with tf.control_dependencies(old[:1]):
            return (index + 1,)

    return tf.while_loop(lambda index: index < count, remove, (tf.constant(0),), parallel_iterations=1)[0]


def _dtypes(specs: Any) -> list[tf.DType]:
    return [spec.dtype for spec in tf.nest.flatten(specs)]


def _with_unknown_sizes(spec: Any) -> tf.TensorSpec:
    """A spec whose dimensions of size 0 are unknown: those that grow."""
    return tf.TensorSpec([size or None for size in spec.shape], spec.dtype)


def _packed(specs: Any, values: Sequence[Tensor]) -> Any:
    for spec, value in zip(tf.nest.flatten(specs), values, strict=True):
        value.set_shape(spec.shape)
    return tf.nest.pack_sequence_as(specs, values)

"""Checks of requests inside the graph: assertions whose messages name the input and the row.

A server checks neither rank nor shape, and returns the message of a failed assertion to the client.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

__all__ = ["broadcast", "broadcast_lists", "ranked", "require", "require_at_most"]

Tensor = Any


def require(condition: Tensor, value: Tensor, name: str, problem: str | Tensor) -> Tensor:
    """`value` [B, ...] if `condition` bool [B] holds for every row; else fails with "name[row] problem"."""
    with tf.device("CPU:0"):
        # Joined, because there may be no such row.
        row = tf.strings.reduce_join(tf.strings.as_string(tf.where(~condition)[:1, 0]))
        message = tf.strings.join([f"{name}[", row, "] ", problem])
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(condition), [message])]):
            return tf.identity(value)


def require_at_most(amount: Tensor, limit: int, value: Tensor, name: str, unit: str) -> Tensor:
    """`value` if the request's `amount`, a scalar integer, is at most `limit`; else fails with "name has AMOUNT UNIT".

    Ops that use the result do not run, and take no memory, for a request above the limit.
    """
    with tf.device("CPU:0"):
        message = tf.strings.join([f"{name} has ", tf.strings.as_string(amount), f" {unit}: give at most {limit}"])
        with tf.control_dependencies([tf.debugging.Assert(amount <= limit, [message])]):
            return tf.identity(value)


def ranked(value: Tensor, name: str, rank: int, max_rows: int) -> Tensor:
    """`value` if it has this rank, 1 or 2, and 1 to `max_rows` rows."""
    actual = tf.rank(value)
    shape = "[B]" if rank == 1 else "[B, L]"
    message = tf.strings.join([f"{name} has rank ", tf.strings.as_string(actual), f": give rank {rank}, {shape}"])
    with tf.control_dependencies([tf.debugging.Assert(tf.equal(actual, rank), [message])]):
        rows = tf.shape(value)[:1]
    with tf.control_dependencies(
        [tf.debugging.Assert(tf.reduce_all(rows > 0), [f"{name} is empty: give at least one row"])]
    ):
        value = tf.identity(value)
    value.set_shape([None] * rank)
    return require_at_most(tf.shape(value)[0], max_rows, value, name, "rows")


def broadcast_lists(value: Tensor, name: str, batch: Tensor, limit: int) -> Tensor:
    """A list of up to `limit` values for all rows, or one per row, as [B, N]; in a list of [B], one value per row."""
    rank = tf.rank(value)
    message = tf.strings.join([f"{name} has rank ", tf.strings.as_string(rank), ": give rank 2, [B, N]"])
    with tf.control_dependencies([tf.debugging.Assert(rank <= 2, [message])]):
        shape = tf.concat([tf.shape(value), [1, 1]], 0)[:2]
    value = tf.reshape(value, shape)
    rows, size = tf.unstack(shape, num=2)
    counts = tf.strings.as_string(tf.stack([rows, batch]))
    unit = tf.where(rank == 2, " lists for ", " values for ")
    message = tf.strings.join([f"{name} has ", counts[0], unit, counts[1], " rows: give one, or one per row"])
    with tf.control_dependencies([tf.debugging.Assert((rows == 1) | (rows == batch), [message])]):
        value = tf.identity(value)
    value = require_at_most(size, limit, value, name, "values per row")
    value = tf.broadcast_to(value, [batch, size])
    value.set_shape([None, None])
    return value


def broadcast(value: Tensor, name: str, batch: Tensor) -> Tensor:
    """A parameter with one value, or one value per row, as [B]."""
    value = tf.reshape(value, [-1])
    size = tf.size(value)
    message = tf.strings.join(
        [
            f"{name} has ",
            tf.strings.as_string(size),
            " values for ",
            tf.strings.as_string(batch),
            " rows: give one, or one per row",
        ]
    )
    with tf.control_dependencies([tf.debugging.Assert((size == 1) | (size == batch), [message])]):
        value = tf.broadcast_to(tf.identity(value), [batch])
    value.set_shape([None])
    return value

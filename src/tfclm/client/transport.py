"""What REST and gRPC have in common: the model that is asked, limits of time and size, and errors."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tfclm.client.messages import STATES
from tfclm.errors import InputError

_STATE_NAMES = {number: name for name, number in STATES.items()}
_MAX_CHARACTERS = 1000  # of a server's message


class ServerError(RuntimeError):
    """The server is not there, not ready, overloaded or failing; the message says which, and what would help."""


@dataclass(frozen=True)
class Model:
    """The model to ask: its default version, or the one with this number or label."""

    name: str
    version: int | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise InputError("`model_name` is empty: give the name under which the server serves the model")
        if self.version is not None and self.label is not None:
            raise InputError("`version` and `version_label` are mutually exclusive: give one of them")
        if self.version is not None and not 0 <= self.version < 2**63:
            raise InputError(f"`version` {self.version}: give the number of a version, 0 or more")
        for field, text in (("model_name", self.name), ("version_label", self.label or "")):
            if not _is_unicode(text):
                raise InputError(f"`{field}` is not UTF-8: give the name as UTF-8")

    def __str__(self) -> str:
        version = "" if self.version is None else f", version {self.version}"
        return f"model {self.name}{version}{'' if self.label is None else f', label {self.label}'}"


@dataclass(frozen=True)
class Signature:
    """A signature of the served model: inputs and outputs name -> type (such as DT_FLOAT), defaults name -> value."""

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    defaults: Mapping[str, Any]

    @property
    def required(self) -> tuple[str, ...]:
        """The inputs that have no default, sorted."""
        return tuple(sorted(set(self.inputs) - set(self.defaults)))


@dataclass(frozen=True)
class Limits:
    """Limits of a call: seconds in total, retries while the server is busy, bytes per reply."""

    timeout: float
    retries: int
    max_reply_bytes: int


class Call:
    """The time limit of one method call of the client, which may take several requests.

    Args:
        address: the server, for messages.
        seconds: the time that the call may take from now on.
    """

    def __init__(self, address: str, seconds: float) -> None:
        self._address = address
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """The seconds that are left, more than 0.

        Raises:
            ServerError: none are left.
        """
        seconds = self._end - time.monotonic()
        if seconds <= 0:
            raise self.timed_out()
        return seconds

    def timed_out(self) -> ServerError:
        """The error for a call that took too long."""
        return ServerError(f"{self._address} did not answer within {self._seconds:g} s")


class Transport(Protocol):
    """A connection to one model of one server."""

    address: str

    def signatures(self, call: Call) -> dict[str, Signature]:
        """The model's signatures by name, as the server's metadata gives them."""

    def predict(
        self, name: str, signature: Signature, inputs: Mapping[str, tuple[str, list[Any]]], call: Call
    ) -> dict[str, list[Any]]:
        """Runs a signature: inputs name -> (type, B values), outputs name -> B values, strings as bytes."""

    def close(self) -> None:
        """Closes the connection."""


def not_available(model: Model, address: str, versions: Mapping[int, int]) -> Exception:
    """The error for a model that the server did not find; `versions` (number -> state) are from its status."""
    if not versions:
        return InputError(
            f"{address} serves no model named {model.name!r}: give the name that the server was started with"
        )
    names = {number: _STATE_NAMES.get(state, "UNKNOWN") for number, state in versions.items()}
    states = ", ".join(f"version {number} is {name}" for number, name in names.items())
    if model.version is not None and model.version not in versions:
        return InputError(one_line(f"{address} has no version {model.version} of model {model.name}: {states}"))
    return ServerError(one_line(f"{model} is not available at {address}: {states}; try again, or see the server's log"))


# TensorFlow's messages to the other requests in a batch that was cancelled with the last one. server/execution.py has
# the same list, because the client imports nothing of the server.
_CANCELLED_BATCH = ("Loop execution was cancelled", "Missing 0-th output from", "cancelled before it was started")


def is_cancelled_batch(message: str) -> bool:
    """Whether a request failed because another one's deadline passed, so that it may be sent again."""
    return any(words in message for words in _CANCELLED_BATCH)


def too_large(address: str, max_bytes: int) -> ServerError:
    """The error for a reply of more than `max_bytes` bytes."""
    return ServerError(
        f"{address} sent a reply of more than {max_bytes} bytes: ask for less, or raise `max_reply_bytes`"
    )


def one_line(message: str) -> str:
    """The server's message as one line of UTF-8, without the graph node that an assertion adds."""
    message = message.split("\n\t [[")[0]
    if message.startswith("assertion failed: [") and message.endswith("]"):
        message = message[len("assertion failed: [") : -1]
    message = " ".join(message[: 10 * _MAX_CHARACTERS].encode(errors="replace").decode().split())
    return message if len(message) <= _MAX_CHARACTERS else f"{message[:_MAX_CHARACTERS]}…"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

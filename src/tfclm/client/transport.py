"""What REST and gRPC have in common: which model is asked, how much time and data it may take, and how either fails."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tfclm.client.messages import STATES
from tfclm.errors import InputError

_STATE_NAMES = {number: name for name, number in STATES.items()}
# Of a server's message: more would bury what it says.
_MOST_CHARACTERS = 1000


class ServerError(RuntimeError):
    """The server is absent, not ready, overloaded or broken; the message says which, and what would help."""


@dataclass(frozen=True)
class Model:
    """Which model of a server is asked: its version served now, or the one with this number or label."""

    name: str
    version: int | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise InputError("the model's name is empty: give the server's --model_name")
        if self.version is not None and self.label is not None:
            raise InputError("version and label exclude each other: give one of them")
        if self.version is not None and not 0 <= self.version < 2**63:
            raise InputError(f"version {self.version}: give the number of a version, 0 or more")
        for field, text in (("model_name", self.name), ("version_label", self.label or "")):
            if not _is_unicode(text):
                raise InputError(f"{field} is not UTF-8: give the name as UTF-8")

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
    """What a server may take: seconds for a whole call, further attempts while it is busy, bytes of one reply."""

    timeout: float
    retries: int
    max_reply_bytes: int


class Call:
    """One call of the client, whatever number of requests it takes: how much of its time is left.

    Args:
        address: the server, for messages.
        seconds: the time that the call has, from now on.
    """

    def __init__(self, address: str, seconds: float) -> None:
        self._address = address
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the end, more than 0.

        Raises:
            ServerError: there are none.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.late()
        return left

    def late(self) -> ServerError:
        """The error for a call whose time has passed."""
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
    """The error for a model that the server could not ask: versions number -> state, as the status says; maybe none."""
    if not versions:
        return InputError(f"{address} has no model {model.name}: give the name that the server was started with")
    names = {number: _STATE_NAMES.get(state, "UNKNOWN") for number, state in versions.items()}
    states = ", ".join(f"version {number} is {name}" for number, name in names.items())
    if model.version is not None and model.version not in versions:
        return InputError(reason(f"{address} has no version {model.version} of model {model.name}: {states}"))
    return ServerError(
        reason(f"{model} is not available at {address}: {states}; ask again, or look into the server's log")
    )


# What TensorFlow says of a batch that was cancelled with the last request in it, to the other requests.
_CANCELLED_BATCH = ("Loop execution was cancelled", "Missing 0-th output from", "cancelled before it was started")


def is_cancelled_batch(message: str) -> bool:
    """Whether a request failed because another one's deadline passed, so that it may be sent again."""
    return any(words in message for words in _CANCELLED_BATCH)


def too_large(address: str, most: int) -> ServerError:
    """The error for a reply of more than `most` bytes."""
    return ServerError(f"{address} sent a reply of more than {most} bytes: ask for less, or raise max_reply_bytes")


def reason(message: str) -> str:
    """The server's message as one line of UTF-8, without the place in the graph that an assertion adds."""
    message = message.split("\n\t [[")[0]
    if message.startswith("assertion failed: [") and message.endswith("]"):
        message = message[len("assertion failed: [") : -1]
    message = " ".join(message[: 10 * _MOST_CHARACTERS].encode(errors="replace").decode().split())
    return message if len(message) <= _MOST_CHARACTERS else f"{message[:_MOST_CHARACTERS]}…"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

"""What REST and gRPC have in common: which model is asked, what can be asked of it, and how either can fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tfclm.client.messages import DTYPES, STATES, from_tensor
from tfclm.errors import InputError

_TYPE_NAMES = {number: name for name, number in DTYPES.items()}
_STATE_NAMES = {number: name for name, number in STATES.items()}


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


class Transport(Protocol):
    """A connection to one model of one server."""

    address: str

    def signatures(self) -> dict[str, Signature]:
        """The model's signatures by name, as the server's metadata gives them."""

    def predict(self, signature: str, inputs: Mapping[str, tuple[str, list[Any]]]) -> dict[str, list[Any]]:
        """Runs a signature: inputs name -> (type, B values), outputs name -> B values, strings as bytes.

        A signature's only output may come under the name "".
        """

    def close(self) -> None:
        """Closes the connection."""


def read_signatures(signatures: Any) -> dict[str, Signature]:
    """The signatures of a SignatureDefMap."""

    def types(tensors: Any) -> dict[str, str]:
        return {name: _TYPE_NAMES.get(info.dtype, "another type") for name, info in tensors.items()}

    return {
        name: Signature(
            types(signature.inputs),
            types(signature.outputs),
            # A default has one value, which goes for every row.
            {key: from_tensor(value)[0] for key, value in signature.defaults.items()},
        )
        for name, signature in signatures.signature_def.items()
        if name != "__saved_model_init_op"
    }


def not_available(model: Model, address: str, versions: Mapping[int, int]) -> Exception:
    """The error for a model that the server could not ask: versions number -> state, as the status says; maybe none."""
    if not versions:
        return InputError(f"{address} has no model {model.name}: give the name that the server was started with")
    names = {number: _STATE_NAMES.get(state, "UNKNOWN") for number, state in versions.items()}
    states = ", ".join(f"version {number} is {name}" for number, name in names.items())
    if model.version is not None and model.version not in versions:
        return InputError(f"{address} has no version {model.version} of model {model.name}: {states}")
    return ServerError(f"{model} is not available at {address}: {states}; ask again, or look into the server's log")


def reason(message: str) -> str:
    """The server's message as one line, without the place in the graph that an assertion adds."""
    message = message.split("\n\t [[")[0]
    if message.startswith("assertion failed: [") and message.endswith("]"):
        message = message[len("assertion failed: [") : -1]
    return " ".join(message.split())

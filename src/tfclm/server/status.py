"""Canonical status codes and the errors that carry them, for REST and gRPC."""

from __future__ import annotations

from enum import IntEnum
from typing import Any


class Code(IntEnum):
    """The canonical codes, numbered as in gRPC."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


HTTP_STATUS = {
    Code.OK: 200,
    Code.CANCELLED: 499,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.ABORTED: 409,
    Code.OUT_OF_RANGE: 400,
    Code.UNIMPLEMENTED: 501,
    Code.UNAVAILABLE: 503,
    Code.UNAUTHENTICATED: 401,
}
"""The HTTP status of each code; codes that are missing here map to 500."""

_XLA_DISABLED = "XLA compilation disabled"


class StatusError(Exception):
    """A request or a model failed, with a code and a message for the client."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"


class TooLarge(StatusError):
    """A request larger than the server accepts; 413 over HTTP."""

    def __init__(self, message: str) -> None:
        super().__init__(Code.INVALID_ARGUMENT, message)


def invalid(message: str) -> StatusError:
    """An INVALID_ARGUMENT error."""
    return StatusError(Code.INVALID_ARGUMENT, message)


def from_tensorflow(error: Any) -> StatusError:
    """The status of a `tf.errors.OpError`."""
    message = str(error.message)
    if _XLA_DISABLED in message:
        hint = f"{_XLA_DISABLED}: this export needs a server that is started with --xla_cpu_compilation_enabled"
        message = message.replace(_XLA_DISABLED, hint, 1)
    return StatusError(Code(error.error_code or Code.UNKNOWN), message)

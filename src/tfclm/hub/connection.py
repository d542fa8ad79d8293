"""Requests to the Hub: token, time limits, retries and error messages."""

from __future__ import annotations

import contextlib
import email.utils
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from tfclm.disk import reason
from tfclm.errors import InputError, first_line

__all__ = [
    "FIRST_WAIT",
    "PushFailed",
    "Unreachable",
    "explain_fetch_error",
    "explain_push_error",
    "fetching_errors",
    "format_error",
    "limit_requests",
    "next_wait",
    "requested_wait",
    "retry",
    "scrubbed",
    "silence_client",
    "stored_token",
]

T = TypeVar("T")

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between two attempts
LONGEST_REQUESTED_WAIT = 3600  # seconds; a Hub that asks for a longer wait is tried again after these


class Unreachable(Exception):
    """The Hub cannot be reached now; the message says why, in one line."""


class PushFailed(Exception):
    """The Hub refuses a push, and trying again would not help."""


def stored_token() -> str | None:
    """The token of the environment or of `hf auth login`; None if there is none.

    Raises:
        InputError: the token's file cannot be read.
    """
    from huggingface_hub import constants, get_token

    try:
        return get_token()
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else "it is not text"
        raise InputError(
            f"the Hub's token in {constants.HF_TOKEN_PATH} cannot be read ({why}): run `hf auth login` again, remove "
            "that file, or set HF_TOKEN"
        ) from error


def scrubbed(text: str, *tokens: str | None) -> str:
    """A text with the Hub's tokens replaced by ***: those given, the user's own, and what looks like one.

    It never fails, because it is used where errors are reported: a token that cannot be read is ignored.

    Example:
        >>> scrubbed("cannot send hf_" + "x" * 34)
        'cannot send ***'
    """
    known = [*tokens, os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")]
    with contextlib.suppress(Exception):
        known.append(stored_token())
    for token in filter(None, known):
        text = text.replace(token, "***")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "***", text)


def limit_requests(seconds: float = 60.0) -> None:
    """Sets a time limit for all requests of `huggingface_hub` in this process; many of them have none by default."""
    import requests
    from huggingface_hub import configure_http_backend

    class Session(requests.Session):
        """Gives up a connection without traffic."""

        def request(self, *arguments: Any, **options: Any) -> requests.Response:
            # Most of the client's calls pass None, which waits forever.
            if options.get("timeout") is None:
                options["timeout"] = seconds
            return super().request(*arguments, **options)

    configure_http_backend(Session)


def silence_client() -> None:
    """Turns off the progress bars and retry warnings of `huggingface_hub`.

    They come from another thread, in the middle of the training's progress bar; the caller logs what matters.
    """
    from huggingface_hub.utils import disable_progress_bars

    from tfclm.compat import hub_api_logger, hub_http_logger

    disable_progress_bars()
    hub_http_logger.setLevel(logging.ERROR)
    hub_api_logger.setLevel(logging.ERROR)


def requested_wait(error: BaseException) -> float | None:
    """Seconds, at most an hour, that the Hub asks to wait before a failed request is made again.

    0 if it asks for none; None if the request would fail again.
    """
    from requests import exceptions

    requests_errors = (
        exceptions.ConnectionError,
        exceptions.Timeout,
        exceptions.ChunkedEncodingError,
        exceptions.JSONDecodeError,
    )
    response, innermost = None, error
    chain: BaseException | None = error
    while chain is not None and response is None:
        # JSONDecodeError, too: the connection broke off in the middle of an answer.
        if isinstance(chain, (*requests_errors, ConnectionError, TimeoutError)):
            return 0.0
        response, innermost, chain = getattr(chain, "response", None), chain, chain.__cause__
    if response is None:
        # These come from the client's checks or from the disk; other errors without an answer are the network's.
        return None if isinstance(innermost, ValueError | TypeError | OSError | PushFailed | InputError) else 0.0
    if response.status_code < 500 and response.status_code not in (408, 409, 412, 425, 429):
        return None
    return _parse_retry_after(response.headers.get("Retry-After", ""))


def _parse_retry_after(header: str) -> float:
    """The seconds of a Retry-After header, `LONGEST_REQUESTED_WAIT` at most; 0 if it cannot be read."""
    header = header.strip()
    if re.fullmatch(r"[0-9]+", header):
        # Not float(), which is infinite for very many digits.
        return float(min(int(header[:20]), LONGEST_REQUESTED_WAIT))
    try:
        seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError, IndexError):
        return 0.0
    return min(max(seconds, 0.0), float(LONGEST_REQUESTED_WAIT))


def next_wait(waited: float, first: float = FIRST_WAIT) -> float:
    """The next back-off in seconds: twice the last one, between `first` and a minute."""
    return min(max(2 * waited, first), LONGEST_WAIT)


def retry(call: Callable[[], T], patience: float) -> T:
    """Calls the Hub, and retries while the call fails for a temporary reason.

    Raises:
        Unreachable: the next attempt would be later than `patience` seconds after the first.
        Exception: an error that would occur again.
    """
    from huggingface_hub import constants

    began, waited = time.monotonic(), 0.0
    while True:
        try:
            return call()
        except Exception as error:
            requested = requested_wait(error)
            if requested is None:
                raise
            waited = next_wait(waited)
            pause = max(waited, requested)
            if time.monotonic() - began + pause > patience:
                raise Unreachable(
                    f"the Hub at {constants.ENDPOINT} cannot be reached: {format_error(error)}"
                ) from error
            time.sleep(pause)


def format_error(error: BaseException, *tokens: str | None) -> str:
    """The message of a failed request in one line, without tokens."""
    status = _status(error)
    answered = f" (the Hub answered {status})" if status is not None else ""
    message = getattr(error, "server_message", None) or first_line(error)
    return scrubbed(" ".join(f"{message}{answered}".split()), *tokens)


def explain_push_error(error: BaseException, repo_id: str, user: str | None, *tokens: str | None) -> str:
    """Why a repository cannot be written, in one line without tokens."""
    status = _status(error)
    reasons = {
        401: "the token is not valid: run `hf auth login`, or set HF_TOKEN",
        403: f"the token of {user} may not write to {repo_id}: give another token or another repository",
    }
    if status in reasons:
        return f"{reasons[status]} (the Hub answered {status})"
    return format_error(error, *tokens)


def explain_fetch_error(error: BaseException, repo_id: str, revision: str | None, file: str) -> str:
    """Why a repository cannot be read, in one line; `file` is the file to fetch."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return f"{repo_id}: a Hub id looks like owner/name"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no {repo_id} on the Hub, or it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision} on the Hub"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"{repo_id} is not in the cache, and the Hub cannot be reached"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{repo_id} has no {file}"
    return f"{repo_id} cannot be fetched from the Hub: {first_line(error)}"


@contextlib.contextmanager
def fetching_errors(repo_id: str, revision: str | None, file: str) -> Iterator[None]:
    """Raises the errors of a download as an InputError that names the repository.

    Args:
        repo_id: the repository to fetch from.
        revision: a branch, tag or commit.
        file: the file to fetch, for the message.
    """
    from huggingface_hub.errors import HFValidationError

    stored_token()  # raises if there is one that cannot be read
    limit_requests()
    try:
        yield
    except (HFValidationError, OSError) as error:  # OSError is the base of all other errors of the client
        raise InputError(explain_fetch_error(error, repo_id, revision, file)) from error


def _status(error: BaseException) -> int | None:
    """The HTTP status of the Hub's answer, if there was one."""
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)

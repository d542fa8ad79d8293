"""Calls a model over TensorFlow Serving's REST API."""

from __future__ import annotations

import email.utils
import http.client
import json
import ssl
import time
import zlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

import requests
import urllib3

from tfclm.client import tls
from tfclm.client.replies import from_json, read_metadata, read_rows, read_status, reading
from tfclm.client.sockets import Adapter, ConnectionFailed, ReplyTooLarge, limits_of
from tfclm.client.transport import (
    Call,
    Limits,
    Model,
    ServerError,
    Signature,
    is_cancelled_batch,
    not_available,
    one_line,
    too_large,
)
from tfclm.errors import InputError

_CHUNK = 2**16
# A list takes 20 times as much memory as in JSON, so a reply of lists alone would exceed the size limit in memory.
_MAX_LISTS = 2**20


class RestTransport:
    """One model at `address`, such as http://localhost:8501; a path before /v1 is kept, because gateways may have one.

    A request that is answered with 503, which means that it was not run, is sent again up to `retries` times, after the
    server's Retry-After or a growing pause, if the call has time for that. A request that was cancelled with a batch
    of other requests is sent again at once. No other request is sent again.
    """

    def __init__(self, address: str, model: Model, limits: Limits, tls_files: tls.Tls) -> None:
        try:
            parts = urlsplit(address)
            secure = parts.scheme == "https"
            # Without the user name and password that a URL may contain.
            self.address = address.replace(f"{parts.netloc.rpartition('@')[0]}@", "", 1).rstrip("/")
            self._server = tls.Server(
                self.address, parts.scheme, parts.hostname or "", parts.port or (443 if secure else 80)
            )
        except ValueError as error:
            raise InputError(f"`url` {address}: {error}: give the server, such as http://localhost:8501") from error
        if not parts.hostname or parts.query or parts.fragment or "/v1/" in f"{parts.path}/":
            raise InputError(f"`url` {address}: give the server alone, such as http://localhost:8501")
        self._url = address.rstrip("/")
        self._model = model
        self._limits = limits
        self._tls = tls_files
        self._name = f"/v1/models/{quote(model.name, safe='')}"
        self._path = self._name
        if model.version is not None:
            self._path += f"/versions/{model.version}"
        if model.label is not None:
            self._path += f"/labels/{quote(model.label, safe='')}"
        self._session = _Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, Adapter(tls_files.context()))

    def close(self) -> None:
        """Closes the connections."""
        self._session.close()

    def signatures(self, call: Call) -> dict[str, Signature]:
        """The model's signatures, from its metadata."""
        reply = self._ask("GET", f"{self._path}/metadata", call)
        with reading(self.address, "metadata that is not TensorFlow Serving's, or"):
            return read_metadata(reply)

    def predict(
        self, name: str, signature: Signature, inputs: Mapping[str, tuple[str, list[Any]]], call: Call
    ) -> dict[str, list[Any]]:
        """Runs a signature, by a row request."""
        columns = (values for _, values in inputs.values())
        rows = [dict(zip(inputs, row, strict=True)) for row in zip(*columns, strict=True)]
        reply = self._ask("POST", f"{self._path}:predict", call, {"signature_name": name, "instances": rows})
        with reading(self.address, "predictions"):
            return read_rows(reply.get("predictions"), signature.outputs, len(rows))

    def _ask(self, method: str, path: str, call: Call, body: Any = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(self._limits.retries + 1):
            status, headers, content = self._exchange(method, path, call, data)
            cancelled = status in (499, 500) and is_cancelled_batch(content.decode(errors="replace"))
            if (status != 503 and not cancelled) or attempt == self._limits.retries:
                break
            if cancelled:
                continue
            pause = _retry_after(headers)
            if pause is None:
                pause = 0.2 * 2**attempt
            if pause >= call.remaining():
                break
            time.sleep(pause)
        return self._read(path, call, status, headers, content)

    def _read(self, path: str, call: Call, status: int, headers: Mapping[str, str], content: bytes) -> dict[str, Any]:
        """The reply's JSON; raises the error that the reply reports."""
        if content.count(b"[") + content.count(b"{") > _MAX_LISTS:
            raise ServerError(f"{self.address} sent a reply of more than {_MAX_LISTS} lists: ask for less")
        try:
            answer = from_json(content)
        except (ValueError, RecursionError):
            answer = None
        if status == 200 and isinstance(answer, dict) and "error" not in answer:
            return answer
        if "Location" in headers and 300 <= status < 400:
            raise ServerError(one_line(f"{self.address} redirects to {headers['Location']}: give that server's URL"))
        message = answer.get("error") if isinstance(answer, dict) else None
        if not isinstance(message, str):
            if status == 400:
                # Some TLS servers answer so if they are asked without TLS.
                self._diagnose(call)
            kind = headers.get("Content-Type", "no type")
            raise ServerError(
                one_line(f"{self.address} is not TensorFlow Serving's REST API: it answered HTTP {status}, {kind}")
            )
        message = one_line(message)
        if status == 404:
            raise not_available(self._model, self.address, {} if path == self._name else self._versions(call))
        if status == 400:
            raise InputError(message)
        busy = ", too many requests" if status in (429, 503) else ""
        late = ", longer than the server's rest_api_timeout_in_ms" if status == 504 else ""
        after = f"; try again after {headers['Retry-After']} s" if status == 503 and "Retry-After" in headers else ""
        raise ServerError(one_line(f"{self.address} answered HTTP {status}{busy}{late}: {message}{after}"))

    def _exchange(self, method: str, path: str, call: Call, data: bytes | None) -> tuple[int, Mapping[str, str], bytes]:
        """Sends a request; returns status, headers and body of the reply."""
        max_bytes = self._limits.max_reply_bytes
        try:
            with (
                limits_of(call, max_bytes),
                self._session.request(
                    method,
                    self._url + path,
                    data=data,
                    headers={"Content-Type": "application/json", "Accept-Encoding": "gzip"},
                    timeout=call.remaining(),
                    stream=True,
                    allow_redirects=False,
                    verify=self._tls.ca_file,
                ) as reply,
            ):
                return reply.status_code, reply.headers, _body(reply, max_bytes)
        except ReplyTooLarge as error:
            raise too_large(self.address, max_bytes) from error
        except ConnectionFailed as failure:
            raise self._connection_error(failure, call) from failure
        except (TimeoutError, requests.Timeout, urllib3.exceptions.TimeoutError) as error:
            raise call.timed_out() from error
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidProxyURL) as error:
            raise InputError(f"`url` {self.address}: {one_line(str(error))}") from error
        except (OSError, urllib3.exceptions.HTTPError, zlib.error, ValueError) as error:
            call.remaining()
            self._diagnose(call)
            origin = _origin(error)
            if isinstance(origin, http.client.RemoteDisconnected | ConnectionError):
                raise ServerError(f"{self.address} closed the connection before it answered") from error
            if isinstance(origin, http.client.BadStatusLine):
                raise ServerError(f"{self.address} does not speak HTTP: for its gRPC port, give grpc://") from error
            raise ServerError(f"{self.address} failed in its answer: {one_line(repr(origin))}") from error

    def _diagnose(self, call: Call) -> None:
        """Raises the error of the connection itself, if it has one."""
        if self._proxy() is None and (found := tls.diagnose(self._server, self._tls, call)):
            raise found

    def _connection_error(self, failure: ConnectionFailed, call: Call) -> ServerError:
        if isinstance(failure.error, ssl.SSLError):
            # A server that refuses the connection may close it before its alert is read.
            if isinstance(failure.error, ssl.SSLEOFError):
                self._diagnose(call)
                if failure.established:
                    return ServerError(f"{self.address} closed the connection before it answered")
            return tls.explain(failure.error, self._server, self._tls)
        if proxy := self._proxy():
            return ServerError(f"the proxy {proxy} does not answer: {one_line(str(failure))}")
        return tls.unreachable(self.address, failure.error)

    def _proxy(self) -> str | None:
        """The proxy for the server from the environment, without the user name and password in its URL."""
        proxy = requests.utils.select_proxy(self._url, requests.utils.get_environ_proxies(self._url))
        return None if proxy is None else proxy.rpartition("@")[2]

    def _versions(self, call: Call) -> dict[int, int]:
        """Number -> state of all versions of the model on the server."""
        try:
            status = self._ask("GET", self._name, call)
        except InputError:
            return {}
        with reading(self.address, "a status"):
            return read_status(status)


class _Session(requests.Session):
    """A session that does not follow redirects, which may turn a POST into a GET, and does not read their bodies."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """No URL."""


def _body(reply: requests.Response, max_bytes: int) -> bytes:
    """The decompressed body; raises ReplyTooLarge if it has more than `max_bytes`."""
    encoding = reply.headers.get("Content-Encoding", "identity").lower()
    if encoding not in ("identity", "gzip"):
        raise ValueError(f"content encoding {encoding}")
    inflater = zlib.decompressobj(31) if encoding == "gzip" else None
    body = bytearray()
    while chunk := reply.raw.read(_CHUNK, decode_content=False):
        body += chunk if inflater is None else inflater.decompress(chunk, max_bytes + 1 - len(body))
        if len(body) > max_bytes:
            raise ReplyTooLarge
    if inflater is not None and not inflater.eof:
        raise ValueError("an incomplete gzip body")
    return bytes(body)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds to wait according to Retry-After, which is a number of seconds or a date."""
    given = headers.get("Retry-After", "").strip()
    if given.isdecimal():
        return float(given[:9])
    try:
        return max(email.utils.parsedate_to_datetime(given).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _origin(error: BaseException) -> BaseException:
    """The original error inside those of requests and urllib3."""
    while inner := [given for given in error.args if isinstance(given, BaseException)]:
        error = inner[0]
    return error

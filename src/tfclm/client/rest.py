"""A model behind TensorFlow Serving's REST API."""

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
from tfclm.client.replies import from_json, read_metadata, read_rows, read_status, understood
from tfclm.client.sockets import Adapter, Broken, TooLarge, awaiting
from tfclm.client.transport import (
    Call,
    Limits,
    Model,
    ServerError,
    Signature,
    is_cancelled_batch,
    not_available,
    reason,
    too_large,
)
from tfclm.errors import InputError

_CHUNK = 2**16
# A list takes 20 times the bytes that it has in JSON, so that lists alone would exceed what a reply may take.
_MOST_LISTS = 2**20


class RestTransport:
    """One model at `address`, such as http://localhost:8501; a path before /v1 is kept, as gateways have one.

    A reply of 503, which says that nothing was run, is asked again up to `retries` times, after a growing pause or what
    the server's Retry-After says, as far as the call has time for it. So is, at once, a request that was cancelled with
    another one's batch. Nothing else is.
    """

    def __init__(self, address: str, model: Model, limits: Limits, trust: tls.Tls) -> None:
        try:
            parts = urlsplit(address)
            secure = parts.scheme == "https"
            # Without the name and password that a URL may carry.
            self.address = address.replace(f"{parts.netloc.rpartition('@')[0]}@", "", 1).rstrip("/")
            self._server = tls.Server(
                self.address, parts.scheme, parts.hostname or "", parts.port or (443 if secure else 80)
            )
        except ValueError as error:
            raise InputError(f"URL {address}: {error}: give the server, such as http://localhost:8501") from error
        if not parts.hostname or parts.query or parts.fragment or "/v1/" in f"{parts.path}/":
            raise InputError(f"URL {address}: give the server alone, such as http://localhost:8501")
        self._url = address.rstrip("/")
        self._model = model
        self._limits = limits
        self._tls = trust
        self._name = f"/v1/models/{quote(model.name, safe='')}"
        self._path = self._name
        if model.version is not None:
            self._path += f"/versions/{model.version}"
        if model.label is not None:
            self._path += f"/labels/{quote(model.label, safe='')}"
        self._session = _Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, Adapter(trust.context()))

    def close(self) -> None:
        """Closes the connections."""
        self._session.close()

    def signatures(self, call: Call) -> dict[str, Signature]:
        """The model's signatures, from its metadata."""
        reply = self._ask("GET", f"{self._path}/metadata", call)
        with understood(self.address, "metadata that is not TensorFlow Serving's, or"):
            return read_metadata(reply)

    def predict(
        self, name: str, signature: Signature, inputs: Mapping[str, tuple[str, list[Any]]], call: Call
    ) -> dict[str, list[Any]]:
        """Runs a signature, by a row request."""
        columns = (values for _, values in inputs.values())
        rows = [dict(zip(inputs, row, strict=True)) for row in zip(*columns, strict=True)]
        reply = self._ask("POST", f"{self._path}:predict", call, {"signature_name": name, "instances": rows})
        with understood(self.address, "predictions"):
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
            if pause >= call.left():
                break
            time.sleep(pause)
        return self._read(path, call, status, headers, content)

    def _read(self, path: str, call: Call, status: int, headers: Mapping[str, str], content: bytes) -> dict[str, Any]:
        """The reply's JSON, or the error that it is."""
        if content.count(b"[") + content.count(b"{") > _MOST_LISTS:
            raise ServerError(f"{self.address} sent a reply of more than {_MOST_LISTS} lists: ask for less")
        try:
            answer = from_json(content)
        except (ValueError, RecursionError):
            answer = None
        if status == 200 and isinstance(answer, dict) and "error" not in answer:
            return answer
        if "Location" in headers and 300 <= status < 400:
            raise ServerError(reason(f"{self.address} redirects to {headers['Location']}: give that server's URL"))
        message = answer.get("error") if isinstance(answer, dict) else None
        if not isinstance(message, str):
            if status == 400:
                # So answer servers that are asked without TLS where they speak it.
                self._diagnose(call)
            kind = headers.get("Content-Type", "no type")
            raise ServerError(
                reason(f"{self.address} is not TensorFlow Serving's REST API: it answered HTTP {status}, {kind}")
            )
        message = reason(message)
        if status == 404:
            raise not_available(self._model, self.address, {} if path == self._name else self._versions(call))
        if status == 400:
            raise InputError(message)
        busy = ", too many requests" if status in (429, 503) else ""
        late = ", longer than the server's --rest_api_timeout_in_ms" if status == 504 else ""
        after = f"; ask again after {headers['Retry-After']} s" if status == 503 and "Retry-After" in headers else ""
        raise ServerError(reason(f"{self.address} answered HTTP {status}{busy}{late}: {message}{after}"))

    def _exchange(self, method: str, path: str, call: Call, data: bytes | None) -> tuple[int, Mapping[str, str], bytes]:
        """Sends a request: status, headers and body of the reply."""
        most = self._limits.max_reply_bytes
        try:
            with (
                awaiting(call, most),
                self._session.request(
                    method,
                    self._url + path,
                    data=data,
                    headers={"Content-Type": "application/json", "Accept-Encoding": "gzip"},
                    timeout=call.left(),
                    stream=True,
                    allow_redirects=False,
                    verify=self._tls.ca_file,
                ) as reply,
            ):
                return reply.status_code, reply.headers, _body(reply, most)
        except TooLarge as error:
            raise too_large(self.address, most) from error
        except Broken as broken:
            raise self._broken(broken, call) from broken
        except (TimeoutError, requests.Timeout, urllib3.exceptions.TimeoutError) as error:
            raise call.late() from error
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidProxyURL) as error:
            raise InputError(f"URL {self.address}: {reason(str(error))}") from error
        except (OSError, urllib3.exceptions.HTTPError, zlib.error, ValueError) as error:
            call.left()
            self._diagnose(call)
            origin = _origin(error)
            if isinstance(origin, http.client.RemoteDisconnected | ConnectionError):
                raise ServerError(f"{self.address} closed the connection before it answered") from error
            if isinstance(origin, http.client.BadStatusLine):
                raise ServerError(f"{self.address} does not speak HTTP: for its gRPC port, give grpc://") from error
            raise ServerError(f"{self.address} failed in its answer: {reason(repr(origin))}") from error

    def _diagnose(self, call: Call) -> None:
        """Raises what is wrong with the connection itself, if anything is."""
        if self._proxy() is None and (found := tls.diagnose(self._server, self._tls, call)):
            raise found

    def _broken(self, broken: Broken, call: Call) -> ServerError:
        if isinstance(broken.error, ssl.SSLError):
            # A server that refuses may be gone before its alert is read.
            if isinstance(broken.error, ssl.SSLEOFError):
                self._diagnose(call)
                if broken.established:
                    return ServerError(f"{self.address} closed the connection before it answered")
            return tls.explain(broken.error, self._server, self._tls)
        if proxy := self._proxy():
            return ServerError(f"the proxy {proxy} does not answer: {reason(str(broken))}")
        return tls.unreachable(self.address, broken.error)

    def _proxy(self) -> str | None:
        """The proxy that the environment names for the server, without the name and password in its URL."""
        proxy = requests.utils.select_proxy(self._url, requests.utils.get_environ_proxies(self._url))
        return None if proxy is None else proxy.rpartition("@")[2]

    def _versions(self, call: Call) -> dict[int, int]:
        """Number -> state of every version that the server has of the model."""
        try:
            status = self._ask("GET", self._name, call)
        except InputError:
            return {}
        with understood(self.address, "a status"):
            return read_status(status)


class _Session(requests.Session):
    """A session that follows no redirect, nor reads the body of one: a request that moves loses its method."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """No URL."""


def _body(reply: requests.Response, most: int) -> bytes:
    """The body, inflated, if it has at most so many bytes."""
    encoding = reply.headers.get("Content-Encoding", "identity").lower()
    if encoding not in ("identity", "gzip"):
        raise ValueError(f"content encoding {encoding}")
    inflater = zlib.decompressobj(31) if encoding == "gzip" else None
    body = bytearray()
    while chunk := reply.raw.read(_CHUNK, decode_content=False):
        body += chunk if inflater is None else inflater.decompress(chunk, most + 1 - len(body))
        if len(body) > most:
            raise TooLarge
    if inflater is not None and not inflater.eof:
        raise ValueError("a gzip body that ends in its midst")
    return bytes(body)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server wants the client to wait: a number, or the time of day then."""
    given = headers.get("Retry-After", "").strip()
    if given.isdecimal():
        return float(given[:9])
    try:
        return max(email.utils.parsedate_to_datetime(given).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _origin(error: BaseException) -> BaseException:
    """The error that requests and urllib3 have wrapped."""
    while inner := [given for given in error.args if isinstance(given, BaseException)]:
        error = inner[0]
    return error

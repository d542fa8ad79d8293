"""Connections that respect the time limit of a whole call and the size limit of a reply, whatever the server sends.

The timeouts of requests and urllib3 apply to each read of a socket, so a server that sends a byte now and then never
times out. Here the timeout of every socket operation is the rest of the call's time, and received bytes are counted.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import requests
import urllib3

from tfclm.client.transport import Call

CONNECT_SECONDS = 5.0
_HEADER_BYTES = 2**16  # allowed in addition to the body


class ConnectionFailed(Exception):
    """A connection could not be made, or TLS failed; requests and urllib3 do not wrap this error."""

    def __init__(self, error: Exception, established: bool = False) -> None:
        super().__init__(str(error))
        self.error, self.established = error, established


class ReplyTooLarge(Exception):
    """A reply exceeds the size limit."""


@dataclass
class _Reply:
    """The reply that this thread waits for: the time and the number of bytes that are left."""

    call: Call
    bytes_left: int

    def count(self, size: int) -> None:
        self.bytes_left -= size
        if self.bytes_left < 0:
            raise ReplyTooLarge


_current = threading.local()


@contextmanager
def limits_of(call: Call, max_bytes: int) -> Iterator[None]:
    """Limits the sockets of this thread to the time of the call and to one reply with a body of `max_bytes`."""
    _current.reply = _Reply(call, max_bytes + _HEADER_BYTES)
    try:
        yield
    finally:
        _current.reply = None


def connect(host: str, port: int, call: Call) -> socket.socket:
    """Makes a TCP connection within the call's time.

    Raises:
        OSError: nothing listens there, or there is no such host.
        ServerError: the call timed out.
    """
    failure: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in _addresses(host, port, call):
        connection = _Socket(family, kind, protocol)
        try:
            connection.settimeout(min(CONNECT_SECONDS, call.remaining()))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.connect(address)
            # The TLS handshake comes next, and has one timeout as a whole.
            connection.settimeout(call.remaining())
            return connection
        except OSError as error:
            failure = error
            connection.close()
        except BaseException:
            connection.close()
            raise
    raise failure


class Adapter(requests.adapters.HTTPAdapter):
    """Makes requests use these connections, directly or through a proxy, and never resend by itself."""

    def __init__(self, context: ssl.SSLContext) -> None:
        context.sslsocket_class = _TlsSocket
        self._context = context
        super().__init__(max_retries=urllib3.Retry(0, read=False))

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        """The pool of connections to servers."""
        super().init_poolmanager(*args, **options, ssl_context=self._context)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        """The pool of connections to a proxy."""
        manager = super().proxy_manager_for(proxy, **options, ssl_context=self._context)
        if not proxy.lower().startswith("socks"):
            manager.pool_classes_by_scheme = _POOLS
        return manager


def _addresses(host: str, port: int, call: Call) -> list[Any]:
    """The addresses of a host, looked up in a thread because the system's look-up takes no timeout."""
    found: SimpleQueue[list[Any] | OSError | UnicodeError] = SimpleQueue()

    def look_up() -> None:
        try:
            found.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.put(error)

    threading.Thread(target=look_up, daemon=True).start()
    try:
        addresses = found.get(timeout=call.remaining())
    except Empty:
        raise call.timed_out() from None
    if isinstance(addresses, list):
        return addresses
    raise addresses


class _LimitedSocket(socket.socket):
    """A socket whose operations time out with the call, and which counts received bytes."""

    def recv_into(self, *args: Any, **options: Any) -> int:
        size = self._run(super().recv_into, *args, **options)
        reply = getattr(_current, "reply", None)
        if reply is not None:
            reply.count(size)
        return size

    def send(self, *args: Any, **options: Any) -> int:
        return self._run(super().send, *args, **options)

    def _run(self, operation: Callable[..., int], *args: Any, **options: Any) -> int:
        reply = getattr(_current, "reply", None)
        if reply is not None:
            self.settimeout(reply.call.remaining())
        try:
            return operation(*args, **options)
        except ssl.SSLError as error:
            raise ConnectionFailed(error, established=True) from error


class _Socket(_LimitedSocket):
    def sendall(self, data: Any, flags: int = 0) -> None:
        # A plain socket has one timeout for all of the data; a TLS socket calls `send` for each piece.
        reply = getattr(_current, "reply", None)
        if reply is not None:
            self.settimeout(reply.call.remaining())
        super().sendall(data, flags)


class _TlsSocket(_LimitedSocket, ssl.SSLSocket): ...


class _ConnectMixin:
    """An HTTP connection that is made by `connect`."""

    host: str
    port: int

    def _new_conn(self) -> socket.socket:
        try:
            return connect(self.host.strip("[]"), self.port, _current.reply.call)
        except (OSError, UnicodeError) as error:
            raise ConnectionFailed(error) from error


class _Connection(_ConnectMixin, urllib3.connection.HTTPConnection): ...


class _TlsConnection(_ConnectMixin, urllib3.connection.HTTPSConnection):
    def connect(self) -> None:
        try:
            super().connect()
        except ssl.SSLError as error:
            raise ConnectionFailed(error) from error


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


_POOLS = {"http": _Pool, "https": _TlsPool}

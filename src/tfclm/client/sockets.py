"""Connections that end with the call that they serve, whatever the server sends or does not send.

The timeouts of requests and urllib3 hold for one read of a socket, so that a server that sends a byte now and then is
never late. Here every operation on a socket has what is left of the call, and what is received is counted.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import requests
import urllib3

from tfclm.client.transport import Call

CONNECT_SECONDS = 5.0
# Of a reply, beside its body.
_HEADER_BYTES = 2**16


class Broken(Exception):
    """A connection that could not be made or was cut by TLS; neither requests nor urllib3 makes another error of it."""

    def __init__(self, error: Exception, established: bool = False) -> None:
        super().__init__(str(error))
        self.error, self.established = error, established


class TooLarge(Exception):
    """A reply has more bytes than it may have."""


@dataclass
class _Reply:
    """The reply that this thread waits for: the time and the bytes that are left."""

    call: Call
    bytes_left: int

    def count(self, size: int) -> None:
        self.bytes_left -= size
        if self.bytes_left < 0:
            raise TooLarge


_awaited = threading.local()


@contextmanager
def awaiting(call: Call, most_bytes: int) -> Iterator[None]:
    """Within, the sockets of this thread's request keep to the call's time, and to one reply of so many bytes."""
    _awaited.reply = _Reply(call, most_bytes + _HEADER_BYTES)
    try:
        yield
    finally:
        _awaited.reply = None


def connect(host: str, port: int, call: Call) -> socket.socket:
    """A TCP connection, within the call's time.

    Raises:
        OSError: nothing listens there, or there is no such host.
        ServerError: the time has passed.
    """
    failure: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in _addresses(host, port, call):
        tried = _Socket(family, kind, protocol)
        try:
            tried.settimeout(min(CONNECT_SECONDS, call.left()))
            tried.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tried.connect(address)
            # What follows is the handshake of TLS, which has one timeout as a whole.
            tried.settimeout(call.left())
            return tried
        except OSError as error:
            failure = error
            tried.close()
        except BaseException:
            tried.close()
            raise
    raise failure


class Adapter(requests.adapters.HTTPAdapter):
    """Sends by such connections, directly or through a proxy; nothing is sent again by itself."""

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
    """The addresses of a host; the system's look-up knows no timeout of the caller's."""
    found: SimpleQueue[list[Any] | OSError | UnicodeError] = SimpleQueue()

    def look_up() -> None:
        try:
            found.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.put(error)

    threading.Thread(target=look_up, daemon=True).start()
    try:
        addresses = found.get(timeout=call.left())
    except Empty:
        raise call.late() from None
    if isinstance(addresses, list):
        return addresses
    raise addresses


class _Limited:
    """Of a socket: every operation has the time that is left, and what is received is counted."""

    def recv_into(self, *args: Any) -> int:
        size: int = self._within(super().recv_into, *args)  # type: ignore[misc]
        reply = getattr(_awaited, "reply", None)
        if reply is not None:
            reply.count(size)
        return size

    def send(self, *args: Any) -> int:
        sent: int = self._within(super().send, *args)  # type: ignore[misc]
        return sent

    def _within(self, operation: Any, *args: Any) -> int:
        reply = getattr(_awaited, "reply", None)
        if reply is not None:
            self.settimeout(reply.call.left())  # type: ignore[attr-defined]
        try:
            return int(operation(*args))
        except ssl.SSLError as error:
            raise Broken(error, established=True) from error


class _Socket(_Limited, socket.socket):
    def sendall(self, data: Any, flags: int = 0) -> None:
        # One timeout for all of it, where a TLS socket sends piece by piece.
        reply = getattr(_awaited, "reply", None)
        if reply is not None:
            self.settimeout(reply.call.left())
        super().sendall(data, flags)


class _TlsSocket(_Limited, ssl.SSLSocket): ...


class _Connects:
    """Of a connection: how it is made."""

    host: str
    port: int

    def _new_conn(self) -> socket.socket:
        try:
            return connect(self.host.strip("[]"), self.port, _awaited.reply.call)
        except (OSError, UnicodeError) as error:
            raise Broken(error) from error


class _Connection(_Connects, urllib3.connection.HTTPConnection): ...


class _TlsConnection(_Connects, urllib3.connection.HTTPSConnection):
    def connect(self) -> None:
        try:
            super().connect()
        except ssl.SSLError as error:
            raise Broken(error) from error


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


_POOLS = {"http": _Pool, "https": _TlsPool}

"""HTTP: sockets, bodies, limits and the access log around the REST API."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiohttp import web
from aiohttp.http import HttpProcessingError
from aiohttp.http_exceptions import BadHttpMethod

from tfclm.server.rest import Reply, RestApi, error_page, local_path
from tfclm.server.status import Code
from tfclm.server.wire.bodies import Body
from tfclm.server.wire.jsontensor import write_error

_log = logging.getLogger(__name__)
_access = logging.getLogger("tfclm.server.access")

_http = logging.getLogger("tfclm.server.http")


@dataclass(frozen=True)
class Limits:
    """What the listener takes on before it refuses.

    A client has `read_seconds` to send a request, and as long to take some of a reply that waits for it. Large bodies
    (`jsontext.LARGE_BYTES`) may have a quarter of the threads, and a quarter of the queue.
    """

    threads: int
    queued: int
    body_bytes: int
    read_seconds: float
    connections: int = 1000
    spare_seconds: float = 5.0  # after which a useless connection gives its place to a new one


class Refused(Exception):
    """A request that is answered without being run."""

    def __init__(self, status: int, code: Code, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Listener:
    """An HTTP server in a thread of its own, with another few threads that run requests."""

    def __init__(self, api: RestApi, host: str, port: int, limits: Limits) -> None:
        self._api, self._host, self._port, self._limits = api, host, port, limits
        self._threads = ThreadPoolExecutor(limits.threads, thread_name_prefix="tfclm-rest")
        self._running = 0  # requests that have a thread or wait for one
        self._large = 0  # of those, the ones with a large body
        self._large_places = asyncio.Semaphore(max(limits.threads // 4, 1))
        self._most_large = max(limits.threads // 4, 1) + limits.queued // 4
        self._buffered = 0  # bytes of bodies that are held
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tfclm-http", daemon=True)

    def start(self) -> int:
        """Listens; gives the port.

        Raises:
            OSError: the port cannot be had.
        """
        self._thread.start()
        try:
            return asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        except OSError:
            self._end_loop()
            raise

    def stop(self, grace_seconds: float) -> None:
        """Stops listening, waits for the requests that run, at most `grace_seconds`, and closes what is open."""
        asyncio.run_coroutine_threadsafe(self._close(grace_seconds), self._loop).result()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> int:
        self._web = _Connections(
            self._handle,
            access_log=None,
            logger=_http,
            auto_decompress=False,
            keepalive_timeout=self._limits.read_seconds,
            lingering_time=1,
        )
        backlog = self._limits.connections
        self._socket = await self._loop.create_server(self._connection, self._host, self._port, backlog=backlog)
        self._watch = self._loop.create_task(self._web.watch(self._limits.read_seconds))
        return int(self._socket.sockets[0].getsockname()[1])

    async def _close(self, grace_seconds: float) -> None:
        self._socket.close()
        self._watch.cancel()
        deadline = self._loop.time() + grace_seconds
        self._web.pre_shutdown()
        while self._running and self._loop.time() < deadline:
            await asyncio.sleep(0.02)
        await self._web.shutdown(1)

    def _connection(self) -> asyncio.Protocol:
        if self._web.count >= self._limits.connections and not self._web.drop_useless(self._limits.spare_seconds):
            return _Busy()
        self._web.count += 1
        return self._web()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._web.has_spoken(request.protocol)
        start = time.perf_counter()
        received = 0
        # What is left of a body that is not read would be taken for the next request.
        close = request.can_read_body
        path = local_path(request.raw_path)
        try:
            if path is None:
                reply = error_page(400)
            elif request.can_read_body and request.headers.get("Expect", "100-continue").lower() != "100-continue":
                reply = error_page(417)
            elif self._api.is_inference(request.method, path):
                sent = await self._read(request)
                received, close = len(sent), False
                gzip = "gzip" in request.headers.get("Content-Encoding", "")
                try:
                    body = Body(sent, gzip=gzip, limit=self._limits.body_bytes)
                    del sent
                    reply = await self._in_thread(request, path, body)
                    del body
                finally:
                    self._buffered -= received
            else:
                # Quick, and asked by probes: never behind the queue.
                reply = self._answer(request, path, Body(limit=0))
        except Refused as refused:
            headers = {"Content-Type": "application/json"}
            reply = Reply(refused.status, write_error(refused.message), headers, code=refused.code)
            # The rest of the body is not wanted.
            close = True
        response = _response(reply)
        if close:
            response.force_close()
        _access.info(
            "request",
            extra={
                "fields": {
                    "protocol": "http",
                    "client": request.remote,
                    "method": request.method,
                    "path": request.raw_path[:512],
                    "model": reply.model,
                    "status": reply.status,
                    "code": reply.code.name,
                    "bytes_in": received,
                    "bytes_out": len(reply.body),
                    "ms": round((time.perf_counter() - start) * 1000, 3),
                }
            },
        )
        return response

    async def _in_thread(self, request: web.BaseRequest, path: str, body: Body) -> Reply:
        full = self._running >= self._limits.threads + self._limits.queued
        if full or (body.large and self._large >= self._most_large):
            raise Refused(503, Code.UNAVAILABLE, "The server is overloaded; try again later")
        self._running += 1
        self._large += body.large
        try:
            if body.large:
                await self._large_places.acquire()
            job = self._loop.run_in_executor(self._threads, self._answer, request, path, body)
        except BaseException:
            self._running -= 1
            self._large -= body.large
            raise
        job.add_done_callback(partial(self._done, body.large))
        # A client that goes away leaves its request in its thread: its place is taken until it is done.
        return await asyncio.shield(job)

    def _done(self, large: bool, job: asyncio.Future[Reply]) -> None:
        self._running -= 1
        self._large -= large
        if large:
            self._large_places.release()

    def _answer(self, request: web.BaseRequest, path: str, body: Body) -> Reply:
        try:
            return self._api.answer(request.method, path, body, request.headers.get("Origin", ""))
        except Exception:
            _log.exception("a request failed: %s %s", request.method, path[:512])
            headers = {"Content-Type": "application/json"}
            return Reply(500, write_error("Internal error; the server's log says more"), headers, code=Code.INTERNAL)

    async def _read(self, request: web.BaseRequest) -> bytes:
        limit = self._limits.body_bytes
        too_large = Refused(413, Code.INVALID_ARGUMENT, f"The request is larger than {limit} bytes")
        if (request.content_length or 0) > limit:
            raise too_large
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            return await asyncio.wait_for(self._receive(request, too_large), self._limits.read_seconds)
        except asyncio.TimeoutError:
            message = f"The request did not arrive within {self._limits.read_seconds:g} s"
            raise Refused(408, Code.DEADLINE_EXCEEDED, message) from None

    async def _receive(self, request: web.BaseRequest, too_large: Refused) -> bytes:
        pieces: list[bytes] = []
        held = 0
        try:
            while piece := await request.content.readany():
                held += len(piece)
                self._buffered += len(piece)
                pieces.append(piece)
                if held > self._limits.body_bytes:
                    raise too_large
                if self._buffered > 8 * self._limits.body_bytes:
                    raise Refused(503, Code.UNAVAILABLE, "The server is overloaded; try again later")
        except BaseException:
            self._buffered -= held
            raise
        return b"".join(pieces)


@dataclass
class _Connection:
    """A connection, and since when it is of no use: no request has come, or replies wait for the client."""

    transport: asyncio.Transport
    since: float
    silent: bool = True  # no head of a request has come yet
    unread: int = 0  # bytes of replies that the client does not take


class _Connections(web.Server):
    """The open connections. Those end that are of no use for long, whatever the client does."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._options = options
        self._open: dict[Any, _Connection] = {}
        self.count = 0  # with those that are about to be made, of which `_open` does not know

    def __call__(self) -> web.RequestHandler:
        """The protocol of a new connection."""
        return _Protocol(self, loop=asyncio.get_running_loop(), **self._options)

    async def watch(self, patience: float) -> None:
        """Ends, from now on, every connection that has been of no use for `patience` seconds."""
        while True:
            await asyncio.sleep(min(patience / 4, 1.0))
            now = asyncio.get_running_loop().time()
            for protocol, connection in list(self._open.items()):
                unread = connection.transport.get_write_buffer_size()
                if not (unread or connection.silent) or connection.unread - unread >= _LEAST_TAKEN:
                    connection.since = now
                elif now - connection.since > patience:
                    # To close it is to wait for the client to take what is left.
                    if unread:
                        connection.transport.abort()
                    else:
                        protocol.force_close()
                else:
                    # It is the most that counts, so that a client cannot stay by taking a byte at a time.
                    unread = max(unread, connection.unread)
                connection.unread = unread

    def drop_useless(self, patience: float) -> bool:
        """Ends the connection that has been of no use for the longest time, if that is `patience` seconds or more."""
        useless = [pair for pair in self._open.items() if pair[1].silent or pair[1].unread]
        if not useless:
            return False
        protocol, connection = min(useless, key=lambda pair: pair[1].since)
        if asyncio.get_running_loop().time() - connection.since < patience:
            return False
        del self._open[protocol]
        connection.transport.abort()
        return True

    def has_spoken(self, protocol: Any) -> None:
        """Notes that a request has come; from the next one on keep-alive's time-out does for it."""
        if (connection := self._open.get(protocol)) and connection.silent:
            connection.silent, connection.since = False, asyncio.get_running_loop().time()

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._open[handler] = _Connection(transport, asyncio.get_running_loop().time())

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        self.count -= 1
        self._open.pop(handler, None)
        super().connection_lost(handler, exc)


class _Protocol(web.RequestHandler):
    """HTTP of a connection; what is no HTTP is answered as TensorFlow Serving answers it."""

    _received = b""

    def data_received(self, data: bytes) -> None:
        self._received = data[:64]
        super().data_received(data)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        super().handle_error(request, status, exc)  # writes to the log, and refuses to answer twice
        if isinstance(exc, BadHttpMethod) and _UNKNOWN_METHOD.match(self._received):
            status = 501
        response = _response(error_page(status))
        response.force_close()
        return response


_UNKNOWN_METHOD = re.compile(rb"[A-Za-z-]+ ")
_LEAST_TAKEN = 2**14


def _response(reply: Reply) -> web.Response:
    response = web.Response(status=reply.status, body=reply.body, headers={"Server": "tfclm", **reply.headers})
    if "Content-Type" not in reply.headers:
        response.headers.popall("Content-Type", None)
    return response


class _Terse(logging.Filter):
    """A client's mistake, or its going away, is one line; the stack behind it says nothing of the server."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, (HttpProcessingError, ConnectionError)):
            reason = " ".join(str(getattr(error, "message", error)).split())
            record.msg, record.args = "a request could not be read: %s", (reason[:200],)
            record.exc_info = None
            record.levelno, record.levelname = logging.WARNING, "WARNING"
        return True


_http.addFilter(_Terse())


class _Busy(asyncio.Protocol):
    """What a connection over the limit meets."""

    def connection_made(self, transport: Any) -> None:
        transport.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        transport.close()

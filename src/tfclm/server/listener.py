"""The HTTP server around the REST API: connections, bodies, limits and the access log."""

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
from tfclm.server.wire.jsonreplies import write_error

_log = logging.getLogger(__name__)
_access = logging.getLogger("tfclm.server.access")
_http = logging.getLogger("tfclm.server.http")

_UNKNOWN_METHOD = re.compile(rb"[A-Za-z-]+ ")
_MIN_READ_BYTES = 2**14  # a client that reads this much of its waiting replies is not idle


@dataclass(frozen=True)
class Limits:
    """The limits of the listener.

    A client has `read_seconds` to send a request, and the same to read some of a waiting reply. Requests with a large
    body (`jsonreader.LARGE_BYTES`) may use a quarter of the threads and a quarter of the queue.
    """

    threads: int
    queued: int
    body_bytes: int
    read_seconds: float
    connections: int = 1000
    idle_seconds: float = 5.0  # at the limit of connections, one idle for this long makes room for a new one


class RequestRefused(Exception):
    """A request that is not run but answered with an error."""

    def __init__(self, status: int, code: Code, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Listener:
    """An HTTP server in its own thread, and a pool of threads that run requests."""

    def __init__(self, api: RestApi, host: str, port: int, limits: Limits) -> None:
        self._api, self._host, self._port, self._limits = api, host, port, limits
        self._threads = ThreadPoolExecutor(limits.threads, thread_name_prefix="tfclm-rest")
        self._running = 0  # requests that have a thread or wait for one
        self._large = 0  # how many of these have a large body
        self._large_slots = asyncio.Semaphore(max(limits.threads // 4, 1))
        self._max_large = max(limits.threads // 4, 1) + limits.queued // 4
        self._buffered = 0  # bytes of all bodies in memory
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tfclm-http", daemon=True)

    def start(self) -> int:
        """Listens; returns the port.

        Raises:
            OSError: the port is not available.
        """
        self._thread.start()
        try:
            return asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        except OSError:
            self._end_loop()
            raise

    def stop(self, grace_seconds: float) -> None:
        """Stops listening, waits up to `grace_seconds` for current requests, and closes all connections."""
        asyncio.run_coroutine_threadsafe(self._close(grace_seconds), self._loop).result()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> int:
        self._web = _HttpServer(
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
        if self._web.count >= self._limits.connections and not self._web.drop_idle(self._limits.idle_seconds):
            return _RefusedConnection()
        self._web.count += 1
        return self._web()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._web.request_received(request.protocol)
        start = time.perf_counter()
        received = 0
        # The unread rest of a body would be taken for the next request.
        close = request.can_read_body
        path = local_path(request.raw_path)
        try:
            if path is None:
                reply = error_page(400)
            elif request.can_read_body and request.headers.get("Expect", "100-continue").lower() != "100-continue":
                reply = error_page(417)
            elif self._api.is_inference(request.method, path):
                sent = await self._read_body(request)
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
                # These are quick, and used by probes: they do not wait in the queue.
                reply = self._answer(request, path, Body(limit=0))
        except RequestRefused as refused:
            headers = {"Content-Type": "application/json"}
            reply = Reply(refused.status, write_error(refused.message), headers, code=refused.code)
            # The rest of the body is not read.
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
        if full or (body.large and self._large >= self._max_large):
            raise RequestRefused(503, Code.UNAVAILABLE, "The server is overloaded; try again later")
        self._running += 1
        self._large += body.large
        try:
            if body.large:
                await self._large_slots.acquire()
            job = self._loop.run_in_executor(self._threads, self._answer, request, path, body)
        except BaseException:
            self._running -= 1
            self._large -= body.large
            raise
        job.add_done_callback(partial(self._done, body.large))
        # If the client disconnects, the request keeps its thread, and counts, until it is done.
        return await asyncio.shield(job)

    def _done(self, large: bool, job: asyncio.Future[Reply]) -> None:
        self._running -= 1
        self._large -= large
        if large:
            self._large_slots.release()

    def _answer(self, request: web.BaseRequest, path: str, body: Body) -> Reply:
        try:
            return self._api.answer(request.method, path, body, request.headers.get("Origin", ""))
        except Exception:
            _log.exception("a request failed: %s %s", request.method, path[:512])
            headers = {"Content-Type": "application/json"}
            return Reply(500, write_error("Internal error; see the server's log"), headers, code=Code.INTERNAL)

    async def _read_body(self, request: web.BaseRequest) -> bytes:
        limit = self._limits.body_bytes
        too_large = RequestRefused(413, Code.INVALID_ARGUMENT, f"The request is larger than {limit} bytes")
        if (request.content_length or 0) > limit:
            raise too_large
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            return await asyncio.wait_for(self._receive(request, too_large), self._limits.read_seconds)
        except asyncio.TimeoutError:
            message = f"The request did not arrive within {self._limits.read_seconds:g} s"
            raise RequestRefused(408, Code.DEADLINE_EXCEEDED, message) from None

    async def _receive(self, request: web.BaseRequest, too_large: RequestRefused) -> bytes:
        pieces: list[bytes] = []
        size = 0
        try:
            while piece := await request.content.readany():
                size += len(piece)
                self._buffered += len(piece)
                pieces.append(piece)
                if size > self._limits.body_bytes:
                    raise too_large
                if self._buffered > 8 * self._limits.body_bytes:
                    raise RequestRefused(503, Code.UNAVAILABLE, "The server is overloaded; try again later")
        except BaseException:
            self._buffered -= size
            raise
        return b"".join(pieces)


@dataclass
class _Connection:
    """A connection, and since when it is idle: no request has arrived, or the client does not read its replies."""

    transport: asyncio.Transport
    idle_since: float
    no_request: bool = True  # the headers of the first request have not arrived yet
    unread: int = 0  # bytes of replies that the client has not read


class _HttpServer(web.Server):
    """The HTTP server of aiohttp, which also closes connections that are idle for long."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._options = options
        self._open: dict[Any, _Connection] = {}
        self.count = 0  # connections, including those that are being set up and not in `_open` yet

    def __call__(self) -> web.RequestHandler:
        """The protocol of a new connection."""
        return _Protocol(self, loop=asyncio.get_running_loop(), **self._options)

    async def watch(self, max_idle_seconds: float) -> None:
        """Closes, from now on, every connection that has been idle for `max_idle_seconds`."""
        while True:
            await asyncio.sleep(min(max_idle_seconds / 4, 1.0))
            now = asyncio.get_running_loop().time()
            for protocol, connection in list(self._open.items()):
                unread = connection.transport.get_write_buffer_size()
                if not (unread or connection.no_request) or connection.unread - unread >= _MIN_READ_BYTES:
                    connection.idle_since = now
                elif now - connection.idle_since > max_idle_seconds:
                    # `force_close` would wait for the client to read the rest.
                    if unread:
                        connection.transport.abort()
                    else:
                        protocol.force_close()
                else:
                    # Keep the maximum, so that a client cannot stay by reading a byte at a time.
                    unread = max(unread, connection.unread)
                connection.unread = unread

    def drop_idle(self, min_idle_seconds: float) -> bool:
        """Closes the longest idle connection, if that is `min_idle_seconds` or more; returns whether it did."""
        idle = [pair for pair in self._open.items() if pair[1].no_request or pair[1].unread]
        if not idle:
            return False
        protocol, connection = min(idle, key=lambda pair: pair[1].idle_since)
        if asyncio.get_running_loop().time() - connection.idle_since < min_idle_seconds:
            return False
        del self._open[protocol]
        connection.transport.abort()
        return True

    def request_received(self, protocol: Any) -> None:
        """Notes the first request of a connection; after that, aiohttp's keep-alive timeout applies."""
        if (connection := self._open.get(protocol)) and connection.no_request:
            connection.no_request, connection.idle_since = False, asyncio.get_running_loop().time()

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._open[handler] = _Connection(transport, asyncio.get_running_loop().time())

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        self.count -= 1
        self._open.pop(handler, None)
        super().connection_lost(handler, exc)


class _Protocol(web.RequestHandler):
    """The HTTP of a connection; invalid HTTP is answered as TensorFlow Serving does."""

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
        super().handle_error(request, status, exc)  # logs the error, and raises if a reply was already sent
        if isinstance(exc, BadHttpMethod) and _UNKNOWN_METHOD.match(self._received):
            status = 501
        response = _response(error_page(status))
        response.force_close()
        return response


def _response(reply: Reply) -> web.Response:
    response = web.Response(status=reply.status, body=reply.body, headers={"Server": "tfclm", **reply.headers})
    if "Content-Type" not in reply.headers:
        response.headers.popall("Content-Type", None)
    return response


class _ShortClientErrors(logging.Filter):
    """Logs an invalid request or a lost connection as one line, without the stack, which is not the server's fault."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, (HttpProcessingError, ConnectionError)):
            reason = " ".join(str(getattr(error, "message", error)).split())
            record.msg, record.args = "a request could not be read: %s", (reason[:200],)
            record.exc_info = None
            record.levelno, record.levelname = logging.WARNING, "WARNING"
        return True


_http.addFilter(_ShortClientErrors())


class _RefusedConnection(asyncio.Protocol):
    """A connection above the limit: it is answered with 503 and closed."""

    def connection_made(self, transport: Any) -> None:
        transport.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        transport.close()

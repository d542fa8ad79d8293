"""HTTP: sockets, bodies, limits and the access log around the REST API."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.http import HttpProcessingError

from tfclm.server.jsontensor import write_error
from tfclm.server.rest import Reply, RestApi
from tfclm.server.status import Code

_log = logging.getLogger(__name__)
_access = logging.getLogger("tfclm.server.access")

_http = logging.getLogger("tfclm.server.http")

MAX_INFLATED_BYTES = 100 * 2**20


@dataclass(frozen=True)
class Limits:
    """What the listener takes on before it refuses."""

    threads: int
    queued: int
    body_bytes: int
    read_seconds: float
    connections: int = 1000


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
        return int(self._socket.sockets[0].getsockname()[1])

    async def _close(self, grace_seconds: float) -> None:
        self._socket.close()
        deadline = self._loop.time() + grace_seconds
        self._web.pre_shutdown()
        while self._running and self._loop.time() < deadline:
            await asyncio.sleep(0.02)
        await self._web.shutdown(1)

    def _connection(self) -> asyncio.Protocol:
        if self._web.count >= self._limits.connections:
            return _Busy()
        protocol = self._web()
        self._web.count += 1
        # A connection on which no request head arrives is let go. Of a later request keep-alive's timeout takes care.
        self._web.silent[protocol] = self._loop.call_later(self._limits.read_seconds, protocol.force_close)
        return protocol

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._web.has_spoken(request.protocol)
        start = time.perf_counter()
        received = 0
        close = False
        try:
            if self._api.is_inference(request.method, request.raw_path):
                body = await self._read(request)
                received = len(body)
                try:
                    reply = await self._in_thread(request, body)
                finally:
                    self._buffered -= received
            else:
                # Quick, and asked by probes: never behind the queue.
                reply = self._answer(request, b"")
                close = request.can_read_body
        except Refused as refused:
            headers = {"Content-Type": "application/json"}
            reply = Reply(refused.status, write_error(refused.message), headers, code=refused.code)
            # The rest of the body is not wanted.
            close = True
        response = web.Response(status=reply.status, body=reply.body, headers={"Server": "tfclm", **reply.headers})
        if "Content-Type" not in reply.headers:
            response.headers.popall("Content-Type", None)
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

    async def _in_thread(self, request: web.BaseRequest, body: bytes) -> Reply:
        if self._running >= self._limits.threads + self._limits.queued:
            raise Refused(503, Code.UNAVAILABLE, "The server is overloaded; try again later")
        self._running += 1
        try:
            job = self._loop.run_in_executor(self._threads, self._answer, request, body)
            job.add_done_callback(self._done)
        except BaseException:
            self._running -= 1
            raise
        # A client that goes away leaves its request in its thread: its place is taken until it is done.
        return await asyncio.shield(job)

    def _done(self, job: asyncio.Future[Reply]) -> None:
        self._running -= 1

    def _answer(self, request: web.BaseRequest, body: bytes) -> Reply:
        try:
            if body and "gzip" in request.headers.get("Content-Encoding", ""):
                body = _inflate(body)
            return self._api.answer(request.method, request.raw_path, body, request.headers.get("Origin", ""))
        except Exception:
            _log.exception("a request failed: %s %s", request.method, request.raw_path[:512])
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


class _Connections(web.Server):
    """The open connections, and what will close those of them on which no request has come."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.count = 0  # with those that are about to be made, of which `connections` does not know
        self.silent: dict[Any, asyncio.TimerHandle] = {}

    def has_spoken(self, handler: Any) -> None:
        """A request has come: the connection may stay. A timer left alone would keep it in memory until it ends."""
        if timer := self.silent.pop(handler, None):
            timer.cancel()

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        self.count -= 1
        self.has_spoken(handler)
        super().connection_lost(handler, exc)


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


def _inflate(body: bytes) -> bytes:
    """Unpacks gzip; what cannot be unpacked, or is too large then, counts as no body."""
    inflater = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(body, MAX_INFLATED_BYTES)
    except zlib.error:
        return b""
    return inflated if inflater.eof else b""

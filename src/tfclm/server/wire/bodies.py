"""Bodies of HTTP requests, gzip-compressed or not."""

from __future__ import annotations

import zlib

from tfclm.server.deadline import Deadline
from tfclm.server.status import TooLarge
from tfclm.server.wire.jsonreader import LARGE_BYTES

_PIECE_BYTES = 2**24


class Body:
    """A body of at most `limit` bytes after decompression; `large` says whether it has more than `LARGE_BYTES`.

    Until it is read, a compressed body is decompressed only as far as is needed to set `large`.
    """

    def __init__(self, sent: bytes = b"", *, gzip: bool = False, limit: int) -> None:
        self._limit, self._start = limit, sent
        self._inflater = None
        self.large = len(sent) > LARGE_BYTES
        if gzip and sent:
            self._inflater = zlib.decompressobj(16 + zlib.MAX_WBITS)
            self._start = self._inflate(sent, LARGE_BYTES + 1)
            self.large = len(self._start) > LARGE_BYTES

    def read(self, deadline: Deadline) -> bytes:
        """The decompressed bytes; a body that is not gzip, or that continues after it, counts as empty.

        Raises:
            TooLarge: the body decompresses to more than the limit.
            StatusError: DEADLINE_EXCEEDED.
        """
        inflater = self._inflater
        if inflater is None:
            return self._start
        inflated = bytearray(self._start)
        while len(inflated) <= self._limit:
            deadline.check()
            piece = self._inflate(inflater.unconsumed_tail, min(self._limit + 1 - len(inflated), _PIECE_BYTES))
            if not piece:
                return bytes(inflated) if inflater.eof and not inflater.unused_data else b""
            inflated += piece
        raise TooLarge(f"The request is larger than {self._limit} bytes")

    def _inflate(self, sent: bytes, limit: int) -> bytes:
        assert self._inflater is not None
        try:
            return self._inflater.decompress(sent, limit)
        except zlib.error:
            return b""

"""A client's connection: uvicorn's, which a client that dawdles does not hold for ever, nor the place of its answer.

A client has SECONDS_FOR_A_HEAD for the first lines of a request, guard.SECONDS_FOR_A_BODY for the rest, and
SECONDS_FOR_A_READER to take any more of what was sent to it; between two requests uvicorn waits `timeout_keep_alive`
seconds.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS_FOR_A_HEAD = 10.0
SECONDS_FOR_A_READER = 30.0


class Connection(H11Protocol):
    """What uvicorn makes for each client."""

    _head: asyncio.TimerHandle | None = None
    _reader: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # to hear of all that the client's system does not take
        self._head = self.loop.call_later(SECONDS_FOR_A_HEAD, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and self._head is not None:
            self._head.cancel()
            self._head = None
        elif not answering and self._head is None:  # a request has begun
            self._head = self.loop.call_later(SECONDS_FOR_A_HEAD, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def _await_reader(self) -> None:
        left = self.transport.get_write_buffer_size()

        def look() -> None:
            if self.transport.get_write_buffer_size() < left:
                self._await_reader()
            else:
                self.transport.abort()

        self._reader = self.loop.call_later(SECONDS_FOR_A_READER, look)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reader is not None:
            self._reader.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._reader):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

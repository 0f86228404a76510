"""Clients beyond the limits: each is told why, once, and disconnected."""

from __future__ import annotations

import asyncio
from typing import cast

from pg_ferret.dispatch import error_document
from pg_ferret.errors import CommandError, ProtocolError
from pg_ferret.wire.message import HEADER_BYTES, frame_length, reply, reply_head

# Not more than so many wait at the same time to say something; others are closed at once.
WAITING_AT_MOST = 64
_PATIENCE_SECONDS = 1.0
# With the flags, which say whether a reply is wanted.
_ENOUGH_BYTES = HEADER_BYTES + 4
# TemporarilyUnavailable: nothing is wrong with the request.
_CODE = 365


class Refusal(asyncio.Protocol):
    """A connection that answers the first message with an error and closes."""

    waiting = 0

    def __init__(self, text: str, loop: asyncio.AbstractEventLoop) -> None:
        self._text = text
        self._loop = loop
        self._data = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        Refusal.waiting += 1
        self._transport = cast(asyncio.Transport, transport)
        self._timer = self._loop.call_later(_PATIENCE_SECONDS, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        if len(self._data) >= _ENOUGH_BYTES:
            return  # answered; the rest of the message is of no interest
        self._data += data[:_ENOUGH_BYTES]
        if len(self._data) < _ENOUGH_BYTES:
            return
        try:
            frame_length(self._data)
            request_id, legacy, silent = reply_head(self._data)
        except ProtocolError:
            silent = True
        if not silent:
            answer = reply(error_document(CommandError(_CODE, self._text)), request_id, legacy)
            self._transport.writelines([answer] if isinstance(answer, bytes) else answer)
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        Refusal.waiting -= 1
        if self._timer is not None:
            self._timer.cancel()

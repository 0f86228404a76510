"""One client connection: bytes in, one request at a time, bytes out, and back-pressure both ways."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import cast

import structlog

from pg_ferret.dispatch import describe, respond
from pg_ferret.errors import ProtocolError
from pg_ferret.runner import Runner
from pg_ferret.state.client import Client
from pg_ferret.wire.message import frame_length, reply_head

_log = structlog.get_logger()
# Sends a descriptor to the other workers; False if that is not possible now.
HandOver = Callable[[int], bool]
# Watches a descriptor of its own of the client, in place of the transport; None if that is not possible now.
Keep = Callable[["Connection", int], asyncio.Transport | None]
# Whom a transport tells what happens after its client has been taken from it.
_NOBODY = asyncio.Protocol()
# Requests that a client sends ahead are answered in order; beyond this many they stay in the socket.
_AHEAD = 4
# After so many answers without a wait, let the other clients have a turn.
_TURN = 16


def _silent(frame: bytes) -> bool:
    """Whether nobody waits for an answer."""
    return reply_head(frame)[2]


class Connection(Runner, asyncio.Protocol):
    """asyncio's view of a client; `closed` is called once, when it is gone."""

    __slots__ = (
        "_ahead",
        "_buffer",
        "_busy",
        "_client",
        "_closed",
        "_counters",
        "_draining",
        "_frame",
        "_gone",
        "_hand_over",
        "_held",
        "_loop",
        "_need",
        "_paused",
        "_refused",
        "_serving",
        "_touched",
        "_transport",
        "_writable",
    )

    def __init__(self, client: Client, loop: asyncio.AbstractEventLoop, closed: Callable[[Connection], None]) -> None:
        super().__init__()
        self._client = client
        self._counters = client.services.counters
        self._loop = loop
        self._closed = closed
        self._transport: asyncio.Transport | None = None
        self._busy = False
        self._draining = False
        self._gone = False  # the client has gone and left unacknowledged writes behind
        self._refused = False
        self._touched = True
        self._paused = False
        self._writable: asyncio.Future[None] | None = None  # there while the client does not read its replies
        self._ahead: deque[bytes] | None = None
        self._buffer: bytearray | None = None  # the beginning of a message of at least `_need` bytes
        self._need = 4
        self._held = False  # whether the worker's account of memory knows of us
        self._hand_over: HandOver | None = None  # there while the worker wants to get rid of us
        self._frame = b""  # the message that is being answered
        self._serving = 0  # bytes of the message that is being answered, if it did not come in one piece

    @property
    def peer(self) -> str:
        """The client's address."""
        return self._client.peer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._counters.bytes_in += len(data)
        try:
            # Nearly always one read is one message.
            if self._buffer is None and len(data) >= 4 and frame_length(data) == len(data):
                self._receive(data)
            else:
                self._assemble(data)
        except ProtocolError as error:
            self._refuse(error)

    def _assemble(self, data: bytes) -> None:
        """Keep the beginning of a message, in one buffer: a list of one-byte pieces would take forty times the room."""
        buffer = self._buffer
        if buffer is None:
            buffer = self._buffer = bytearray()
        buffer += data
        size = len(buffer)
        if size < self._need:
            self._account()
            return
        position = 0
        with memoryview(buffer) as view:
            while size - position >= 4:
                length = frame_length(view[position : position + 4])
                if size - position < length:
                    self._need = length
                    break
                self._receive(bytes(view[position : position + length]))
                position += length
            else:
                self._need = 4
        if position == size:
            self._buffer = None
        else:
            del buffer[:position]
        self._account()

    def _account(self) -> None:
        """Tell how much memory this client holds; requests that are answered as they come never get here."""
        buffered = 0 if self._buffer is None else len(self._buffer)
        ahead = sum(map(len, self._ahead)) if self._ahead else 0
        unsent = 0 if self._writable is None else self.unsent()
        held = self._serving + buffered + ahead + unsent
        stuck = self._buffer is not None or self._writable is not None
        self._held = held > 0 or stuck
        self._client.services.backlog.hold(self, held, stuck)

    def unsent(self) -> int:
        """Bytes of replies that the client has not taken."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def _receive(self, frame: bytes) -> None:
        self._touched = True
        if self._refused:
            return  # behind what could not be understood
        if not self._busy:
            self._busy = True
            if self._buffer is not None:
                self._serving = len(frame)
            self.start(self._serve(frame))
            return
        if self._ahead is None:
            self._ahead = deque()
        self._ahead.append(frame)
        if len(self._ahead) >= _AHEAD and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    async def _serve(self, frame: bytes) -> None:
        """Answer one message and those that came in the meantime."""
        transport = self._transport
        assert transport is not None
        turn = 0
        try:
            while True:
                self._frame = frame
                answer = await respond(frame, self._client)
                if isinstance(answer, bytes):
                    self._counters.bytes_out += len(answer)
                    transport.write(answer)
                elif answer is not None:
                    self._counters.bytes_out += sum(map(len, answer))
                    transport.writelines(answer)
                if self._writable is not None:
                    await self._writable
                if not self._ahead or self._draining:
                    break
                frame = self._next()
                self._serving = len(frame)
                turn += 1
                if turn % _TURN == 0:
                    await asyncio.sleep(0)
        except ProtocolError as error:
            self._refuse(error)
        except asyncio.CancelledError:
            transport.abort()
            raise
        finally:
            self._busy = False
            self._frame = b""
            self._serving = 0
            if self._held:
                self._account()
        if self._draining or self._gone or self._hand_over is not None:
            self._depart(transport)

    def _depart(self, transport: asyncio.Transport) -> None:
        """Nothing is left to be answered."""
        if self._gone:
            self._leave()
        elif self._draining:
            transport.close()
        elif self._hand_over is not None:
            self.move(self._hand_over)

    def _next(self) -> bytes:
        assert self._ahead is not None
        assert self._transport is not None
        frame = self._ahead.popleft()
        if not self._ahead:
            self._ahead = None
            if self._paused:
                self._paused = False
                self._transport.resume_reading()
        return frame

    def _refuse(self, error: ProtocolError) -> None:
        """The client does not speak the protocol: it alone is closed."""
        _log.info("closing a connection", peer=self._client.peer, reason=str(error))
        self._counters.errors += 1
        self._refused = True
        self._ahead = None
        self._buffer = None
        if self._transport is not None:
            self._transport.close()

    def pause_writing(self) -> None:
        if self._writable is None:
            self._writable = self._loop.create_future()
            self._account()

    def resume_writing(self) -> None:
        if self._writable is not None:
            self._writable.set_result(None)
            self._writable = None
            self._account()

    def connection_lost(self, exc: Exception | None) -> None:
        self._buffer = None
        self._paused = False
        self.resume_writing()  # nobody has to wait for the client any more
        if self.running and _silent(self._frame):
            # An unacknowledged write: drivers close behind it.  It is made, and so are those that came after it.
            self._gone = True
            self._ahead = deque(filter(_silent, self._ahead or ()))
            self._account()
            return
        self._ahead = None
        if self.running:
            # Nobody waits for the answer any more: the query is to end too.
            self.cancel()
            self._client.services.engine.abandon(describe(self._frame))
        self._leave()

    def _leave(self) -> None:
        if self._held:
            self._held = False
            self._client.services.backlog.hold(self, 0, stuck=False)
        self._closed(self)

    def move(self, hand_over: HandOver) -> bool:
        """Go to another worker, at once or as soon as the requests at hand are answered; True if that is done.

        The client notices nothing: what it has sent and we have not read, the other one reads.
        """
        self._hand_over = hand_over
        transport = self._resting()
        if transport is None or not hand_over(transport.get_extra_info("socket").fileno()):
            return False
        transport.abort()  # our descriptor only: the connection lives on in the other worker
        return True

    def _resting(self) -> asyncio.Transport | None:
        """The transport, if nothing is under way in either direction."""
        transport = self._transport
        if transport is None or transport.is_closing() or self._busy:
            return None
        if self._buffer is not None or transport.get_write_buffer_size():
            return None
        return transport

    def park(self, keep: Keep) -> None:
        """Have something smaller than a transport watch this client, unless a request is under way.

        As with `move`, what the client sends meanwhile stays in its socket.
        """
        transport = self._resting()
        if transport is None or transport.get_extra_info("parked"):
            return
        parked = keep(self, transport.get_extra_info("socket").fileno())
        if parked is not None:
            self._transport = parked
            transport.set_protocol(_NOBODY)
            transport.abort()  # our descriptor only

    def stay(self) -> None:
        """Forget ``move``: there is nobody to go to."""
        self._hand_over = None

    def quiet(self) -> bool:
        """Whether nothing has come since this was last asked and nothing is to be answered."""
        if self._touched or self._busy:
            self._touched = False
            return False
        return True

    def touch(self) -> None:
        """Whoever asks next is not told `quiet`."""
        self._touched = True

    def close_if_quiet(self) -> None:
        """Close if `quiet`."""
        if self.quiet() and self._transport is not None:
            self._transport.close()

    def drain(self) -> None:
        """Finish the request at hand, then close."""
        self._draining = True
        if not self._busy and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close now."""
        if self._transport is not None:
            self._transport.abort()

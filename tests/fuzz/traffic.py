"""The sockets of live.py: what is sent, what has to come back, and what came."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections import Counter, deque
from contextlib import suppress

import bson

from pg_ferret.errors import CommandError, ProtocolError
from pg_ferret.wire import message as wire
from tests.fuzz.commands import A_CURSOR
from tests.fuzz.lenient import decoded

# No message is due an answer for longer.
OVERDUE_SECONDS = 30.0
_CURSOR = bson.encode({"": A_CURSOR})[6:-1]
# A promise of more bytes than this is not kept.
_PATIENCE_BYTES = 1 << 16
_HANG_UP_EVERY = 97
_HISTORY = 8
INTERNAL = "internal error; see PostgreSQL's log"


class Findings:
    """What is wrong, each kind with its first few cases."""

    def __init__(self) -> None:
        self.cases: dict[str, list[str]] = {}
        self.counts: Counter[str] = Counter()

    def add(self, kind: str, case: str = "") -> None:
        """Enter one case."""
        self.counts[kind] += 1
        cases = self.cases.setdefault(kind, [])
        if len(cases) < 10 and case:
            cases.append(case)


class Stream:
    """What the server sees of one connection's bytes: the messages, and whether it has to close."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self.broken = False  # no answer comes after this
        self.missing = 0  # bytes that are promised and not sent

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that these bytes complete."""
        self._rest += data
        frames = []
        while not self.broken and (frame := self._next()) is not None:
            frames.append(frame)
            self.broken = refused(frame)
        return frames

    def _next(self) -> bytes | None:
        self.missing = max(0, 4 - len(self._rest)) if self._rest else 0
        if len(self._rest) < 4:
            return None
        (length,) = struct.unpack_from("<i", self._rest)
        if not 16 <= length <= 48_000_000:
            self.broken = True
            return None
        self.missing = max(0, length - len(self._rest))
        if self.missing:
            return None
        frame = bytes(self._rest[:length])
        del self._rest[:length]
        return frame


def refused(frame: bytes) -> bool:
    """Whether the connection is to be closed for this message; parser.py looks after the parser."""
    try:
        wire.parse(frame)
    except ProtocolError:
        return True
    except CommandError:
        pass
    return False


def silent(frame: bytes) -> bool:
    """Whether a message that is not refused has no answer."""
    opcode, flags = struct.unpack_from("<iI", frame, 12) if len(frame) >= 20 else (0, 0)
    return opcode == 2013 and bool(flags & 2)


class Link:
    """One connection, again and again; sends at most ``window`` messages ahead."""

    def __init__(self, traffic: Traffic, window: int) -> None:
        self._traffic = traffic
        self._window = window
        self._hang_up = False
        self._sent: deque[bytes] = deque(maxlen=_HISTORY)
        self.socket: socket.socket | None = None

    def _connect(self) -> None:
        self.socket = made = socket.create_connection(("127.0.0.1", self._traffic.port), timeout=OVERDUE_SECONDS)
        made.setblocking(False)
        self._stream = Stream()
        self._inbox = bytearray()
        self._outbox = bytearray()
        self.due: deque[tuple[bytes, float]] = deque()
        self._hang_up = False
        self._sent.clear()
        self._traffic.register(self)

    @property
    def wants_to_write(self) -> bool:
        """Whether bytes wait for room in the socket."""
        return bool(self._outbox)

    @property
    def ready(self) -> bool:
        """Whether another message may be sent."""
        if self.socket is None:
            return True
        return not (self._stream.broken or self._hang_up or self._outbox) and len(self.due) < self._window

    def send(self, number: int, data: bytes) -> None:
        """Send a message; most often more follow on the same connection."""
        if self.socket is None:
            self._connect()
        now = time.monotonic()
        self._sent.append(data)
        frames = self._stream.feed(data)
        self.due += [(frame, now) for frame in frames if refused(frame) or not silent(frame)]
        self._outbox += data
        self._hang_up = number % _HANG_UP_EVERY == 0
        self.write()

    def write(self) -> None:
        """Send what waits; close if that is what this connection does next."""
        assert self.socket is not None
        try:
            while self._outbox:
                del self._outbox[: self.socket.send(self._outbox)]
        except BlockingIOError:
            return
        except OSError:
            self._outbox.clear()  # the end comes with the next read
            return
        if self._hang_up:
            self._traffic.counts["hung up in the middle"] += 1
            self.close()
        elif self._stream.missing > _PATIENCE_BYTES and not self.due:
            self._traffic.counts["left with half a message"] += 1
            self.close()

    def read(self) -> None:
        """Take what has come."""
        assert self.socket is not None
        try:
            data = self.socket.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._closed_by_server()
            return
        self._inbox += data
        while (frame := self._whole_answer()) is not None:
            self._answered(frame)
        if self.socket is not None and not self._outbox and not self.due:
            self.write()

    def _whole_answer(self) -> bytes | None:
        if len(self._inbox) < 16:
            return None
        (length,) = struct.unpack_from("<i", self._inbox)
        if len(self._inbox) < length:
            return None
        frame = bytes(self._inbox[: max(length, 16)])
        del self._inbox[: max(length, 16)]
        return frame

    def _answered(self, answer: bytes) -> None:
        if not self.due:
            self._traffic.findings.add("an answer to nothing", answer.hex())
            return
        frame, _ = self.due.popleft()
        self._traffic.answered(frame, answer)

    def _closed_by_server(self) -> None:
        self._traffic.counts["closed by the server"] += 1
        if not self._stream.broken:
            self._traffic.findings.add("a connection was closed for no fault of its messages", self.history())
        self.close()

    def close(self) -> None:
        """Close from this side."""
        if self.socket is not None:
            self._traffic.unregister(self)
            self.socket.close()
            self.socket = None
            self.due.clear()

    def history(self) -> str:
        """The latest messages of this connection and what is still to be answered, for a report."""
        sent = [f"sent {data.hex()}" for data in self._sent]
        return "\n".join([*sent, *(f"due  {frame.hex()}" for frame, _ in self.due)])

    @property
    def overdue(self) -> bool:
        """Whether a message has waited for too long."""
        return self.socket is not None and bool(self.due) and time.monotonic() - self.due[0][1] > OVERDUE_SECONDS


class Traffic:
    """All links on one thread."""

    def __init__(self, port: int, links: int, findings: Findings) -> None:
        self.port = port
        self.findings = findings
        self.counts: Counter[str] = Counter()
        self.codes: Counter[tuple[int, str]] = Counter()
        self.alarmed = False  # PostgreSQL may have crashed
        self._cursor = _CURSOR
        self._poll = select.poll()
        self._links = [Link(self, index + 1) for index in range(links)]
        self._by_descriptor: dict[int, Link] = {}

    def register(self, link: Link) -> None:
        """A link has connected."""
        assert link.socket is not None
        self._by_descriptor[link.socket.fileno()] = link
        self._poll.register(link.socket, select.POLLIN)
        self.counts["connections"] += 1

    def unregister(self, link: Link) -> None:
        """A link is about to close."""
        assert link.socket is not None
        self._poll.unregister(link.socket)
        del self._by_descriptor[link.socket.fileno()]

    def send(self, number: int, data: bytes) -> None:
        """Send a message on the link whose turn it is, as soon as that link is ready."""
        link = self._links[number % len(self._links)]
        while not link.ready:
            self._turn()
        self.counts["sent"] += 1
        link.send(number, data.replace(_CURSOR, self._cursor))

    def finish(self) -> None:
        """Wait for every answer that is due; then close."""
        while any(link.socket is not None and link.due for link in self._links):
            self._turn()
        for link in self._links:
            link.close()

    def in_flight(self) -> list[bytes]:
        """The messages without an answer yet."""
        return [frame for link in self._links if link.socket is not None for frame, _ in link.due]

    def _turn(self) -> None:
        """Wait for a socket, not for long, and serve those that are ready."""
        for descriptor, link in self._by_descriptor.items():
            self._poll.modify(descriptor, select.POLLIN | (select.POLLOUT if link.wants_to_write else 0))
        for descriptor, events in self._poll.poll(100):
            ready = self._by_descriptor[descriptor]
            if events & select.POLLOUT:
                ready.write()
            if ready.socket is not None and events & ~select.POLLOUT:
                ready.read()
        for link in self._links:
            if link.overdue:
                self.counts["overdue"] += 1
                self.findings.add(f"no answer within {OVERDUE_SECONDS:.0f} s", link.history())
                link.close()

    def answered(self, frame: bytes, answer: bytes) -> None:
        """Judge an answer: whose it is, that it can be read, and that no defect of ours is behind it."""
        self.counts["answered"] += 1
        _, _, answered_id, opcode = struct.unpack_from("<iiii", answer)
        if answered_id != struct.unpack_from("<i", frame, 4)[0]:
            self.findings.add("an answer to another message", f"{frame.hex()} -> {answer.hex()}")
        try:
            document = decoded(answer[21 if opcode == 2013 else 36 :])
        except ValueError as error:
            self.findings.add("an answer that is no BSON", f"{error}: {frame.hex()} -> {answer.hex()}")
            return
        code, text = document.get("code", 0), str(document.get("errmsg", ""))
        assert isinstance(code, int)
        self.codes[code, str(document.get("codeName", ""))] += 1
        if code == 91:
            self.alarmed = True
            self.findings.add("code 91: PostgreSQL went away under a message", frame.hex())
        elif code == 1:
            kind = f"code 1: {text}" if text == INTERNAL else f"(engine) code 1: {text}"
            self.findings.add(kind, frame.hex())
        self._remember_cursor(document)

    def _remember_cursor(self, document: dict[str, object]) -> None:
        cursor = document.get("cursor")
        if isinstance(cursor, dict) and isinstance(cursor.get("id"), int) and cursor["id"]:
            with suppress(struct.error):
                self._cursor = struct.pack("<q", cursor["id"])

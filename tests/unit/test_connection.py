"""One client connection, without a network and without PostgreSQL."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import bson
import pytest

from pg_ferret import registry
from pg_ferret.connection import Connection
from pg_ferret.registry import Command
from pg_ferret.state.client import Client
from pg_ferret.wire import message as wire_message
from pg_ferret.wire.message import Request
from tests.turns import settle
from tests.unit.fake_services import Services, message

_DESCRIPTOR = 1000


class Transport(asyncio.Transport):
    """Keeps what is written and what was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = False
        self.aborted = False
        self.reading = True
        self.unsent = 0

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self if name == "socket" else default

    def fileno(self) -> int:
        return _DESCRIPTOR

    def is_closing(self) -> bool:
        return self.closed

    def replies(self) -> list[tuple[int, dict[str, Any]]]:
        """The answered ids and the documents."""
        return [(struct.unpack_from("<i", frame, 8)[0], bson.decode(frame[21:])) for frame in self.written]


class Rig:
    """A connection with its surroundings."""

    def __init__(self) -> None:
        self.services = Services()
        self.transport = Transport()
        self.gone = 0
        self.connection = Connection(self.services.client(), asyncio.get_running_loop(), self._closed)
        self.connection.connection_made(self.transport)

    def _closed(self, _connection: Connection) -> None:
        self.gone += 1


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """The command `slow` waits for this event."""
    event = asyncio.Event()

    async def slow(_request: Request, _client: Client) -> bytes:
        await event.wait()
        return bson.encode({"slow": True, "ok": 1.0})

    monkeypatch.setitem(registry.COMMANDS, b"slow", Command("slow", slow, "", False))
    monkeypatch.setattr(wire_message, "_shapes", wire_message.Shapes())  # they remember commands
    return event


async def test_a_message_is_answered_at_once() -> None:
    rig = Rig()
    rig.connection.data_received(message({"ping": 1}, 7))
    assert rig.transport.replies() == [(7, {"ok": 1.0})]
    assert rig.services.counters.requests == 1
    assert rig.services.counters.in_flight == 0


@pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 30])
async def test_a_message_in_pieces(size: int) -> None:
    rig = Rig()
    data = message({"ping": 1}, 1) + message({"ping": 1}, 2)
    for start in range(0, len(data), size):
        rig.connection.data_received(data[start : start + size])
    await settle()
    assert [number for number, _ in rig.transport.replies()] == [1, 2]


async def test_several_messages_in_one_read_are_answered_in_order() -> None:
    rig = Rig()
    rig.connection.data_received(b"".join(message({"ping": 1}, number) for number in range(50)))
    await settle()
    assert [number for number, _ in rig.transport.replies()] == list(range(50))


async def test_more_to_come_is_answered_by_silence() -> None:
    rig = Rig()
    rig.connection.data_received(message({"ping": 1}, 1, flags=2) + message({"nonsense": 1}, 2, flags=2))
    rig.connection.data_received(message({"ping": 1}, 3))
    await settle()
    assert [number for number, _ in rig.transport.replies()] == [3]


async def test_requests_sent_ahead_wait_and_reading_pauses(gate: asyncio.Event) -> None:
    rig = Rig()
    rig.connection.data_received(message({"slow": 1}, 1))
    for number in range(2, 8):
        rig.connection.data_received(message({"ping": 1}, number))
    assert rig.transport.written == []
    assert not rig.transport.reading
    assert rig.services.counters.in_flight == 1
    gate.set()
    await settle()
    assert [number for number, _ in rig.transport.replies()] == [1, 2, 3, 4, 5, 6, 7]
    assert rig.transport.reading


async def test_a_client_that_does_not_read_its_replies_is_not_served_further() -> None:
    rig = Rig()
    rig.connection.pause_writing()
    rig.connection.data_received(message({"ping": 1}, 1))
    rig.connection.data_received(message({"ping": 1}, 2))
    await settle()
    assert len(rig.transport.written) == 1
    rig.connection.resume_writing()
    await settle()
    assert len(rig.transport.written) == 2


async def test_unacknowledged_requests_are_run_though_the_client_has_gone(gate: asyncio.Event) -> None:
    rig = Rig()
    rig.connection.data_received(message({"slow": 1}, 1, flags=2))
    rig.connection.data_received(message({"slow": 1}, 2, flags=2))
    rig.connection.data_received(message({"ping": 1}, 3))
    rig.connection.connection_lost(None)
    await settle()
    assert (rig.gone, rig.services.abandoned) == (0, [])
    assert rig.services.backlog.held > 0
    gate.set()
    await settle()
    assert (rig.gone, rig.services.abandoned) == (1, [])
    assert rig.services.counters.requests == 2  # nobody waits for the third
    assert rig.services.backlog.held == 0
    assert rig.transport.written == []


async def test_so_is_one_that_back_pressure_has_met(gate: asyncio.Event) -> None:
    rig = Rig()
    for number in range(2):
        rig.connection.data_received(message({"slow": 1}, number, flags=2))
    rig.connection.pause_writing()
    gate.set()
    await settle()
    assert rig.services.counters.requests == 1
    rig.connection.connection_lost(None)
    await settle()
    assert rig.services.counters.requests == 2
    assert rig.gone == 1
    assert rig.services.backlog.held == 0


async def test_a_client_that_goes_away_ends_its_request(gate: asyncio.Event) -> None:
    rig = Rig()
    rig.connection.data_received(message({"slow": 1}))
    rig.connection.connection_lost(None)
    await settle()
    assert rig.gone == 1
    assert rig.services.abandoned == ["slow admin"]
    assert rig.services.counters.in_flight == 0
    assert rig.transport.written == []


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<i", 2**31 - 1),
        struct.pack("<i", -1),
        struct.pack("<i", 4),
        struct.pack("<i", 15) + bytes(11),
        struct.pack("<iiii", 16, 1, 0, 2013),
    ],
)
async def test_garbage_closes_the_connection(garbage: bytes) -> None:
    rig = Rig()
    rig.connection.data_received(garbage)
    await settle()
    assert rig.transport.closed
    assert rig.transport.written == []


async def test_a_broken_document_is_an_error_and_the_connection_goes_on() -> None:
    rig = Rig()
    broken = bytearray(message({"ping": 1, "x": "abc"}, 5))
    broken[broken.index(b"abc\0") - 4] = 99
    rig.connection.data_received(bytes(broken))
    rig.connection.data_received(message({"ping": 1}, 6))
    await settle()
    (first, refusal), (second, _) = rig.transport.replies()
    assert (first, second) == (5, 6)
    assert (refusal["ok"], refusal["code"], refusal["codeName"]) == (0.0, 22, "InvalidBSON")
    assert not rig.transport.closed


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ({"nonsense": 1}, 59),
        ({"explain": {"find": "c"}}, 238),
        ({"ping": 1, "txnNumber": bson.Int64(1)}, 20),
        ({"find": "c", "startTransaction": True, "autocommit": False}, 20),
    ],
)
async def test_refusals(command: dict[str, Any], code: int) -> None:
    rig = Rig()
    rig.connection.data_received(message(command))
    await settle()
    ((_, answer),) = rig.transport.replies()
    assert answer["code"] == code
    assert answer["ok"] == 0.0
    assert rig.services.counters.errors == 1


async def test_a_defect_in_a_handler_is_an_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(_request: Request, _client: Client) -> bytes:
        raise ZeroDivisionError("secret")

    monkeypatch.setitem(registry.COMMANDS, b"broken", Command("broken", broken, "", False))
    rig = Rig()
    rig.connection.data_received(message({"broken": 1}))
    await settle()
    ((_, answer),) = rig.transport.replies()
    assert answer["code"] == 1
    assert "secret" not in answer["errmsg"]
    assert rig.services.troubles == ["broken: ZeroDivisionError, see PostgreSQL's log"]


async def test_draining_closes_idle_connections_at_once_and_busy_ones_after_their_answer(gate: asyncio.Event) -> None:
    idle, busy = Rig(), Rig()
    idle.connection.drain()
    assert idle.transport.closed
    busy.connection.data_received(message({"slow": 1}))
    busy.connection.drain()
    assert not busy.transport.closed
    gate.set()
    await settle()
    assert len(busy.transport.written) == 1
    assert busy.transport.closed


async def test_a_client_is_handed_over_after_its_answer_if_there_is_still_somebody_to_take_it(
    gate: asyncio.Event,
) -> None:
    _, staying, draining, gone = rigs = [Rig() for _ in range(4)]
    taken: list[int] = []

    def take(descriptor: int) -> bool:
        taken.append(descriptor)
        return True

    for rig in rigs:
        rig.connection.data_received(message({"slow": 1}, flags=2 if rig is gone else 0))
        assert not rig.connection.move(take)
    staying.connection.stay()
    draining.connection.drain()
    gone.connection.connection_lost(None)
    gone.connection.stay()
    assert (taken, gone.gone) == ([], 0)
    gate.set()
    await settle()
    assert taken == [_DESCRIPTOR]
    assert [(rig.transport.aborted, rig.transport.closed, rig.gone) for rig in rigs] == [
        (True, False, 0),
        (False, False, 0),
        (False, True, 0),
        (False, False, 1),
    ]


async def test_a_quiet_connection_is_closed_and_one_in_use_is_not(gate: asyncio.Event) -> None:
    rig = Rig()
    rig.connection.close_if_quiet()
    assert not rig.transport.closed
    rig.connection.data_received(message({"slow": 1}))
    for _ in range(3):
        rig.connection.close_if_quiet()
        assert not rig.transport.closed
    gate.set()
    await settle()
    rig.connection.close_if_quiet()
    assert rig.transport.closed


async def test_a_client_that_counts_anew_is_not_closed_at_once() -> None:
    rig = Rig()
    assert not rig.connection.quiet()
    assert rig.connection.quiet()
    rig.connection.touch()
    rig.connection.close_if_quiet()
    assert not rig.transport.closed
    rig.connection.close_if_quiet()
    assert rig.transport.closed


def test_a_command_cannot_be_registered_twice() -> None:
    with pytest.raises(ValueError, match="ping"):
        registry.command("ping", help="again")(registry.COMMANDS[b"ping"].handler)
    with pytest.raises(ValueError, match="explain"):
        registry.command("explain", help="known but missing")(registry.COMMANDS[b"ping"].handler)


async def test_what_a_client_holds_is_accounted_for(gate: asyncio.Event) -> None:
    rig = Rig()
    backlog = rig.services.backlog
    frame = message({"slow": 1})
    rig.connection.data_received(frame[:10])
    assert backlog.held == 10
    rig.connection.data_received(frame[10:] + frame)
    assert backlog.held == 2 * len(frame)
    gate.set()
    await settle()
    assert backlog.held == 0
    rig.transport.unsent = 100
    rig.connection.pause_writing()
    assert backlog.held == 100
    rig.connection.connection_lost(None)
    assert backlog.held == 0


async def test_a_message_that_came_whole_is_not_accounted_for(gate: asyncio.Event) -> None:
    rig = Rig()
    rig.connection.data_received(message({"slow": 1}))
    assert rig.services.backlog.held == 0
    gate.set()
    await settle()
    assert len(rig.transport.written) == 1


async def test_nothing_is_left_of_messages_that_came_together(gate: asyncio.Event) -> None:
    rig = Rig()
    rig.connection.data_received(message({"ping": 1}) + message({"ping": 1}))
    assert rig.services.backlog.held == 0
    rig.connection.data_received(message({"slow": 1}))
    rig.connection.data_received(message({"ping": 1}))
    gate.set()
    await settle()
    assert len(rig.transport.written) == 4
    rig.transport.unsent = 100
    rig.connection.pause_writing()
    assert rig.services.backlog.held == 100

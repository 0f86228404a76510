"""Who accepts the next client."""

from __future__ import annotations

import asyncio
import socket
from contextlib import closing

import pytest

from pg_ferret.listener import Adopter, Balance, Listener
from pg_ferret.status import Kind, State, StatusTable


@pytest.fixture
def table() -> StatusTable:
    status = StatusTable(4)
    for slot in status.slots[1:4]:
        slot.set(kind=Kind.WORKER, state=State.READY)
        slot.beat()
    return status


def test_whoever_has_fewest_accepts(table: StatusTable) -> None:
    for slot, connections in zip(table.slots[1:4], (100, 101, 120), strict=True):
        slot.set(connections=connections)
    assert [Balance(table, slot).ahead() for slot in (1, 2, 3)] == [False, False, True]


def test_with_few_clients_every_one_counts(table: StatusTable) -> None:
    table[1].set(connections=1)
    assert not Balance(table, 1).ahead()
    table[1].set(connections=2)
    assert Balance(table, 1).ahead()
    assert not Balance(table, 2).ahead()


def test_room_lasts_until_it_is_another_ones_turn(table: StatusTable) -> None:
    for slot, connections in zip(table.slots[1:4], (100, 110, 160), strict=True):
        slot.set(connections=connections)
    assert [Balance(table, slot).room() for slot in (1, 2, 3)] == [110 + 1 + 6 + 1 - 100, 100 + 1 + 6 + 1 - 110, -52]
    assert [Balance(table, slot).room(lead=0) for slot in (1, 2, 3)] == [11, -9, -59]


def test_a_worker_alone_has_always_room(table: StatusTable) -> None:
    for slot in table.slots[2:4]:
        slot.set(state=State.STARTING)
    table[1].set(connections=1000)
    assert Balance(table, 1).room() > 0


@pytest.mark.parametrize("change", [{"state": State.DRAINING}, {"heartbeat": 1}, {"kind": Kind.FREE}])
def test_nobody_waits_for_a_worker_that_takes_no_clients(table: StatusTable, change: dict[str, int]) -> None:
    for slot in table.slots[1:3]:
        slot.set(connections=50)
    assert Balance(table, 1).ahead()
    table[3].set(**change)
    assert not Balance(table, 1).ahead()


@pytest.mark.parametrize("kind", [Listener, Adopter])
async def test_no_enums_are_made_for_a_client(kind: type[Listener], table: StatusTable) -> None:
    loop = asyncio.get_running_loop()
    come: asyncio.Future[socket.socket] = loop.create_future()
    channel, ours = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server, channel, ours:
        listening = server if kind is Listener else ours
        listening.setblocking(False)
        listener = kind("here", listening, loop, Balance(table, 1), lambda client, _: come.set_result(client))
        with closing(listener), socket.create_connection(server.getsockname()) as theirs:
            if kind is Adopter:
                accepted, _ = server.accept()
                with accepted:
                    socket.send_fds(channel, [b"."], [accepted.fileno()])
            with await asyncio.wait_for(come, 5) as client:
                assert (client.getpeername(), client.family) == (theirs.getsockname(), socket.AF_INET)
                assert (type(client.family), type(client.type)) == (int, int)

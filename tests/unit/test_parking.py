"""Quiet clients that give up their transports, with real sockets on both kinds of event loop."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import Any

import bson
import pytest
import uvloop

from pg_ferret import parking
from pg_ferret.connection import Connection, Keep
from pg_ferret.parking import Parking
from tests.turns import PATIENCE_SECONDS, settle, wait_until
from tests.unit.fake_services import Services, message

Loop = Callable[[], asyncio.AbstractEventLoop]


class Lot:
    """A worker's part in it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.services = Services()
        self.parking = Parking(self.loop, self.attach)
        self.clients: set[Connection] = set()
        self.peers: list[Peer] = []
        self.attached = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    def attach(self, connection: Connection, accepted: socket.socket) -> None:
        self.attached += 1
        task = self.loop.create_task(self.loop.connect_accepted_socket(lambda: connection, accepted))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def connect(self) -> tuple[Connection, Peer]:
        """A client that has sent nothing yet."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        connection = Connection(self.services.client(len(self.clients)), self.loop, self.clients.discard)
        self.clients.add(connection)
        self.attach(connection, ours)
        self.peers.append(peer := Peer(theirs))
        return connection, peer

    async def welcome(self) -> tuple[Connection, Peer]:
        """A client that has been answered once."""
        connection, peer = self.connect()
        await peer.ping(1)
        return connection, peer

    async def close(self) -> None:
        """All clients go, and are seen to have gone."""
        for peer in self.peers:
            peer.sock.close()
        await wait_until(lambda: not self.clients)
        assert len(self.parking) == 0
        self.parking.close()


class Peer:
    """The client's end."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self.sock, data)

    async def reply(self) -> int:
        """The number of the request that the next reply answers."""
        head = await self._exactly(16)
        length, _, answered, _ = struct.unpack("<iiii", head)
        assert bson.decode((await self._exactly(length - 16))[5:])["ok"] == 1.0
        return int(answered)

    async def ping(self, number: int) -> None:
        await self.send(message({"ping": 1}, number))
        assert await self.reply() == number

    async def at_end(self) -> bool:
        return await asyncio.wait_for(self._loop.sock_recv(self.sock, 1), PATIENCE_SECONDS) == b""

    async def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = await asyncio.wait_for(self._loop.sock_recv(self.sock, size - len(data)), PATIENCE_SECONDS)
            assert piece, "closed"
            data += piece
        return data


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def loop_factory(request: pytest.FixtureRequest) -> Loop:
    factory: Loop = request.param
    return factory


def sockets() -> set[str]:
    """Those that this process has, by their inodes: those of other tests may go meanwhile."""
    links = (f"/proc/self/fd/{descriptor}" for descriptor in os.listdir("/proc/self/fd"))
    return {name for link in links if os.path.lexists(link) and (name := os.readlink(link)).startswith("socket:")}


def run(loop_factory: Loop, scene: Callable[[Lot], Coroutine[Any, Any, None]]) -> None:
    """Play a scene, and see that no client and no socket is left."""

    async def play() -> None:
        before = sockets()
        lot = Lot()
        try:
            await scene(lot)
        finally:
            await lot.close()  # uvloop would wait for clients that are left
        await wait_until(lambda: not sockets() - before)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(play())


def test_who_has_sent_something_is_not_quiet(loop_factory: Loop) -> None:
    async def scene(lot: Lot) -> None:
        quiet: list[bool] = []

        def attach(connection: Connection, stirred: socket.socket) -> None:
            quiet.append(connection.quiet())  # nothing has been read yet
            lot.attach(connection, stirred)

        lot.parking.close()
        lot.parking = Parking(lot.loop, attach)
        # So many that they get their transports in several turns of the loop.
        clients = [await lot.welcome() for _ in range(50)]
        for connection, _ in clients:
            lot.parking.park(connection)
            connection.quiet()
        for _, peer in clients[:40]:
            await peer.send(message({"ping": 1}, 2))
        lot.parking.touch_stirred()
        for connection, _ in clients:
            connection.close_if_quiet()
        assert [await peer.reply() for _, peer in clients[:40]] == [2] * 40
        assert all([await peer.at_end() for _, peer in clients[40:]])
        assert quiet == [False] * 40

    run(loop_factory, scene)


def test_a_parked_client_is_served_as_soon_as_it_sends(loop_factory: Loop) -> None:
    async def scene(lot: Lot) -> None:
        connection, peer = await lot.welcome()
        for number in range(2, 5):
            lot.parking.park(connection)
            assert len(lot.parking) == 1
            await peer.ping(number)
            assert len(lot.parking) == 0
        assert lot.attached == 4

    run(loop_factory, scene)


def test_what_has_come_before_parking_is_answered(loop_factory: Loop) -> None:
    async def scene(lot: Lot) -> None:
        connection, peer = await lot.welcome()
        peer.sock.send(message({"ping": 1}, 2))  # without a turn of the loop
        lot.parking.park(connection)
        assert await peer.reply() == 2

    run(loop_factory, scene)


def test_nothing_is_lost_whenever_a_client_is_parked(loop_factory: Loop) -> None:
    chance = random.Random(5)

    async def scene(lot: Lot) -> None:
        async def talk(connection: Connection, peer: Peer) -> None:
            sent = answered = 0
            while answered < 200:
                if chance.random() < 0.3:
                    lot.parking.park(connection)
                data = message({"ping": 1}, sent)
                cut = chance.choice((0, 1, 4, 20))
                await peer.send(data[:cut])
                if cut and chance.random() < 0.3:
                    lot.parking.park(connection)
                await peer.send(data[cut:])
                sent += 1
                while answered < sent and (chance.random() < 0.7 or sent - answered > 10):
                    assert await peer.reply() == answered
                    answered += 1
            while answered < sent:
                assert await peer.reply() == answered
                answered += 1

        await asyncio.gather(*(talk(*lot.connect()) for _ in range(20)))
        assert lot.attached > 200

    run(loop_factory, scene)


def test_a_parked_client_that_goes_is_forgotten(loop_factory: Loop) -> None:
    async def scene(lot: Lot) -> None:
        connection, peer = await lot.welcome()
        lot.parking.park(connection)
        peer.sock.close()
        await wait_until(lambda: not lot.clients)
        assert len(lot.parking) == 0

    run(loop_factory, scene)


def test_a_client_in_the_middle_of_a_message_is_not_parked(loop_factory: Loop) -> None:
    async def scene(lot: Lot) -> None:
        connection, peer = await lot.welcome()
        data = message({"ping": 1}, 2)
        await peer.send(data[:10])
        await wait_until(lambda: lot.services.backlog.held == 10)
        lot.parking.park(connection)
        assert len(lot.parking) == 0
        await peer.send(data[10:])
        assert await peer.reply() == 2

    run(loop_factory, scene)


@pytest.mark.parametrize("end", [Connection.abort, Connection.drain, Connection.close_if_quiet])
def test_a_parked_client_can_be_closed(loop_factory: Loop, end: Callable[[Connection], None]) -> None:
    async def scene(lot: Lot) -> None:
        connection, peer = await lot.welcome()
        assert not connection.quiet()
        lot.parking.park(connection)
        end(connection)
        end(connection)
        assert await peer.at_end()
        await wait_until(lambda: not lot.clients)
        assert len(lot.parking) == 0

    run(loop_factory, scene)


def test_a_parked_client_can_go_to_another_worker(loop_factory: Loop) -> None:
    async def scene(lot: Lot) -> None:
        connection, peer = await lot.welcome()
        lot.parking.park(connection)
        taken: list[int] = []

        def refuse(_descriptor: int) -> bool:
            return False

        def take(descriptor: int) -> bool:
            taken.append(os.dup(descriptor))
            return True

        assert not connection.move(refuse)
        assert len(lot.parking) == 1
        await peer.ping(2)
        lot.parking.park(connection)
        assert connection.move(take)
        await wait_until(lambda: not lot.clients)
        await peer.send(b"what is sent now is the other one's")
        await settle()
        assert len(lot.parking) == 0
        with socket.socket(fileno=taken[0]) as other:
            assert other.recv(100) == b"what is sent now is the other one's"

    run(loop_factory, scene)


def test_only_the_quiet_are_parked(loop_factory: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "SWEEP_SECONDS", 0.02)

    async def scene(lot: Lot) -> None:
        sweeping = lot.loop.create_task(lot.parking.run(lot.clients))
        quiet = [lot.connect()[1] for _ in range(100)]
        _, lively = lot.connect()
        number = 0
        while len(lot.parking) < 100:
            number += 1
            await lively.ping(number)
        for peer in quiet:
            await peer.ping(1)
        sweeping.cancel()
        assert 200 <= lot.attached < 200 + number

    run(loop_factory, scene)


def test_without_a_descriptor_left_a_client_stays_as_it_is(loop_factory: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_descriptor: int) -> int:
        raise OSError(24, "Too many open files")

    async def scene(lot: Lot) -> None:
        connection, peer = await lot.welcome()
        monkeypatch.setattr(os, "dup", none_left)
        lot.parking.park(connection)
        assert len(lot.parking) == 0
        await peer.ping(2)

    run(loop_factory, scene)


def test_a_client_that_cannot_be_parked_keeps_no_other_from_it(
    loop_factory: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parking, "SWEEP_SECONDS", 0.01)
    whole = Connection.park

    async def scene(lot: Lot) -> None:
        clients = [(await lot.welcome())[0] for _ in range(3)]

        def park(connection: Connection, keep: Keep) -> None:
            if connection is clients[1]:
                raise RuntimeError("broken")
            whole(connection, keep)

        monkeypatch.setattr(Connection, "park", park)
        sweeping = asyncio.create_task(lot.parking.run(clients))
        await wait_until(lambda: len(lot.parking) == 2)
        assert not sweeping.done()
        sweeping.cancel()

    run(loop_factory, scene)

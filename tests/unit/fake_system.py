"""A supervisor whose operating system and gateway exist only here, for test_prefork.py."""

from __future__ import annotations

import socket
from pathlib import Path

from config.check import checked
from config.settings import Config
from pg_ferret.errors import StateDirError
from pg_ferret.status import Slot, State
from supervisor.channel import Channel
from supervisor.crew import System
from supervisor.prefork import Gateway, Supervisor
from supervisor.vetting import Vetting
from tests.unit.samples import config, message


class FakeSystem:
    """Processes that exist only here, and a clock that stands."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.running: list[int] = []
        self.dead: dict[int, int] = {}  # wait status by pid
        self.sent: list[tuple[int, int]] = []
        self.fork_fails = False
        self._last_pid = 100

    def fork(self) -> int:
        if self.fork_fails:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        self._last_pid += 1
        self.running.append(self._last_pid)
        return self._last_pid

    def kill(self, pid: int, number: int) -> None:
        self.sent.append((pid, number))

    def waitpid(self, pid: int, _options: int) -> tuple[int, int]:
        return (pid, self.dead.pop(pid)) if pid in self.dead else (0, 0)

    def end(self, pid: int, wait_status: int) -> None:
        self.running.remove(pid)
        self.dead[pid] = wait_status

    def system(self) -> System:
        return System(self.fork, self.kill, self.waitpid, lambda: self.now)


class FakeVetting(Vetting):
    """A check in this very process, which takes as long as the world wants."""

    def __init__(self, text: bytes, world: World) -> None:
        if isinstance(world.vetting_error, OSError):
            raise world.vetting_error
        self.text = text
        self.deadline = float("inf")
        self.socket, self._other = socket.socketpair()
        self._world = world

    def done(self) -> bool:
        return not self._world.vetting_takes_long

    def result(self) -> Config:
        self.end()
        if self._world.vetting_error:
            raise self._world.vetting_error
        return checked(self.text)

    def end(self) -> int:
        self.socket.close()
        self._other.close()
        return 0


class World:
    """A supervisor, its fake system, and the launcher's end of the channel."""

    def __init__(self) -> None:
        self.fake = FakeSystem()
        self.launcher, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.launcher.setblocking(False)
        self.prepared: list[Config] = []
        self.state_dir_error = ""
        self.vetting_error: Exception | None = None
        self.vetting_takes_long = False
        gateway = Gateway(lambda _: 0, self.prepare)
        self.supervisor = Supervisor(Channel(theirs), config(), gateway, self.vet, self.fake.system())
        self.theirs = theirs

    def vet(self, text: bytes) -> Vetting:
        return FakeVetting(text, self)

    def prepare(self, new: Config) -> Path:
        self.prepared.append(new)
        if self.state_dir_error:
            raise StateDirError(self.state_dir_error)
        return Path("/")

    def turn(self, seconds: float = 0.0) -> int | None:
        """Let time pass, have the healthy workers beat, then one round of the loop."""
        self.fake.now += seconds
        return self.supervisor.turn()

    def configure(self, **settings: str) -> None:
        self.launcher.send(b"S" + message(**settings))
        self.turn()

    def ready(self) -> None:
        """Every running worker says that it is ready and beats."""
        for slot in self.supervisor.table.slots[1:]:
            if slot.get("pid") in self.fake.running:
                slot.set(state=State.READY, heartbeat=int(self.fake.now * 1e9))

    @property
    def running(self) -> Config:
        """The configuration that the workers have been given."""
        orders = self.supervisor.crew.orders
        assert orders is not None
        return orders.config

    def slot(self, index: int) -> Slot:
        return self.supervisor.table[index]

    def received(self) -> list[bytes]:
        messages = []
        while True:
            try:
                messages.append(self.launcher.recv(100_000))
            except BlockingIOError:
                return messages

    def lines(self) -> list[str]:
        return [item[2:].decode() for item in self.received() if item[:1] == b"l"]

    def sent_slots(self) -> list[int]:
        return [int.from_bytes(item[1:5], "little") for item in self.received() if item[:1] == b"s"]

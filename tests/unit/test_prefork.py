"""The supervisor with a fake operating system: no fork, no signal, no waiting."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from samples import config, message

from config.settings import Config
from pg_ferret.errors import StateDirError
from pg_ferret.status import Kind, Slot, State
from supervisor import plan
from supervisor.channel import Channel
from supervisor.crew import System
from supervisor.plan import Drain, Kill, Limits, Process, Release, Seat, Start
from supervisor.prefork import Gateway, Supervisor

LIMITS = Limits(wanted=2, worker_timeout=5, graceful_timeout=3)
KILLED, FAILED_BOOT, CRASHED, LEFT = 9, 3 << 8, 1 << 8, 0


class FakeSystem:
    """Processes that exist only here, and a clock that stands."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.running: list[int] = []
        self.dead: list[tuple[int, int]] = []
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

    def waitpid(self, _pid: int, _options: int) -> tuple[int, int]:
        return self.dead.pop(0) if self.dead else (0, 0)

    def end(self, pid: int, wait_status: int) -> None:
        self.running.remove(pid)
        self.dead.append((pid, wait_status))

    def system(self) -> System:
        return System(self.fork, self.kill, self.waitpid, lambda: self.now)


class World:
    """A supervisor, its fake system, and the launcher's end of the channel."""

    def __init__(self) -> None:
        self.fake = FakeSystem()
        self.launcher, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.launcher.setblocking(False)
        self.prepared: list[Config] = []
        self.state_dir_error = ""
        gateway = Gateway(lambda _: 0, self.prepare)
        self.supervisor = Supervisor(Channel(theirs), config(), gateway, self.fake.system())
        self.theirs = theirs

    def prepare(self, new: Config) -> Path:
        self.prepared.append(new)
        if self.state_dir_error:
            raise StateDirError(self.state_dir_error)
        return Path(new.settings.state_dir)

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


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    world.configure()
    yield world
    world.supervisor.close()
    world.launcher.close()
    world.theirs.close()


# -- decisions ------------------------------------------------------------------------------------------------------


def seats(count: int, beat: float = 0.0, draining: float | None = None) -> list[Seat]:
    return [Seat(index, Process(100 + index, 0.0, True, beat, draining)) for index in range(1, count + 1)]


def test_grows_into_the_lowest_free_seats() -> None:
    crew = [Seat(1, Process(101, 0.0)), Seat(2), Seat(3), Seat(4)]
    assert plan.decide(crew, Limits(3, 5, 5), 0.0) == [Start(crew[1]), Start(crew[2])]


def test_shrinks_waiting_seats_first_then_the_highest() -> None:
    crew = seats(3, beat=0.0)
    crew.insert(0, Seat(9, retry=50.0))
    assert plan.decide(crew, Limits(1, 5, 5), 0.0) == [Drain(crew[2]), Drain(crew[3]), Release(crew[0])]


def test_a_draining_worker_neither_counts_nor_blocks_its_successor() -> None:
    crew = [*seats(2), Seat(3)]
    assert crew[0].process is not None
    crew[0].process.draining = 0.0
    assert plan.decide(crew, LIMITS, 0.0) == [Start(crew[2])]


def test_no_free_seat_means_waiting_for_the_drain() -> None:
    crew = seats(2, draining=0.0)
    assert plan.decide(crew, LIMITS, 1.0) == []


def test_drain_ends_at_graceful_timeout() -> None:
    crew = seats(1, draining=10.0, beat=12.9)
    assert plan.decide(crew, Limits(0, 5, 3), 12.9) == []
    assert plan.deadline(crew, LIMITS) == 13.0
    (kill,) = plan.decide(crew, Limits(0, 5, 3), 13.0)
    assert isinstance(kill, Kill)
    assert kill.signal == signal.SIGKILL


def test_hung_worker_gets_abrt_then_kill() -> None:
    crew = seats(1, beat=10.0)
    limits = Limits(1, 5, 3)
    assert plan.decide(crew, limits, 15.0) == []
    (first,) = plan.decide(crew, limits, 15.1)
    assert isinstance(first, Kill)
    assert first.signal == signal.SIGABRT
    process = crew[0].process
    assert process is not None
    process.aborted = 15.1
    assert plan.decide(crew, limits, 16.0) == []
    (second,) = plan.decide(crew, limits, 16.1)
    assert isinstance(second, Kill)
    assert second.signal == signal.SIGKILL
    process.killed = True
    assert plan.decide(crew, limits, 99.0) == []


def test_silence_while_the_supervisor_slept_is_nobodys_fault() -> None:
    crew = seats(1, beat=10.0)
    assert plan.decide(crew, Limits(1, 5, 3, awake=100.0), 104.0) == []
    assert plan.decide(crew, Limits(1, 5, 3, awake=100.0), 105.5) != []


def test_a_starting_worker_has_more_patience() -> None:
    crew = [Seat(1, Process(101, 0.0, beat=0.0))]
    assert plan.decide(crew, Limits(1, 1, 3), 9.0) == []
    assert plan.decide(crew, Limits(1, 1, 3), 10.5) != []


def test_backoff_grows_to_thirty_seconds() -> None:
    crashes = [plan.backoff(count, boot_failed=False) for count in range(12)]
    assert crashes == [0, 0, 0.25, 0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    boots = [plan.backoff(count, boot_failed=True) for count in range(1, 8)]
    assert boots == [1, 2, 4, 8, 16, 30, 30]
    assert plan.backoff(10_000, boot_failed=False) == 30


def test_a_late_death_forgives_the_early_ones() -> None:
    seat = Seat(1, Process(101, born=0.0), failures=5)
    assert plan.bury(seat, None, now=100.0)
    assert (seat.failures, seat.retry, seat.restarts) == (0, 100.0, 1)


@pytest.mark.parametrize(
    ("wait_status", "text"), [(3 << 8, "exit 3"), (9, "signal KILL"), (6 | 0x80, "signal ABRT"), (0, "exit 0")]
)
def test_exit_text(wait_status: int, text: str) -> None:
    assert plan.exit_text(wait_status) == text


# -- the loop -------------------------------------------------------------------------------------------------------


def test_forks_the_wanted_workers_and_shows_them(world: World) -> None:
    assert world.fake.running == [101, 102]
    row = world.slot(2)
    assert (row.get("kind"), row.get("slot"), row.get("pid"), row.get("state")) == (Kind.WORKER, 2, 102, State.STARTING)
    assert (row.get("generation"), row.get("restarts"), row.heartbeat_age() != 0) == (1, 0, True)
    assert world.slot(0).get("state") == State.STARTING
    world.ready()
    world.turn()
    assert world.slot(0).get("state") == State.READY


def test_dead_worker_is_replaced_in_the_same_round(world: World) -> None:
    world.ready()
    world.turn(10)
    world.fake.end(101, KILLED)
    world.turn()
    row = world.slot(1)
    assert (row.get("pid"), row.last_exit, row.get("restarts"), row.get("generation")) == (103, "signal KILL", 1, 2)
    assert world.slot(2).get("pid") == 102


def test_crash_loop_backs_off(world: World) -> None:
    times = []
    for _ in range(6):
        while 101 not in world.fake.running and not world.slot(1).get("pid"):
            world.turn(0.05)
        times.append(world.fake.now)
        world.fake.end(world.slot(1).get("pid"), CRASHED)
        world.turn()
    waits = [round(b - a, 2) for a, b in pairwise(times)]
    assert waits == pytest.approx([0.0, 0.25, 0.5, 1.0, 2.0], abs=0.06)
    assert world.slot(1).get("state") == State.BACKOFF
    assert world.slot(1).last_exit == "exit 1"
    assert world.slot(2).get("pid") == 102


def test_worker_that_cannot_boot_does_not_spin(world: World) -> None:
    for seconds in (0.0, 0.5, 0.4):
        for pid in list(world.fake.running):
            world.fake.end(pid, FAILED_BOOT)
        world.turn(seconds)
    assert world.fake.running == []
    assert world.slot(1).get("state") == State.BACKOFF
    assert world.slot(0).get("state") == State.BACKOFF
    world.turn(0.2)
    assert world.fake.running == [103, 104]


def test_reload_cuts_the_backoff_short(world: World) -> None:
    for pid in (101, 102):
        world.fake.end(pid, FAILED_BOOT)
    world.turn()
    assert world.fake.running == []
    world.configure(pool_min_conns="5")
    assert world.fake.running == [103, 104]


def test_fork_failure_backs_off_and_is_shown(world: World) -> None:
    world.ready()
    world.turn(10)
    world.fake.fork_fails = True
    world.fake.end(101, KILLED)
    world.turn()
    world.turn()
    assert world.slot(1).last_exit == "fork: Resource temporarily unav"
    assert world.slot(1).get("state") == State.BACKOFF
    world.fake.fork_fails = False
    world.turn(1)
    assert world.slot(1).get("pid") == 103


def test_hung_worker_is_aborted_then_killed_then_replaced(world: World) -> None:
    world.ready()
    world.turn()
    for _ in range(32):
        world.slot(2).set(heartbeat=int(world.fake.now * 1e9))
        world.turn(1.0)
    assert world.fake.sent == [(101, signal.SIGABRT), (101, signal.SIGKILL)]
    world.fake.end(101, KILLED)
    world.turn()
    assert world.slot(1).get("pid") == 103
    assert any("ferretdb.worker_timeout" in line for line in world.lines())


def test_shrinking_drains_and_frees_the_slot(world: World) -> None:
    world.ready()
    world.configure(workers="1")
    assert world.fake.sent == [(102, signal.SIGTERM)]
    assert world.slot(2).get("state") == State.DRAINING
    world.fake.end(102, LEFT)
    world.turn()
    assert world.slot(2).get("kind") == Kind.FREE
    assert world.fake.running == [101]


def test_disabled_drains_all_and_enabled_serves_again(world: World) -> None:
    world.ready()
    world.configure(enabled="off")
    assert world.slot(0).message == "ferretdb.enabled is off"
    for pid in (101, 102):
        world.fake.end(pid, LEFT)
    world.turn(100)
    assert world.fake.running == []
    world.configure()
    assert world.fake.running == [103, 104]


def test_invalid_settings_change_nothing(world: World) -> None:
    world.configure(workers="4711")
    assert world.slot(0).message.startswith("ferretdb.workers: ")
    assert "4711" not in world.slot(0).message
    assert world.fake.running == [101, 102]
    world.configure(workers="3")
    assert world.slot(0).message.startswith("pg_ferret ")
    assert world.fake.running == [101, 102, 103]


def test_garbage_instead_of_settings_changes_nothing(world: World) -> None:
    world.launcher.send(b"S{")
    assert world.turn() is None
    assert world.slot(0).message
    assert world.fake.running == [101, 102]


def test_no_worker_before_the_state_directory_is_there(world: World) -> None:
    world.configure(enabled="off")
    for pid in (101, 102):
        world.fake.end(pid, LEFT)
    world.turn()
    world.state_dir_error = "ferretdb.state_dir: /full: No space left on device"
    world.configure(state_dir="/full")
    assert world.fake.running == []
    world.turn(1)
    assert world.slot(0).message == world.state_dir_error
    assert sum(world.state_dir_error in line for line in world.lines()) == 1
    world.state_dir_error = ""
    world.turn(1)
    assert world.fake.running == [103, 104]


def test_state_directory_does_not_move_under_running_workers(world: World) -> None:
    world.configure(state_dir="/elsewhere", workers="3")
    assert world.fake.running == [101, 102, 103]
    assert "ferretdb.state_dir" in world.slot(0).message
    orders = world.supervisor.crew.orders
    assert orders is not None
    assert orders.config.settings.state_dir == ""
    assert len(world.prepared) == 1


def test_role_is_forwarded(world: World) -> None:
    world.launcher.send(b"Rstandby")
    world.turn()
    orders = world.supervisor.crew.orders
    assert orders is not None
    assert orders.config.server.in_recovery


@pytest.mark.parametrize("order", [b"Qfast", b"Qsmart"])
def test_quit_ends_workers_and_loop(world: World, order: bytes) -> None:
    world.launcher.send(order)
    assert world.turn() is None
    assert world.fake.sent == [(101, signal.SIGTERM), (102, signal.SIGTERM)]
    assert world.slot(0).get("state") == State.STOPPING
    world.fake.end(101, LEFT)
    assert world.turn(0.1) is None
    world.turn(0.1)
    assert world.fake.sent[2:] == [(102, signal.SIGKILL)]
    world.fake.end(102, KILLED)
    assert world.turn() == 0
    assert world.fake.running == []


def test_a_worker_that_cannot_even_be_killed_does_not_hold_the_stop(world: World) -> None:
    world.supervisor.wakeup.queue.append(signal.SIGTERM)
    assert world.turn() is None
    assert world.turn(0.3) == 0


def test_the_launchers_death_is_a_stop_with_status_one(world: World) -> None:
    world.launcher.close()
    assert world.turn() is None
    for pid in (101, 102):
        world.fake.end(pid, LEFT)
    assert world.turn() == 1


# -- status ---------------------------------------------------------------------------------------------------------


def test_status_is_sent_once_a_second_and_when_a_state_changes(world: World) -> None:
    assert world.sent_slots() == [0, 1, 2]
    world.slot(1).set(requests=5)
    world.turn(0.1)
    assert world.sent_slots() == []
    world.ready()
    world.turn(0.1)
    assert world.sent_slots() == [0, 1, 2]
    world.turn(1)
    assert world.sent_slots() == [0]


def test_cursors_are_shown_on_the_supervisors_row_only(world: World) -> None:
    world.ready()
    for index in (1, 2):
        world.slot(index).set(cursors=12)
    world.turn(1)
    shown = {item[1]: Slot(memoryview(item[5:])).get("cursors") for item in world.received() if item[:1] == b"s"}
    assert (world.slot(0).get("cursors"), shown[1], shown[2]) == (12, -1, -1)


def test_a_full_channel_delays_status_and_loses_none(world: World) -> None:
    filled = 0
    while True:
        try:
            world.theirs.send(b"lDfill", socket.MSG_DONTWAIT)
            filled += 1
        except BlockingIOError:
            break
    world.ready()
    world.turn(1)
    assert world.received().count(b"lDfill") == filled
    world.turn(0.2)
    assert world.sent_slots() == [0, 1, 2]

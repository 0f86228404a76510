"""The supervisor with a fake operating system: no fork, no signal, no waiting."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from itertools import pairwise

import pytest

from pg_ferret.status import Kind, Slot, State
from tests.unit.fake_system import World

KILLED, FAILED_BOOT, CRASHED, LEFT = 9, 3 << 8, 1 << 8, 0


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    world.configure()
    yield world
    world.supervisor.close()
    world.launcher.close()
    world.theirs.close()


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
    assert world.fake.sent == [(101, signal.SIGABRT), (101, signal.SIGCONT), (101, signal.SIGKILL)]
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


def test_the_loop_goes_on_while_settings_are_checked(world: World) -> None:
    world.ready()
    world.turn(10)
    world.vetting_takes_long = True
    world.configure(workers="3")
    world.fake.end(101, KILLED)
    world.turn()
    assert world.fake.running == [102, 103]
    world.vetting_takes_long = False
    world.turn()
    assert world.fake.running == [102, 103, 104]


def test_the_newest_settings_are_the_ones_that_count(world: World) -> None:
    world.vetting_takes_long = True
    world.configure(workers="4")
    world.configure(workers="3")
    world.vetting_takes_long = False
    world.turn()
    assert world.fake.running == [101, 102, 103]


def test_a_role_told_while_settings_are_checked_is_newer_than_they(world: World) -> None:
    world.vetting_takes_long = True
    world.configure(pool_min_conns="5")
    world.launcher.send(b"Rstandby")
    world.turn()
    world.vetting_takes_long = False
    world.turn()
    assert (world.running.settings.pool_min_conns, world.running.server.in_recovery) == (5, True)
    world.configure(pool_min_conns="6")
    assert (world.running.settings.pool_min_conns, world.running.server.in_recovery) == (6, False)


@pytest.mark.parametrize(
    "error", [OSError(11, "Resource temporarily unavailable"), RuntimeError("ModuleNotFoundError: pydantic")]
)
def test_settings_that_cannot_be_checked_are_tried_again(world: World, error: Exception) -> None:
    world.vetting_error = error
    world.configure(workers="3")
    assert world.fake.running == [101, 102]
    assert "cannot be checked" in world.slot(0).message
    assert str(error.args[-1]) in world.slot(0).message
    world.vetting_error = None
    world.turn(1)
    assert world.fake.running == [101, 102]
    world.turn(4)
    assert world.fake.running == [101, 102, 103]
    assert "cannot be checked" not in world.slot(0).message


def test_a_stop_does_not_wait_for_settings(world: World) -> None:
    world.vetting_takes_long = True
    world.configure(workers="3")
    world.launcher.send(b"Qfast")
    world.turn()
    for pid in (101, 102):
        world.fake.end(pid, LEFT)
    assert world.turn() == 0


def test_no_worker_before_the_state_directory_is_there(world: World) -> None:
    world.configure(enabled="off")
    for pid in (101, 102):
        world.fake.end(pid, LEFT)
    world.turn()
    world.state_dir_error = "ferretdb.state_dir: /full: No space left on device"
    world.configure(state_dir="/full")
    assert world.fake.running == []
    world.turn(1)
    assert world.slot(0).message == f"{world.state_dir_error}; listening on no address"
    assert sum(world.state_dir_error in line for line in world.lines()) == 1
    world.state_dir_error = ""
    world.turn(1)
    assert world.fake.running == [103, 104]


def test_state_directory_does_not_move_under_running_workers(world: World) -> None:
    world.configure(state_dir="/elsewhere", workers="3")
    assert world.fake.running == [101, 102, 103]
    assert "ferretdb.state_dir" in world.slot(0).message
    assert world.running.settings.state_dir == ""
    assert {item.settings.state_dir for item in world.prepared} == {""}


def test_role_is_forwarded(world: World) -> None:
    world.launcher.send(b"Rstandby")
    world.turn()
    assert world.running.server.in_recovery


@pytest.mark.parametrize("order", [b"Qfast", b"Qsmart"])
def test_quit_ends_workers_and_loop(world: World, order: bytes) -> None:
    world.launcher.send(order)
    assert world.turn() is None
    assert world.fake.sent == [(101, signal.SIGINT), (102, signal.SIGINT)]
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


# -- replacing workers ----------------------------------------------------------------------------------------------


def test_a_rolling_restart_starts_each_successor_first(world: World) -> None:
    world.ready()
    world.turn()
    world.launcher.send(b"W")
    world.turn()
    assert world.fake.running == [101, 102, 103]
    assert world.fake.sent == []
    world.ready()
    world.turn()
    assert world.fake.sent == [(101, signal.SIGTERM)]
    assert world.fake.running == [101, 102, 103, 104]
    world.ready()
    world.turn()
    assert world.fake.sent == [(101, signal.SIGTERM), (102, signal.SIGTERM)]
    for pid in (101, 102):
        world.fake.end(pid, LEFT)
    world.turn(1)
    assert world.fake.running == [103, 104]
    assert [world.slot(index).get("restarts") for index in (3, 4)] == [0, 0]


def test_a_worker_that_has_served_enough_is_replaced(world: World) -> None:
    world.configure(max_requests="1000")
    world.ready()
    world.slot(1).set(requests=999)
    world.slot(2).set(requests=1000)
    world.turn()
    world.ready()
    world.turn()
    assert world.fake.sent == [(102, signal.SIGTERM)]


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


def test_what_is_wrong_with_the_settings_is_sent_when_it_changes(world: World) -> None:
    def errors() -> list[bytes]:
        return [item[1:] for item in world.received() if item[:1] == b"e"]

    assert errors() == [b""]
    world.configure(workers="9", max_workers="8")
    assert errors() == [b"ferretdb.workers\0" + b"9\0" + b"9 are more than ferretdb.max_workers (8)\0"]
    world.turn(1)
    assert errors() == []
    world.configure(workers="2")
    assert errors() == [b""]

"""Whom it hits when clients make a worker keep too much."""

from __future__ import annotations

import pytest

from pg_ferret.state.backlog import Backlog


class Holder:
    """A client that can be disconnected."""

    def __init__(self) -> None:
        self.peer = "peer"
        self.pending = 0
        self.aborted = False

    def unsent(self) -> int:
        return self.pending

    def abort(self) -> None:
        self.aborted = True


class Rig:
    """An account with a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.backlog = Backlog(lambda: self.now)
        self.backlog.limit = 1000
        self.backlog.timeout = 60.0


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_who_holds_little_goes_last(rig: Rig) -> None:
    small, old, new = Holder(), Holder(), Holder()
    rig.backlog.limit = 300_000
    for rig.now, holder, size in (1.0, small, 20), (2.0, old, 200_000), (3.0, new, 200_000):
        rig.backlog.hold(holder, size, stuck=True)
    assert [holder.aborted for holder in (small, old, new)] == [False, True, False]


def test_the_one_that_has_not_moved_for_the_longest_makes_room(rig: Rig) -> None:
    old, busy, new = Holder(), Holder(), Holder()
    rig.backlog.hold(busy, 400, stuck=False)
    rig.now = 1.0
    rig.backlog.hold(old, 300, stuck=True)
    rig.now = 2.0
    rig.backlog.hold(new, 299, stuck=True)
    assert rig.backlog.held == 999
    rig.now = 3.0
    rig.backlog.hold(new, 301, stuck=True)
    assert (old.aborted, busy.aborted, new.aborted) == (True, False, False)
    assert rig.backlog.held == 701


def test_a_newcomer_goes_itself_if_the_others_are_being_served(rig: Rig) -> None:
    busy, new = Holder(), Holder()
    rig.backlog.hold(busy, 900, stuck=False)
    rig.backlog.hold(new, 200, stuck=True)
    assert (busy.aborted, new.aborted) == (False, True)
    assert rig.backlog.held == 900


def test_a_lower_limit_holds_for_those_who_are_there(rig: Rig) -> None:
    old, new = Holder(), Holder()
    for rig.now, holder in (1.0, old), (2.0, new):
        rig.backlog.hold(holder, 400, stuck=True)
    rig.backlog.limit = 500
    rig.backlog.tick()
    assert (old.aborted, new.aborted, rig.backlog.held) == (True, False, 400)


def test_who_stands_still_goes(rig: Rig) -> None:
    half, moving, served = Holder(), Holder(), Holder()
    for client, stuck in ((half, True), (moving, True), (served, False)):
        rig.backlog.hold(client, 10, stuck=stuck)
    rig.now = 59.0
    rig.backlog.hold(moving, 11, stuck=True)
    rig.backlog.tick()
    assert not half.aborted
    rig.now = 60.0
    rig.backlog.tick()
    assert (half.aborted, moving.aborted, served.aborted) == (True, False, False)
    assert rig.backlog.held == 21


def test_who_reads_slowly_stays(rig: Rig) -> None:
    reader = Holder()
    reader.pending = 500
    rig.backlog.hold(reader, 500, stuck=True)
    for _ in range(3):
        rig.now += 59.0
        rig.backlog.tick()
        reader.pending -= 1
    assert not reader.aborted
    rig.now += 61.0
    rig.backlog.tick()
    rig.now += 61.0
    rig.backlog.tick()
    assert reader.aborted


def test_no_timeout_is_for_ever(rig: Rig) -> None:
    rig.backlog.timeout = 0.0
    half = Holder()
    rig.backlog.hold(half, 1, stuck=True)
    rig.now = 1e9
    rig.backlog.tick()
    assert not half.aborted


def test_nothing_is_left_of_who_holds_nothing(rig: Rig) -> None:
    client = Holder()
    rig.backlog.hold(client, 10, stuck=True)
    rig.backlog.hold(client, 0, stuck=False)
    rig.now = 1e9
    rig.backlog.tick()
    assert (client.aborted, rig.backlog.held) == (False, 0)

"""Who accepts the next client."""

from __future__ import annotations

import pytest

from pg_ferret.listener import Balance
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

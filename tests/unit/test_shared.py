"""The shared connection's decisions, on a clock and a server that do what a test wants."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from pg_ferret.engine.calls import FIND, GET_MORE, Call
from pg_ferret.engine.lines import STALL_SECONDS, Owner, Shared
from pg_ferret.engine.pipeline import Row
from pg_ferret.engine.shared import Costs, Reads, SharedLine
from tests.unit.fake_line import Loop, Server, row, sync

_SHAPE = 1


class Stage:
    """A line with the reads that were given up on it."""

    def __init__(self, call: Call = GET_MORE) -> None:
        self.loop = Loop()
        self.server = Server()
        self.elsewhere: list[Shared] = []
        self.stalled: list[Shared] = []
        owner = Owner(
            lambda read, _: self.elsewhere.append(read), lambda _: None, lambda _, read: self.stalled.append(read)
        )
        self.costs = costs = Costs()
        costs.note(_SHAPE, 0.0)
        self.line = SharedLine(cast(Any, self.server), cast(Any, self.loop), call, costs, owner)
        self.reads = [Shared(call, (b"%d" % number,), b"db.c", _SHAPE) for number in range(4)]
        self.waiters = [self.line.add(read) for read in self.reads]
        self.loop.run()


@pytest.fixture
def stage() -> Stage:
    return Stage()


def reads(stage: Stage, most: int, *, free: bool) -> tuple[Reads, list[Shared]]:
    """The line as one of so many, and the reads that are measured on connections of their own instead."""
    measured: list[Shared] = []

    async def measure(_: Reads, read: Shared) -> Row:
        measured.append(read)
        return ()

    lines = Reads(GET_MORE, lambda _: stage.line, measure, lambda: free)
    lines.allot(most)
    lines.add(cast(Any, stage.server))
    return lines, measured


def answer(stage: Stage, count: int, *, end: bool = False) -> None:
    stage.server.give(stage.line, *[row(b"page", None)] * count, *[sync()] * end)


def answers(stage: Stage) -> int:
    return sum(waiter.done() for waiter in stage.waiters)


def test_a_line_that_moves_may_take_its_time(stage: Stage) -> None:
    for number in range(1, 4):
        stage.loop.run(STALL_SECONDS * 0.9)
        answer(stage, 1)
        stage.loop.run(STALL_SECONDS * 0.2)
        assert (answers(stage), stage.line.waiting, stage.stalled) == (number, 4 - number, [])
    answer(stage, 1, end=True)
    stage.loop.run(STALL_SECONDS)
    assert (answers(stage), stage.line.waiting, stage.line.lost, stage.loop.later) == (4, 0, False, [])


def test_a_line_that_stands_still_is_given_up(stage: Stage) -> None:
    answer(stage, 1)
    stage.loop.run(STALL_SECONDS)
    stage.loop.run(STALL_SECONDS)
    assert stage.stalled == [stage.reads[1]]
    assert stage.elsewhere == stage.reads[1:]
    assert stage.line.lost
    assert stage.line.waiting == 0


def test_a_read_that_opens_a_cursor_is_made_elsewhere() -> None:
    stage = Stage(FIND)
    stage.server.give(stage.line, row(b"page", None, None), row(b"page", b"more", b"id"), row(b"page", None, None))
    assert stage.elsewhere == [stage.reads[1]]
    assert not stage.waiters[1].done()
    assert stage.waiters[2].result() == (b"page", None)
    assert stage.costs.slow(_SHAPE)


def test_a_read_that_goes_on_with_a_cursor_is_not(stage: Stage) -> None:
    stage.server.give(stage.line, row(b"page", b"more"))
    assert stage.waiters[0].result() == (b"page", b"more")
    assert stage.elsewhere == []
    assert stage.costs.cheap(_SHAPE)


def test_an_answered_batch_whose_end_is_late_is_no_stall(stage: Stage) -> None:
    answer(stage, 4)
    for _ in range(3):
        stage.loop.run(STALL_SECONDS)
    assert (answers(stage), stage.stalled, stage.line.lost) == (4, [], False)
    answer(stage, 0, end=True)
    stage.loop.run(STALL_SECONDS)
    assert (stage.line.busy, stage.loop.later) == (False, [])


@pytest.mark.parametrize("free", [True, False])
def test_a_second_line_is_no_reason_to_wait_for_a_connection(stage: Stage, free: bool) -> None:
    lines, measured = reads(stage, 2, free=free)
    before = stage.line.waiting
    read = lines.share(stage.reads[0])
    if free:
        assert asyncio.iscoroutine(read)
        asyncio.run(read)
        assert measured == [stage.reads[0]]
    else:
        assert asyncio.isfuture(read)
    assert stage.line.waiting == before + (not free)


def test_reads_share_if_there_is_no_other_way(stage: Stage) -> None:
    lines, measured = reads(stage, 1, free=False)
    unknown, slow = (stage.reads[0]._replace(shape=shape) for shape in (2, 3))
    stage.costs.note(slow.shape, 1.0)
    stage.loop.run(STALL_SECONDS * 0.9)  # late
    assert asyncio.isfuture(lines.share(stage.reads[0]))
    assert asyncio.isfuture(lines.share(unknown))
    asyncio.run(cast(Any, lines.share(slow)))
    assert measured == [slow]

"""The shared connection's decisions, on a clock and a server that do what a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest
from psycopg import pq

from pg_ferret.engine.calls import GET_MORE
from pg_ferret.engine.lines import Shared
from pg_ferret.engine.pipeline import Row
from pg_ferret.engine.shared import STALL_SECONDS, Costs, Owner, Reads, SharedLine

_SHAPE = 1


class Loop:
    """An event loop in which nothing happens by itself."""

    def __init__(self) -> None:
        self.now = 100.0
        self.soon: list[Callable[[], None]] = []
        self.later: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def create_future(self) -> asyncio.Future[Row]:
        return asyncio.Future(loop=cast(Any, self))

    def call_soon(self, call: Callable[[], None]) -> None:
        self.soon.append(call)

    def call_later(self, seconds: float, call: Callable[[], None]) -> None:
        self.later.append((self.now + seconds, call))

    def add_reader(self, *_: Any) -> None: ...

    def remove_reader(self, *_: Any) -> None: ...

    def run(self, seconds: float = 0.0) -> None:
        """What is to be done at once, and what is due so much later."""
        while self.soon:
            self.soon.pop(0)()
        self.now += seconds
        due = [call for at, call in self.later if at <= self.now]
        self.later = [(at, call) for at, call in self.later if at > self.now]
        for call in due:
            call()


class Result:
    """A result of libpq."""

    def __init__(self, status: pq.ExecStatus) -> None:
        self.status = int(status)

    def get_value(self, _row: int, column: int) -> bytes | None:
        return b"page" if column == 0 else None


class Server:
    """A connection in pipeline mode: results arrive when the test says so."""

    socket = 0
    status = int(pq.ConnStatus.OK)

    def __init__(self) -> None:
        self.pgconn = self
        self._results: list[Result] = []

    def enter_pipeline_mode(self) -> None: ...

    def send_query_prepared(self, *_: Any) -> None: ...

    def pipeline_sync(self) -> None: ...

    def flush(self) -> int:
        return 0

    def consume_input(self) -> None: ...

    def is_busy(self) -> int:
        return not self._results

    def get_result(self) -> Result:
        return self._results.pop(0)

    def answer(self, line: SharedLine, count: int, sync: bool = False) -> None:
        self._results += [Result(pq.ExecStatus.TUPLES_OK) for _ in range(count)]
        self._results += [Result(pq.ExecStatus.PIPELINE_SYNC)] if sync else []
        line._readable()


class Stage:
    """A line with the reads that were given up on it."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.server = Server()
        self.elsewhere: list[Shared] = []
        self.stalled: list[Shared] = []
        owner = Owner(
            lambda read, _: self.elsewhere.append(read), lambda _: None, lambda _, read: self.stalled.append(read)
        )
        costs = Costs()
        costs.note(_SHAPE, 0.0)
        self.line = SharedLine(cast(Any, self.server), cast(Any, self.loop), GET_MORE, costs, owner)
        self.reads = [Shared(GET_MORE, (b"%d" % number,), b"db.c", _SHAPE) for number in range(4)]
        self.waiters = [self.line.add(read) for read in self.reads]
        self.loop.run()


@pytest.fixture
def stage() -> Stage:
    return Stage()


def answers(stage: Stage) -> int:
    return sum(waiter.done() for waiter in stage.waiters)


def test_a_line_that_moves_may_take_its_time(stage: Stage) -> None:
    for number in range(1, 4):
        stage.loop.run(STALL_SECONDS * 0.9)
        stage.server.answer(stage.line, 1)
        stage.loop.run(STALL_SECONDS * 0.2)
        assert (answers(stage), stage.line.waiting, stage.stalled) == (number, 4 - number, [])
    stage.server.answer(stage.line, 1, sync=True)
    stage.loop.run(STALL_SECONDS)
    assert (answers(stage), stage.line.waiting, stage.line.lost, stage.loop.later) == (4, 0, False, [])


def test_a_line_that_stands_still_is_given_up(stage: Stage) -> None:
    stage.server.answer(stage.line, 1)
    stage.loop.run(STALL_SECONDS)
    stage.loop.run(STALL_SECONDS)
    assert stage.stalled == [stage.reads[1]]
    assert stage.elsewhere == stage.reads[1:]
    assert stage.line.lost
    assert stage.line.waiting == 0


def test_an_answered_batch_whose_end_is_late_is_no_stall(stage: Stage) -> None:
    stage.server.answer(stage.line, 4)
    for _ in range(3):
        stage.loop.run(STALL_SECONDS)
    assert (answers(stage), stage.stalled, stage.line.lost) == (4, [], False)
    stage.server.answer(stage.line, 0, sync=True)
    stage.loop.run(STALL_SECONDS)
    assert (stage.line.busy, stage.loop.later) == (False, [])


@pytest.mark.parametrize("free", [True, False])
def test_a_second_line_is_no_reason_to_wait_for_a_connection(stage: Stage, free: bool) -> None:
    measured: list[Shared] = []

    async def measure(_: Reads, read: Shared) -> Row:
        measured.append(read)
        return ()

    lines = Reads(GET_MORE, lambda _: stage.line, measure, lambda: free)
    lines.allot(2)
    lines.add(cast(Any, stage.server))
    before = stage.line.waiting
    read = lines.share(stage.reads[0])
    if free:
        assert asyncio.iscoroutine(read)
        asyncio.run(read)
        assert measured == [stage.reads[0]]
    else:
        assert asyncio.isfuture(read)
    assert stage.line.waiting == before + (not free)

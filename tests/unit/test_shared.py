"""The shared connection's decisions, on a clock and a server that do what a test wants."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, cast

import pytest

from pg_ferret.engine.backend import Backend, Lender
from pg_ferret.engine.calls import AGGREGATE, BYTEA_OID, FIND, FIND_AS_EVER, FIND_MANY, GET_MORE, Call, array
from pg_ferret.engine.costs import CHEAP_SECONDS, Costs
from pg_ferret.engine.lines import STALL_SECONDS, Owner, Shared
from pg_ferret.engine.pages import LOOKED_AT, PageLine
from pg_ferret.engine.pipeline import LARGE_BYTES, Row
from pg_ferret.engine.points import PointLine
from pg_ferret.engine.scheduling import Lag, Work
from pg_ferret.engine.shared import Reads
from pg_ferret.errors import EngineError, EngineLostError
from pg_ferret.runner import Runner
from tests.turns import settle
from tests.unit.fake_line import Loop, Server, prepared, refusal, row, rows, sync

_SHAPE, _OTHER_SHAPE = 1, 2


class OneByOne(PointLine):
    """Point reads of one transaction, each a statement of its own."""

    _FEWEST = 1_000
    __slots__ = ()


class Stage:
    """A line with the reads that were given up on it."""

    def __init__(
        self, call: Call = FIND, *, together: bool = True, points: type[PointLine] = OneByOne, count: int = 4
    ) -> None:
        self.loop = Loop()
        self.server = Server()
        self.elsewhere: list[Shared] = []
        self.stalled: list[Shared] = []
        self.unclaimed: list[Row] = []
        self.ended = 0
        owner = Owner(
            lambda read, _: self.elsewhere.append(read),
            self._end,
            lambda _, read: self.stalled.append(read),
            lambda _, row: self.unclaimed.append(row),
        )
        self.lag = Lag(cast(Any, self.loop))
        self.costs = costs = Costs(self.lag)
        for shape in (_SHAPE, _OTHER_SHAPE):
            costs.note(shape, 0.0, 0.0)
        self.server.prepared_names |= {AGGREGATE.name, FIND.name, FIND_AS_EVER.name, FIND_MANY.name, GET_MORE.name}
        self.gives_way = False
        line = points if together else partial(PageLine, gives_way=lambda: self.gives_way)
        self.line = line(cast(Any, self.server), self.loop.turn, costs, owner)
        self.reads = [Shared(call, (b"db", b"%d" % number), b"db.c", _SHAPE) for number in range(count)]
        self.waiters = [self.line.add(read) for read in self.reads]
        self.loop.run()

    def _end(self, _: object) -> None:
        self.ended += 1


@pytest.fixture
def stage() -> Stage:
    return Stage()


def reads(stage: Stage, most: int, *, free: bool) -> tuple[Reads, list[Shared]]:
    """The line as one of so many, and the reads that are measured on connections of their own instead."""
    measured: list[Shared] = []

    async def measure(_: Reads, read: Shared) -> Row:
        measured.append(read)
        return ()

    lines = Reads(lambda _: stage.line, stage.costs, measure, lambda: free)
    lines.allot(most)
    lines.add(cast(Any, stage.server))
    return lines, measured


def answer(stage: Stage, count: int, *, end: bool = False) -> None:
    stage.server.give(stage.line, *[row(b"page", None)] * count, *[sync()] * end)


def answers(stage: Stage) -> int:
    return sum(waiter.done() for waiter in stage.waiters)


def page(stage: Stage, seconds: float) -> None:
    """The oldest page comes after so long."""
    stage.loop.now += seconds
    stage.server.give(stage.line, row(b"page", None), sync())


def test_a_line_that_moves_may_take_its_time(stage: Stage) -> None:
    for number in range(1, 4):
        stage.loop.run(STALL_SECONDS * 0.9)
        answer(stage, 1)
        stage.loop.run(STALL_SECONDS * 0.2)
        assert (answers(stage), stage.line.waiting, stage.stalled) == (number, 4 - number, [])
    answer(stage, 1, end=True)
    stage.loop.run(STALL_SECONDS)
    assert (answers(stage), stage.line.waiting, stage.line.lost, stage.loop.later) == (4, 0, False, [])


@pytest.mark.parametrize("together", [True, False])
def test_a_line_that_stands_still_is_given_up(together: bool) -> None:
    stage = Stage(together=together)
    answer(stage, 1, end=not together)
    stage.loop.run(STALL_SECONDS)
    stage.loop.run(STALL_SECONDS)
    assert stage.stalled == [stage.reads[1]]
    assert stage.elsewhere == stage.reads[1:]
    assert stage.line.lost
    assert stage.line.waiting == 0
    for seconds, cheap in ((0.0, together), (0.8, together), (1.1, True)):
        stage.costs.note(_SHAPE, 0.0, stage.loop.now + seconds)
        assert (_SHAPE in stage.costs.cheap) == cheap


def test_a_read_that_opens_a_cursor_is_made_elsewhere() -> None:
    stage = Stage(FIND)
    stage.server.give(stage.line, row(b"page", None, None), row(b"page", b"more", b"id"), row(b"page", None, None))
    assert stage.elsewhere == [stage.reads[1]]
    assert stage.unclaimed == [(b"page", b"more", b"id")]
    assert not stage.waiters[1].done()
    assert stage.waiters[2].result() == (b"page", None)
    assert stage.costs.slow(_SHAPE)


def test_a_read_that_goes_on_with_a_cursor_is_not() -> None:
    stage = Stage(GET_MORE, together=False)
    stage.server.give(stage.line, row(b"page", b"more"))
    assert stage.waiters[0].result() == (b"page", b"more")
    assert stage.elsewhere == []
    assert _SHAPE in stage.costs.cheap


@pytest.mark.parametrize("together", [True, False])
def test_an_answered_batch_whose_end_is_late_is_no_stall(together: bool) -> None:
    stage = Stage(together=together)
    for _ in range(0 if together else 3):
        page(stage, 0.0)
    answer(stage, 4 if together else 1)
    for _ in range(3):
        stage.loop.run(STALL_SECONDS)
    assert (answers(stage), stage.stalled, stage.line.lost, stage.line.waiting) == (4, [], False, 0)
    answer(stage, 0, end=True)
    stage.loop.run(STALL_SECONDS)
    assert (stage.line.busy, stage.loop.later) == (False, [])


@pytest.mark.parametrize("together", [True, False])
def test_when_the_end_of_a_transaction_fails_its_reads_have_their_answers(together: bool) -> None:
    stage = Stage(together=together)
    reads = row(b"page", None, None)
    stage.server.give(stage.line, *([reads] * 4 if together else [reads]), refusal(b"40001"), sync())
    if not together:
        stage.server.give(stage.line, *[reads, sync()] * 3)
    assert (answers(stage), stage.line.busy, stage.elsewhere, stage.ended) == (4, False, [], 0)
    assert [waiter.result()[0] for waiter in stage.waiters] == [b"page"] * 4


@pytest.mark.parametrize("together", [True, False])
def test_a_line_that_is_to_go_serves_those_who_wait_and_no_others(together: bool) -> None:
    stage = Stage(together=together)
    stage.line.retire()
    assert not stage.line.takes(stage.reads[0])
    assert not stage.line.may_take(stage.reads[0])
    assert not stage.ended
    reads = row(b"page", None, None)
    stage.server.give(stage.line, *([*[reads] * 4, sync()] if together else [reads, sync()] * 4))
    assert (answers(stage), stage.ended, stage.elsewhere) == (4, 1, [])


@pytest.mark.parametrize("together", [True, False])
def test_who_waits_when_the_connection_ends_is_told(together: bool) -> None:
    stage = Stage(together=together)
    answer(stage, 1, end=not together)
    stage.server.give(stage.line, refusal(b"57P01", b"FATAL"))
    assert stage.waiters[0].result()[0] == b"page"
    assert all(isinstance(waiter.exception(), EngineLostError) for waiter in stage.waiters[1:])
    assert (stage.ended, stage.line.waiting) == (1, 0)


@pytest.mark.parametrize("together", [True, False])
def test_a_line_has_only_so_much_room(together: bool) -> None:
    stage = Stage(together=together)
    room = 511 if together else 124  # a batch of four is under way, or four pages
    for number in range(room + 1):
        assert stage.line.full == (number == room)
        if number < room:
            stage.line.add(stage.reads[0])
    assert not stage.line.takes(stage.reads[0])
    assert not stage.line.may_take(stage.reads[0])


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
    unknown, slow = (replace(stage.reads[0], shape=shape) for shape in (3, 4))
    stage.costs.note(slow.shape, 1.0, 0.0)
    stage.loop.run(STALL_SECONDS * 0.9)  # late
    assert asyncio.isfuture(lines.share(stage.reads[0]))
    for call in (FIND, FIND_AS_EVER, GET_MORE):
        assert asyncio.isfuture(lines.share(replace(unknown, call=call)))
    aggregation = replace(unknown, call=AGGREGATE)
    for read in (slow, aggregation):
        asyncio.run(cast(Any, lines.share(read)))
    assert measured == [slow, aggregation]
    stage.costs.note(aggregation.shape, 0.0, 0.0)
    assert asyncio.isfuture(lines.share(aggregation))


def test_reads_of_one_turn_are_one_transaction(stage: Stage) -> None:
    assert (len(stage.server.sent), stage.server.syncs) == (4, 1)


@pytest.mark.parametrize(
    ("count", "statements"),
    [(1, [FIND]), (2, [FIND] * 2), (3, [FIND_MANY]), (16, [FIND_MANY]), (17, [FIND_MANY] * 2), (35, [FIND_MANY] * 3)],
)
def test_of_them_some_are_one_statement(count: int, statements: list[Call]) -> None:
    stage = Stage(points=PointLine, count=count)
    assert stage.server.sent == [call.name for call in statements]
    assert stage.server.syncs == 1
    pages = [(b"%d" % number, None) for number in range(count)]
    left = iter(pages)
    for call in statements:
        stage.server.give(stage.line, rows(*islice(left, 16 if call is FIND_MANY else 1)))
    stage.server.give(stage.line, sync())
    assert [waiter.result() for waiter in stage.waiters] == pages
    assert (stage.line.busy, stage.elsewhere) == (False, [])


def test_one_that_opens_a_cursor_or_is_large_leaves_the_others_in_peace() -> None:
    stage = Stage(points=PointLine)
    large = bytes(LARGE_BYTES + 1)
    stage.waiters[3].cancel()
    stage.server.give(stage.line, rows((b"0", None), (b"1", b"more", b"id"), (large, None), (b"3", None)), sync())
    assert stage.elsewhere == [stage.reads[1]]
    assert stage.unclaimed == [(b"1", b"more", b"id")]
    assert [stage.waiters[number].result() for number in (0, 2)] == [(b"0", None), (large, None)]
    assert stage.costs.slow(_SHAPE)
    assert stage.line.swollen


def test_one_of_two_that_is_refused_is_told() -> None:
    stage = Stage(points=PointLine, count=2)
    stage.server.give(stage.line, refusal(b"22023"), sync())
    assert isinstance(stage.waiters[0].exception(), EngineError)
    assert stage.elsewhere == stage.reads[1:]


@pytest.mark.parametrize("sqlstate", [b"22023", b"57014", b"26000"])
def test_of_a_refused_statement_all_are_made_elsewhere(sqlstate: bytes) -> None:
    """Nobody knows which of them it was, before they have been."""
    stage = Stage(points=PointLine, count=35)
    stage.reads[20].shape = _OTHER_SHAPE
    stage.server.give(stage.line, rows(*[(b"page", None)] * 16), refusal(sqlstate), sync())
    assert answers(stage) == 16
    assert stage.elsewhere == stage.reads[16:]
    assert (stage.line.busy, stage.line.waiting, stage.ended) == (False, 0, 0)
    for number in range(16, 20):
        stage.waiters[number].set_result((b"page", None))
    stage.waiters[21].cancel()
    assert {_SHAPE, _OTHER_SHAPE} <= stage.costs.cheap
    stage.waiters[20].set_exception(EngineError("22023", "refused"))
    assert _OTHER_SHAPE not in stage.costs.cheap
    assert _SHAPE in stage.costs.cheap


def test_the_last_one_of_a_batch_that_is_refused_by_itself_is_told() -> None:
    stage = Stage(points=PointLine, count=17)
    stage.server.give(stage.line, rows(*[(b"page", None)] * 16), refusal(b"22023"), sync())
    assert isinstance(stage.waiters[16].exception(), EngineError)
    assert (answers(stage), stage.elsewhere) == (17, [])
    assert _SHAPE not in stage.costs.cheap


def test_when_the_end_of_their_transaction_fails_several_have_their_answers() -> None:
    stage = Stage(points=PointLine)
    stage.server.give(stage.line, rows(*[(b"page", None)] * 4), refusal(b"40001"), sync())
    assert (answers(stage), stage.line.busy, stage.elsewhere, stage.ended) == (4, False, [], 0)


def test_several_that_stand_still_are_made_elsewhere() -> None:
    stage = Stage(points=PointLine)
    for _ in range(2):
        stage.loop.run(STALL_SECONDS)
    assert stage.stalled == stage.reads[:1]
    assert stage.elsewhere == stage.reads
    assert stage.line.lost


def test_a_line_that_is_to_go_serves_several_that_wait() -> None:
    stage = Stage(points=PointLine)
    stage.line.retire()
    stage.server.give(stage.line, rows(*[(b"page", None)] * 4), sync())
    assert (answers(stage), stage.ended, stage.elsewhere) == (4, 1, [])


def test_a_statement_for_several_that_cannot_be_prepared_ends_the_line() -> None:
    stage = Stage(points=PointLine, count=1)
    stage.server.prepared_names.clear()
    stage.server.give(stage.line, row(b"page", None), sync())
    for read in stage.reads * 3:
        stage.line.add(read)
    stage.loop.run()
    assert stage.server.prepared == [FIND_MANY.name]
    stage.server.give(stage.line, refusal(b"3F000"), sync())
    assert stage.elsewhere == stage.reads * 3
    assert stage.ended == 1


def test_who_waits_for_a_statement_for_several_is_told_when_the_connection_ends() -> None:
    stage = Stage(points=PointLine)
    stage.server.give(stage.line, refusal(b"57P01", b"FATAL"))
    assert all(isinstance(waiter.exception(), EngineLostError) for waiter in stage.waiters)
    assert (stage.ended, stage.elsewhere) == (1, [])


def test_an_array_is_what_postgresql_takes() -> None:
    """As array_recv() reads it: dimensions, flags, type, size, first index, and each element behind its length."""
    head = bytes.fromhex("00000001 00000000 00000011 00000003 00000001")
    elements = bytes.fromhex("00000001 61 00000000 00000002 6263")
    assert array(BYTEA_OID, [b"a", b"", memoryview(b"bc")]) == head + elements


@pytest.mark.parametrize("call", [FIND, AGGREGATE])
def test_pages_are_transactions_of_their_own_and_may_open_cursors(call: Call) -> None:
    stage = Stage(call, together=False)
    assert (len(stage.server.sent), stage.server.syncs) == (4, 4)
    stage.server.give(stage.line, row(b"page", b"more", b"id"), sync())
    stage.server.give(stage.line, refusal(b"22023"), sync(), row(b"page", None, None), sync())
    assert stage.waiters[0].result() == (b"page", b"more", b"id")
    assert isinstance(stage.waiters[1].exception(), EngineError)
    assert stage.waiters[2].result() == (b"page", None)
    assert (stage.elsewhere, stage.line.waiting) == ([], 1)


def test_a_page_for_one_who_has_gone_is_unclaimed() -> None:
    stage = Stage(FIND, together=False)
    stage.waiters[0].cancel()
    for cursor_id in (b"1", b"2"):
        stage.server.give(stage.line, row(b"page", b"more", cursor_id), sync())
    assert stage.unclaimed == [(b"page", b"more", b"1")]
    assert stage.waiters[1].result() == (b"page", b"more", b"2")


def waits(stage: Stage, number: int) -> Runner:
    """Somebody who waits for one of the reads."""

    async def wait() -> None:
        await stage.waiters[number]

    runner = Runner()
    runner.start(wait())
    return runner


def test_who_is_answered_goes_on_when_all_has_been_read() -> None:
    stage = Stage(FIND, together=False)
    first, second = waits(stage, 0), waits(stage, 1)
    stage.server.give(stage.line)
    stage.server.give(stage.line, row(b"page", None), sync())
    assert not first.running
    assert not stage.loop.soon
    stage.waiters[1].cancel()  # not by a reading
    stage.loop.run()
    assert not second.running


def test_who_is_answered_goes_on_though_what_follows_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(FIND, together=False)
    first, second = waits(stage, 0), waits(stage, 1)
    monkeypatch.setattr(PageLine, "_finish", None)
    with pytest.raises(TypeError):
        stage.server.give(stage.line, row(b"page", None), sync())
    assert not first.running
    stage.waiters[1].cancel()
    stage.loop.run()
    assert not second.running


@pytest.mark.parametrize("asked", [False, True])
async def test_so_is_one_on_a_connection_of_its_own(monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    """Whether or not PostgreSQL has been asked to cancel it, and was done before it heard of that."""
    loop, server = Loop(), Server()
    monkeypatch.setattr(loop, "call_soon", asyncio.get_running_loop().call_soon)
    unclaimed: list[tuple[Call, Row]] = []
    lender = Lender(lambda _: None, lambda _: None, lambda _, __: None, lambda *gone: unclaimed.append(gone))
    backend = Backend(cast(Any, server), loop.turn, lender)
    backend.execute(FIND, ()).cancel()
    cancelling = asyncio.create_task(backend.cancel()) if asked else None
    await settle()
    server.give(backend, prepared(), row(b"page", b"more", b"1"), sync())
    assert cancelling is None or await cancelling
    assert server.cancelled == asked
    assert unclaimed == [(FIND, (b"page", b"more", b"1"))]


def test_a_line_prepares_each_statement_once() -> None:
    stage = Stage(GET_MORE, together=False)
    stage.server.prepared_names.clear()
    reads = [Shared(call, (), b"db.c", _SHAPE) for call in (FIND, GET_MORE, FIND, GET_MORE)]
    waiters = [stage.line.add(read) for read in reads]
    assert stage.server.prepared == [FIND.name, GET_MORE.name]
    answers = [row(b"page", None), sync()]
    stage.server.give(stage.line, *answers * 4, prepared(), refusal(b"22023"), sync(), prepared(), *answers * 3)
    assert isinstance(waiters[0].exception(), EngineError)
    assert all(waiter.result() == (b"page", None) for waiter in waiters[1:])
    assert stage.server.prepared_names == {FIND.name, GET_MORE.name}
    assert stage.line.takes(replace(reads[1], shape=_OTHER_SHAPE))


def test_who_waits_for_a_statement_that_cannot_be_prepared_is_served_elsewhere() -> None:
    stage = Stage(GET_MORE, together=False)
    stage.server.prepared_names.clear()
    for _ in stage.reads:
        page(stage, 0.0)
    first, second = (Shared(FIND, (b"%d" % number,), b"db.c", _SHAPE) for number in range(2))
    waiters = stage.line.add(first), stage.line.add(second), stage.line.add(replace(first, call=GET_MORE))
    stage.server.give(stage.line, refusal(b"3F000"), sync(), refusal(b"26000"), sync())
    stage.server.give(stage.line, prepared(), row(b"page", None), sync())
    assert isinstance(waiters[0].exception(), EngineError)
    assert stage.elsewhere == [second]
    assert not stage.line.takes(first)
    assert stage.server.prepared_names == {GET_MORE.name}


class Kernel:
    """What it says: for how long PostgreSQL runs for a page and waits for a processor, and this process waits for one.

    And how long a turn of the loop takes, which the kernel does not say.
    """

    def __init__(self, ran: float, waited: float = 0.0, ours: float = 0.0, lag: float = 0.0) -> None:
        self.each = Work(ran, waited)
        self.ours = ours
        self.lag = lag
        self._all = self._all_ours = Work(1.0, 1.0)

    def page(self) -> None:
        self._all = Work(self._all.ran + self.each.ran, self._all.waited + self.each.waited)
        self._all_ours = Work(1.0, self._all_ours.waited + self.ours)

    def speak(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "pg_ferret.engine.scheduling.work_of", lambda pid: self._all_ours if pid == os.getpid() else self._all
        )


def pages(stage: Stage, seconds: float, kernel: Kernel | None = None) -> bool:
    """Many pages take so long each, always with others behind them; tells whether one more may join them."""
    read = stage.reads[0]
    for _ in range(10 * LOOKED_AT):
        if kernel is not None:
            kernel.page()
            stage.lag.seconds = kernel.lag
        page(stage, seconds)
        stage.line.add(read)
    stage.costs.note(read.shape, 0.0, stage.loop.now + 2.0)
    return stage.line.takes(read)


@pytest.mark.parametrize(
    ("kernel", "seconds", "joins"),
    [
        (None, 0.002, False),  # the kernel does not say
        (None, 0.0009, True),
        (Kernel(0.0015), 0.0015, False),
        (Kernel(0.0003), 0.002, False),  # it sleeps
        (Kernel(0.0003), 0.0009, True),
        (Kernel(0.0003, 0.0005), 0.002, True),  # it waits for a processor, and the loop looks late
        (Kernel(0.0003, 0.0195), 0.02, True),
        (Kernel(0.0003, 0.0, 0.0002), 0.002, False),
        (Kernel(0.0003, 0.0, 0.0015), 0.002, True),  # this process waits for a processor
    ],
)
def test_a_page_joins_others_unless_postgresql_has_much_to_do_or_sleeps(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel | None, seconds: float, joins: bool
) -> None:
    if kernel is None:
        monkeypatch.setattr("pg_ferret.engine.scheduling.work_of", lambda _: None)
    else:
        kernel.speak(monkeypatch)
    stage = Stage(GET_MORE, together=False)
    assert stage.line.takes(stage.reads[0])
    assert pages(stage, seconds, kernel) == joins
    while stage.line.busy:
        page(stage, seconds)
    assert stage.line.takes(stage.reads[0])  # nobody is there


@pytest.mark.parametrize(("seconds", "behind", "joins"), [(0.002, 0, True), (0.002, 1, False), (0.007, 0, False)])
def test_a_page_may_be_read_a_turn_late_while_nobody_waits_behind_it(
    monkeypatch: pytest.MonkeyPatch, seconds: float, behind: int, joins: bool
) -> None:
    kernel = Kernel(0.0003, 0.0, 0.0, 0.0015)
    kernel.speak(monkeypatch)
    stage = Stage(GET_MORE, together=False)
    for _ in range(len(stage.reads) - behind):
        page(stage, 0.0)
    stage.lag.seconds = kernel.lag
    for _ in range(2 * LOOKED_AT):
        stage.line.add(stage.reads[0])
        kernel.page()
        page(stage, seconds)
    assert stage.loop.soon  # it looks for how long a turn takes
    stage.line.add(stage.reads[0])
    assert stage.line.takes(stage.reads[0]) == joins


def test_what_this_process_waited_while_nobody_was_there_excuses_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(0.0003)
    kernel.speak(monkeypatch)
    stage = Stage(GET_MORE, together=False)
    pages(stage, 0.0003, kernel)
    while stage.line.busy:
        page(stage, 0.0)
    kernel.ours = 1.0
    kernel.page()
    stage.loop.now += 10.0
    kernel.ours = 0.0
    stage.line.add(stage.reads[0])
    kernel.page()
    page(stage, 0.06)
    assert stage.costs.slow(_SHAPE)


def test_they_do_again_when_that_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(0.02)
    kernel.speak(monkeypatch)
    stage = Stage(GET_MORE, together=False)
    assert not pages(stage, 0.02, kernel)
    assert stage.costs.cheap_seconds == CHEAP_SECONDS
    kernel.each = Work(0.0003, 0.0)
    assert pages(stage, 0.0003, kernel)


def test_where_all_pages_take_long_the_same_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(0.0003, 1.0)
    kernel.speak(monkeypatch)
    stage = Stage(GET_MORE, together=False)
    for mean, limit in ((0.0005, 0.004), (0.005, 0.02), (0.02, 0.05), (0.0005, 0.004)):
        pages(stage, mean, kernel)
        stage.costs.note(_OTHER_SHAPE, limit * 0.9, stage.loop.now)
        assert _OTHER_SHAPE in stage.costs.cheap
        stage.costs.note(_OTHER_SHAPE, limit * 1.1, stage.loop.now)
        assert stage.costs.slow(_OTHER_SHAPE)


@pytest.mark.parametrize("together", [True, False])
def test_behind_an_answer_of_some_size_there_may_be_another(monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
    """libpq reads so much at a time and no more."""
    stage = Stage(GET_MORE, together=False)
    if together:
        stage = Stage()
        for _ in range(4):
            stage.waiters.append(stage.line.add(stage.reads[0]))
            stage.loop.run()
        answer(stage, 4, end=True)
        stage.waiters = stage.waiters[4:]
    large, small = row(bytes(16_000), None), row(bytes(10), None)
    arriving = [[large, sync(), large, sync()], [small, sync()], [large, sync()]]
    monkeypatch.setattr(stage.server, "consume_input", lambda: stage.server.results.extend(arriving.pop(0)))
    stage.line._readable()
    assert answers(stage) == 3
    assert arriving


@pytest.mark.parametrize(
    ("gives_way", "size", "count", "times"),
    [(True, 16_000, 6, 1), (False, 16_000, 6, 0), (True, 10, 6, 0), (True, 16_000, 5, 0)],
)
def test_others_go_first_where_many_large_pages_are_to_come(
    monkeypatch: pytest.MonkeyPatch, gives_way: bool, size: int, count: int, times: int
) -> None:
    stage = Stage(GET_MORE, together=False, count=count)
    stage.gives_way = gives_way
    given: list[int] = []
    monkeypatch.setattr(os, "sched_yield", lambda: given.append(answers(stage)))
    stage.server.give(stage.line, row(bytes(size), None), sync())
    for part in ((), (row(bytes(size), None), sync())):
        stage.server.give(stage.line, *part)
    assert given == [1] * times  # before the second page is read, in two parts
    assert answers(stage) == 2


def test_behind_several_of_which_any_is_of_some_size_there_may_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(points=PointLine)
    stage.waiters += [stage.line.add(read) for read in stage.reads]
    stage.loop.run()
    large, small = (bytes(16_000), None), (bytes(10), None)
    arriving = [[rows(large, *[small] * 3), sync()], [rows(*[small] * 4), sync()], []]
    monkeypatch.setattr(stage.server, "consume_input", lambda: stage.server.results.extend(arriving.pop(0)))
    stage.line._readable()
    assert answers(stage) == 8
    assert arriving == [[]]


def test_pages_of_which_one_took_long_stay_away_for_a_while() -> None:
    stage = Stage(GET_MORE, together=False)
    page(stage, 0.02)
    stage.costs.note(_SHAPE, 0.0, stage.loop.now)
    assert _SHAPE in stage.costs.cheap
    page(stage, 0.03)
    now = stage.loop.now
    for later, cheap in ((0.0, False), (0.9, False), (1.1, True)):
        stage.costs.note(_SHAPE, 0.0, now + later)
        assert (_SHAPE in stage.costs.cheap, stage.costs.slow(_SHAPE)) == (cheap, not cheap)


_NOT, _SLOW, _LONG = range(3)


@pytest.mark.parametrize("before", [0, 16, LOOKED_AT - 1])
@pytest.mark.parametrize(
    ("of_the_page", "seconds", "away"),
    [
        (Kernel(0.03), 0.03, _LONG),
        (Kernel(0.03, 0.0, 0.0, 0.03), 0.03, _LONG),
        (Kernel(0.001), 0.03, _LONG),  # it sleeps
        (Kernel(0.001), 0.012, _SLOW),
        (Kernel(0.001), 0.007, _NOT),
        (Kernel(0.001, 0.015), 0.03, _SLOW),
        (Kernel(0.001, 0.029), 0.03, _NOT),  # it waits for a processor
        (Kernel(0.001, 0.0, 0.015), 0.03, _SLOW),
        (Kernel(0.001, 0.0, 0.029), 0.03, _NOT),  # this process does
        (Kernel(0.001, 0.0, 0.0, 0.015), 0.03, _SLOW),
        (Kernel(0.001, 0.0, 0.0, 0.025), 0.03, _NOT),  # it is late to read the answer
        (Kernel(0.001, 0.01, 0.01, 0.008), 0.03, _NOT),
    ],
)
def test_only_what_postgresql_takes_long_for_stays_away(
    monkeypatch: pytest.MonkeyPatch, of_the_page: Kernel, seconds: float, away: int, before: int
) -> None:
    kernel = Kernel(0.0003)
    kernel.speak(monkeypatch)
    stage = Stage(GET_MORE, together=False)
    assert pages(stage, 0.0003, kernel)
    for _ in range(before):
        kernel.page()
        page(stage, 0.0003)
        stage.line.add(stage.reads[0])
    kernel.each, kernel.ours, stage.lag.seconds = of_the_page.each, of_the_page.ours, of_the_page.lag
    kernel.page()
    page(stage, seconds)
    assert stage.costs.slow(_SHAPE) == (away != _NOT)
    stage.costs.note(_SHAPE, 0.0, stage.loop.now + 0.9)
    assert stage.costs.slow(_SHAPE) == (away == _LONG)


def test_a_slow_read_stays_away_until_one_is_cheap() -> None:
    costs = Costs(Lag(cast(Any, Loop())))
    for seconds, cheap in ((0.005, False), (0.003, True), (0.005, False), (0.005, False), (0.003, True)):
        costs.note(_SHAPE, seconds, 0.0)
        assert (_SHAPE in costs.cheap, costs.slow(_SHAPE)) == (cheap, not cheap)


def test_reads_that_are_always_slow_are_measured_now_and_then() -> None:
    costs = Costs(Lag(cast(Any, Loop())))
    assert not costs.settled(_SHAPE, 0.0)
    for tenths in range(10):
        costs.note(_SHAPE, 0.005, tenths / 10)
        assert not costs.settled(_SHAPE, tenths / 10 + 0.05)
    costs.note(_SHAPE, 0.005, 1.0)
    assert not costs.settled(_OTHER_SHAPE, 1.05)
    assert costs.settled(_SHAPE, 1.05)
    assert not costs.settled(_SHAPE, 1.15)
    costs.note(_SHAPE, 0.003, 1.15)
    costs.note(_SHAPE, 0.005, 1.2)
    assert not costs.settled(_SHAPE, 1.25), "one has been cheap since"


def test_reads_that_stay_away_are_not_measured_before_that_is_of_use() -> None:
    costs = Costs(Lag(cast(Any, Loop())))
    costs.keep_away(_SHAPE, 1.0)
    costs.note(_SHAPE, 0.005, 0.5)
    assert costs.settled(_SHAPE, 0.9)
    assert not costs.settled(_SHAPE, 1.0)


@pytest.mark.parametrize("together", [False, True])
def test_a_read_that_a_time_limit_ends_is_made_elsewhere(together: bool) -> None:
    stage = Stage(FIND, together=together)
    stage.server.give(stage.line, row(b"page", None, None), *[sync()] * (not together), refusal(b"57014"), sync())
    assert answers(stage) == 1
    assert stage.elsewhere == (stage.reads[1:] if together else stage.reads[1:2])
    assert stage.costs.slow(_SHAPE)


@pytest.mark.parametrize("together", [True, False])
def test_large_pages_stay_away(together: bool) -> None:
    stage = Stage(together=together)
    stage.server.give(stage.line, row(bytes(LARGE_BYTES + 1), None))
    assert not stage.line.takes(stage.reads[0])
    assert stage.line.swollen


def test_pages_share_while_they_meet_many(stage: Stage) -> None:
    lines, _ = reads(stage, 1, free=True)
    assert not any(lines.crowded(2) for _ in range(1000))
    assert not lines.crowded(50)  # a single time
    assert [lines.crowded(4) for _ in range(1000)][-1]
    assert lines.crowded(0)
    assert not [lines.crowded(2) for _ in range(1000)][-1]

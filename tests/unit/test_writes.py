"""Writes that share a connection, and the flush of what they commit, on a clock and a server that a test moves."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import replace
from typing import Any, cast

import psycopg
import pytest

from pg_ferret.engine.backend import Backend, Lender
from pg_ferret.engine.calls import FLUSH_COMMITS, INSERT, SET_UP_WRITES, TRUE, Call
from pg_ferret.engine.commits import Commits, Committed, unknown
from pg_ferret.engine.lines import STALL_SECONDS, Owner, Shared
from pg_ferret.engine.pipeline import Params, Row
from pg_ferret.engine.writes import Room, Shapes, WriteLine, Writes
from pg_ferret.errors import CommandError, EngineError, EngineLostError
from pg_ferret.runner import Waiter
from tests.unit.fake_line import Loop, Server, prepared, refusal, row, sync

_SHAPE = 1
_DONE = (b"reply", b"\x01", b"12345678")
_FLUSH = Shared(FLUSH_COMMITS, (b"12345678",), b"", 0)
_WRITE = Shared(INSERT, (b"db", b"spec", b"documents", TRUE), b"db.c", _SHAPE)


def write_error(code: int) -> Any:
    """How the engine reports an error in a single statement."""
    return row(b"...\x10code\0" + struct.pack("<i", code) + b"...", b"\0", b"12345678")


class Stage:
    """A line that has been set up, and what became of the writes given to it."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.server = Server()
        self.shapes = Shapes()
        self.shapes.note(_SHAPE, 0.0)
        self.committed: list[Row] = []
        self.elsewhere: list[Shared] = []
        self.ended = 0
        self.stalled: list[Shared] = []
        owner = Owner(
            lambda write, _: self.elsewhere.append(write),
            self._end,
            lambda _, write: self.stalled.append(write),
            lambda _, __: None,
        )
        self.line = WriteLine(
            cast(Any, self.server),
            self.loop.turn,
            self.shapes,
            lambda _, done: self.committed.append(done),
            owner,
        )
        self.line.begin()
        self.server.give(self.line, row(b"30", b"0.1"), sync())

    def _end(self, _: object) -> None:
        self.ended += 1


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_every_write_is_a_transaction_of_its_own(stage: Stage) -> None:
    waiters = [stage.line.add(_WRITE) for _ in range(3)]
    assert stage.server.sent == [SET_UP_WRITES.name, *[INSERT.name] * 3]
    stage.server.give(stage.line, row(*_DONE), sync(), refusal(b"22023"), sync(), row(b"reply", b"\x01", None), sync())
    assert stage.committed == [_DONE]  # told when it is flushed
    assert not waiters[0].done()
    error = waiters[1].exception()
    assert isinstance(error, EngineError)
    assert error.sqlstate == "22023"
    assert waiters[2].result() == (b"reply", b"\x01", None)
    assert (stage.line.busy, stage.line.waiting) == (False, 0)


@pytest.mark.parametrize("answer", [refusal(b"55P03"), refusal(b"57014"), write_error(50463045), write_error(67371461)])
def test_what_would_have_to_wait_is_made_elsewhere(stage: Stage, answer: Any) -> None:
    waiter = stage.line.add(_WRITE)
    stage.server.give(stage.line, answer, sync())
    assert stage.elsewhere == [_WRITE]
    assert not waiter.done()
    assert not stage.line.takes(_SHAPE)
    stage.loop.run(2.0)
    assert stage.line.takes(_SHAPE)


def test_a_write_whose_commit_fails_is_not_made(stage: Stage) -> None:
    waiter = stage.line.add(_WRITE)
    stage.server.give(stage.line, row(*_DONE), refusal(b"23503"), sync())
    assert isinstance(waiter.exception(), EngineError)
    assert not stage.committed


def test_a_line_is_late_only_for_as_many_as_wait(stage: Stage) -> None:
    for _ in range(20):
        stage.line.add(_WRITE)
    stage.loop.run(0.01)
    assert stage.line.takes(_SHAPE)
    stage.loop.run(0.01)
    assert not stage.line.takes(_SHAPE)


def test_a_large_answer_ends_the_line_when_it_is_idle(stage: Stage) -> None:
    stage.line.add(_WRITE)
    stage.server.give(stage.line, row(bytes(2 << 20), b"\x01", b"12345678"), sync())
    assert stage.line.swollen


def test_another_error_of_a_statement_is_the_clients(stage: Stage) -> None:
    waiter = stage.line.add(_WRITE)
    stage.server.give(stage.line, write_error(11000), sync())
    assert not stage.elsewhere
    assert not waiter.done()
    assert len(stage.committed) == 1


def test_a_statement_that_is_not_prepared_ends_the_line(stage: Stage) -> None:
    stage.line.add(_WRITE)
    stage.server.give(stage.line, refusal(b"26000"), sync())
    assert (stage.elsewhere, stage.ended) == ([_WRITE], 1)


def test_slow_writes_stay_away_for_a_while(stage: Stage) -> None:
    stage.line.add(_WRITE)
    stage.loop.run(0.06)
    assert not stage.line.takes(_SHAPE)  # it is late
    stage.server.give(stage.line, row(*_DONE), sync())
    assert not stage.line.takes(_SHAPE)
    stage.loop.run(2.0)
    assert stage.line.takes(_SHAPE)
    assert not stage.line.takes(2)  # nothing is known of it


def test_a_stuck_write_is_cancelled_and_at_last_given_up(stage: Stage) -> None:
    waiters = [stage.line.add(_WRITE) for _ in range(2)]
    stage.loop.run(STALL_SECONDS)
    assert stage.server.cancelled == 1
    stage.server.give(stage.line, refusal(b"57014"), sync())
    assert stage.elsewhere == [_WRITE]
    stage.loop.run(STALL_SECONDS)
    assert not stage.stalled
    for _ in range(60):
        stage.loop.run(STALL_SECONDS)
    assert stage.stalled == [_WRITE]
    assert stage.line.lost
    assert isinstance(waiters[1].exception(), EngineLostError)
    assert not stage.loop.later


def test_a_line_that_moves_is_not_cancelled(stage: Stage) -> None:
    for _ in range(3):
        stage.line.add(_WRITE)
    for _ in range(2):
        stage.loop.run(STALL_SECONDS * 0.9)
        stage.server.give(stage.line, row(*_DONE), sync())
        stage.loop.run(STALL_SECONDS * 0.2)
    assert stage.server.cancelled == 0


def test_a_lost_connection_fails_all_that_wait(stage: Stage) -> None:
    waiters = [stage.line.add(_WRITE) for _ in range(2)]
    stage.server.give(stage.line, row(*_DONE), sync(), refusal(b"57P01", b"FATAL"))
    assert len(stage.committed) == 1
    assert isinstance(waiters[1].exception(), EngineLostError)
    assert stage.ended == 1
    assert not stage.line.takes(_SHAPE)
    assert isinstance(stage.line.add(_WRITE).exception(), EngineLostError)


def test_who_leaves_finishes_first(stage: Stage) -> None:
    stage.line.add(_WRITE)
    stage.line.retire()
    assert (stage.ended, stage.line.takes(_SHAPE)) == (0, False)
    stage.server.give(stage.line, row(*_DONE), sync())
    assert stage.ended == 1


class Pool:
    """What the lines know of it."""

    def __init__(self, stage: Stage, *more: Stage) -> None:
        self.is_crowded = True
        self.alone: list[Params] = []
        self.apart: list[Params] = []
        self.wanted = 0
        self.is_free = True
        room = Room(lambda: self.is_crowded, self._alone, self._apart, lambda: self.is_free, self._want, lambda: 0)
        lines = iter([stage.line, *(other.line for other in more)])
        self.writes = Writes(lambda _: next(lines), stage.shapes, room)
        self.writes.allot(2)

    def _want(self, _: object) -> None:
        self.wanted += 1

    async def _alone(self, _: Call, params: Params) -> Row:
        self.alone.append(params)
        return ()

    async def _apart(self, _: Call, params: Params) -> Row:
        self.apart.append(params)
        return ()


def test_a_write_shares_only_among_others(stage: Stage) -> None:
    pool = Pool(stage)
    pool.writes.add(cast(Any, stage.server))
    stage.server.give(stage.line, row(b"30", b"0.1"), sync())
    assert asyncio.isfuture(pool.writes.share(_WRITE))
    assert pool.wanted == 0
    pool.is_crowded = False
    asyncio.run(cast(Any, pool.writes.share(_WRITE)))
    assert pool.alone == [_WRITE.params[:-1]]


def test_one_line_serves_all_until_many_wait(stage: Stage) -> None:
    second = Stage()
    pool = Pool(stage, second)

    def share(times: int) -> tuple[int, int, int]:
        for _ in range(times):
            assert asyncio.isfuture(pool.writes.share(_WRITE))
        return stage.line.waiting, second.line.waiting, pool.wanted

    for one in (stage, second):
        pool.writes.add(cast(Any, one.server))
        one.server.give(one.line, row(b"30", b"0.1"), sync())
    pool.writes.allot(3)
    assert share(12) == (12, 0, 0)
    assert share(12) == (12, 12, 0)
    assert share(2) == (13, 13, 2)  # there may be a third
    stage.server.give(stage.line, *[row(*_DONE), sync()] * 2)
    assert share(1) == (12, 13, 2)


def test_writes_behind_one_that_takes_long_are_not_about_to_be_committed(stage: Stage) -> None:
    second = Stage()
    pool = Pool(stage, second)
    for one in (stage, second):
        pool.writes.add(cast(Any, one.server))
        one.server.give(one.line, row(b"30", b"0.1"), sync())
        one.line.add(_WRITE)
    stage.line.add(_WRITE)
    assert (stage.line.waiting, pool.writes.coming()) == (2, 3)
    stage.loop.run(0.006)
    second.loop.run(0.004)
    assert (stage.line.waiting, pool.writes.coming()) == (2, 0)
    stage.server.give(stage.line, row(*_DONE), sync())
    assert (stage.line.waiting, pool.writes.coming()) == (1, 1)


def test_the_first_write_of_a_shape_is_made_apart(stage: Stage) -> None:
    pool = Pool(stage)
    pool.writes.add(cast(Any, stage.server))
    stage.server.give(stage.line, row(b"30", b"0.1"), sync())
    other = replace(_WRITE, shape=2)
    asyncio.run(cast(Any, pool.writes.share(other)))
    assert pool.apart == [other.params]
    assert asyncio.isfuture(pool.writes.share(other))


def test_a_write_shares_if_there_is_no_other_way(stage: Stage) -> None:
    pool = Pool(stage)
    pool.is_free = False
    other = replace(_WRITE, shape=2)
    asyncio.run(cast(Any, pool.writes.share(other)))  # not even a line
    assert pool.apart == [other.params]
    pool.writes.add(cast(Any, stage.server))
    stage.loop.run(0.1)  # it is late, too
    assert asyncio.isfuture(pool.writes.share(_WRITE))
    assert asyncio.isfuture(pool.writes.share(replace(_WRITE, shape=3)))
    stage.server.give(stage.line, row(b"30", b"0.1"), sync(), row(*_DONE), sync(), row(*_DONE), sync())
    assert stage.line.takes(3)


class Flushes:
    """What is to be flushed, and the connection that does it."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.server = Server()
        self.elsewhere: list[Committed] = []
        self.coming = 0
        self.in_line: list[Waiter[Row]] = []
        self.has_line = True
        self.flushed = 0
        self.commits = Commits(
            cast(Any, self.loop), self.elsewhere.append, lambda: self.coming, lambda *_: self._in_line(), self._flushes
        )
        self.commits.apart = True
        lender = Lender(lambda _: None, lambda _: None, lambda _, __: None, lambda _, __: None)
        self.backend = Backend(cast(Any, self.server), self.loop.turn, lender)
        self.commits.backend = self.backend

    def _flushes(self) -> None:
        self.flushed += 1

    def _in_line(self) -> Waiter[Row] | None:
        if not self.has_line:
            return None
        self.in_line.append(Waiter(self.loop.turn))
        return self.in_line[-1]

    def add(self, incarnation: bytes = b"12345678") -> Waiter[Row]:
        waiter = Waiter[Row](self.loop.turn)
        self.commits.add(waiter, (b"reply", b"\x01", incarnation))
        return waiter

    def answer(self, *results: Any) -> None:
        self.server.give(self.backend, *results, sync())
        self.loop.run()


@pytest.fixture
def flushes() -> Flushes:
    return Flushes()


def test_one_flush_serves_all_of_a_turn_and_the_next_one_all_of_meanwhile(flushes: Flushes) -> None:
    first = [flushes.add() for _ in range(3)]
    flushes.loop.run()
    second = [flushes.add() for _ in range(2)]
    flushes.loop.run()
    assert flushes.server.sent == [FLUSH_COMMITS.name]
    flushes.answer(row(b""))
    assert [waiter.done() for waiter in first + second] == [True] * 3 + [False] * 2
    assert flushes.server.sent == [FLUSH_COMMITS.name] * 2
    flushes.answer(row(b""))
    assert all(waiter.done() for waiter in second)
    assert not flushes.commits.flushing
    assert flushes.flushed == 2


def test_a_flush_waits_while_more_are_coming_than_it_would_serve(flushes: Flushes) -> None:
    flushes.coming = 3
    waiters = [flushes.add()]
    flushes.loop.run()
    assert not flushes.server.sent
    flushes.coming = 2
    waiters.append(flushes.add())
    flushes.loop.run()
    assert flushes.server.sent == [FLUSH_COMMITS.name]
    flushes.coming = 1
    flushes.answer(row(b""))
    assert all(waiter.done() for waiter in waiters)


def test_a_flush_that_has_gone_leaves_no_timer(flushes: Flushes) -> None:
    flushes.coming = 3
    for _ in range(3):
        flushes.add()
        flushes.loop.run()
    assert flushes.server.sent == [FLUSH_COMMITS.name]
    flushes.answer(row(b""))
    flushes.loop.run(0.001)
    flushes.add()
    flushes.loop.run(0.001)  # the time of the first timer
    assert flushes.server.sent == [FLUSH_COMMITS.name]
    flushes.loop.run(0.001)
    assert flushes.server.sent == [FLUSH_COMMITS.name] * 2


def test_the_next_flush_waits_too(flushes: Flushes) -> None:
    flushes.add()
    flushes.loop.run()
    flushes.coming = 5
    flushes.add()
    flushes.answer(row(b""))
    assert flushes.server.sent == [FLUSH_COMMITS.name]
    flushes.loop.run(0.002)
    assert flushes.server.sent == [FLUSH_COMMITS.name] * 2


def test_there_is_one_flush_at_a_time(flushes: Flushes) -> None:
    """Whatever the order in which the loop runs what is due."""
    flushes.coming = 3
    first = flushes.add()
    flushes.loop.run()
    flushes.add()  # the end of this turn comes after the timer
    (timer,) = flushes.loop.later
    timer.call()
    second = flushes.add()
    flushes.coming = 0
    flushes.loop.run()
    assert flushes.server.sent == [FLUSH_COMMITS.name]
    flushes.answer(row(b""))
    assert (first.done(), second.done(), flushes.server.sent) == (True, False, [FLUSH_COMMITS.name] * 2)


def test_without_a_connection_that_flushes_nobody_waits_for_others(flushes: Flushes) -> None:
    flushes.coming = 5
    flushes.commits.backend = None
    flushes.add()
    flushes.loop.run()
    assert len(flushes.elsewhere) == 1


def test_a_flush_waits_for_a_moment_only(flushes: Flushes) -> None:
    flushes.coming = 100
    first = flushes.add()
    flushes.loop.run()
    flushes.add()
    flushes.loop.run(0.001)
    assert not flushes.server.sent
    flushes.loop.run(0.001)
    assert flushes.server.sent == [FLUSH_COMMITS.name]
    second = flushes.add()
    flushes.answer(row(b""))
    assert (first.done(), second.done()) == (True, False)
    flushes.loop.run(0.002)
    assert flushes.server.sent == [FLUSH_COMMITS.name] * 2


def test_a_flush_that_is_refused_fails_its_writes(flushes: Flushes) -> None:
    waiter = flushes.add()
    flushes.loop.run()
    flushes.answer(refusal(b"57P02"))
    error = waiter.exception()
    assert isinstance(error, EngineError)
    assert error.sqlstate == "57P02"


@pytest.mark.parametrize("cancelled", [True, False])
def test_when_a_connection_cannot_flush_another_one_does(flushes: Flushes, cancelled: bool) -> None:
    waiter = flushes.add()
    flushes.loop.run()
    if cancelled:
        flushes.answer(refusal(b"57014"))
    else:
        flushes.backend.drop()
        flushes.loop.run()
    (committed,) = flushes.elsewhere
    assert (committed.incarnation, flushes.commits.pending) == (b"12345678", 0)
    assert not waiter.done()
    committed.tell(None)
    assert waiter.result()[0] == b"reply"


@pytest.fixture
def in_line() -> Flushes:
    """Without a connection that flushes: where writes stand in line."""
    flushes = Flushes()
    flushes.commits.apart = False
    flushes.commits.backend = None
    return flushes


def test_a_flush_in_line_waits_until_all_have_been_made(in_line: Flushes) -> None:
    in_line.coming = 1
    waiters = [in_line.add() for _ in range(15)]
    in_line.loop.run()
    assert not in_line.in_line
    in_line.coming = 0
    waiters.append(in_line.add())
    in_line.loop.run()
    (flush,) = in_line.in_line
    flush.set_result(())
    in_line.loop.run()
    assert all(waiter.done() for waiter in waiters)
    assert not in_line.commits.pending


def test_sixteen_writes_wait_for_no_other_and_none_for_long(in_line: Flushes) -> None:
    in_line.coming = 50
    for _ in range(16):
        in_line.add()
    in_line.loop.run()
    (flush,) = in_line.in_line
    in_line.add()
    flush.set_result(())
    in_line.loop.run(0.001)
    assert len(in_line.in_line) == 1
    in_line.loop.run(0.002)
    assert len(in_line.in_line) == 2


@pytest.mark.parametrize("lost", [True, False])
def test_without_a_line_that_flushes_another_connection_does(in_line: Flushes, lost: bool) -> None:
    in_line.has_line = lost
    waiter = in_line.add()
    in_line.loop.run()
    if lost:
        in_line.in_line[0].set_exception(EngineLostError("lost"))
        in_line.loop.run()
    assert (len(in_line.elsewhere), in_line.commits.pending, waiter.done()) == (1, 0, False)


def test_a_flush_stands_in_line_as_long_as_the_disk_takes(stage: Stage) -> None:
    waiter = stage.line.add(_FLUSH)
    stage.loop.run(10.0)
    assert stage.line.takes(_SHAPE)
    assert (stage.server.cancelled, stage.stalled) == (0, [])
    behind = stage.line.add(_WRITE)
    stage.server.give(stage.line, row(b""), sync())
    assert waiter.result() == ()
    for _ in range(2):
        stage.loop.run(STALL_SECONDS)
    assert (stage.server.cancelled, stage.line.takes(_SHAPE)) == (1, False)  # this is a write again
    assert not behind.done()


def test_a_flush_that_a_cancel_request_has_met_is_told(stage: Stage) -> None:
    """Commits has another connection flush."""
    waiter = stage.line.add(_FLUSH)
    stage.server.give(stage.line, refusal(b"57014"), sync())
    assert isinstance(waiter.exception(), EngineError)
    assert (stage.elsewhere, stage.line.takes(_SHAPE)) == ([], True)


def test_a_flush_stands_behind_none_that_takes_long(stage: Stage) -> None:
    pool = Pool(stage)
    assert pool.writes.flush(_FLUSH) is None
    pool.writes.add(cast(Any, stage.server))
    stage.server.give(stage.line, row(b"30", b"0.1"), sync())
    stage.line.add(_WRITE)
    assert pool.writes.flush(_FLUSH) is not None
    stage.loop.run(0.006)
    assert pool.writes.flush(_FLUSH) is None
    pool.is_free = False  # there is no other connection
    assert pool.writes.flush(_FLUSH) is not None
    stage.server.give(stage.line, row(*_DONE), sync(), row(b""), sync(), row(b""), sync())
    pool.is_free = True
    stage.line.add(_WRITE)
    stage.server.give(stage.line, row(*_DONE), sync(), row(b""), sync())
    assert pool.writes.flush(_FLUSH) is not None
    stage.line.retire()
    assert pool.writes.flush(_FLUSH) is None


def test_whether_a_write_was_made_is_unknown_if_it_was_not_flushed() -> None:
    assert isinstance(unknown(CommandError(262, "no connection"))(), EngineLostError)
    assert isinstance(unknown(EngineError("57014", "cancelled"))(), EngineLostError)
    assert isinstance(unknown(EngineError("57P02", "restarted"))(), EngineError)


def test_a_flush_that_cannot_be_sent_is_passed_on(flushes: Flushes, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise psycopg.OperationalError

    monkeypatch.setattr(flushes.server, "pipeline_sync", refuse)
    flushes.add()
    flushes.loop.run()
    assert len(flushes.elsewhere) == 1
    assert not flushes.commits.flushing


def test_when_a_flush_is_done_its_writes_are_told_at_once(flushes: Flushes) -> None:
    waiter = flushes.add()
    flushes.loop.run()
    flushes.server.give(flushes.backend, prepared(), row(b"true"), sync())
    assert waiter.done()


def test_a_cancelled_write_waits_for_no_flush(flushes: Flushes) -> None:
    committed: list[Row] = []
    server = Server()
    lender = Lender(lambda _: None, lambda _: None, lambda _, done: committed.append(done), lambda _, __: None)
    backend = Backend(cast(Any, server), flushes.loop.turn, lender)
    ended = backend.execute(INSERT, _WRITE.params)
    backend.held = True
    server.give(backend, row(*_DONE), sync())
    assert ended.done()
    assert not committed


def test_a_restarted_server_is_not_asked_for_what_came_before(flushes: Flushes) -> None:
    flushes.add(b"before..")
    flushes.add(b"after...")
    flushes.loop.run()
    assert [committed.incarnation for committed in flushes.elsewhere] == [b"before.."]
    assert flushes.server.sent == [FLUSH_COMMITS.name]


def test_who_does_not_wait_any_more_is_no_harm(flushes: Flushes) -> None:
    gone, waits = flushes.add(), flushes.add()
    gone.cancel()
    flushes.loop.run()
    flushes.answer(row(b""))
    assert waits.done()


def test_only_so_many_shapes_are_remembered() -> None:
    shapes = Shapes()
    for shape in range(20_001):
        shapes.note(shape, 0.0)
    assert len(shapes) <= 10_000
    assert 20_000 in shapes

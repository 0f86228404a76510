"""Which connections serve many requests, and as what."""

from __future__ import annotations

from typing import Any, cast

import pytest

from pg_ferret.engine.backend import Backend, Lender
from pg_ferret.engine.calls import FLUSH_COMMITS, GET_MORE, SET_UP_WRITES
from pg_ferret.engine.duties import Duties
from pg_ferret.engine.limits import Limits
from pg_ferret.engine.lines import Owner, Shared
from pg_ferret.engine.pages import PageLine
from pg_ferret.engine.writes import Room
from pg_ferret.runner import Waiter
from tests.unit.fake_line import Loop, Server


def _nothing(*_: object) -> Any:
    return None


class Stage:
    """Duties for so many connections and processors."""

    def __init__(self, largest: int = 40, processors: int = 2) -> None:
        self.loop = Loop()
        self.turn = self.loop.turn
        owner = Owner(_nothing, _nothing, _nothing, _nothing)
        self.others = 0
        room = Room(_nothing, _nothing, _nothing, _nothing, _nothing, lambda: self.others)
        self.duties = Duties(self.turn, owner, room, _nothing, _nothing)
        self.duties.allot(Limits(1, largest, None, processors=processors))

    def meet(self, others: int, times: int = 100) -> bool:
        """So many requests that meet so many others: whether the last one of them has met a crowd."""
        self.others = others
        return [self.duties.meet() for _ in range(times)][-1]

    def page_line(self) -> PageLine:
        """The first one."""
        self.duties.pages.add(cast(Any, Server()))
        (line,) = self.duties.pages.all
        assert isinstance(line, PageLine)
        return line

    def backend(self) -> Backend:
        return Backend(cast(Any, Server()), self.turn, Lender(_nothing, _nothing, _nothing, _nothing))


@pytest.mark.parametrize(
    ("largest", "processors", "lines"),
    [
        (40, 2, (1, 2, 2, True)),
        (40, 1, (1, 1, 1, False)),
        (10, 2, (1, 2, 1, True)),
        (8, 2, (1, 1, 1, True)),
        (7, 1, (1, 1, 1, False)),
        (6, 2, (1, 0, 2, False)),
        (5, 1, (1, 0, 1, False)),
        (4, 2, (1, 0, 1, False)),
        (2, 2, (1, 0, 0, False)),
        (1, 2, (0, 0, 0, False)),
    ],
)
def test_half_of_the_connections_may_be_shared(
    largest: int, processors: int, lines: tuple[int, int, int, bool]
) -> None:
    duties = Stage(largest, processors).duties
    found = []
    for kind in (duties.finds, duties.writes, duties.pages):
        while kind.due:
            kind.add(cast(Any, Server()))
        found.append(len(kind.all))
    assert (*found, duties.commits.apart) == lines
    assert sum(found) + duties.commits.apart <= largest // 2


def test_a_duty_is_wanted_once_and_given_once() -> None:
    stage = Stage(processors=1)
    duties, backend = stage.duties, stage.backend()
    assert duties.fitting(backend) is None
    assert (duties.want(duties.finds), duties.want(duties.finds)) == (True, False)
    assert duties.fitting(backend) is duties.finds
    assert duties.give(duties.finds, backend)
    assert (len(duties.finds.all), duties.connections) == (1, 1)
    duties.want(duties.finds)
    assert not duties.give(duties.finds, stage.backend())  # there is enough of that
    assert duties.fitting(backend) is None
    (line,) = duties.lines()
    assert (duties.remove(line), duties.remove(line), duties.connections) == (True, False, 0)


def test_one_connection_flushes_if_that_is_allowed() -> None:
    stage = Stage()
    duties, flusher = stage.duties, stage.backend()
    for backend, given in ((flusher, True), (stage.backend(), False)):
        duties.want(duties.commits)
        assert duties.give(duties.commits, backend) == given
    assert duties.commits.backend is flusher
    few = Stage(largest=6)
    few.duties.want(few.duties.commits)
    assert not few.duties.give(few.duties.commits, flusher)
    assert not few.meet(100)  # nobody could flush


def test_a_connection_with_large_buffers_serves_one_at_a_time() -> None:
    stage = Stage()
    backend = stage.backend()
    backend.swollen = True
    stage.duties.want(stage.duties.pages)
    assert stage.duties.fitting(backend) is None


def test_writes_share_while_they_meet_many_wherever_these_wait() -> None:
    stage = Stage()
    duties = stage.duties
    assert not stage.meet(8, times=1)
    assert stage.meet(5)
    assert stage.meet(3)  # fewer than would have begun it
    duties.commits.pending = 3
    assert stage.meet(0)
    duties.commits.pending = 0
    duties.writes.add(cast(Any, Server()))
    (line,) = duties.writes.all
    line.queue.extend([cast(Any, None)] * 3)
    assert stage.meet(0)
    line.queue.clear()
    assert not stage.meet(2)
    assert not stage.meet(3)


@pytest.mark.parametrize("others", [2, 3])
def test_writes_that_share_are_counted_when_they_are_flushed(others: int) -> None:
    stage = Stage()
    assert stage.meet(8)
    stage.others = others
    for _ in range(100):
        stage.duties.commits.add(Waiter(stage.turn), (b"reply", b"\x01", b"12345678"))
        stage.loop.run()
    assert stage.duties.crowd.there == (others == 3)  # beside the one that is flushed


def test_a_line_of_pages_gives_way_as_the_limits_say() -> None:
    stage = Stage()
    line = stage.page_line()
    found = []
    for gives_way in (False, True, False):
        stage.duties.allot(Limits(1, 40, None, gives_way=gives_way))
        found.append(line._gives_way())
    assert found == [False, True, False]


@pytest.mark.parametrize("kind", ["finds", "writes"])
def test_nobody_gives_way_who_has_been_asked_for_more_than_pages_lately(kind: str) -> None:
    stage = Stage()
    duties, line = stage.duties, stage.page_line()
    duties.allot(Limits(1, 40, None, gives_way=True))
    line.add(Shared(GET_MORE, (b"db", b"spec", b"continuation"), b"db.c", 0))
    assert line._gives_way()
    stage.others = 1
    assert not line._gives_way()
    stage.others = 0
    getattr(duties, kind).add(cast(Any, Server()))
    (other,) = getattr(duties, kind).all
    for busy, since, expected in ((True, 0.0, False), (False, 0.05, False), (False, 0.2, True)):
        other.busy = busy
        other.since = stage.loop.now - since
        assert line._gives_way() == expected


def test_a_line_flushes_for_a_worker_of_one_processor() -> None:
    stage = Stage(processors=1)
    duties = stage.duties
    assert duties._in_line(FLUSH_COMMITS, (b"12345678",)) is None  # there is none yet
    assert duties.missing() is duties.writes
    server = Server()
    duties.writes.add(cast(Any, server))
    assert duties._in_line(FLUSH_COMMITS, (b"12345678",)) is not None
    assert server.sent == [SET_UP_WRITES.name, FLUSH_COMMITS.name]
    assert duties.missing() is None


def test_writes_forget_a_rush_with_their_last_line() -> None:
    stage = Stage()
    duties = stage.duties
    for _ in range(2):
        duties.writes.add(cast(Any, Server()))
    assert stage.meet(8)
    duties.remove(duties.writes.all[0])
    assert stage.meet(3, times=1)
    duties.finds.add(cast(Any, Server()))
    duties.remove(duties.finds.all[0])
    assert stage.meet(3, times=1)
    duties.remove(duties.writes.all[0])
    assert not stage.meet(3)


def test_writes_forget_a_rush_when_nobody_has_written_for_long() -> None:
    stage = Stage()
    duties = stage.duties
    assert stage.meet(8)
    duties.idle()
    assert not stage.meet(3)

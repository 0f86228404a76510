"""Which connections serve many requests, and as what: as lines of reads or of writes, or to flush commits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from pg_ferret.engine.backend import Backend
from pg_ferret.engine.calls import Call
from pg_ferret.engine.commits import Commits, Committed
from pg_ferret.engine.costs import Costs
from pg_ferret.engine.crowd import Crowd
from pg_ferret.engine.limits import Limits
from pg_ferret.engine.lines import Line, Lines, Owner, Shared
from pg_ferret.engine.pages import PageLine
from pg_ferret.engine.pipeline import Params, Row
from pg_ferret.engine.points import PointLine
from pg_ferret.engine.scheduling import Lag
from pg_ferret.engine.shared import ReadLine, Reads
from pg_ferret.engine.writes import Room, Shapes, WriteLine, Writes
from pg_ferret.runner import Turn, Waiter

# A page takes PostgreSQL ten times a point read's time: one of its processes keeps a processor busy, and more of them
# than the worker's share of processors only take turns.  A write takes as long as it takes the worker to serve it; one
# line is enough until many wait in it.
_LINES_OF_FINDS: Final = 1
_MOST_LINES_OF_PAGES: Final = 2
_MOST_LINES_OF_WRITES: Final = 2
# A flush of its own is a round trip more, which pays when it serves many writes: from so many others under way in the
# mean on, until there are so few. A mixture of both is slower than either. What has a connection of its own counts
# whatever it is: it takes the processors' time.
_CROWD: Final = 4.0
_NO_CROWD: Final = 2.5
# For so long nobody who asks for pages only gives way: point reads that come often would wait twice as long.
_LATELY_SECONDS: Final = 0.1

Duty = Lines[ReadLine] | Lines[WriteLine] | Commits


class Duties:
    """The kinds of them, and who has them."""

    __slots__ = (
        "_loop",
        "_others",
        "_patient",
        "commits",
        "connections",
        "crowd",
        "finds",
        "pages",
        "wanted",
        "writes",
    )

    def __init__(
        self,
        turn: Turn,
        owner: Owner,
        room: Room,
        measured: Callable[[Reads, Shared], Awaitable[Row]],
        flush_elsewhere: Callable[[Committed], None],
    ) -> None:
        """`measured` as for Reads, `flush_elsewhere` as for Commits."""
        self.commits = Commits(turn.loop, flush_elsewhere, self._coming, self._in_line, self._flushes)
        self._loop = turn.loop
        lag = Lag(turn.loop)

        def reads(line: Callable[..., ReadLine]) -> Reads:
            costs = Costs(lag)
            return Reads(partial(line, turn=turn, costs=costs, owner=owner), costs, measured, room.free)

        self.finds = reads(PointLine)
        self.pages = reads(partial(PageLine, gives_way=self._gives_way))
        self._patient = False  # as the limits say
        shapes = Shapes()
        make = partial(WriteLine, turn=turn, shapes=shapes, committed=self.commits.add, owner=owner)
        self.writes = Writes(make, shapes, room)
        self.crowd = Crowd(_CROWD, _NO_CROWD)  # of writes
        self._others = room.others
        self.wanted: list[Duty] = []  # each is to get the next connection that comes free and fits
        self.connections = 0  # that are lines

    def _coming(self) -> int:  # Commits is made before the writes, which tell it what they have committed
        return self.writes.coming()

    def _in_line(self, call: Call, params: Params) -> Waiter[Row] | None:
        return self.writes.flush(Shared(call, params, b"", 0))

    def lines(self) -> list[Line]:
        """All of them."""
        return [*self.finds.all, *self.pages.all, *self.writes.all]

    def allot(self, limits: Limits) -> None:
        """Half of the connections are for those who need one of their own."""
        room = limits.largest // 2
        finds = min(_LINES_OF_FINDS, room)
        # Beside the first line of writes one for pages, and one to flush what they commit: a single processor would
        # only change from one to the other and back.
        several = limits.processors > 1
        writes = min(_MOST_LINES_OF_WRITES, limits.processors, max(0, room - finds - 1 - several))
        flush = several and writes > 0
        if not writes:
            self.crowd.forget()
        self.finds.allot(finds)
        self.writes.allot(writes)
        self.pages.allot(min(_MOST_LINES_OF_PAGES, limits.processors, room - finds - writes - flush))
        self.commits.apart = flush
        self._patient = limits.gives_way

    def _gives_way(self) -> bool:
        """Whether other processes may go first.

        Nobody has a connection of his own, and those that point reads and writes share have not been used lately.
        """
        if not self._patient or self._others():
            return False
        lately = self._loop.time() - _LATELY_SECONDS
        return not any(line.busy or line.since > lately for line in (*self.finds.all, *self.writes.all))

    def _flushes(self) -> None:
        self.meet(itself=1)

    def meet(self, itself: int = 0) -> bool:
        """To be asked for every write while there is no crowd, else for every flush: whether writes had better share.

        For a flush, ``itself`` of those that wait are one that it serves.
        """
        if not self.writes.most:
            return False
        waiting = sum(line.waiting for line in self.writes.all)
        return self.crowd.meets(self._others() + self.commits.pending + waiting - itself)

    def idle(self) -> None:
        """Nobody has written for long."""
        self.crowd.forget()

    def missing(self) -> Duty | None:
        """What has yet to be there for writes to share a flush: the connection that flushes, or the line that does."""
        if self.commits.apart:
            return self.commits if self.commits.backend is None else None
        return None if self.writes.all else self.writes

    def want(self, duty: Duty) -> bool:
        """Another connection is to serve in this way; False if that is wanted already."""
        if duty in self.wanted:
            return False
        self.wanted.append(duty)
        return True

    def fitting(self, backend: Backend) -> Duty | None:
        """Which of those that are wanted a connection may have."""
        return next((duty for duty in self.wanted if duty.fits(backend)), None)

    def give(self, duty: Duty, backend: Backend) -> bool:
        """Have a connection do so; False if there is enough of that by now."""
        self.wanted.remove(duty)
        if isinstance(duty, Commits):
            if not duty.apart or duty.backend is not None:
                return False
            duty.backend = backend
        elif duty.due:
            backend.detach()
            duty.add(backend.connection)
            self.connections += 1
        else:
            return False
        return True

    def remove(self, line: Line) -> bool:
        """It serves no more; tells whether it did."""
        wrote = self.writes.remove(line)
        if wrote and not self.writes.all:
            self.crowd.forget()
        found = wrote or self.finds.remove(line) or self.pages.remove(line)
        self.connections -= found
        return found

"""Who waits for a connection of their own, and for how long."""

from __future__ import annotations

import pytest

from pg_ferret.engine.calls import FIND
from pg_ferret.engine.queue import Queue, Request
from pg_ferret.errors import CommandError
from tests.unit.fake_line import Loop


class Stage:
    """A queue, and how often somebody has waited in vain."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.overdue = 0
        self.queue = Queue(self.loop.turn, self._overdue)

    def _overdue(self) -> CommandError:
        self.overdue += 1
        return CommandError(262, "in vain")

    def add(self, seconds: float | None = 1.0, *, first: bool = False) -> Request:
        return self.queue.add(FIND, (), None, seconds, first=first)


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_they_are_served_in_order_but_for_the_first(stage: Stage) -> None:
    one, two = stage.add(), stage.add()
    before = stage.add(first=True)
    assert [stage.queue.take() for _ in range(4)] == [before, one, two, None]


def test_who_has_gone_is_passed_over(stage: Stage) -> None:
    gone, waits = stage.add(), stage.add()
    gone.waiter.cancel()
    assert stage.queue.take() is waits
    stage.add().waiter.cancel()
    stage.loop.run(0.05)
    assert not stage.queue.requests


def test_nobody_waits_longer_than_allowed(stage: Stage) -> None:
    short, long, patient = stage.add(0.1), stage.add(0.2), stage.add(None)
    for seconds, overdue in ((0.06, 0), (0.06, 1), (0.06, 1), (0.06, 2), (1e6, 2)):
        stage.loop.run(seconds)
        assert stage.overdue == overdue
    for request in (short, long):
        with pytest.raises(CommandError, match="in vain"):
            request.waiter.result()
    assert stage.queue.take() is patient


def test_when_nobody_waits_nobody_looks(stage: Stage) -> None:
    stage.add()
    assert stage.queue.take()
    stage.loop.run(0.05)
    assert not stage.loop.later
    stage.add(0.01)
    stage.loop.run(0.05)
    assert stage.overdue == 1

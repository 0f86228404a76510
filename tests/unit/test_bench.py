"""What make bench measures."""

from __future__ import annotations

from bench.goals import DECISIVE
from bench.plan import FULL


def test_what_decides_a_goal_is_measured() -> None:
    assert {(point.op, point.clients) for point in FULL.points} >= DECISIVE

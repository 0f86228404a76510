"""What make bench measures."""

from __future__ import annotations

from pathlib import Path

from bench.__main__ import measure
from bench.goals import DECISIVE
from bench.plan import FULL, PACED_BY, Plan, Point
from bench.targets import Sample, Target
from dev.cluster import Cluster


class _Gateway(Target):
    """Answers so many requests a second, and notes how many it is sent."""

    def __init__(self, name: str, rates: list[int]) -> None:
        super().__init__(Cluster(Path("nowhere")), Path("nowhere"))
        self.name = name
        self.paces: list[int] = []
        self._rates = rates

    def measure(self, point: Point, seconds: float, pace: int = 0) -> Sample:
        self.paces.append(pace)
        ops = self._rates.pop(0) if point == PACED_BY else pace
        return Sample(self.name, point.op, point.clients, ops, 1.0)


def test_what_decides_a_goal_is_measured() -> None:
    assert {(point.op, point.clients) for point in FULL.points} >= DECISIVE


def test_paced_clients_send_all_gateways_the_same_part_of_what_the_slower_one_has_answered_in_that_round() -> None:
    paced = Point("find-paced", 64), Point("find-paced-beside", 64)
    gateways = [_Gateway("quick", [10_000, 0]), _Gateway("slow", [5_000, 2_000])]
    measure([*gateways], Plan((PACED_BY, *paced), rounds=2, seconds=1.0, idle=()))
    assert [gateway.paces for gateway in gateways] == [[0, 2000, 2000, 0, 1, 1]] * 2  # a gateway has failed: no pace
    assert all(point in FULL.points for point in (PACED_BY, *paced))

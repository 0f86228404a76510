"""What make bench measures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.__main__ import measure
from bench.generator import Load
from bench.goals import DECISIVE, surely_missed
from bench.plan import FULL, PACED_BY, QUICK, Plan, Point, paced
from bench.report import table
from bench.sample import Sample
from bench.targets import Run, Target
from dev.cluster import Cluster


class _Gateway(Target):
    """Answers so many requests a second, and notes how many it is sent."""

    def __init__(self, name: str, rates: list[int], order: list[str] | None = None) -> None:
        super().__init__(Cluster(Path("nowhere")), Path("nowhere"))
        self.name = name
        self.paces: list[int] = []
        self.seconds: list[float] = []
        self.order = [] if order is None else order
        self._rates = rates

    def begin(self, point: Point, seconds: float, pace: int = 0, turns: int = 1) -> Run:
        self.paces.append(pace)
        self.seconds.append(seconds)
        return _Run(self, point, self._rates.pop(0) if point == PACED_BY else pace, turns)


class _Run(Run):
    """Answers when it has had all its turns."""

    def __init__(self, gateway: _Gateway, point: Point, ops: int, turns: int) -> None:
        self._turns = turns
        self._sample = Sample(gateway.name, point.op, point.clients, ops, 1.0)
        self._gateway = gateway

    def go(self) -> None:
        self._turns -= 1
        self._gateway.order.append(self._gateway.name)

    def end(self) -> Sample:
        assert self._turns == 0
        return self._sample


def _nothing() -> None:
    """What begins a round here."""


def test_what_decides_a_goal_is_measured() -> None:
    assert set(FULL.points) >= DECISIVE


def test_paced_clients_send_all_gateways_the_same_part_of_what_the_slower_one_has_answered_in_that_round() -> None:
    points = (PACED_BY, Point("find-paced", 64), Point("find-paced-beside", 64))
    gateways = [_Gateway("quick", [10_000, 0, 4_000]), _Gateway("slow", [5_000, 2_000, 3_000])]
    measure([*gateways], Plan(points, rounds=3, seconds=1.0, idle=()), _nothing)
    # In the second round a gateway has failed.
    assert [gateway.paces for gateway in gateways] == [[0, 2000, 2000, 0, 0, 1200, 1200]] * 2
    for plan in (FULL, QUICK):
        at = [index for index, point in enumerate(plan.points) if paced(point.op)]
        assert all(index > plan.points.index(PACED_BY) for index in at)


def test_in_each_round_gateways_are_started_anew_and_take_turns_and_each_is_first_at_every_other() -> None:
    order: list[str] = []
    gateways = [_Gateway(name, [8_000, 8_000], order) for name in "ab"]
    measure([*gateways], Plan((PACED_BY,), rounds=2, seconds=2.0, idle=()), lambda: order.append("-"))
    assert "".join(order) == "-abbaabba-baabbaab"
    order.clear()
    gateways = [_Gateway(name, [8_000], order) for name in "ab"]
    measure([*gateways], Plan((PACED_BY, Point("find-paced-beside", 64)), rounds=1, seconds=2.0, idle=()), _nothing)
    assert "".join(order[8:]) == "ba"


def test_what_takes_long_is_measured_for_longer_and_the_table_says_so_and_how_much_others_took() -> None:
    gateway = _Gateway("pg_ferret", [8_000])
    samples, speeds = measure(
        [gateway],
        Plan(
            (PACED_BY, Point("find", 16), Point("group", 16), Point("find-paced", 64)), rounds=1, seconds=2.0, idle=()
        ),
        _nothing,
    )
    assert gateway.seconds == [6.0, 2.0, 6.0, 6.0]
    assert len(speeds) == 1
    assert speeds[0] > 0
    samples[0].book(
        ((1.0, 2.0, 10.0, 5.0), (1.25, 2.25, 10.5, 5.5)),
        ((1.25, 3.0, 12.0, 6.0), (1.25, 3.25, 12.5, 6.25)),
    )
    assert (samples[0].gateway_cpu, samples[0].postgres_cpu) == (0.25, 0.5)
    machine = {"cpu": "a CPU", "memory": "1 GB", "system": "a system"}
    run = {"command": "make bench", "date": "today", "rounds": 1, "seconds": 2.0, "versions": {}, "machine": machine}
    text = table(run | {"samples": [one.as_dict() for one in samples[:3]], "additions": [60.0, 70.0, 80.0], "idle": []})
    longer = "3 times as long for $group over 10,000, 16 clients; find by _id, 64 clients.\n"
    assert "medians of 1 rounds of 2 s, " + longer in text
    assert "Other programs took 0.25 cores in those rounds, the machine's host 0.75 (steal)." in text
    assert "took 70 ms (60 to 80)" in text


def test_a_goal_is_missed_when_chance_would_hardly_let_so_many_rounds_miss_it() -> None:
    assert not surely_missed([0.98] * 7 + [1.01] * 2, 1.0, least=True)
    assert surely_missed([0.98] * 8 + [1.01], 1.0, least=True)
    assert not surely_missed([1.04] * 4, 1.0, least=False)
    assert surely_missed([1.04] * 5, 1.0, least=False)


def test_the_load_generator_is_moved_to_another_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "cgroup.procs").open("w") as group:
        monkeypatch.setattr(Load, "group", group.fileno())
        load = Load(["sh", "-c", """echo ready; read go; printf '{"ops": %d}\\n' $$"""])
        assert load.run() == {"ops": int((tmp_path / "cgroup.procs").read_text())}
        load.close()


def test_the_load_generator_knows_what_is_measured() -> None:
    known = re.findall(r'^\t"([\w-]+)": +\{run:', Path("bench/load/operations.go").read_text(), re.MULTILINE)
    assert {paced(point.op) or point.op for plan in (FULL, QUICK) for point in plan.points} <= {*known, "connect"}

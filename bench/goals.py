"""What was aimed at, and whether a run has reached it."""

from __future__ import annotations

import math
import statistics
from typing import Any

from bench.figures import Cell, pairs, ratios_of, rounds, slowdowns
from bench.plan import ONE_WORKER, TITLES, TWO_WORKERS, Point, put_beside

# What pg_ferret divided by FerretDB is meant to be: operation, clients, ops/s at least, the gateway's CPU at most.
_GOALS = (
    ("ping", 16, 2.0, 1.0),
    ("find", 16, 1.7, 0.5),
    ("find", 64, 2.0, 0.5),
    ("insert", 16, 1.3, 0.55),
    ("update", 16, 1.3, 0.5),
    ("insertMany", 16, 1.15, 0.5),
    ("scan", 16, 1.4, 0.4),
    ("group", 16, 1.0, 1.0),
    ("connect", 16, 1.5, 1.0),
)
_GOAL_MEMORY = 0.2
_GOAL_BESIDE = 1.5
_GOAL_CLIENTS = 0.8
# Whose operations per second with 256 clients are compared with those of 16.
_MANY = ("find", "insert")
# The aggregation takes one of two cores: who sends as fast as it is answered waits longer for that alone.
BESIDE = {"find-paced": "paced", "find": "as many as are answered"}
# Points on which a goal depends.
DECISIVE = frozenset(
    {Point(op, clients) for op, clients, *_ in _GOALS}
    | {Point(op, clients) for op in _MANY for clients in (16, 256)}
    | {Point(name, 64) for op in BESIDE for name in (op, put_beside(op))}
)
# What happens more often by chance is no proof that a goal is missed.
_CHANCE = 0.05
_ALONE = "(pg_ferret alone)"


def goals(run: dict[str, Any]) -> list[str]:
    """What was aimed at, and whether it is reached."""
    compared = ratios_of(run)
    lines = ["", "Goals:", "", "| pg_ferret divided by FerretDB | aimed at | measured | |", "|---|--:|--:|---|"]

    def goal(name: str, aim: float, found: list[float], least: bool = False, once: bool = False) -> None:
        figure = statistics.median(found)
        reached = figure >= aim if least else figure <= aim
        sign = "≥" if least else "≤"
        text = f"{figure:.2f}" if reached or float(f"{figure:.2f}") != aim else f"{figure:.3f}"
        missed = not reached and (once or surely_missed(found, aim, least))
        result = "reached" if reached else "**missed**" if missed else "undecided"
        lines.append(f"| {name} | {sign} {aim:g} | {text} | {result} |")

    for op, clients, rate, gateway in _GOALS:
        if ratios := compared.get((op, clients)):
            goal(f"{TITLES[op]}, {clients} clients: ops/s", rate, ratios.rate, least=True)
            goal(f"{TITLES[op]}, {clients} clients: CPU of gateway", gateway, ratios.gateway)
            goal(f"{TITLES[op]}, {clients} clients: p99", 1.0, ratios.p99)
    idle = {one["target"]: one for one in run["idle"]}
    states = {"just started": {name: run["fresh_memory"][name][0] for name in idle}}
    for number, count in enumerate(run["idle"][0]["clients"] if idle else ()):
        figures = {name: one["asked"][number] for name, one in idle.items() if len(one["asked"]) > number}
        states[f"with {count:,} idle clients"] = figures
    gone = {name: one["gone"] for name, one in idle.items() if "error" not in one}
    states["with none, when these have gone"] = gone
    for name, memory in states.items():
        if memory.get("FerretDB") and memory.get("pg_ferret"):
            goal(f"memory, {name}", _GOAL_MEMORY, [memory["pg_ferret"] / memory["FerretDB"]], once=True)
    for op, way in BESIDE.items():
        if slowdown := slowdowns(run, op).get("pg_ferret"):
            goal(f"{_ALONE} point reads, {way}: p99 beside an aggregation by that without", _GOAL_BESIDE, slowdown)
    by_clients = rounds(run)
    for op in _MANY:
        many, few = (by_clients.get((op, clients), {}).get("pg_ferret", []) for clients in (256, 16))
        if together := pairs(many, few):
            goal(f"{_ALONE} {TITLES[op]}, 256 clients by 16: ops/s", _GOAL_CLIENTS, _rates(together), least=True)
    for (op, clients), row in rounds({"samples": run.get("growth", [])}).items():
        if together := pairs(row.get(TWO_WORKERS, []), row.get(ONE_WORKER, [])):
            name = f"{_ALONE} {TITLES[op]}, {clients} clients, two workers by one: ops/s"
            goal(name, 1.0, _rates(together), least=True)
    return lines if len(lines) > 5 else []


def surely_missed(found: list[float], aim: float, least: bool) -> bool:
    """Of rounds whose median misses the aim: whether chance would hardly let so many of them miss it.

    The sign test: if their true median were the aim, each would be on either side of it as a coin falls. Fewer than
    five rounds decide nothing.
    """
    misses = sum(one < aim if least else one > aim for one in found)
    ways = sum(math.comb(len(found), count) for count in range(misses, len(found) + 1))
    return ways / 2.0 ** len(found) <= _CHANCE


def _rates(together: list[tuple[Cell, Cell]]) -> list[float]:
    return [one.rate / other.rate for one, other in together]

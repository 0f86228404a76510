"""The figures of a run: medians of rounds, and what pg_ferret's are of FerretDB's."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.plan import put_beside


@dataclass(frozen=True)
class Cell:
    """The figures of one target at one point, each the median of its rounds.

    Times in microseconds; how many cores other programs took, and the machine's host.
    """

    rate: float
    p50: float
    p99: float
    p999: float
    gateway: float
    postgres: float
    others: float
    stolen: float
    errors: int
    error: str


@dataclass(frozen=True)
class Ratios:
    """One target's figures divided by another's, round by round."""

    rate: list[float]
    p99: list[float]
    gateway: list[float]
    postgres: list[float]


Key = tuple[str, int]
_Samples = dict[Key, dict[str, list[dict[str, Any]]]]


def _samples(run: dict[str, Any]) -> _Samples:
    """Operation and clients -> target -> what each round has given, in the order of the run."""
    found: _Samples = defaultdict(lambda: defaultdict(list))
    for sample in run["samples"]:
        found[sample["op"], sample["clients"]][sample["target"]].append(sample)
    return found


def cells(run: dict[str, Any]) -> dict[Key, dict[str, Cell]]:
    """Operation and clients -> target -> figures, in the order of the run."""
    return {key: {target: _cell(found) for target, found in row.items()} for key, row in _samples(run).items()}


def rounds(run: dict[str, Any]) -> dict[Key, dict[str, list[Cell]]]:
    """The same, round by round."""
    return {
        key: {target: [_cell([one]) for one in found] for target, found in row.items()}
        for key, row in _samples(run).items()
    }


def _cell(samples: list[dict[str, Any]]) -> Cell:
    error = next((sample["error"] for sample in samples if sample["error"]), "")
    errors = sum(sample["errors"] for sample in samples)
    if not (good := [sample for sample in samples if sample["ops"]]):
        return Cell(0, 0, 0, 0, 0, 0, 0, 0, errors, error)

    def middle(figure: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(figure, good))

    return Cell(
        rate=middle(lambda sample: sample["ops"] / sample["seconds"]),
        p50=middle(lambda sample: sample["p50"]),
        p99=middle(lambda sample: sample["p99"]),
        p999=middle(lambda sample: sample["p999"]),
        gateway=middle(lambda sample: sample["gateway_cpu"] / sample["ops"] * 1e6),
        postgres=middle(lambda sample: sample["postgres_cpu"] / sample["ops"] * 1e6),
        others=middle(lambda sample: sample["other_cpu"] / sample["seconds"]),
        stolen=middle(lambda sample: sample["stolen_cpu"] / sample["seconds"]),
        errors=errors,
        error=error,
    )


def ratios_of(run: dict[str, Any]) -> dict[Key, Ratios]:
    """pg_ferret's figures divided by FerretDB's, where there are both."""
    return {
        key: Ratios(
            rate=[ours.rate / theirs.rate for ours, theirs in together],
            p99=[ours.p99 / theirs.p99 for ours, theirs in together],
            gateway=[_quotient(ours.gateway, theirs.gateway) for ours, theirs in together],
            postgres=[_quotient(ours.postgres, theirs.postgres) for ours, theirs in together],
        )
        for key, row in rounds(run).items()
        if (together := pairs(row.get("pg_ferret", []), row.get("FerretDB", [])))
    }


def pairs(ours: list[Cell], theirs: list[Cell]) -> list[tuple[Cell, Cell]]:
    """Two rows of rounds side by side, without the rounds in which one of them failed."""
    return [(one, other) for one, other in zip(ours, theirs, strict=False) if one.rate and other.rate]


def _quotient(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else float("nan")


def slowdowns(run: dict[str, Any], op: str) -> dict[str, list[float]]:
    """How much later each target answers point reads while one of the clients aggregates, round by round."""
    found = rounds(run)
    with_it, without = found.get((put_beside(op), 64), {}), found.get((op, 64), {})
    return {
        target: [beside.p99 / alone.p99 for beside, alone in together]
        for target, samples in with_it.items()
        if (together := pairs(samples, without.get(target, [])))
    }

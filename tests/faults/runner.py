"""Runs one fault: a cluster, load, the fault several times, and then the accounts."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pymongo.errors import PyMongoError

from dev.cluster import ClusterError
from tests.faults.load import Load, percentile
from tests.faults.stage import Missed, Resources, Stage, lives, new_cluster

# How long the load runs undisturbed before the first fault, and at least after each.
WARM_SECONDS = 0.6
CALM_SECONDS = 0.3
# Memory comes and goes with new processes; anything beyond this is a leak.
_PSS_FACTOR = 1.2
_PSS_SLACK = 6 << 20
_DESCRIPTORS_SLACK = 4
_SETTLE_SECONDS = 15.0
# What the log said last belongs to a fault that does not end.
_LOG_LINES = 20


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    name: str
    expected: str
    inject: Callable[[Stage], None]
    within: float  # seconds
    rounds: int = 3
    # Codes that requests under way may fail with; None: nothing may fail.
    failures: frozenset[str] = frozenset()
    settings: dict[str, str] = field(default_factory=dict)
    load: dict[str, int] = field(default_factory=dict)  # numbers of writers, readers and idle clients


@dataclass
class Result:
    """What was seen."""

    fault: Fault
    rounds: int
    recoveries: list[float]
    failed: Counter[str]
    requests: int
    lost: int
    orphans: int
    before: Resources
    after: Resources
    notes: dict[str, float]
    problems: list[str]
    seconds: float

    @property
    def p50(self) -> float:
        """The middle recovery, in seconds."""
        return percentile(self.recoveries, 0.5)

    @property
    def worst(self) -> float:
        """The longest recovery, in seconds."""
        return max(self.recoveries, default=float("inf"))


FAULTS: list[Fault] = []


def fault(
    name: str, expected: str, *, failures: str = "", **options: Any
) -> Callable[[Callable[[Stage], None]], Callable[[Stage], None]]:
    """Enter a function that injects a fault once and waits for the recovery; ``failures``: codes divided by commas.

    ``options`` are further fields of Fault.
    """

    def enter(inject: Callable[[Stage], None]) -> Callable[[Stage], None]:
        allowed = frozenset(filter(None, map(str.strip, failures.split(","))))
        FAULTS.append(Fault(name, expected, inject, failures=allowed, **options))
        return inject

    return enter


def run(item: Fault, rounds: int, patience: float = 1.0) -> Result:
    """Everything for one fault, from a new cluster to its last process; ``patience`` multiplies its time limits."""
    started = time.monotonic()
    cluster = new_cluster({"ferretdb.cursor_timeout": "2s", **item.settings})
    try:
        cluster.start()
        stage = Stage(cluster, _load(cluster.uri, item), item.within * patience, patience)
        return _run(item, rounds, stage, started)
    finally:
        cluster.destroy()


def _load(uri: str, item: Fault) -> Load:
    return Load(uri, **item.load)


def _run(item: Fault, rounds: int, stage: Stage, started: float) -> Result:
    stage.until(stage.ready, "the gateway is ready")
    _warm_up(stage)
    before = stage.resources()
    stage.load = load = _load(stage.cluster.uri, item)
    load.start()
    try:
        stage.until(lambda: load.latencies, "the first request is answered")
        for _ in range(rounds):
            _undisturbed(WARM_SECONDS)
            item.inject(stage)
            _undisturbed(CALM_SECONDS)
    except (Missed, ClusterError) as error:
        stage.problems.append(str(error))
        print(*stage.cluster.log.splitlines()[-_LOG_LINES:], sep="\n", file=sys.stderr)
    finally:
        load.stop()
    return _account(item, rounds, stage, before, started)


def _undisturbed(seconds: float) -> None:
    """Let the load run: the time is the point."""
    time.sleep(seconds)


def _warm_up(stage: Stage) -> None:
    """As much load as there will be, so that what is kept for good is there before the accounts are opened."""
    stage.load.start()
    _undisturbed(WARM_SECONDS)
    stage.load.stop()


def _account(item: Fault, rounds: int, stage: Stage, before: Resources, started: float) -> Result:
    after, lost, orphans = Resources(), -1, 0
    failed = stage.load.failed()
    try:
        stage.until(stage.ready, "the gateway is whole again")
        lost = stage.load.lost(stage.cluster.uri)
        # Cursors expire and buffers are given back within seconds, not at once.
        with suppress(Missed):
            stage.until(lambda: not _leaks(before, stage.resources()), "nothing is left", _SETTLE_SECONDS)
        after = stage.resources()
        stage.hang_up()
        stage.cluster.stop()
        orphans = sum(map(_is_gateway, stage.seen))
    except (Missed, ClusterError, PyMongoError) as error:
        stage.problems.append(str(error))
    stage.hang_up()
    problems = [*stage.problems, *stage.load.wrong[:3]]
    unexpected = {code: count for code, count in failed.items() if code not in item.failures}
    if unexpected:
        told = [line for line in stage.cluster.log.splitlines() if "the engine failed" in line]
        problems.append(f"unexpected failures: {unexpected}; {' | '.join(told[:3])}")
    if lost:
        problems.append(f"{lost} acknowledged writes lost")
    if orphans:
        problems.append(f"{orphans} processes left")
    problems += _leaks(before, after)
    return Result(
        item, rounds, stage.recoveries, failed, len(stage.load.latencies), lost, orphans, before, after,
        stage.notes, problems, time.monotonic() - started,
    )  # fmt: skip


def _is_gateway(pid: int) -> bool:
    """Whether a process of the gateway is still there; another one may have its pid by now."""
    with suppress(OSError):
        return b"-m\0supervisor" in Path(f"/proc/{pid}/cmdline").read_bytes() and lives(pid)
    return False


def _leaks(before: Resources, after: Resources) -> list[str]:
    found = []
    if after.pss > before.pss * _PSS_FACTOR + _PSS_SLACK:
        found.append(f"memory grew from {before.pss >> 20} to {after.pss >> 20} MB")
    if after.descriptors > before.descriptors + _DESCRIPTORS_SLACK:
        found.append(f"descriptors grew from {before.descriptors} to {after.descriptors}")
    if after.cursors:
        found.append(f"{after.cursors} cursors are left")
    if after.cursor_files:
        found.append(f"{after.cursor_files} cursor files are left")
    return found

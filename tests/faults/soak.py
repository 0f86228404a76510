"""``python3 -m tests.faults.soak --minutes N``: mixed load and random faults, and whether anything grows meanwhile.

Exit status 1 if a figure at the end is more than 5 % above the first one, or anything acknowledged is lost.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psycopg

from dev.cluster import ClusterError
from tests.faults import report
from tests.faults.load import Load
from tests.faults.stage import Missed, Stage, kill, new_cluster

_FIRST_AFTER = 60.0  # seconds: pools and caches have their size by then
_FAULT_EVERY = 10.0
_LOOK_EVERY = 30.0
# Beside the five percent: a few idle connections; the registry keeps the size of its busiest moment.
_SLACK = {"pss": 4 << 20, "descriptors": 4, "connections": 4, "registry_bytes": 1 << 20, "cursor_files": 0}


@dataclass
class Sample:
    """What the gateway holds while the load is on."""

    seconds: float
    pss: int
    descriptors: int
    connections: int
    registry_bytes: int
    cursor_files: int
    requests: int
    failed: int


def sample(stage: Stage, started: float) -> Sample:
    """A look at everything that could grow; the load pauses for it, so that what is under way does not count."""
    resources = stage.resources()
    size = 0
    for memo in Path("/dev/shm").glob("pg_ferret.*/postmaster"):
        with suppress(OSError):  # another server's may vanish
            if str(stage.cluster.data) in memo.read_text():
                size = (memo.parent / "cursors.mdb").stat().st_blocks * 512
    return Sample(
        time.monotonic() - started,
        resources.pss,
        resources.descriptors,
        len(stage.backends()),
        size,
        resources.cursor_files,
        len(stage.load.latencies),
        len(stage.load.failures),
    )


def _worker_killed(stage: Stage) -> None:
    kill(random.choice([int(row["pid"]) for row in stage.workers().values()]))


def _worker_stopped(stage: Stage) -> None:
    kill(random.choice([int(row["pid"]) for row in stage.workers().values()]), signal.SIGSTOP)


def _supervisor_killed(stage: Stage) -> None:
    kill(stage.supervisor())


def _backend_ended(stage: Stage) -> None:
    stage.sql(f"select pg_terminate_backend({random.choice(stage.backends())})")


def _workers_restarted(stage: Stage) -> None:
    stage.sql("select ferretdb.restart_workers()")


def _resized(stage: Stage) -> None:
    stage.configure(workers=str(random.choice((2, 3, 4))))
    stage.configure(workers="2")


def _crash_recovery(stage: Stage) -> None:
    kill(random.choice(stage.backends()))


FAULTS: list[tuple[int, Callable[[Stage], None]]] = [
    (6, _worker_killed),
    (2, _worker_stopped),
    (2, _supervisor_killed),
    (6, _backend_ended),
    (3, _workers_restarted),
    (3, _resized),
    (1, _crash_recovery),
]


def disturb(stage: Stage) -> str:
    """One random fault, and the time until all is well again."""
    inject = random.choices([one for _, one in FAULTS], [weight for weight, _ in FAULTS])[0]
    with suppress(psycopg.Error, ClusterError, IndexError):
        inject(stage)
    stage.until(lambda: stage.ready() and stage.serving(), f"well again after {inject.__name__}")
    return inject.__name__.strip("_")


def soak(stage: Stage, minutes: float) -> tuple[list[Sample], dict[str, int]]:
    """Run; the samples and how often each fault was injected."""
    started = time.monotonic()
    samples: list[Sample] = []
    injected: dict[str, int] = {}
    lost = 0
    while (now := time.monotonic() - started) < minutes * 60:
        stage.load = load = Load(stage.cluster.uri, writers=4, readers=4, idle=50)
        load.start()
        until = time.monotonic() + (_LOOK_EVERY if now >= _FIRST_AFTER else _FIRST_AFTER)
        while time.monotonic() < until:
            time.sleep(min(_FAULT_EVERY, max(0.0, until - time.monotonic())))  # the load is the point
            name = disturb(stage)
            injected[name] = injected.get(name, 0) + 1
        load.stop()
        lost += load.lost(stage.cluster.uri)
        stage.problems += load.wrong
        with suppress(Missed):
            stage.until(lambda: not stage.resources().cursor_files, "cursor files are gone", 20.0)
        samples.append(sample(stage, started))
        print(report.soak_line(asdict(samples[-1])), flush=True)
    stage.check(not lost, f"{lost} acknowledged writes lost")
    return samples, injected


def growth(samples: list[Sample]) -> list[str]:
    """What grew: the middle of the last five samples against the middle of the first five."""
    found = []
    for name, slack in _SLACK.items():
        first = sorted(getattr(item, name) for item in samples[:5])[len(samples[:5]) // 2]
        last = sorted(getattr(item, name) for item in samples[-5:])[len(samples[-5:]) // 2]
        if last > first * 1.05 + slack:
            found.append(f"{name} grew from {first} to {last}")
    return found


def main() -> int:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(prog="make soak")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    cluster = new_cluster({"ferretdb.cursor_timeout": "5s", "ferretdb.worker_timeout": "2s"})
    try:
        cluster.start()
        stage = Stage(cluster, Load(cluster.uri), 30.0)
        stage.until(stage.ready, "ready")
        samples, injected = soak(stage, arguments.minutes)
        stage.hang_up()
    finally:
        cluster.destroy()
    problems = [*stage.problems, *growth(samples)]
    facts = {"injected": injected, "problems": problems, "samples": [asdict(item) for item in samples]}
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"faults: {injected}; problems: {'; '.join(problems) or 'none'}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

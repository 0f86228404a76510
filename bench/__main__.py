"""make bench: measure all targets, interleaved, and write what came out as JSON.

``python3 -m bench --bin DIR --out FILE [--quick] [--only OPERATION...] [--rounds N]`` inside dev/enter. At every
point the gateways take turns of half a second before the next point comes, in several rounds, so that whatever else the
machine does meets all of them. Each round has servers of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench import growth, procfs
from bench.generator import Load
from bench.goals import DECISIVE
from bench.plan import FULL, LONG, LONGER, PACE, PACED_BY, QUICK, TITLES, TURNS, Plan, Point, beside, paced
from bench.sample import Sample
from bench.targets import FerretDB, Pgbench, PgFerret, Target, begin_round, pg_ferret_launcher
from dev.cluster import Cluster, free_port

_SETTINGS = {
    "shared_buffers": "1GB",
    "max_connections": "400",
    "max_wal_size": "16GB",
    "checkpoint_timeout": "1h",
    # Its work would be booked on whoever is measured while it runs.
    "autovacuum": "off",
    "ferretdb.max_connections": "20000",
}


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, str]:
    """What this was measured on."""
    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "cpu": f"{model}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{memory:.0f} GB",
        "system": f"{platform.system()} {platform.release()}",
    }


def additions() -> float:
    """Milliseconds in which Python makes a million additions: how quick the machine is at the moment."""
    started = time.perf_counter()
    total = 0
    for number in range(1_000_000):
        total += number
    return (time.perf_counter() - started) * 1000


def measure(targets: list[Target], plan: Plan, begin: Callable[[], None]) -> tuple[list[Sample], list[float]]:
    """All points, all rounds; and how long `additions` took before each of these.  ``begin`` is called before, too."""
    samples: list[Sample] = []
    speeds: list[float] = []
    rates: dict[str, float] = {}  # of each target where paced clients take their pace from
    decisive = tuple(point for point in plan.points if point in DECISIVE)
    for number in range(plan.rounds + plan.more):
        begin()
        speeds.append(additions())
        for index, point in enumerate(plan.points if number < plan.rounds else decisive):
            able = [target for target in targets if target.can(point)]
            gateways = [target for target in able if not isinstance(target, Pgbench)]
            pace = round(PACE * min(rates[target.name] for target in gateways)) if paced(point.op) else 0
            if paced(point.op) and not pace:
                say(f"{number + 1}/{plan.rounds + plan.more} {TITLES[point.op]}: skipped, no pace: see above")
                continue
            seconds = plan.seconds * (LONGER if point in LONG else 1)
            found = _in_turns(gateways, point, seconds, pace, first=index + number)
            found += [target.measure(point, seconds) for target in able if target not in gateways]
            samples += found
            for sample in found:
                if point == PACED_BY:
                    rates[sample.target] = sample.ops / sample.seconds if sample.ops else 0.0
                say(f"{number + 1}/{plan.rounds + plan.more} {_line(sample)}")
    return samples, speeds


def _in_turns(targets: list[Target], point: Point, seconds: float, pace: int, first: int) -> list[Sample]:
    """One operation at all of them. What the machine does at the moment meets them all: they change several times.

    Whoever comes first finds colder caches: that changes, too.
    """
    turns = 1 if beside(point.op) else TURNS
    runs = [target.begin(point, seconds, pace, turns) for target in targets]
    for turn in range(first, first + turns):
        at = turn % len(runs)
        for run in runs[at:] + runs[:at]:
            run.go()
    return [run.end() for run in runs]


def _line(sample: Sample) -> str:
    head = f"{TITLES[sample.op]:<40.40} {sample.clients:>4} clients  {sample.target:<10}"
    if not sample.ops:
        return f"{head} failed: {sample.error}"
    gateway, postgres = (cpu / sample.ops * 1e6 for cpu in (sample.gateway_cpu, sample.postgres_cpu))
    tail = f", {sample.errors} errors: {sample.error}" if sample.errors else ""
    return (
        f"{head} {sample.ops / sample.seconds:>9,.0f}/s  CPU {gateway:6,.0f} + {postgres:6,.0f} us"
        f"  p50 {sample.p50:7,.0f}  p99 {sample.p99:8,.0f} us{tail}"
    )


def idle_memory(target: Target, counts: tuple[int, ...], rest: float) -> dict[str, object]:
    """PSS of a target with so many clients at a time, and then without them; after ``rest`` seconds each.

    The first ones are looked at when they have said hello, too; then, like all others, each has read a document.
    """

    def rested() -> int:
        time.sleep(rest)
        return target.memory()[0]

    found: dict[str, object] = {"target": target.name, "clients": counts}
    asked: list[int] = []
    loads: list[Load] = []
    for count, fewer in zip(counts, (0, *counts), strict=False):
        loads.append(load := target.load(Point("idle", count - fewer), 0))
        if load.ready and not fewer:
            found["said_hello"] = rested()
        if error := load.run().get("error"):
            found["error"] = error
            break
        asked.append(rested())
    for load in loads:
        load.close()
    found |= {"asked": asked, "gone": rested()}
    say(f"{target.name}: {found}")
    return found


def run(bin_dir: Path, directory: Path, plan: Plan) -> dict[str, object]:
    """Start everything, measure, stop everything."""
    cluster = Cluster(directory, pg_port=free_port(), settings=_SETTINGS)
    cluster.destroy()
    # FerretDB leaves this at "localhost", where a password would be asked for; pg_ferret brings it itself.
    cluster.settings["documentdb.localhost_connection_string"] = f"host={cluster.socket_dir}"
    targets: list[Target] = []
    try:
        say("starting PostgreSQL with pg_ferret")
        cluster.start()
        targets.append(ours := PgFerret(cluster, bin_dir))
        if (bin_dir / "ferretdb").exists():
            targets.append(FerretDB(cluster, bin_dir))
        else:
            say("FerretDB: skipped, it could not be built (see above)")
        for target in targets:
            target.start()
        fresh = {target.name: target.memory() for target in targets}
        launcher = procfs.pss_bytes({pg_ferret_launcher(cluster) or 0})
        for target in targets:
            target.setup()
        targets.append(Pgbench(cluster, bin_dir))
        cluster.psql("vacuum analyze")
        cluster.psql("checkpoint")
        started = time.monotonic()
        # Idle clients first: later the memory would be what the load before has left.
        idle = [
            idle_memory(target, plan.idle, plan.rest) for target in targets if plan.idle and target.name != Pgbench.name
        ]
        samples, speeds = measure(targets, plan, lambda: begin_round(cluster, targets))
        loaded = {target.name: target.memory() for target in targets}
        # Before the growth of cost is measured: that changes the number of workers.
        versions = {
            "PostgreSQL": cluster.psql("show server_version")[0][0],
            "DocumentDB": cluster.psql("select extversion from pg_extension where extname = 'documentdb'")[0][0],
            **{target.name: target.version() for target in targets},
        }
        grown = growth.measure(ours, plan.cursors, plan.collections, plan.seconds, say) if plan.cursors else []
        return {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "machine": machine(),
            "versions": versions,
            "settings": _SETTINGS,
            "rounds": plan.rounds,
            "more": plan.more,
            "seconds": plan.seconds,
            "pace": PACE,
            "took": round(time.monotonic() - started),
            "fresh_memory": fresh,
            "launcher_memory": launcher,
            "loaded_memory": loaded,
            "idle": idle,
            "additions": speeds,
            "samples": [sample.as_dict() for sample in samples],
            "growth": grown,
        }
    finally:
        for target in targets:
            target.stop()
        cluster.destroy()


def main() -> int:
    """The command line; see the Makefile."""
    parser = argparse.ArgumentParser(prog="python3 -m bench")
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=TITLES, help="these operations only, and what they are paced by")
    parser.add_argument("--rounds", type=int, help="instead of the plan's")
    parser.add_argument("--load-group", type=int, help="open file: cgroup.procs, where load generators move to")
    options = parser.parse_args()
    Load.group = options.load_group
    plan = QUICK if options.quick else FULL
    if options.only:
        points = tuple(point for point in plan.points if point.op in options.only)
        if not points:
            parser.error(f"none of these is measured here: {' '.join(options.only)}")
        if any(paced(point.op) for point in points):
            points = (PACED_BY, *(point for point in points if point != PACED_BY))
        plan = replace(plan, points=points, idle=(), cursors=0, collections=0)
    if options.rounds:
        plan = replace(plan, rounds=options.rounds, more=0)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        result = run(options.bin, options.out.parent / "cluster", plan)
    except subprocess.CalledProcessError as error:
        say(f"bench: {error}")
        return 1
    command = [
        "make bench",
        "QUICK=1" if options.quick else "",
        f'ONLY="{" ".join(options.only)}"' if options.only else "",
        f"ROUNDS={options.rounds}" if options.rounds else "",
    ]
    result["command"] = " ".join(filter(None, command))
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

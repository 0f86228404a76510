"""What must not make a request dearer: open cursors, collections, a second worker.  pg_ferret alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bson import Int64
from pymongo import MongoClient

from bench.plan import ONE_WORKER, TWO_WORKERS, Point
from bench.sample import Sample
from bench.targets import DATABASE, PgFerret, begin_round
from dev.cluster import wait_for

_POINTS = (Point("find", 16), Point("insert", 16), Point("scan", 16))
# Reads everywhere: only with the collections there, and only after the backends have seen most of them.
_ANYWHERE = Point("find-anywhere", 16)
_WARM_UP_SECONDS = 20.0
# Workers that have just come have connections to PostgreSQL that know nothing yet.
_SETTLE_SECONDS = 1.0
_ROUNDS = 2
_TURNS = 8  # in half of them one worker comes first
_THREADS = 16


def measure(target: PgFerret, cursors: int, collections: int, seconds: float, say: Callable[[str], None]) -> list[Any]:
    """Samples under one condition after the other; ``target`` of a sample is the condition's name."""
    samples: list[Sample] = []

    def under(condition: str, *more: Point, rounds: int = _ROUNDS) -> None:
        for _ in range(rounds):
            for point in (*_POINTS, *more):
                sample = target.measure(point, seconds)
                sample.target = condition
                samples.append(sample)
                say(f"{condition}: {point.op} {sample.ops / (sample.seconds or 1):,.0f}/s {sample.error}")

    conditions = [(1, ONE_WORKER), (2, TWO_WORKERS)]
    for turn in range(_TURNS):
        begin_round(target.cluster, [target])
        for workers, condition in conditions[:: -1 if turn % 2 else 1]:
            _resize(target, workers)
            for point in _POINTS:
                target.measure(point, _SETTLE_SECONDS)
            under(condition, rounds=1)
    _resize(target, 1)
    with MongoClient[dict[str, Any]](target.uri, maxPoolSize=_THREADS) as client:
        database = client[DATABASE]

        def open_cursor(_: int) -> Int64:
            # PyMongo would send an id of less than 32 bits as an int, which killCursors refuses, as MongoDB does.
            return Int64(database.command("find", "docs", batchSize=1)["cursor"]["id"])

        def create(number: int) -> None:
            client[f"{DATABASE}_many"].create_collection(f"c{number}", check_exists=False)

        with ThreadPoolExecutor(_THREADS) as threads:
            opened = list(threads.map(open_cursor, range(cursors)))
            under(f"{cursors:,} open cursors")
            for start in range(0, cursors, 1000):
                database.command("killCursors", "docs", cursors=opened[start : start + 1000])
            under(f"{ONE_WORKER}, again")
            list(threads.map(create, range(collections)))
            target.measure(_ANYWHERE, _WARM_UP_SECONDS)
            under(f"{collections:,} collections more", _ANYWHERE)
    return [sample.as_dict() for sample in samples]


def _resize(target: PgFerret, workers: int) -> None:
    target.cluster.configure(ferretdb__workers=str(workers))
    wanted = ["ready"] * (workers + 1)
    wait_for(lambda: [row["state"] for row in target.cluster.status()] == wanted, 20, f"{workers} workers")

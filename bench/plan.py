"""What is measured: operations, numbers of clients, times."""

from __future__ import annotations

from dataclasses import dataclass

# What an operation of the load generator (bench/load/operations.go) is called in tables.
TITLES = {
    "ping": "ping",
    "find": "find by _id",
    "insert": "insert one",
    "insert-array": "insert one, in the command itself as Node.js",
    "update": "update one by _id",
    "delete": "delete one by _id",
    "findAndModify": "findAndModify by _id",
    "insertMany": "insertMany of 100",
    "page": "find 20 documents",
    "count": "count 20 documents, by an aggregation as drivers do",
    "scan": "1,000 documents in 10 batches",
    "sort": "sort 10,000, read 1,000 in 10 batches",
    "group": "$group over 10,000",
    "ycsb-a": "YCSB A (50 % reads, 50 % updates, 1 kB)",
    "ycsb-b": "YCSB B (95 % reads)",
    "ycsb-c": "YCSB C (reads only)",
    "insert-1MB": "insert a document of 1 MB",
    "find-1MB": "find a document of 1 MB",
    "find-anywhere": "find by _id in any of 10,000 collections",
    "find-beside": "find by _id, one of the clients aggregates 1,000,000 rows",
    "find-paced": "find by _id, paced",
    "find-paced-beside": "find by _id, paced, one of the clients aggregates 1,000,000 rows",
    "connect": "connect, hello, close",
}
# Conditions that are compared (bench/growth.py).
ONE_WORKER, TWO_WORKERS = "1 worker", "2 workers"


@dataclass(frozen=True)
class Point:
    """One cell of the table: an operation and a number of clients."""

    op: str
    clients: int


@dataclass(frozen=True)
class Plan:
    """``rounds`` passes over ``points``, each for ``seconds`` per target (or `LONGER`), and ``more`` over those that
    decide whether a goal is reached; so many ``idle`` clients at once, one number after the other, and ``rest`` seconds
    before memory is looked at.

    And pg_ferret alone with so many ``cursors`` open and so many ``collections`` more, if any.
    """

    points: tuple[Point, ...]
    rounds: int
    seconds: float
    idle: tuple[int, ...]  # ascending
    more: int = 0
    rest: float = 0.0
    cursors: int = 0
    collections: int = 0


# Clients of an operation with "-paced" in its name send such a part of what the slower gateway has answered in the same
# round where each sent its next request when it had its answer.
PACE = 0.4
PACED_BY = Point("find", 64)

# What is run before each round, not measured: these open all connections that are needed in it.
WARM_UP = (Point("find", 256), Point("insert", 256), Point("insertMany", 16), Point("scan", 16), Point("group", 16))
WARM_UP_SECONDS = 0.5
# Turns into which the time of a point is divided.
TURNS = 4
# Before each: a gateway and a load generator in Go go on for a while, to collect their garbage.
PAUSE_SECONDS = 0.05
# These are measured for so many times as long: a round would have few of them, or a single halt of the machine would
# make the p99 of point reads, which is compared with and without an aggregation beside them.
LONGER = 3
LONG = (
    Point("group", 16),
    Point("find", 64),
    Point("find-beside", 64),
    Point("find-paced", 64),
    Point("find-paced-beside", 64),
)
_BESIDE = "-beside"  # ends the names of operations beside an aggregation


def paced(op: str) -> str:
    """The operation that is measured at a pace; empty if it is not."""
    return op.replace("-paced", "") if "-paced" in op else ""


def beside(op: str) -> bool:
    """Whether one of the clients aggregates meanwhile; it goes on when the others have ended, so there are no turns."""
    return op.endswith(_BESIDE)


def put_beside(op: str) -> str:
    """The operation ``op`` while one of the clients aggregates."""
    return op + _BESIDE


def _points(**clients: tuple[int, ...]) -> tuple[Point, ...]:
    names = {name.replace("-", "_"): name for name in TITLES}
    return tuple(Point(names[name], count) for name, counts in clients.items() for count in counts)


QUICK = Plan(
    points=_points(
        ping=(16,),
        find=(16, 64),
        insert=(16,),
        update=(16,),
        delete=(16,),
        findAndModify=(16,),
        insertMany=(16,),
        page=(16,),
        scan=(16,),
        group=(16,),
        sort=(16,),
        ycsb_a=(16,),
        find_1MB=(4,),
        connect=(16,),
    ),
    rounds=1,
    seconds=1.0,
    idle=(1000,),
)

FULL = Plan(
    # Point reads without and beside an aggregation are compared, and so not long apart.
    points=_points(
        ping=(16,),
        find=(1, 4, 16, 64, 256),
        find_beside=(64,),
        find_paced=(64,),
        find_paced_beside=(64,),
        insert=(1, 16, 64, 256),
        insert_array=(64,),
        update=(16, 64),
        delete=(16,),
        findAndModify=(16,),
        insertMany=(16,),
        page=(1, 16, 64),
        count=(16, 64),
        scan=(16,),
        sort=(16,),
        group=(16,),
        ycsb_a=(16,),
        ycsb_b=(16,),
        ycsb_c=(16,),
        insert_1MB=(4,),
        find_1MB=(4,),
        connect=(16,),
    ),
    rounds=3,
    more=6,
    seconds=2.0,
    idle=(8_000, 10_000),
    rest=12.0,  # what a moment's work took is given back by then, as far as a target does so
    cursors=100_000,
    collections=10_000,
)

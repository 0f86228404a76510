"""Cursors belong to no worker."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from bson import Int64
from pymongo import MongoClient
from pymongo.database import Database
from pymongo.errors import ConnectionFailure, OperationFailure, PyMongoError

from dev.cluster import Cluster, wait_for
from tests.integration.conftest import CLIENT_OPTIONS

Document = dict[str, Any]


def fill(database: Database[Document], count: int = 1000) -> None:
    database.c.insert_many([{"_id": number, "r": number * 7919 % count} for number in range(count)])


def workers(cluster: Cluster) -> dict[int, int]:
    """Slot -> pid of the workers that are ready."""
    rows = cluster.psql("select slot, pid from ferretdb.status where kind = 'worker' and state = 'ready'")
    return {int(slot or 0): int(pid or 0) for slot, pid in rows}


@pytest.mark.parametrize("sort", [None, [("r", 1)]])
def test_any_worker_continues_any_cursor(cluster: Cluster, database: Database[Document], sort: Any) -> None:
    fill(database)
    command: Document = {"find": "c", "batchSize": 10, "noCursorTimeout": True}
    page = database.command(command | ({"sort": {"r": 1}} if sort else {}))
    found = [row["_id"] for row in page["cursor"]["firstBatch"]]
    number = page["cursor"]["id"]
    while number:
        with MongoClient[Document](
            cluster.uri, **CLIENT_OPTIONS
        ) as other:  # a new connection, and sooner or later another worker
            page = other[database.name].command({"getMore": Int64(number), "collection": "c", "batchSize": 100})
        found += [row["_id"] for row in page["cursor"]["nextBatch"]]
        number = page["cursor"]["id"]
    assert sorted(found) == list(range(1000))


def test_many_threads_over_four_workers(cluster: Cluster, database: Database[Document]) -> None:
    fill(database)
    wrong: list[str] = []

    def read(client: MongoClient[Document]) -> None:
        rows = [row["r"] for row in client[database.name].c.find(sort=[("r", 1)], batch_size=2)]
        if rows != list(range(1000)):
            wrong.append(f"{len(rows)} rows")

    with MongoClient[Document](cluster.uri, maxPoolSize=20, **CLIENT_OPTIONS) as client:
        threads = [threading.Thread(target=read, args=(client,)) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert wrong == []


@pytest.mark.parametrize("sort", [True, False], ids=["file", "streaming"])
def test_workers_killed_in_the_middle_of_cursors(cluster: Cluster, database: Database[Document], sort: bool) -> None:
    """A cursor fails only with the network error of its own connection: no CursorNotFound, no duplicate, no gap."""
    fill(database)
    order: Any = [("r", 1)] if sort else None
    outcome: Counter[str] = Counter()
    until = time.monotonic() + 6

    def read() -> None:
        with MongoClient[Document](cluster.uri, maxPoolSize=4, **CLIENT_OPTIONS) as client:
            while time.monotonic() < until:
                rows: list[int] = []
                try:
                    found = client[database.name].c.find(sort=order, batch_size=2)
                    rows.extend(row["r" if sort else "_id"] for row in found)
                    outcome["complete" if rows == list(range(1000)) else "WRONG"] += 1
                except ConnectionFailure:
                    outcome["cut" if rows == list(range(len(rows))) else "WRONG"] += 1
                except PyMongoError as error:
                    outcome[type(error).__name__ + str(error)] += 1

    threads = [threading.Thread(target=read) for _ in range(20)]
    for thread in threads:
        thread.start()
    choose = random.Random(1)
    while time.monotonic() < until:
        with contextlib.suppress(ProcessLookupError):  # the view is up to a second old
            os.kill(choose.choice(list(wait_for(lambda: workers(cluster)).values())), signal.SIGKILL)
        wait_for(lambda: len(workers(cluster)) == 4)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert outcome["complete"] > 0
    assert outcome["cut"] > 0
    assert set(outcome) == {"complete", "cut"}


def test_a_cursor_survives_the_supervisor(cluster: Cluster, database: Database[Document]) -> None:
    fill(database)
    page = database.command({"find": "c", "sort": {"r": 1}, "batchSize": 10})
    ((supervisor,),) = cluster.psql("select pid from ferretdb.status where kind = 'supervisor'")
    os.kill(int(supervisor or 0), signal.SIGKILL)
    wait_for(lambda: len(workers(cluster)) == 4 and supervisor not in {row["pid"] for row in cluster.status()})
    with MongoClient[Document](cluster.uri, **CLIENT_OPTIONS) as other:
        command = {"getMore": Int64(page["cursor"]["id"]), "collection": "c", "batchSize": 2000}
        rest = other[database.name].command(command)["cursor"]
    assert [row["r"] for row in page["cursor"]["firstBatch"] + rest["nextBatch"]] == list(range(1000))
    assert rest["id"] == 0


def test_ownership_and_killing(database: Database[Document]) -> None:
    fill(database, 50)
    number = Int64(database.command({"find": "c", "sort": {"r": 1}, "batchSize": 1})["cursor"]["id"])
    with pytest.raises(OperationFailure) as elsewhere:
        database.command({"getMore": number, "collection": "other"})
    assert elsewhere.value.code == 13
    killed = database.command({"killCursors": "c", "cursors": [number, Int64(12345)]})
    assert killed["cursorsKilled"] == [number]
    assert killed["cursorsNotFound"] == [12345]
    with pytest.raises(OperationFailure) as gone:
        database.command({"getMore": number, "collection": "c"})
    assert (gone.value.code, (gone.value.details or {})["codeName"]) == (43, "CursorNotFound")


@pytest.mark.parametrize("sort", [{}, {"r": 1}])
@pytest.mark.parametrize("how", ["drop", "drop database", "rename", "replaced by rename"])
def test_a_cursor_ends_with_its_collection(
    client: MongoClient[Document], database: Database[Document], how: str, sort: Document
) -> None:
    """It must not go on in another one that is made under that name."""
    fill(database, 30)
    database.other.insert_many([{"_id": number} for number in range(30)])
    commands = [{"find": name, "batchSize": 10, "sort": sort} for name in ("c", "other")]
    cursor, another = (database.command(command)["cursor"]["id"] for command in commands)
    if how == "drop":
        database.c.drop()
    elif how == "drop database":
        client.drop_database(database.name)
    elif how == "rename":
        database.c.rename("d")
    else:
        database.new.insert_one({})
        database.new.rename("c", dropTarget=True)
    if how != "replaced by rename":
        fill(database, 30)
    for code in (175, 43):
        with pytest.raises(OperationFailure) as failure:
            database.command({"getMore": cursor, "collection": "c"})
        assert failure.value.details is not None
        name = {175: "QueryPlanKilled", 43: "CursorNotFound"}[code]
        assert (failure.value.code, failure.value.details["codeName"]) == (code, name)
    if how != "drop database":
        assert len(database.command({"getMore": another, "collection": "other"})["cursor"]["nextBatch"]) == 20


def test_idle_cursors_expire(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(**{"ferretdb.cursor_timeout": "1s"})
    with MongoClient[Document](cluster.uri, **CLIENT_OPTIONS) as client:
        fill(client.night, 50)
        numbers = [
            Int64(client.night.command({"find": "c", "batchSize": 1} | extra)["cursor"]["id"])
            for extra in ({}, {"sort": {"r": 1}})
        ]
        assert all(numbers)
        wait_for(lambda: client.admin.command("serverStatus")["metrics"]["cursor"]["open"]["total"] == 0)
        for number in numbers:
            with pytest.raises(OperationFailure) as gone:
                client.night.command({"getMore": number, "collection": "c"})
            assert gone.value.code == 43

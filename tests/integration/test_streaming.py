"""Finds in the order of _id, which the engine continues in its newer way (extension/streaming.c)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import bson
import psycopg
import pytest
from bson import Int64
from pymongo import MongoClient
from pymongo.database import Database

from dev.cluster import Cluster
from pg_ferret.engine.calls import FIND, FIND_AS_EVER, reads_by_id
from pg_ferret.engine.limits import conninfo
from tests.integration.conftest import NewCluster, configuration
from tests.integration.pools import table_of

Document = dict[str, Any]

_SETTING = "documentdb.enableDynamicCursors"
_SOME = {"_id": {"$gte": 10}}
_BY_ID: dict[str, Document] = {
    "everything": {},
    "without a condition": {"filter": {}},
    "a range": {"filter": {"_id": {"$gte": 10, "$lt": 90}}},
    "a list": {"filter": {"_id": {"$in": list(range(0, 100, 2))}}},
    "of few fields": {"filter": _SOME, "projection": {"r": 1}},
    "as drivers send it": {
        "filter": _SOME,
        "noCursorTimeout": True,
        "comment": "c",
        "lsid": {"id": bson.Binary(bytes(16), 4)},
        "$clusterTime": {"clusterTime": bson.Timestamp(1, 1), "signature": {}},
        "$readPreference": {"mode": "primary"},
    },
    "a page's size as an int64": {"batchSize": Int64(10)},
}
_OTHERS: dict[str, Document] = {
    "another condition": {"filter": {"r": {"$gte": 10}}},
    "one more": {"filter": {"_id": {"$gte": 10}, "r": {"$gte": 10}}},
    "one before": {"filter": {"r": {"$gte": 10}, "_id": {"$gte": 10}}},
    "a field whose name begins so": {"filter": {"_id.a": {"$exists": False}}},
    "alternatives": {"filter": {"$or": [{"_id": {"$gte": 10}}, {"_id": {"$lt": 5}}]}},
    "an order": {"filter": _SOME, "sort": {"_id": 1}},
    "an offset": {"filter": _SOME, "skip": 1},
    "a limit": {"filter": _SOME, "limit": 50},
    "a hint": {"filter": _SOME, "hint": {"_id": 1}},
    "a collation": {"filter": _SOME, "collation": {"locale": "de"}},
    "no documents yet": {"filter": _SOME, "batchSize": 0},
    "no documents yet, as an int64": {"filter": _SOME, "batchSize": Int64(1 << 33)},
    "a page's size as a double": {"filter": _SOME, "batchSize": 10.0},
}


@pytest.fixture
def session(cluster: Cluster) -> Iterator[psycopg.Connection]:
    """A connection as the gateway's."""
    with psycopg.connect(conninfo(configuration(cluster)), autocommit=True) as connection:
        yield connection


def first_page(session: psycopg.Connection, database: str, command: Document) -> bytes:
    """Make a find; the engine's continuation."""
    params = [database.encode(), bson.encode(command)]
    result = session.pgconn.exec_params(FIND.sql, params, None, FIND.formats, 1)
    assert result.error_message == b"", result.error_message
    continuation = result.get_value(0, 1)
    assert continuation is not None
    return continuation


@pytest.mark.parametrize("options", [pytest.param(each, id=name) for name, each in {**_BY_ID, **_OTHERS}.items()])
def test_which_finds_are_continued_so(
    session: psycopg.Connection, database: Database[Document], options: Document
) -> None:
    database.c.insert_many([{"_id": number, "r": number} for number in range(100)])
    command = {"find": "c", "batchSize": 10, "$db": database.name} | options
    continuation = first_page(session, database.name, command)
    assert ("qd" in bson.decode(continuation)) == (options in _BY_ID.values())
    assert reads_by_id(continuation)
    assert session.execute(f"show {_SETTING}").fetchone() == ("off",)


def test_another_find_in_the_same_transaction_is_continued_as_ever(
    session: psycopg.Connection, database: Database[Document]
) -> None:
    database.c.insert_many([{"_id": number, "r": number} for number in range(100)])
    by_id, other = ({"find": "c", "batchSize": 10, "filter": {name: {"$gte": 10}}} for name in ("_id", "r"))
    each = f"ferretdb.checked_find(%s) is not null, current_setting('{_SETTING}')"
    finds = tuple(bson.encode(command) for command in (by_id, by_id, other, other, by_id))
    found = session.execute(f"select {', '.join([each] * len(finds))}", finds, binary=True).fetchone()
    assert found is not None
    assert found[1::2] == ("on", "on", "off", "off", "on")
    assert session.execute(f"show {_SETTING}").fetchone() == ("off",)
    with session.transaction():
        assert "qd" not in bson.decode(first_page(session, database.name, by_id))
    assert session.execute(f"show {_SETTING}").fetchone() == ("off",)


def test_who_has_switched_it_on_keeps_it(session: psycopg.Connection, database: Database[Document]) -> None:
    database.c.insert_many([{"_id": number, "r": number} for number in range(100)])
    session.execute(f"set {_SETTING} = on")
    for name in ("_id", "r", "_id"):
        command = {"find": "c", "batchSize": 10, "filter": {name: {"$gte": 10}}}
        assert "qd" in bson.decode(first_page(session, database.name, command))
        assert session.execute(f"show {_SETTING}").fetchone() == ("on",)


def made_again(cluster: Cluster) -> bool:
    """Whether a find has been made a second time by any of the gateway's connections, as the last thing there."""
    asked = FIND_AS_EVER.sql.decode().replace("'", "''")
    sql = f"select pid from pg_stat_activity where application_name = 'pg_ferret' and query = '{asked}'"
    return cluster.psql(sql) != []


@pytest.mark.parametrize("read", ["c", "simple", "indexed"])
@pytest.mark.parametrize("index", ["r", "$**"])
def test_what_is_not_read_in_the_order_of_its_id_is_continued_as_ever(
    new_cluster: NewCluster, read: str, index: str
) -> None:
    """A view's own condition, or a wildcard index: the command does not tell."""
    cluster = new_cluster(autovacuum="off")
    with MongoClient[Document](cluster.uri) as client:
        database = client.streaming
        database.c.insert_many([{"_id": number, "r": number} for number in range(1000)])
        database.c.create_index({index: 1})
        database.create_collection("simple", viewOn="c", pipeline=[{"$addFields": {"s": 1}}])
        database.create_collection("indexed", viewOn="c", pipeline=[{"$match": {"r": {"$gte": 100}}}])
        for _ in range(2):  # the second time it is known
            cursor = database[read].find({"_id": {"$gte": 200}}, batch_size=50)
            first = next(cursor)
            assert made_again(cluster) == (read == "indexed" or (read, index) == ("c", "$**"))
            assert sorted(row["_id"] for row in [first, *cursor]) == list(range(200, 1000))


@pytest.mark.parametrize("filtered", [{}, {"_id": {"$gte": 0}}], ids=["everything", "a range"])
def test_indexes_that_are_made_meanwhile_change_nothing(
    cluster: Cluster, database: Database[Document], filtered: Document
) -> None:
    database.c.insert_many([{"_id": number, "r": number % 7} for number in range(1000)])
    cursor = database.c.find(filtered, batch_size=50)
    found = [next(cursor)["_id"] for _ in range(60)]
    for keys in ({"_id": 1, "r": 1}, {"_id": -1, "r": 1}, {"r": 1}, {"$**": 1}):
        database.c.create_index(keys)
        found += [next(cursor)["_id"] for _ in range(60)]
    cluster.psql(f"analyze {table_of(cluster, 'c', database.name)}")
    assert found + [row["_id"] for row in cursor] == list(range(1000))


@pytest.mark.parametrize("filtered", [{}, {"_id": {"$gte": -1}}], ids=["everything", "a range"])
@pytest.mark.parametrize("seed", range(3))
def test_writes_meanwhile_make_a_cursor_neither_miss_nor_repeat_others(
    database: Database[Document], filtered: Document, seed: int
) -> None:
    chance = random.Random(seed)
    database.c.insert_many([{"_id": number * 10, "s": "x" * chance.randrange(400)} for number in range(500)])
    throughout = {number * 10 for number in range(500)}
    added: set[int] = set()
    found: list[int] = []
    page = database.command({"find": "c", "filter": filtered, "batchSize": 7})["cursor"]
    while True:
        found += [row["_id"] for row in page.get("firstBatch", page.get("nextBatch"))]
        if not page["id"]:
            break
        # The engine goes on with the document behind the last one; growing, it moves to another place.
        near = range(found[-1] + 10, found[-1] + 60, 10)
        for number in [*near, chance.randrange(500) * 10]:
            database.c.update_one({"_id": number}, {"$set": {"s": "y" * chance.randrange(2000)}})
        gone = {chance.choice(near), chance.randrange(500) * 10}
        database.c.delete_many({"_id": {"$in": list(gone)}})
        throughout -= gone
        new = {found[-1] + 1, found[-1] + 11, chance.randrange(5000) * 10 + 5} - added
        database.c.insert_many([{"_id": number} for number in new])
        added |= new
        page = database.command({"getMore": Int64(page["id"]), "collection": "c", "batchSize": chance.randrange(1, 20)})
        page = page["cursor"]
    assert found == sorted(found)
    assert [number for number, times in Counter(found).items() if times > 1] == []
    assert throughout - set(found) == set()

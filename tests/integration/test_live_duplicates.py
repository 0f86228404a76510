"""Duplicate keys: what clients are told of them, and what they are not to hear of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from bson import encode
from pymongo import MongoClient
from pymongo.database import Database
from pymongo.errors import DuplicateKeyError, OperationFailure

from dev.cluster import Cluster
from pg_ferret.engine.limits import conninfo
from tests.integration.conftest import configuration
from tests.integration.pools import active
from tests.turns import wait_until

Document = dict[str, Any]
_ABSENT = object()


def details_of(write: Callable[[], object]) -> Document:
    """What a client is told when this fails."""
    with pytest.raises(DuplicateKeyError) as failure:
        write()
    assert failure.value.details is not None
    return dict(failure.value.details)


@pytest.mark.parametrize(
    ("query", "change", "value"),
    [
        ({"key": "a", "n": 7}, {"$inc": {"n": 1}}, "a"),
        ({"$and": [{"key": {"$eq": "a"}}, {"n": 7}]}, {"$inc": {"n": 1}}, "a"),
        ({"_id": 9}, {"$set": {"key": "a"}}, "a"),
        ({"_id": 4}, {"$inc": {"key": 1}}, _ABSENT),
        ({"_id": 5}, {"$rename": {"other": "key"}}, _ABSENT),
        ({"_id": 5}, [{"$set": {"key": {"$concat": ["a"]}}}], _ABSENT),
    ],
)
def test_an_update_names_no_value_that_it_does_not_know(
    database: Database[Document], query: Document, change: Any, value: object
) -> None:
    database.c.create_index("key", unique=True)
    database.c.insert_many([{"_id": 1, "key": "a"}, {"_id": 3, "key": 5}, {"_id": 4, "key": 4}])
    database.c.insert_one({"_id": 5, "key": "z", "other": "a"})
    text = f"E11000 duplicate key error collection: {database.name}.c index: key_1"
    for details in (
        details_of(lambda: database.c.update_one(query, change, upsert=True)),
        details_of(lambda: database.c.find_one_and_update(query, change, upsert=True)),
    ):
        assert details["keyPattern"] == {"key": 1}
        assert details.get("keyValue", {}).get("key", _ABSENT) == value
        assert details["errmsg"] == (text if value is _ABSENT else f'{text} dup key: {{ key: "{value}" }}')


def test_an_array_s_duplicate_is_named_if_there_is_no_choice(database: Database[Document]) -> None:
    database.c.create_index("a", unique=True)
    database.c.insert_one({"a": [1, 2]})
    assert details_of(lambda: database.c.insert_one({"a": [2]}))["keyValue"] == {"a": 2}
    assert "keyValue" not in details_of(lambda: database.c.insert_one({"a": [2, 3]}))


def test_an_index_that_cannot_be_unique_is_refused_with_its_pattern(database: Database[Document]) -> None:
    database.c.insert_many([{"a": 1}, {"a": 1}])
    with pytest.raises(OperationFailure) as failure:
        database.c.create_index([("b", 1), ("a", -1)], unique=True)
    assert failure.value.code == 11000
    assert failure.value.details is not None
    assert failure.value.details["keyPattern"] == {"b": 1, "a": -1}


@asynccontextmanager
async def stored_by_another(cluster: Cluster, database: Database[Document]) -> AsyncIterator[psycopg.AsyncConnection]:
    """A document with key ``k`` that nobody sees until its transaction is committed."""
    database.c.create_index("key", unique=True)
    spec = encode({"insert": "c", "documents": [{"_id": 1, "key": "k", "n": 10}]})
    async with await psycopg.AsyncConnection.connect(conninfo(configuration(cluster))) as other:
        await other.execute("select documentdb_api.insert(%s, %b, null, null)", [database.name, spec])
        yield other


async def while_another_stores(cluster: Cluster, database: Database[Document], write: Callable[[], Any]) -> Any:
    """The result of a write that waits for `stored_by_another`."""
    async with stored_by_another(cluster, database) as other:
        task = asyncio.create_task(asyncio.to_thread(write))
        await wait_until(lambda: active(cluster))
        await other.commit()
        return await task


@pytest.mark.parametrize("change", [{"$inc": {"n": 1}}, {"$set": {"key": "k"}, "$inc": {"n": 1}}])
async def test_an_upsert_that_lost_a_race_finds_the_document(
    cluster: Cluster, database: Database[Document], change: Document
) -> None:
    result = await while_another_stores(
        cluster, database, lambda: database.c.update_one({"key": "k"}, change, upsert=True)
    )
    assert (result.matched_count, result.modified_count, result.upserted_id) == (1, 1, None)
    assert list(database.c.find()) == [{"_id": 1, "key": "k", "n": 11}]


@pytest.mark.parametrize("ordered", [True, False])
async def test_an_upsert_among_others_that_lost_a_race_finds_the_document(
    cluster: Cluster, database: Database[Document], ordered: bool
) -> None:
    """This one the engine makes again by itself."""
    updates = [
        {"q": {"key": key}, "u": {"$inc": {"n": 1}, "$setOnInsert": {"_id": key}}, "upsert": True}
        for key in ("a", "k", "z")
    ]
    command = {"update": "c", "updates": updates, "ordered": ordered}
    reply = await while_another_stores(cluster, database, lambda: database.command(command))
    assert (reply["n"], reply["nModified"]) == (3, 1)
    assert reply["upserted"] == [{"index": 0, "_id": "a"}, {"index": 2, "_id": "z"}]
    assert [row["n"] for row in database.c.find(sort=[("key", 1)])] == [1, 11, 1]


async def test_a_find_and_modify_that_lost_a_race_finds_the_document(
    cluster: Cluster, database: Database[Document]
) -> None:
    found = await while_another_stores(
        cluster, database, lambda: database.c.find_one_and_update({"key": "k"}, {"$inc": {"n": 1}}, upsert=True)
    )
    assert found == {"_id": 1, "key": "k", "n": 10}
    assert database.c.count_documents({}) == 1


async def test_what_lost_a_race_and_fails_all_the_same_is_told_once(
    cluster: Cluster, database: Database[Document]
) -> None:
    """The document that is there now has no room for the change."""
    command = {"update": "c", "updates": [{"q": {"key": "k"}, "u": {"$push": {"n": 1}}, "upsert": True}]}
    reply = await while_another_stores(cluster, database, lambda: database.command(command))
    assert [(error["index"], error["code"]) for error in reply["writeErrors"]] == [(0, 2)]
    assert "upserted" not in reply


@pytest.mark.parametrize("partial", [True, False])
def test_an_upsert_that_collides_with_another_document_is_refused(database: Database[Document], partial: bool) -> None:
    options: Document = {"partialFilterExpression": {"active": True}} if partial else {}
    database.c.create_index("key", unique=True, **options)
    database.c.insert_many([{"key": "a", "active": True, "n": 1}, {"_id": 5, "key": "a" if partial else "b"}])
    query = {"_id": 5} if partial else {"key": "a", "n": 2}
    details = details_of(lambda: database.c.update_one(query, {"$set": {"active": True}}, upsert=True))
    assert details.get("keyValue") == (None if partial else {"key": "a"})


def test_what_an_aggregation_cannot_write_is_told_as_of_its_target(database: Database[Document]) -> None:
    database.target.create_index("u", unique=True)
    database.target.insert_one({"u": 5})
    database.c.insert_one({"u": 5})
    for stage in ({"$merge": "target"}, {"$merge": {"into": {"db": database.name, "coll": "target"}}}):
        with pytest.raises(OperationFailure) as failure:
            database.c.aggregate([stage])
        assert failure.value.code == 11000
        assert failure.value.details is not None
        assert failure.value.details["errmsg"].endswith(
            f"E11000 duplicate key error collection: {database.name}.target index: u_1"
        )
        assert failure.value.details["keyPattern"] == {"u": 1}


def test_many_who_upsert_the_same_few_keys_all_succeed(client: MongoClient[Document], database_name: str) -> None:
    collection = client[database_name].c
    collection.create_index("key", unique=True)

    async def upsert_all() -> None:
        calls = (
            asyncio.to_thread(collection.update_one, {"key": number % 3}, {"$inc": {"n": 1}}, upsert=True)
            for number in range(60)
        )
        await asyncio.gather(*calls)

    asyncio.run(upsert_all())
    assert sum(row["n"] for row in collection.find()) == 60

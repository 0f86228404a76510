"""Commands and errors through PyMongo, as an application meets them."""

from __future__ import annotations

import time
from typing import Any

import pytest
from bson import Int64, encode
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.datetime_ms import DatetimeMS
from bson.raw_bson import RawBSONDocument
from pymongo import MongoClient, UpdateOne
from pymongo.database import Database
from pymongo.errors import BulkWriteError, DuplicateKeyError, OperationFailure

from dev.cluster import Cluster, wait_for
from tests.integration.conftest import CLIENT_OPTIONS

Document = dict[str, Any]


def code_of(database: Database[Document], command: dict[str, Any]) -> int | None:
    """The error code that a command is answered with."""
    with pytest.raises(OperationFailure) as failure:
        database.command(command)
    return failure.value.code


def test_documents_are_written_changed_counted_and_deleted(database: Database[Document]) -> None:
    things = database.things
    assert things.insert_many([{"_id": number, "n": number % 3} for number in range(9)]).inserted_ids == list(range(9))
    assert things.update_one({"_id": 1}, {"$set": {"n": 7}}).modified_count == 1
    assert things.update_many({"n": 0}, {"$inc": {"n": 10}}).modified_count == 3
    assert things.replace_one({"_id": 100}, {"n": 100}, upsert=True).upserted_id == 100
    assert things.find_one_and_update({"_id": 2}, {"$set": {"n": 20}}) == {"_id": 2, "n": 2}
    assert things.find_one_and_delete({"_id": 2}) == {"_id": 2, "n": 20}
    nothing_new = database.command({"findAndModify": "things", "query": {"_id": 1}, "update": {"$set": {"n": 7}}})
    assert nothing_new["lastErrorObject"] == {"n": 1, "updatedExisting": True}
    assert things.delete_many({"n": 10}).deleted_count == 3
    assert things.count_documents({}) == 6
    wait_for(lambda: things.estimated_document_count() == 6, what="PostgreSQL's statistics")
    assert sorted(things.distinct("n")) == [1, 2, 7, 100]
    done = things.bulk_write([UpdateOne({"_id": 4}, {"$set": {"x": 1}}), UpdateOne({"_id": 7}, {"$set": {"x": 1}})])
    assert done.modified_count == 2


def test_a_pipeline_groups_and_sorts(database: Database[Document]) -> None:
    database.sales.insert_many([{"item": "ab"[number % 2], "amount": number} for number in range(10)])
    pipeline: list[Document] = [{"$group": {"_id": "$item", "sum": {"$sum": "$amount"}}}, {"$sort": {"_id": 1}}]
    assert list(database.sales.aggregate(pipeline, batchSize=1)) == [{"_id": "a", "sum": 20}, {"_id": "b", "sum": 25}]


def test_indexes_are_built_at_once(database: Database[Document]) -> None:
    database.c.insert_many([{"a": number, "b": 1} for number in range(100)])
    started = time.monotonic()
    assert database.c.create_index("a", unique=True) == "a_1"
    assert time.monotonic() - started < 2
    assert database.c.index_information()["a_1"] == {"v": 2, "key": [("a", 1)], "unique": True}
    with pytest.raises(OperationFailure) as failure:
        database.c.create_index("b", unique=True)
    assert failure.value.code == 11000
    database.c.drop_index("a_1")
    assert list(database.c.index_information()) == ["_id_"]
    assert code_of(database, {"dropIndexes": "c", "index": "nothing_1"}) == 27


def test_collections_and_views(client: MongoClient[Document], database: Database[Document]) -> None:
    database.create_collection("c")
    database.c.insert_many([{"a": 1}, {"a": 2}])
    database.create_collection("v", viewOn="c", pipeline=[{"$match": {"a": 2}}])
    assert database.v.count_documents({}) == 1
    assert sorted(database.list_collection_names()) == ["c", "v"]
    assert database.command("collMod", "c")["ok"] == 1.0
    assert database.name in client.list_database_names()
    assert database.command("collStats", "c")["count"] == 2
    assert database.command("dbStats")["collections"] == 1
    assert database.command("dataSize", f"{database.name}.c")["numObjects"] == 2
    assert database.command("validate", "c")["valid"] is True
    database.c.rename("d")
    assert database.d.count_documents({}) == 2
    assert database.command("drop", "d") == {"nIndexesWas": 1, "ns": f"{database.name}.d", "ok": 1.0}
    assert database.command("drop", "d") == {"ok": 1.0}
    assert database.command("dropDatabase") == {"dropped": database.name, "ok": 1.0}


def test_the_server_describes_itself(client: MongoClient[Document]) -> None:
    hello = client.admin.command("hello")
    assert (hello["isWritablePrimary"], hello["maxWriteBatchSize"], hello["readOnly"]) == (True, 25_000, False)
    commands = client.admin.command("listCommands")["commands"]
    for name in ("buildInfo", "whatsmyuri", "connectionStatus", "hostInfo", "getCmdLineOpts", "serverStatus"):
        assert name in commands
        assert client.admin.command(name)["ok"] == 1.0
    assert client.admin.command({"getParameter": 1, "featureCompatibilityVersion": 1})["ok"] == 1.0
    assert client.admin.command({"getLog": "*"})["names"] == ["global", "startupWarnings"]
    assert client.admin.command("serverStatus")["connections"]["current"] >= 1


def test_sessions(client: MongoClient[Document], database: Database[Document]) -> None:
    assert database.command("startSession")["timeoutMinutes"] == 30
    with client.start_session() as session:
        database.c.insert_many([{} for _ in range(10)], session=session)
        page = database.command({"find": "c", "batchSize": 2}, session=session)
        assert session.session_id is not None
        assert database.command({"refreshSessions": [session.session_id]})["ok"] == 1.0
        assert database.command({"endSessions": [session.session_id]})["ok"] == 1.0
    assert code_of(database, {"getMore": Int64(page["cursor"]["id"]), "collection": "c"}) == 43


def test_refusals(client: MongoClient[Document], database: Database[Document]) -> None:
    assert code_of(database, {"nonsense": 1}) == 59
    assert code_of(database, {"explain": {"find": "c"}}) == 238
    assert code_of(database, {"find": "c", "unknownField": 1}) == 40415
    assert code_of(database, {"find": "c", "tailable": True}) == 2
    assert code_of(database, {"find": "c", "min": {"_id": 1}, "hint": {"_id": 1}}) == 115
    assert database.command({"find": "c", "min": {}, "max": {}})["ok"] == 1.0
    for field in ("sort", "collation", "hint"):
        assert database.command({"find": "c", field: {}})["ok"] == 1.0
    assert database.command({"aggregate": "c", "pipeline": [], "cursor": {}, "collation": {}})["ok"] == 1.0
    assert (
        database.command({"findAndModify": "c", "query": {}, "remove": True, "collation": {}, "sort": {}})["ok"] == 1.0
    )
    assert code_of(database, {"listDatabases": 1}) == 13
    with client.start_session() as session, pytest.raises(OperationFailure) as failure, session.start_transaction():
        database.c.insert_one({"_id": 1}, session=session)
    assert failure.value.code == 20
    assert database.c.count_documents({}) == 0


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"writeConcern": {"w": 1}}, None),
        ({"writeConcern": {"w": "majority", "j": True, "wtimeout": 1000}}, None),
        ({"writeConcern": {"w": 2}}, 2),
        ({"writeConcern": {"w": "tag"}}, 2),
        ({"writeConcern": {"w": -1}}, 9),
        ({"writeConcern": {"w": 51}}, 9),
        ({"writeConcern": 1}, 14),
        ({"readConcern": {"level": "majority"}}, None),
        ({"readConcern": {}}, None),
        ({"readConcern": {"level": "linearizable"}}, 123),
        ({"readConcern": {"level": "snapshot"}}, 123),
        ({"readConcern": {"level": "nonsense"}}, 2),
        ({"readConcern": {"level": 1}}, 14),
    ],
)
def test_what_a_single_server_cannot_promise_is_refused(
    database: Database[Document], options: Document, code: int | None
) -> None:
    command: Document = (
        {"find": "c"} if "readConcern" in options else {"insert": "c", "documents": [{"x": 1}]}
    ) | options
    for _ in range(2):  # the second one is known by its shape
        if code is None:
            assert database.command(command)["ok"] == 1.0
        else:
            assert code_of(database, command) == code
    assert database.c.count_documents({}) == (2 if "insert" in command and code is None else 0)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ({"ping": 1, "apiVersion": "1", "apiStrict": True}, None),
        ({"find": "c", "apiVersion": "1"}, None),
        ({"find": "c", "apiVersion": "2"}, 322),
        ({"find": "c", "apiVersion": 1}, 322),
        ({"find": "c", "apiStrict": True}, 4886600),
        ({"find": "c", "apiDeprecationErrors": False}, 4886600),
        ({"find": "c", "apiVersion": "1", "apiStrict": 0}, 14),
        ({"distinct": "c", "key": "x", "apiVersion": "1"}, None),
        ({"distinct": "c", "key": "x", "apiVersion": "1", "apiStrict": False}, None),
        ({"distinct": "c", "key": "x", "apiVersion": "1", "apiStrict": True}, 323),
    ],
)
def test_the_stable_api_is_kept(database: Database[Document], command: Document, code: int | None) -> None:
    for _ in range(2):
        if code is None:
            assert database.command(command)["ok"] == 1.0
        else:
            assert code_of(database, command) == code


def test_a_pipeline_that_would_write_nothing_is_refused(
    client: MongoClient[Document], database: Database[Document]
) -> None:
    with pytest.raises(OperationFailure) as failure:
        database.aggregate([{"$documents": [{"_id": 1}]}, {"$merge": "c"}])
    assert failure.value.code == 115
    database.aggregate([{"$documents": [{"_id": 1}]}, {"$out": "c"}])
    assert list(database.c.find()) == [{"_id": 1}]
    names = client.list_database_names()
    assert names == sorted(names)
    assert database.name in names


def test_a_concern_is_looked_at_though_another_of_its_length_was_kept(database: Database[Document]) -> None:
    for w, code in ((1, None), (2, 2), (1, None)):
        command = {"insert": "c", "documents": [{"x": 1}], "writeConcern": {"w": w}}
        if code is None:
            database.command(command)
        else:
            assert code_of(database, command) == code
    assert database.c.count_documents({}) == 2


def test_who_brings_a_password_is_told_that_there_are_none(cluster: Cluster) -> None:
    uri = cluster.uri.replace("mongodb://", "mongodb://user:secret@")
    with MongoClient[Document](uri, **CLIENT_OPTIONS) as client, pytest.raises(OperationFailure) as failure:
        client.test.command("ping")
    assert "no authentication yet" in str(failure.value)


def test_duplicate_keys_are_told_as_mongodb_tells_them(database: Database[Document]) -> None:
    database.c.create_index([("a.b", 1)], unique=True)
    database.c.insert_one({"_id": 1, "a": {"b": "x"}})
    with pytest.raises(DuplicateKeyError) as by_id:
        database.c.insert_one({"_id": 1})
    assert by_id.value.details is not None
    assert (by_id.value.details["keyPattern"], by_id.value.details["keyValue"]) == ({"_id": 1}, {"_id": 1})
    with pytest.raises(DuplicateKeyError) as by_index:
        database.c.insert_one({"_id": 2, "a": {"b": "x"}})
    assert by_index.value.details is not None
    assert by_index.value.details["keyValue"] == {"a.b": "x"}
    expected = f'E11000 duplicate key error collection: {database.name}.c index: a.b_1 dup key: {{ a.b: "x" }}'
    assert by_index.value.details["errmsg"] == expected
    with pytest.raises(DuplicateKeyError) as modified:
        database.c.find_one_and_update({"_id": 3}, {"$set": {"a.b": "x"}}, upsert=True)
    assert modified.value.details is not None
    assert modified.value.details["keyPattern"] == {"a.b": 1}


@pytest.mark.parametrize(("ordered", "stored"), [(True, 1), (False, 3)])
def test_write_errors_name_their_statements(database: Database[Document], ordered: bool, stored: int) -> None:
    documents: list[Document] = [{"_id": 1}, {"_id": 1}, {"_id": 2}, {"_id": 2}, {"_id": 3}]
    with pytest.raises(BulkWriteError) as failure:
        database.c.insert_many(documents, ordered=ordered)
    assert [error["index"] for error in failure.value.details["writeErrors"]] == ([1] if ordered else [1, 3])
    assert {error["code"] for error in failure.value.details["writeErrors"]} == {11000}
    assert database.c.count_documents({}) == stored


def test_limits(database: Database[Document]) -> None:
    assert len(database.many.insert_many([{"_id": number} for number in range(25_001)]).inserted_ids) == 25_001
    large = {"_id": 1, "x": "y" * (16 * 1024 * 1024 - 100)}
    database.large.insert_one(large)
    assert database.large.find_one() == large
    with pytest.raises(OperationFailure) as failure:
        database.large.insert_one({"x": "y" * (16 * 1024 * 1024)})
    assert failure.value.code == 10334


def test_a_long_batch_of_duplicates_stops_nobody(client: MongoClient[Document], database: Database[Document]) -> None:
    """What every import does that is run twice."""
    documents = [{"_id": number} for number in range(20_000)]
    database.c.insert_many(documents)
    started = time.monotonic()
    with pytest.raises(BulkWriteError) as failure:
        database.c.insert_many(documents, ordered=False)
    # Quadratic, it was twenty seconds.
    assert time.monotonic() - started < 8
    errors = (failure.value.details or {})["writeErrors"]
    assert len(errors) == len(documents)
    assert {error["code"] for error in errors} == {11000}
    assert (errors[1]["index"], errors[1]["keyValue"], errors[1]["keyPattern"]) == (1, {"_id": 1}, {"_id": 1})
    # As MongoDB does, a megabyte of explanations is enough.
    assert errors[-1]["errmsg"] == ""


def test_what_clients_store_keeps_no_reply_from_others(client: MongoClient[Document], database_name: str) -> None:
    """Dates beyond Python's, and documents that look like references."""
    options: Any = CodecOptions(datetime_conversion=DatetimeConversion.DATETIME_AUTO)
    database = client.get_database(database_name, codec_options=options)
    far = DatetimeMS(2**60)
    documents = [{"_id": 1, "d": far}, {"_id": 2, "d": {"$ref": 5, "$id": 1}}]
    database.c.insert_many(documents)
    with pytest.raises(BulkWriteError) as failure:
        database.c.insert_many([*documents, {"_id": 3}], ordered=False)
    details = failure.value.details or {}
    assert (details["nInserted"], [error["code"] for error in details["writeErrors"]]) == (1, [11000, 11000])
    database.c.create_index("a", partialFilterExpression={"d": {"$gt": far}})
    indexes = database.command("listIndexes", "c", codec_options=options)["cursor"]["firstBatch"]
    assert [index["name"] for index in indexes] == ["_id_", "a_1"]
    database.c.drop()
    assert database.list_collection_names() == []


@pytest.mark.parametrize(
    "command",
    [
        {"drop": "c\0x"},
        {"collStats": "c\0x"},
        {"dataSize": "d.c\0x"},
        {"count": "x" * 256},
        {"count": "c\0x"},
        {"count": ""},
        {"distinct": "c\0x", "key": "_id"},
        {"distinct": 1, "key": "_id"},
        {"aggregate": "", "pipeline": [], "cursor": {}},
    ],
)
def test_names_that_mean_another_collection_are_refused(database: Database[Document], command: Document) -> None:
    database.c.insert_one({})
    assert code_of(database, command) == 73
    assert database.c.count_documents({}) == 1


# It looks at every character.
_SLOW = {"s": {"$regex": "x.*y"}}


@pytest.mark.parametrize(
    "command",
    [
        {"find": "c", "filter": _SLOW},
        {"count": "c", "query": _SLOW},
        {"distinct": "c", "key": "_id", "query": _SLOW},
        {"aggregate": "c", "pipeline": [{"$match": _SLOW}], "cursor": {}},
    ],
)
def test_a_time_limit_ends_reads_of_every_kind(database: Database[Document], command: Document) -> None:
    database.c.insert_many([{"_id": number, "s": "x" * 1000} for number in range(10_000)])
    assert database.command(command)["ok"] == 1.0
    assert code_of(database, command | {"maxTimeMS": 1}) == 50


@pytest.mark.parametrize(
    "command",
    [
        {"ping": 1},
        {"find": "c"},
        {"find": "c", "filter": {"_id": 1}, "limit": 1, "singleBatch": True},
        {"insert": "c", "documents": [{}]},
        {"aggregate": "c", "pipeline": [], "cursor": {}},
        {"count": "c"},
        {"create": "d"},
    ],
)
def test_a_time_limit_that_is_none_is_refused(database: Database[Document], command: Document) -> None:
    assert database.command(command | {"maxTimeMS": 0})["ok"] == 1.0
    for limit in (-1, 2**31, Int64(-1), 1.5, "1", None):
        assert code_of(database, command | {"maxTimeMS": limit}) == 2
        database.drop_collection("d")
        assert database.command(command | {"maxTimeMS": 2**31 - 1})["ok"] == 1.0
        database.drop_collection("d")


def test_requests_of_one_shape_keep_their_collections_apart(database: Database[Document]) -> None:
    """The gateway looks closely at the first of them only."""
    for name in ("abc", "abd", "abe"):
        database[name].insert_many([{"_id": number, "from": name} for number in range(5)])
    for _ in range(3):
        for name in ("abc", "abd", "abe"):
            assert database[name].find_one({"_id": 1}) == {"_id": 1, "from": name}
            assert {document["from"] for document in database[name].find({}, batch_size=2)} == {name}
        assert code_of(database, {"find": "a\0c", "filter": {"_id": 1}, "limit": 1, "singleBatch": True}) == 73
    opened = database.command("find", "abc", batchSize=1)["cursor"]["id"]
    assert code_of(database, {"getMore": Int64(opened), "collection": "abd"}) == 13
    assert code_of(database, {"getMore": Int64(opened), "collection": "a\0c"}) == 73
    assert database.command("getMore", Int64(opened), collection="abc")["cursor"]["nextBatch"][0]["_id"] == 1


def test_text_that_is_not_utf8_reaches_no_engine(database: Database[Document]) -> None:
    """The engine would repeat it in an error message and take PostgreSQL down with it."""
    broken = RawBSONDocument(encode({"$size": ["XX"]}).replace(b"XX", b"\xff\xfe"))
    for command in (
        {"find": "c", "filter": {"b": broken}},
        {"delete": "c", "deletes": [{"q": {"b": broken}, "limit": 1}]},
    ):
        assert code_of(database, command) == 22

"""What a statement alone tells of the document that it was to store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from bson import Regex, encode
from bson.raw_bson import RawBSONDocument

from pg_ferret.commands.documents import OPTIONS
from pg_ferret.commands.statements import UNKNOWN, Index, Statement

Document = dict[str, Any]
KEY = {"key": 1}
BOTH = {"a": 1, "b.c": -1}


def raw(document: Mapping[str, Any]) -> RawBSONDocument:
    """As handlers see it."""
    return RawBSONDocument(encode(document), OPTIONS)


def update(query: Document, change: Any, **more: Any) -> Statement:
    return Statement.of_update(raw({"q": query, "u": change, **more}))


@pytest.mark.parametrize(
    ("document", "pattern", "values"),
    [
        ({"key": "x"}, KEY, {"key": "x"}),
        ({}, KEY, {"key": None}),
        ({"key": ["x"]}, KEY, {"key": "x"}),
        ({"key": ["x", "y"]}, KEY, {"key": UNKNOWN}),
        ({"key": []}, KEY, {"key": UNKNOWN}),
        ({"a": 1, "b": {"c": 2}}, BOTH, {"a": 1, "b.c": 2}),
        ({"a": 1, "b": 3}, BOTH, {"a": 1, "b.c": None}),
        ({"a": 1, "b": [{"c": 2}]}, BOTH, {"a": 1, "b.c": UNKNOWN}),
    ],
)
def test_a_document_to_insert_tells_all_but_which_item_of_an_array(
    document: Document, pattern: Document, values: Document
) -> None:
    assert Statement(raw(document)).values(Index("i", pattern)) == values


@pytest.mark.parametrize(
    ("statement", "pattern", "values"),
    [
        (update({"_id": 1}, {"$set": {"key": "x"}}), KEY, {"key": "x"}),
        (update({"_id": 1}, {"$set": {"b.c": 2}, "$inc": {"n": 1}}), {"b.c": 1}, {"b.c": 2}),
        (update({"_id": 1}, {"$set": {"b": {"c": 2}}}), {"b.c": 1}, {"b.c": 2}),
        (update({"_id": 1}, {"$set": {"b": 2}}), {"b.c": 1}, {"b.c": UNKNOWN}),
        (update({"_id": 1}, {"$set": {"b.c": 2}}), {"b": 1}, {"b": UNKNOWN}),
        (update({"_id": 1}, {"$inc": {"key": 1}}), KEY, {"key": UNKNOWN}),
        (update({"_id": 1}, {"$rename": {"other": "key"}}), KEY, {"key": UNKNOWN}),
        (update({"_id": 1}, {"$set": {"items.$[one].key": 1}}), {"items.key": 1}, {"items.key": UNKNOWN}),
        (update({"_id": 1}, {"$push": {"key": 1}}), KEY, {"key": UNKNOWN}),
        (update({"_id": 1}, [{"$set": {"key": "x"}}]), KEY, {"key": UNKNOWN}),
        # Of a document that is there, the filter tells the _id: another field could be an array that has the value.
        (update({"a": 1}, {"$set": {"b.c": 2}}), BOTH, {"a": UNKNOWN, "b.c": 2}),
        (update({"_id": 1}, {"$set": {"b.c": 2}}), {"_id": 1, "b.c": 1}, {"_id": 1, "b.c": 2}),
        (update({"_id": 1}, {"$set": {"items.0.key": 6}}, upsert=True), {"items.key": 1}, {"items.key": UNKNOWN}),
        (update({"_id": 1}, {"$setOnInsert": {"a": 1}, "$set": {"b.c": 2}}), BOTH, {"a": UNKNOWN, "b.c": 2}),
        (
            update({"_id": 1}, {"$setOnInsert": {"a": 1}, "$set": {"b.c": 2}}, upsert=True),
            BOTH,
            {"a": UNKNOWN, "b.c": 2},
        ),
        (update({"_id": 1}, {"$set": {"b.c": 2}}), BOTH, {"a": UNKNOWN, "b.c": 2}),
        (update({"_id": 1}, {"$set": {"b.c": 2}}, upsert=True), BOTH, {"a": UNKNOWN, "b.c": 2}),
        # What changes nothing of the index can only have failed as a new document.
        (update({"key": "x", "n": 1}, {"$inc": {"n": 1}}, upsert=True), KEY, {"key": "x"}),
        (update({"key": {"$eq": "x"}}, {"$inc": {"n": 1}}, upsert=True), KEY, {"key": "x"}),
        (update({"$and": [{"key": "x"}, {"n": 1}]}, {"$inc": {"n": 1}}, upsert=True), KEY, {"key": "x"}),
        (update({"_id": 1}, {"$inc": {"n": 1}}, upsert=True), KEY, {"key": None}),
        (update({"key": {"$gt": 1}}, {"$inc": {"n": 1}}, upsert=True), KEY, {"key": UNKNOWN}),
        (update({"$or": [{"key": "x"}]}, {"$inc": {"n": 1}}, upsert=True), KEY, {"key": UNKNOWN}),
        (update({"_id": 1}, {"$setOnInsert": {"key": "x"}}, upsert=True), KEY, {"key": "x"}),
        (update({"_id": 1}, {"key": "x"}), KEY, {"key": "x"}),
        (update({"_id": 1}, {"key": "x"}, upsert=True), {"_id": 1}, {"_id": 1}),
        (update({"n": 1}, {"key": "x"}), {"_id": 1}, {"_id": UNKNOWN}),
    ],
)
def test_a_change_tells_what_it_sets_and_what_it_looked_for(
    statement: Statement, pattern: Document, values: Document
) -> None:
    assert statement.values(Index("i", pattern)) == values


@pytest.mark.parametrize(
    ("statement", "pattern", "raced"),
    [
        (update({"key": "x"}, {"$inc": {"n": 1}}, upsert=True), KEY, True),
        (update({"key": "x"}, {"$set": {"key": "x", "n": 1}}, upsert=True), KEY, True),
        (update({"key": "x"}, {"key": "x", "n": 1}, upsert=True), KEY, True),
        (update({"$and": [{"a": 1}, {"b.c": {"$eq": 2}}]}, {"$inc": {"n": 1}}, upsert=True), BOTH, True),
        (update({"key": "x", "$comment": "y"}, {"$inc": {"n": 1}}, upsert=True), KEY, True),
        (update({"key": "x"}, {"$setOnInsert": {"n": 1}}, upsert=True), KEY, True),
        (update({"key": 1}, {"$set": {"key": True}}, upsert=True), KEY, False),
        # It would fail again: another document has the key.
        (update({"key": "x", "n": 1}, {"$inc": {"n": 1}}, upsert=True), KEY, False),
        (update({"key": "x", "n": {"$gt": 1}}, {"$inc": {"n": 1}}, upsert=True), KEY, False),
        (update({"key": "x"}, {"$set": {"key": "y"}}, upsert=True), KEY, False),
        (update({"key": "x"}, {"key": "y"}, upsert=True), KEY, False),
        (update({"_id": 1}, {"$set": {"key": "x"}}, upsert=True), KEY, False),
        (update({"a": 1}, {"$inc": {"n": 1}}, upsert=True), BOTH, False),
        (update({"key": Regex("x")}, {"$inc": {"n": 1}}, upsert=True), KEY, False),
        (update({"$or": [{"key": "x"}]}, {"$inc": {"n": 1}}, upsert=True), KEY, False),
        (update({"$and": [{"key": "x"}, {"key": "y"}]}, {"$inc": {"n": 1}}, upsert=True), KEY, False),
    ],
)
def test_an_upsert_has_raced_if_it_looked_for_the_very_key(
    statement: Statement, pattern: Document, raced: bool
) -> None:
    assert statement.raced(Index("i", pattern)) == raced


def test_a_document_may_also_come_into_a_partial_index_by_another_field() -> None:
    statement = update({"key": "x"}, {"$set": {"active": True}}, upsert=True)
    assert statement.raced(Index("i", KEY))
    assert not statement.raced(Index("i", KEY, partial=True))
    assert statement.values(Index("i", KEY, partial=True)) == {"key": UNKNOWN}

"""Requests that fail."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from bson import Int64, decode
from pymongo import MongoClient

from dev.cluster import Cluster
from pg_ferret.wire.message import Request
from tests.garbage import alive, no_collection
from tests.integration.in_process import among_many, serve
from tests.turns import wait_until
from tests.wire import message

Document = dict[str, Any]
_FAILING: dict[str, Document] = {
    "an unknown command": {"nope": 1},
    "an unknown cursor": {"getMore": Int64(5), "collection": "c"},
    "find": {"find": "c", "filter": {"n": {"$nope": 1}}},
    "find by _id": {"find": "c", "filter": {"_id": {"$nope": 1}}, "limit": 1},
    "aggregate": {"aggregate": "c", "pipeline": [{"$nope": 1}], "cursor": {}},
    "aggregate that writes": {"aggregate": "c", "pipeline": [{"$out": {"db": "failed", "coll": ""}}], "cursor": {}},
    "count": {"count": "c", "query": {"n": {"$nope": 1}}},
    "insert": {"insert": "c", "documents": 1},
    "insert what nobody takes": {"insert": "$c", "documents": [{"_id": 1}]},
    "update": {"update": "c", "updates": [{"q": {"_id": 1}, "u": {"$set": {"n": 1}}, "nope": 1}]},
    "update what is duplicate": {"update": "c", "updates": [{"q": {"_id": 1}, "u": {"$set": {"key": 2}}}]},
    "delete": {"delete": "c", "deletes": [{"q": {"_id": 1}, "limit": 5}]},
    "findAndModify": {"findAndModify": "c", "query": {"_id": 1}, "remove": True, "update": {"n": 1}},
    "findAndModify what is duplicate": {"findAndModify": "c", "query": {"_id": 1}, "update": {"$set": {"key": 2}}},
}


class Transport(asyncio.Transport):
    """It keeps the last reply."""

    reply: Document | None = None

    def write(self, data: Any) -> None:
        self.reply = decode(data[21:])


@pytest.mark.parametrize("crowd", [False, True])
@pytest.mark.parametrize("command", _FAILING.values(), ids=_FAILING)
async def test_nothing_is_left_of_them_without_a_collection(
    cluster: Cluster, client: MongoClient[Document], monkeypatch: pytest.MonkeyPatch, command: Document, crowd: bool
) -> None:
    """The message may be of 48 MB."""
    if crowd:
        among_many(monkeypatch)
    client.failed.c.drop()
    client.failed.c.create_index("key", unique=True)
    client.failed.c.insert_many([{"_id": number, "key": number} for number in range(3)])
    frame = message(command | {"$db": "failed"})
    transport = Transport()
    async with serve(cluster, [transport], 8) as (connection,):
        for _ in range(5):
            with no_collection():
                transport.reply = None
                connection.data_received(frame)
                await wait_until(lambda: transport.reply)
                assert not alive(Request)
        reply = transport.reply
        assert reply is not None
        assert not reply["ok"] or reply["writeErrors"]

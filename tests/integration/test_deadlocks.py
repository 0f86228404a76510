"""Writes that PostgreSQL rolls back because of others: a client is not to learn of it."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest
from bson import encode
from pymongo import MongoClient

from dev.cluster import Cluster
from pg_ferret.engine.limits import conninfo
from tests.integration.conftest import configuration
from tests.integration.pools import active
from tests.turns import wait_until

Document = dict[str, Any]
_UPDATE = "select documentdb_api.update('line', %b, null, null)"


def increment(number: int) -> bytes:
    """An update of one document."""
    return encode({"update": "w", "updates": [{"q": {"_id": number}, "u": {"$inc": {"n": 10}}}]})


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_write_that_ends_a_deadlock_is_made_again_as_a_whole(
    cluster: Cluster, client: MongoClient[Document], ordered: bool
) -> None:
    client.line.w.drop()
    client.line.w.insert_many([{"_id": number, "n": 0} for number in range(3)])
    updates = [{"q": {"_id": number}, "u": {"$inc": {"n": 1}}} for number in range(3)]
    async with await psycopg.AsyncConnection.connect(conninfo(configuration(cluster))) as other:
        await other.execute("set deadlock_timeout = '60s'")  # it is the gateway's that PostgreSQL ends
        await other.execute(_UPDATE, [increment(2)])
        write = asyncio.create_task(
            asyncio.to_thread(client.line.command, {"update": "w", "updates": updates, "ordered": ordered})
        )
        await wait_until(lambda: active(cluster))  # it has changed 0 and 1
        await other.execute(_UPDATE, [increment(1)])
        await other.commit()
        assert (await write)["nModified"] == 3
    assert [row["n"] for row in client.line.w.find(sort=[("_id", 1)])] == [1, 11, 11]

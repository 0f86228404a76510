"""The stock drivers write and read through PostgreSQL."""

from __future__ import annotations

from typing import Any

from motor.motor_asyncio import AsyncIOMotorClient
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.database import Database

from dev.cluster import Cluster, wait_for

Document = dict[str, Any]


def test_pymongo(database: Database[Document]) -> None:
    database.things.insert_many([{"_id": number, "n": number % 3} for number in range(10)])
    assert [row["_id"] for row in database.things.find({"n": 1}).sort("_id")] == [1, 4, 7]


async def test_pymongo_async(adatabase: AsyncDatabase[Document]) -> None:
    await adatabase.things.insert_one({"_id": 1})
    assert await adatabase.things.find_one() == {"_id": 1}


async def test_motor(motor_client: AsyncIOMotorClient[Document], database_name: str) -> None:
    things = motor_client[database_name].things
    await things.insert_one({"_id": 1})
    assert await things.find({}).to_list(None) == [{"_id": 1}]


def test_status_has_a_row_for_each_process(cluster: Cluster) -> None:
    def rows() -> list[dict[str, str | None]]:
        found = cluster.status()
        return found if [row["state"] for row in found] == ["ready"] * len(found) else []

    assert [row["kind"] for row in wait_for(rows, what="all ready")] == ["supervisor", *["worker"] * 4]

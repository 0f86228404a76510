"""The same flows through both asyncio drivers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient
from pymongo.errors import DuplicateKeyError

Document = dict[str, Any]


@pytest.fixture(params=["motor", "pymongo"])
def collection(
    request: pytest.FixtureRequest,
    motor_client: AsyncIOMotorClient[Document],
    aclient: AsyncMongoClient[Document],
    database_name: str,
) -> Any:
    """A collection; the two drivers have the same methods, which differ only in their types."""
    client: Any = motor_client if request.param == "motor" else aclient
    return client[database_name].things


async def rows_of(cursor: Any) -> list[Document]:
    return [row async for row in cursor]


async def test_documents(collection: Any) -> None:
    await collection.insert_many([{"_id": number, "n": number % 5} for number in range(100)])
    assert await collection.count_documents({"n": 1}) == 20
    assert (await collection.update_many({"n": 1}, {"$set": {"n": 9}})).modified_count == 20
    assert (await collection.find_one_and_update({"_id": 2}, {"$inc": {"n": 1}})) == {"_id": 2, "n": 2}
    assert (await collection.delete_many({"n": 9})).deleted_count == 20
    assert sorted(await collection.distinct("n")) == [0, 2, 3, 4]
    await collection.create_index("n")
    assert sorted(await collection.index_information()) == ["_id_", "n_1"]
    with pytest.raises(DuplicateKeyError):
        await collection.insert_one({"_id": 2})


async def test_cursors_side_by_side(collection: Any) -> None:
    await collection.insert_many([{"_id": number, "r": number * 7 % 200} for number in range(200)])

    async def read() -> list[int]:
        return [row["r"] for row in await rows_of(collection.find({}, sort=[("r", 1)], batch_size=3))]

    assert await asyncio.gather(*(read() for _ in range(20))) == [list(range(200))] * 20


async def test_a_pipeline(collection: Any) -> None:
    await collection.insert_many([{"n": number % 3} for number in range(30)])
    pipeline = [{"$group": {"_id": "$n", "count": {"$sum": 1}}}, {"$sort": {"_id": 1}}]
    cursor = collection.aggregate(pipeline)
    if asyncio.iscoroutine(cursor):  # pymongo's method is a coroutine, motor's is not
        cursor = await cursor
    assert await rows_of(cursor) == [{"_id": number, "count": 10} for number in range(3)]

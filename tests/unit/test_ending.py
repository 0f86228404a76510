"""What ends cursors, and where aggregations write: seen without an engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pg_ferret.commands.cursors import ending
from pg_ferret.commands.pipelines import Output
from pg_ferret.errors import EngineError
from pg_ferret.state.cursors import Cursor, Cursors, owner
from pg_ferret.wire.message import Request, parse
from tests.wire import message

_FAR = float("inf")
_NAMESPACE = b"db.c"


@pytest.fixture
def cursors(tmp_path: Path) -> Cursors:
    """A thousand of a collection, and one of another."""
    registry = Cursors(tmp_path)
    for number in range(1, 1001):
        registry.open(number, Cursor(owner(_NAMESPACE, b""), _FAR, b"next"))
    registry.open(2000, Cursor(owner(b"db.d", b""), _FAR, b"next"))
    return registry


def bereft(cursors: Cursors) -> int:
    """How many have nothing to go on with."""
    return sum(cursor is not None and not cursor.continuation for cursor in map(cursors.get, range(3000)))


async def end(cursors: Cursors, work: Any) -> bytes:
    return await ending([_NAMESPACE + b"\0"], work, cast(Any, SimpleNamespace(cursors=cursors)))


async def test_cursors_that_are_opened_meanwhile_are_the_new_collection_s(cursors: Cursors) -> None:
    async def work() -> bytes:
        cursors.open(2001, Cursor(owner(_NAMESPACE, b""), _FAR, b"next"))
        return b"done"

    assert await end(cursors, work) == b"done"
    assert bereft(cursors) == 1000
    assert cursors.get(2001) == Cursor(owner(_NAMESPACE, b""), _FAR, b"next")


async def test_what_was_refused_ends_nothing(cursors: Cursors) -> None:
    async def work() -> bytes:
        raise EngineError("55P03", "lock not available")

    with pytest.raises(EngineError):
        await end(cursors, work)
    assert bereft(cursors) == 0


@pytest.mark.parametrize("after", [False, True])
async def test_cursors_end_though_the_client_has_gone(cursors: Cursors, after: bool) -> None:
    dropped = asyncio.Event()

    async def work() -> bytes:
        dropped.set()
        if not after:
            await asyncio.Event().wait()
        return b"done"

    task = asyncio.create_task(end(cursors, work))
    await dropped.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})
    assert bereft(cursors) == 1000


def request(pipeline: object) -> Request:
    return parse(message({"aggregate": "c", "pipeline": pipeline, "$db": "db"}))


@pytest.mark.parametrize(
    ("pipeline", "output"),
    [
        ([], None),
        ([{"$match": {}}], None),
        ([{"$match": {"$merge": 1}}], None),
        ([{"$merge": "t"}, {"$match": {}}], None),
        ([{"$match": {}}, {"$merge": "t"}], (b"$merge", b"db", b"t")),
        ([{"$merge": {"into": "t", "on": "x"}}], (b"$merge", b"db", b"t")),
        ([{"$merge": {"into": {"db": "e", "coll": "t"}}}], (b"$merge", b"e", b"t")),
        ([{"$out": "t"}], (b"$out", b"db", b"t")),
        ([{"$out": {"db": "e", "coll": "t"}}], (b"$out", b"e", b"t")),
        # What the engine will refuse.
        ([{"$merge": 5}], (b"$merge", b"db", b"")),
        ([{"$merge": {"into": {"db": 1}}}], (b"$merge", b"db", b"")),
        ([{"$merge": {}}], (b"$merge", b"db", b"")),
        ([{}], None),
        ([5, {"$merge": "t"}], None),
        ({"$merge": "t"}, None),
        ("$merge", None),
    ],
)
def test_where_an_aggregation_writes(pipeline: object, output: tuple[bytes, ...] | None) -> None:
    assert Output.of(request(pipeline)) == output


def test_a_broken_stage_is_the_engine_s_to_refuse() -> None:
    made = request([{"$merge": "t"}])
    made.frame = made.frame.replace(b"\x02$merge\0\x02", b"\x02$merge\0\x63")
    assert Output.of(made) is None

"""Which reads and writes may stand in line with others: mostly those of one small document that is found by its _id."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from bson import Binary, Int64, ObjectId, Regex, decode_all, encode

import pg_ferret.commands  # noqa: F401  (fills the registry)
from pg_ferret.engine.calls import FIND, FIND_AS_EVER, GET_MORE, TRUE, Call
from pg_ferret.engine.lines import Shared
from pg_ferret.engine.pipeline import Params, Row
from pg_ferret.errors import CommandError, EngineError
from pg_ferret.registry import COMMANDS
from pg_ferret.state.cursors import Cursors
from pg_ferret.wire.message import Request, parse
from tests.garbage import alive, no_collection
from tests.wire import message, sequence

Document = dict[str, Any]


class Engine:
    """A pool that remembers which way requests took."""

    def __init__(self, failures: Iterable[EngineError], crowd: bool) -> None:
        self.writes = self.finds = self
        self.pages = SimpleNamespace(share=self._page, crowded=lambda others: crowd)
        self.shared: list[Shared] = []
        self.paged: list[Shared] = []
        self.apart: list[Params] = []
        self.failures = list(failures)

    def share(self, request: Shared) -> Awaitable[Row]:
        self.shared.append(request)
        return self._done(request.call)

    def _page(self, request: Shared) -> Awaitable[Row]:
        self.paged.append(request)
        return self._done(request.call)

    def write(self, call: Call, params: Params) -> Awaitable[Row]:
        return self.call(call, params)

    def call(self, call: Call, params: Params) -> Awaitable[Row]:
        self.apart.append(params)
        return self._done(call)

    async def _done(self, call: Call) -> Row:
        if self.failures:
            raise self.failures.pop(0)
        return encode({"n": 1, "ok": 1.0}), b"\x01" if call.writes else None, None


def run(
    command: Document, *sequences: tuple[str, bytes], failures: Iterable[EngineError] = (), crowd: bool = False
) -> Engine:
    """What the pool is asked for, if so many of its calls fail at first; in a crowd pages share."""
    sections = b"".join(sequence(name, [data]) for name, data in sequences)
    request = parse(message(command | {"$db": "db"}, sections=sections))
    engine = Engine(failures, crowd)
    services = SimpleNamespace(engine=engine, counters=SimpleNamespace(in_flight=1), unordered=set())
    client = SimpleNamespace(services=services)
    asyncio.run(cast(Any, COMMANDS[request.name].handler(request, cast(Any, client))))
    return engine


def statement(query: object, **more: object) -> bytes:
    return encode({"q": query, "u": {"$set": {"a": 1}}, **more})


@pytest.mark.parametrize("key", [1, Int64(1), 1.5, "x", ObjectId(), Binary(b"b", 0), True])
def test_a_change_of_one_document_shares(key: object) -> None:
    for engine in (
        run({"update": "c"}, ("updates", statement({"_id": key}))),
        run({"update": "c", "updates": decode_all(statement({"_id": key}))}),
        run({"delete": "c"}, ("deletes", encode({"q": {"_id": key}, "limit": 1}))),
        run({"delete": "c", "deletes": [{"q": {"_id": key}, "limit": 1}], "ordered": True}),
        run({"findAndModify": "c", "query": {"_id": key}, "remove": True}),
    ):
        (write,) = engine.shared
        assert write.params[-1] == TRUE
        assert write.namespace == b"db.c"
        assert not engine.apart


def test_a_small_document_shares() -> None:
    assert run({"insert": "c"}, ("documents", encode({"a": 1}))).shared
    assert run({"insert": "c"}, ("documents", encode({}))).shared
    assert run({"insert": "c", "documents": [{"a": 1}]}).shared
    assert run({"insert": "c", "documents": [{}]}).shared
    assert run({"insert": "c", "documents": [{"a": 1}], "maxTimeMS": 5000}).shared


@pytest.mark.parametrize(
    ("command", "sequences"),
    [
        ({"insert": "c"}, [("documents", encode({"a": 1}) + encode({"a": 2}))]),
        ({"insert": "c"}, [("documents", encode({"a": "x" * 5000}))]),
        ({"insert": "c", "collation": {"locale": "en"}}, [("documents", encode({"a": 1}))]),
        ({"insert": "c", "comment": "x" * 5000}, [("documents", encode({"a": 1}))]),
        ({"insert": "c", "documents": []}, []),
        ({"insert": "c", "documents": [1]}, []),
        ({"insert": "c", "documents": {"0": {"a": 1}}}, []),
        ({"insert": "c"}, []),
        ({"update": "c"}, [("updates", statement({"a": 1}))]),
        ({"update": "c"}, [("updates", statement({}))]),
        ({"update": "c"}, [("updates", statement({"_id": {"$gt": 1}}))]),
        ({"update": "c"}, [("updates", statement({"_id": Regex("x")}))]),
        ({"update": "c"}, [("updates", statement({"_id": [1, 2]}))]),
        ({"update": "c"}, [("updates", statement({"_idx": 1}))]),
        ({"update": "c"}, [("updates", statement({"_id": 1}) * 2)]),
        ({"update": "c"}, [("updates", encode({"q": {}}))]),
        ({"delete": "c"}, [("deletes", encode({"q": {"a": 1}, "limit": 0}))]),
        ({"findAndModify": "c", "query": {"a": 1}, "remove": True}, []),
        ({"findAndModify": "c", "query": {}, "remove": True}, []),
        ({"findAndModify": "c", "remove": True}, []),
        ({"findAndModify": "c", "query": {"_id": "x"}, "remove": True, "collation": {"locale": "en"}}, []),
    ],
)
def test_everything_else_is_made_apart(command: Document, sequences: list[tuple[str, bytes]]) -> None:
    arrays = {name: decode_all(data) for name, data in sequences}
    for engine in (run(command, *sequences), run(command | arrays)):
        assert not engine.shared
        assert len(engine.apart) == 1


@pytest.mark.parametrize("size", range(16))
def test_a_broken_statement_is_left_to_the_engine(size: int) -> None:
    assert run({"update": "c"}, ("updates", statement({"_id": 1})[:size])).apart
    assert run({"insert": "c"}, ("documents", encode({"_id": 12345})[: min(size, 13)])).apart


def test_a_collection_without_a_name_is_refused() -> None:
    with pytest.raises(CommandError, match="Invalid namespace"):
        run({"insert": ""}, ("documents", encode({"a": 1})))


@pytest.mark.parametrize(
    "command",
    [
        {"filter": {"a": 1}, "limit": 1, "singleBatch": True},
        {"filter": {"a": 1}, "batchSize": 0, "singleBatch": True},
        {"filter": {"_id": 1}},
        {"filter": {"_id": ObjectId(), "a": {"$gt": 1}}},
        {"filter": {"a": 1}, "limit": 1},
        {"filter": {"a": 1}, "limit": Int64(1)},
        {"filter": {}, "limit": 1},
        {"filter": {"_id": 1}, "maxTimeMS": 5000},
    ],
)
def test_a_read_that_leaves_nothing_behind_shares(command: Document) -> None:
    for _ in range(2):  # a new shape and a known one
        engine = run({"find": "c"} | command)
        assert engine.shared
        assert not engine.apart


@pytest.mark.parametrize("crowd", [False, True])
@pytest.mark.parametrize(
    "command",
    [
        {"filter": {"a": 1}},
        {"filter": {"a": 1}, "limit": 2},
        {"filter": {"_id": {"$gt": 1}}},
        {"filter": {"_id": 1}, "batchSize": 0},
        {"filter": {}, "limit": 1, "batchSize": 0},
        {"filter": {"_id": 1}, "sort": {"a": 1}},
        {"filter": {}, "limit": 1, "singleBatch": True, "sort": {"a": 1}},
        {"filter": {"_id": 1}, "skip": 1},
        {"filter": {"a": 1}, "limit": 20, "maxTimeMS": 5000},
        {"filter": {"_id": 1}, "hint": "x"},
        {"filter": {"_id": "x"}, "collation": {"locale": "en"}},
    ],
)
def test_a_read_that_may_leave_a_cursor_shares_in_a_crowd_only(command: Document, crowd: bool) -> None:
    for _ in range(2):
        engine = run({"find": "c"} | command, crowd=crowd)
        assert not engine.shared
        assert (len(engine.paged), len(engine.apart)) == (crowd, not crowd)


@pytest.mark.parametrize("crowd", [False, True])
@pytest.mark.parametrize(
    "command",
    [
        {"aggregate": "c", "pipeline": [{"$match": {"a": 1}}], "cursor": {}},
        {"aggregate": "c", "pipeline": [], "cursor": {}},
        {"count": "c", "query": {"a": 1}},
        {"count": "c"},
        {"distinct": "c", "key": "a", "query": {"b": 1}},
        {"distinct": "c", "key": "a"},
        # What is wrong with these the engine says.
        {"aggregate": "c", "pipeline": [1], "cursor": {}},
        {"aggregate": "c", "pipeline": [{"$match": {"a": 1}}, 1], "cursor": {}},
        {"aggregate": "c", "pipeline": "x", "cursor": {}},
        {"count": "c", "query": [1]},
    ],
)
def test_other_reads_share_in_a_crowd_only(command: Document, crowd: bool) -> None:
    engine = run(command, crowd=crowd)
    assert not engine.shared
    assert (len(engine.paged), len(engine.apart)) == (crowd, not crowd)


@pytest.mark.parametrize("stage", [{"$out": "d"}, {"$merge": {"into": "d"}}])
def test_an_aggregation_that_writes_is_made_apart(stage: Document) -> None:
    engine = run({"aggregate": "c", "pipeline": [{"$match": {"a": 1}}, stage], "cursor": {}}, crowd=True)
    assert engine.apart
    assert not engine.paged


def test_other_reads_of_about_the_same_cost_have_the_same_shape() -> None:
    def shape(command: Document) -> int:
        (read,) = run(command, crowd=True).paged
        return read.shape

    matched: Document = {"aggregate": "c", "pipeline": [{"$match": {"a": 1}}, {"$limit": 5}], "cursor": {}}
    same = matched | {"pipeline": [{"$match": {"a": 2}}, {"$limit": 5}], "maxTimeMS": 5}
    assert shape(matched) == shape(same)
    assert shape(matched | {"pipeline": [{"$skip": 5}]}) == shape(matched | {"pipeline": [{"$skip": 6}]})
    counted: Document = {"count": "c", "query": {"a": 1}}
    assert shape(counted) == shape(counted | {"query": {"a": 2}})
    others = [
        matched,
        matched | {"aggregate": "d"},
        matched | {"pipeline": [{"$match": {"b": 1}}, {"$limit": 5}]},
        matched | {"pipeline": [{"$match": {"a": 1}}, {"$limit": 6}]},
        matched | {"pipeline": [{"$match": {"a": 1}}, {"$lookup": {"from": "d", "pipeline": [], "as": "x"}}]},
        matched | {"pipeline": [{"$match": {"a": 1}}, {"$lookup": {"from": "e", "pipeline": [], "as": "x"}}]},
        matched | {"pipeline": [{"$match": {"a": 1.0}}, {"$limit": 5}]},
        matched | {"pipeline": [{"$match": {"a": 1}}, {"$sort": {"a": 1}}]},
        matched | {"pipeline": [{"$match": {"a": 1}}, {"$sort": {"b": 1}}]},
        matched | {"pipeline": [{"$match": {"a": 1, "b": "x" * 100}}, {"$limit": 5}]},
        matched | {"cursor": {"batchSize": 5}},
        counted,
        counted | {"count": "d"},
        counted | {"query": {"b": 1}},
        counted | {"skip": 1},
        counted | {"limit": 1},
        {"distinct": "c", "query": {"a": 1}, "key": "a"},
        {"distinct": "c", "query": {"a": 1}, "key": "b"},
    ]
    assert len({shape(other) for other in others}) == len(others)


@pytest.mark.parametrize("command", [{"filter": 1, "limit": 1}, {"limit": 1}])
def test_a_read_without_a_filter_is_made_apart(command: Document) -> None:
    for _ in range(2):
        engine = run({"find": "c"} | command, crowd=True)
        assert not engine.shared + engine.paged
        assert engine.apart


def test_pages_of_about_the_same_cost_have_the_same_shape() -> None:
    def shape(**more: object) -> int:
        (page,) = run({"find": "c", "filter": {"a": 1}, "limit": 20} | more, crowd=True).paged
        return page.shape

    assert shape() == shape(filter={"a": 2}) == shape(projection={"b": 1}) == shape(maxTimeMS=5)
    others: list[Document] = [
        {"find": "d"},
        {"filter": {"b": 1}},
        {"filter": {"a": 1, "b": list(range(100))}},
        {"limit": 21},
        {"batchSize": 5},
        {"sort": {"a": 1}},
        {"skip": 20},
        {"skip": 40},
        {"hint": "a"},
        {"collation": {"locale": "en"}},
    ]
    assert len({shape(), *[shape(**other) for other in others]}) == 1 + len(others)
    (single,) = run({"find": "c", "filter": {"a": 1}, "singleBatch": True}).shared
    alone: list[Document] = [{}, {"limit": 20}, {"skip": 20}, {"batchSize": 20}]
    bare = [run({"find": "c", "filter": {"a": 1}} | other, crowd=True).paged[0].shape for other in alone]
    assert len({single.shape, *bare}) == 1 + len(alone)


class Scan(Engine):
    """One that has more for every find, and the registry of its cursors."""

    def __init__(self, place: Path) -> None:
        super().__init__((), crowd=True)
        self.crowd = True
        self.pages.crowded = lambda _: self.crowd
        self.opened = 0
        self.cursors = Cursors(place)
        self.config = SimpleNamespace(settings=SimpleNamespace(cursor_timeout=1000))
        self.engine, self.counters, self.unordered = self, SimpleNamespace(in_flight=1), set[bytes]()

    async def _done(self, call: Call) -> Row:
        if call is GET_MORE:
            return b"page", None
        self.opened += 1
        continuation = encode({"qi": Int64(self.opened), "qp": False, "qc": {"command": self.opened}})
        return b"page", continuation, self.opened.to_bytes(8, "big")

    def ask(self, command: Document) -> None:
        request = parse(message(command | {"$db": "db"}))
        client = SimpleNamespace(services=self, user=b"")
        asyncio.run(cast(Any, COMMANDS[request.name].handler(request, cast(Any, client))))

    def next_page(self, size: int = 5, **more: object) -> int:
        """The shape of the page behind the first one of a find."""
        self.ask({"find": "c", "filter": {"a": 1}} | more)
        self.crowd = True
        self.ask({"getMore": Int64(self.opened), "collection": "c", "batchSize": size})
        return self.paged[-1].shape


def test_the_next_pages_of_finds_of_one_shape_have_the_same_shape(tmp_path: Path) -> None:
    scan = Scan(tmp_path)
    shape = scan.next_page()
    assert scan.next_page(filter={"a": 2}) == shape
    others = [scan.next_page(6), scan.next_page(filter={"b": 1}), scan.next_page(limit=100)]
    assert len({shape, *others}) == 4


def test_those_of_finds_that_met_nobody_are_told_apart_by_their_commands(tmp_path: Path) -> None:
    scan = Scan(tmp_path)
    shapes = set()
    for _ in range(2):
        scan.crowd = False
        shapes.add(scan.next_page())
    assert len(shapes) == 2


class View(Scan):
    """One of a view: in the newer way the engine goes on by another index than that of _id."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.made: list[Call] = []

    async def _done(self, call: Call) -> Row:
        self.made.append(call)
        page, _, cursor_id = await super()._done(call)
        newer = {"qi": Int64(self.opened), "qp": False, "qk": 1, "qd": {"find": "c"}, "dc": {"type": 1}}
        older = {"qi": Int64(self.opened), "qp": False, "qk": 1, "qc": {"find": "c"}}
        return page, encode(newer if call is FIND else older), cursor_id


@pytest.mark.parametrize("crowd", [False, True])
def test_a_find_that_cannot_go_on_by_id_is_made_again_and_the_next_one_only_once(tmp_path: Path, crowd: bool) -> None:
    view = View(tmp_path)
    view.crowd = crowd
    for expected in ([FIND, FIND_AS_EVER], [FIND_AS_EVER], [FIND_AS_EVER]):
        view.made.clear()
        view.ask({"find": "c", "filter": {}})
        assert view.made == expected
    view.made.clear()
    view.ask({"find": "d", "filter": {}})
    assert view.made == [FIND, FIND_AS_EVER]
    view.made.clear()
    view.ask({"find": "c", "filter": {"_id": 1}, "singleBatch": True})  # which opens no cursor
    assert view.made[0] is FIND


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pg_ferret.commands.retries._LONGEST_PAUSE", 0.0)


CHANGES: list[Document] = [
    {"update": "c", "updates": [{"q": {"a": 1}, "u": {"$set": {"a": 2}}}]},
    {"update": "c", "updates": [{"q": {"_id": 1}, "u": {"$set": {"a": 2}}}]},
    {"delete": "c", "deletes": [{"q": {"a": 1}, "limit": 0}]},
    {"insert": "c", "documents": [{"a": 1}, {"a": 2}]},
    {"findAndModify": "c", "query": {"a": 1}, "remove": True},
]


@pytest.mark.parametrize("command", CHANGES)
def test_a_write_that_was_rolled_back_because_of_others_is_made_again(command: Document) -> None:
    failures = [EngineError("40P01", "deadlock detected"), EngineError("40001", "could not serialize access")]
    engine = run(command, failures=failures)
    made = engine.shared + engine.apart
    assert len(made) == 3
    assert not engine.failures


@pytest.mark.parametrize("command", CHANGES)
def test_nothing_is_left_of_it_without_a_collection(command: Document) -> None:
    with no_collection():
        run(command, failures=(EngineError("40P01", "deadlock detected") for _ in range(2)))
        assert not alive(Request)


@pytest.mark.parametrize("command", CHANGES)
def test_a_refusal_is_final(command: Document) -> None:
    failures = [EngineError("40P01", "deadlock detected"), EngineError("42501", "permission denied")] * 2
    with pytest.raises((EngineError, CommandError), match="permission denied"):
        run(command, failures=failures)


def test_a_write_is_not_made_again_for_ever() -> None:
    with pytest.raises(EngineError, match="deadlock"):
        run(CHANGES[0], failures=[EngineError("40P01", "deadlock detected")] * 1000)
    with pytest.raises(EngineError, match="deadlock"):
        run(CHANGES[4], failures=[EngineError("40P01", "deadlock detected")] * 1000)


def test_a_write_is_made_again_until_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("pg_ferret.commands.retries.time", SimpleNamespace(monotonic=lambda: next(clock)))
    failures = [EngineError("40P01", "deadlock detected")] * 4
    assert len(run(CHANGES[0] | {"maxTimeMS": 5000}, failures=failures).apart) == 5
    with pytest.raises(CommandError, match="exceeded time limit"):
        run(CHANGES[0] | {"maxTimeMS": 2000}, failures=failures)


@pytest.mark.parametrize(
    ("command", "sequences"),
    [
        ({"find": "c", "filter": {"a": "x" * 5000}}, []),
        ({"insert": "c", "documents": [{"a": "x" * 5000}]}, []),
        ({"insert": "c"}, [("documents", encode({"a": "x" * 5000}))]),
    ],
)
def test_what_is_large_is_not_copied(command: Document, sequences: list[tuple[str, bytes]]) -> None:
    (params,) = run(command, *sequences).apart
    large = max((param for param in params if param is not None), key=len)
    assert len(large) > 5000
    assert isinstance(large, memoryview)

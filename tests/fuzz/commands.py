"""Commands for live.py: of every kind the gateway knows, right ones and ones whose fields have the wrong type.

Everything is drawn from the ``random.Random`` that is handed in, so a message is a matter of its seed alone.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from bson import (
    Binary,
    Code,
    Decimal128,
    Int64,
    MaxKey,
    MinKey,
    ObjectId,
    Regex,
    Timestamp,
)
from bson.datetime_ms import DatetimeMS

import pg_ferret.commands  # noqa: F401  (fills the registry)
from pg_ferret.registry import COMMANDS, MISSING

Document = dict[str, Any]

DATABASES = ("fuzz_a", "fuzz_b")
COLLECTIONS = ("c", "d", "käse", "e")
# Stands for the id of a cursor that is open: live.py puts the latest one in its place.
A_CURSOR = Int64(0x1BADCAFE5EED)
# What `wordy` repeats, for those who want to misspell it.
WORD = b"abxf"
# MongoDB's own ways to end the server, should they come to be implemented.
_NEVER = frozenset((b"shutdown", b"fsync", b"setFeatureCompatibilityVersion"))
KNOWN = tuple(sorted(name.decode() for name in (COMMANDS.keys() | MISSING) - _NEVER))

_SESSION = {"id": Binary(bytes(range(16)), 4)}
_FIELDS = ("_id", "a", "b", "a.b", "n", "t", "$x", "")
_SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 101, 2**31 - 1, -(2**31)),
    *(Int64(0), Int64(1), Int64(2**63 - 1), Int64(-(2**63)), A_CURSOR),
    *(0.0, -0.0, 1.0, 1.5, -1.0, 1e300, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "a",
        "$a",
        "$$ROOT",
        "a.b",
        ".",
        "a\0b",
        "\0",
        "käse",
        "x" * 300,
        "$cmd.aggregate",
        "system.views",
        "c",
        "_id_",
    ),
    *(ObjectId(b"0123456789ab"), Binary(b""), Binary(bytes(16), 4), Binary(b"\1\2", 0x80), Binary(b"\1\2", 2)),
    *(datetime.datetime(2020, 1, 1), DatetimeMS(2**63 - 1), DatetimeMS(-(2**63)), DatetimeMS(253402300800000)),
    *(Regex("a*", "i"), Regex("(", "x"), Timestamp(1, 1), Timestamp(2**32 - 1, 2**32 - 1), MinKey(), MaxKey()),
    *(Decimal128("NaN"), Decimal128("1E+6144"), Decimal128("-0.5"), Code("f"), Code("f", {"a": 1})),
)


def _operators(names: str) -> tuple[str, ...]:
    return tuple("$" + name for name in names.split())


_MATCH = _operators("eq gt in nin exists type regex elemMatch not size mod all near")
_LOGIC = _operators("and or nor expr where text jsonSchema comment")
_CHANGE = _operators("set unset inc mul push pull addToSet rename min currentDate bit pop")
_ACCUMULATE = _operators("sum avg first push addToSet max stdDevPop mergeObjects topN")
_COMPUTE = _operators("add concat cond let map reduce dateToString convert arrayElemAt range")
_STAGES = _operators(
    """match group sort limit skip project unwind count addFields bucket sample facet unionWith documents indexStats
    collStats sortByCount replaceRoot setWindowFields redact densify fill geoNear changeStream currentOp nonsense"""
)


# What PyMongo makes objects of, or cannot.
_SPECIAL: tuple[Any, ...] = (
    {"$ref": "c", "$id": 1},
    {"$ref": 5, "$id": 1},
    {"$ref": "c", "$id": 1, "$db": None},
    {"$oid": "x"},
    {"$date": DatetimeMS(2**62)},
)


def scalar(random: Random) -> Any:
    """A value that is no document, likely one at the edge of its type."""
    return random.choice(_SCALARS)


def value(random: Random, depth: int = 3) -> Any:
    """Any value; documents and arrays up to ``depth``."""
    kind = random.random()
    if depth <= 0 or kind < 0.6:
        return scalar(random)
    if kind < 0.62:
        return random.choice(_SPECIAL)
    if kind < 0.8:
        return [value(random, depth - 1) for _ in range(random.randrange(4))]
    return {field(random): value(random, depth - 1) for _ in range(random.randrange(4))}


def field(random: Random) -> str:
    """The name of a field, sometimes an operator's."""
    return random.choice(_FIELDS if random.random() < 0.8 else (*_MATCH, *_LOGIC, *_CHANGE, *_COMPUTE))


def stored(random: Random) -> Document:
    """A document to store; few different ids, so that they collide."""
    made: Document = {"_id": random.randrange(400) if random.random() < 0.9 else scalar(random)}
    for _ in range(random.randrange(4)):
        made[random.choice(_FIELDS[1:])] = value(random)
    return made


def query(random: Random) -> Document:
    """A filter."""
    kind = random.random()
    if kind < 0.3:
        return {"_id": random.randrange(400)}
    if kind < 0.5:
        return {random.choice(_FIELDS): scalar(random)}
    if kind < 0.85:
        return {random.choice(_FIELDS): {random.choice(_MATCH): value(random, 2)}}
    if kind < 0.95:
        return {random.choice(_LOGIC): random.choice(([query(random)], value(random, 2)))}
    return {}


def change(random: Random) -> Any:
    """The update part of an update."""
    kind = random.random()
    if kind < 0.75:
        return {random.choice(_CHANGE): {random.choice(_FIELDS): value(random, 2)}}
    if kind < 0.9:
        return stored(random)
    return [stage(random) for _ in range(random.randrange(3))]


def expression(random: Random) -> Any:
    """An aggregation expression, right or wrong."""
    if random.random() < 0.3:
        return "$" + random.choice(_FIELDS)
    return {random.choice(_COMPUTE): value(random, 2)}


def stage(random: Random) -> Document:
    """One stage of a pipeline; the ones that multiply documents are left to `aggregate`, which takes one at most."""
    name = random.choice(_STAGES)
    right: dict[str, Callable[[], Any]] = {
        "$match": lambda: query(random),
        "$group": lambda: {"_id": expression(random), "x": {random.choice(_ACCUMULATE): expression(random)}},
        "$sort": lambda: {random.choice(_FIELDS): random.choice((1, -1))},
        "$limit": lambda: random.randrange(1, 50),
        "$skip": lambda: random.randrange(50),
        "$project": lambda: {random.choice(_FIELDS): random.choice((0, 1, expression(random)))},
        "$unwind": lambda: "$" + random.choice(_FIELDS),
        "$addFields": lambda: {random.choice(_FIELDS): expression(random)},
        "$facet": lambda: {"f": [{"$limit": 3}]},
        "$unionWith": lambda: random.choice(COLLECTIONS),
        "$documents": lambda: [value(random, 1) for _ in range(3)],
        "$replaceRoot": lambda: {"newRoot": expression(random)},
    }
    make = right.get(name)
    return {name: value(random, 2) if make is None or random.random() < 0.25 else make()}


def _aggregate(random: Random) -> Document:
    pipeline = [stage(random) for _ in range(random.randrange(4))]
    if random.random() < 0.1:
        joined = {"from": random.choice(COLLECTIONS), "localField": "_id", "foreignField": "_id", "as": "j"}
        pipeline.append({"$lookup": joined})
    if random.random() < 0.03:
        pipeline.append(
            {random.choice(("$out", "$merge")): random.choice((random.choice(COLLECTIONS), value(random, 1)))}
        )
    name = random.choice(COLLECTIONS) if random.random() < 0.95 else 1
    return {"aggregate": name, "pipeline": pipeline, "cursor": _cursor(random)}


def _cursor(random: Random) -> Document:
    return {"batchSize": random.choice((0, 1, 2, 5, 101))}


def _find(random: Random) -> Document:
    made: Document = {"find": random.choice(COLLECTIONS), "filter": query(random)}
    options: Document = {
        "sort": {random.choice(_FIELDS): 1},
        "projection": {random.choice(_FIELDS): random.choice((0, 1, expression(random)))},
        "limit": random.randrange(20),
        "skip": random.randrange(20),
        "batchSize": random.choice((0, 1, 2, 101)),
        "singleBatch": True,
        "hint": random.choice(("_id_", {"a": 1}, "i1")),
        "noCursorTimeout": False,
        "let": {"x": 1},
        "collation": {"locale": "en"},
    }
    return made | _some(random, options)


def _some(random: Random, options: Mapping[str, Any]) -> Document:
    """Up to three of the options."""
    return {name: options[name] for name in random.sample(sorted(options), random.randrange(min(4, len(options) + 1)))}


def _insert(random: Random) -> Document:
    documents = [stored(random) for _ in range(random.randrange(1, 4))]
    return {"insert": random.choice(COLLECTIONS), "documents": documents, "ordered": random.random() < 0.5}


def _update(random: Random) -> Document:
    statement = {"q": query(random), "u": change(random)}
    statement |= _some(random, {"multi": True, "upsert": True, "arrayFilters": [{"x": 1}], "hint": "_id_"})
    return {"update": random.choice(COLLECTIONS), "updates": [statement], "ordered": random.random() < 0.5}


def _delete(random: Random) -> Document:
    return {"delete": random.choice(COLLECTIONS), "deletes": [{"q": query(random), "limit": random.choice((0, 1))}]}


def _find_and_modify(random: Random) -> Document:
    made: Document = {"findAndModify": random.choice(COLLECTIONS), "query": query(random)}
    if random.random() < 0.2:
        return made | {"remove": True}
    return (
        made | {"update": change(random)} | _some(random, {"new": True, "upsert": True, "sort": {"a": 1}, "fields": {}})
    )


def _get_more(random: Random) -> Document:
    cursor = A_CURSOR if random.random() < 0.8 else Int64(random.getrandbits(53))
    return {"getMore": cursor, "collection": random.choice(COLLECTIONS), "batchSize": random.randrange(5)}


def _kill_cursors(random: Random) -> Document:
    ids = random.choices((A_CURSOR, Int64(-1), Int64(2**63 - 1), 5, "x"), (8, 1, 1, 1, 1), k=random.randrange(4))
    return {"killCursors": random.choice(COLLECTIONS), "cursors": ids}


def _create_indexes(random: Random) -> Document:
    index: Document = {"key": {random.choice(_FIELDS): random.choice((1, -1, "text", "2dsphere", "hashed", 0))}}
    index["name"] = random.choice(("i1", "i2", "i3"))
    options: Document = {
        "unique": True,
        "sparse": True,
        "expireAfterSeconds": random.choice((0, 10**6, -1)),
        "partialFilterExpression": query(random),
        "collation": {"locale": "en"},
    }
    return {"createIndexes": random.choice(COLLECTIONS), "indexes": [index | _some(random, options)]}


def _create(random: Random) -> Document:
    options: Document = {
        "viewOn": random.choice(COLLECTIONS),
        "pipeline": [stage(random)],
        "capped": True,
        "validator": query(random),
        "clusteredIndex": {"key": {"_id": 1}, "unique": True},
    }
    return {"create": random.choice((*COLLECTIONS, "v", "w"))} | _some(random, options)


def _rename(random: Random) -> Document:
    database = random.choice(DATABASES)
    names = [f"{database}.{random.choice((*COLLECTIONS, 'v'))}" for _ in range(2)]
    return {"renameCollection": names[0], "to": names[1], "dropTarget": random.random() < 0.5}


def _on_collection(name: str, **options: Any) -> Callable[[Random], Document]:
    """A command on a collection without any fields of interest but these."""
    return lambda random: {name: random.choice(COLLECTIONS)} | _some(random, options)


def _plain(name: str, **options: Any) -> Callable[[Random], Document]:
    """A command on a database or none."""
    return lambda random: {name: 1} | _some(random, options)


# What is called, how often, and what makes it.  Index builds take fifty times as long as the others.
_MAKERS: tuple[tuple[float, Callable[[Random], Document]], ...] = (
    (14, _find),
    (14, _insert),
    (10, _update),
    (5, _delete),
    (8, _find_and_modify),
    (12, _aggregate),
    (6, _get_more),
    (3, _kill_cursors),
    (0.7, _create_indexes),
    (0.7, _on_collection("dropIndexes", index="i1")),
    (2, _on_collection("listIndexes", cursor={"batchSize": 0})),
    (2, _on_collection("count", query={"a": 1}, limit=5, skip=1, hint="_id_")),
    (2, lambda random: {"distinct": random.choice(COLLECTIONS), "key": field(random), "query": query(random)}),
    (0.7, _create),
    (0.3, _on_collection("collMod", index={"name": "i1", "hidden": True}, validator={"a": 1})),
    (0.3, _rename),
    (0.5, _on_collection("drop")),
    (0.03, _plain("dropDatabase")),
    (0.7, _on_collection("collStats", scale=1024)),
    (0.3, _plain("dbStats", scale=1024, freeStorage=1)),
    (0.3, lambda random: {"dataSize": f"{random.choice(DATABASES)}.{random.choice(COLLECTIONS)}"}),
    (0.3, _on_collection("validate", full=True)),
    (0.7, _plain("listDatabases", nameOnly=True, filter={"name": "x"})),
    (0.7, _plain("listCollections", nameOnly=True, filter={"name": "c"}, cursor={"batchSize": 1})),
    (1, _plain("hello", helloOk=True, client={"driver": {"name": "x"}}, saslSupportedMechs="a.b")),
    (1, _plain("ping")),
    (0.5, _plain("serverStatus")),
    (0.5, lambda random: {"getParameter": random.choice(("*", {"allParameters": True})), "quiet": 1}),
    (0.5, lambda random: {"getLog": random.choice(("*", "global", "startupWarnings", "x"))}),
    (0.5, _plain("startSession")),
    (1, lambda random: {random.choice(("endSessions", "refreshSessions")): [_SESSION]}),
)
_WEIGHTS = tuple(weight for weight, _ in _MAKERS)
_COMMON: Document = {
    "lsid": _SESSION,
    "maxTimeMS": 2000,
    "comment": "x",
    "readConcern": {"level": "local"},
    "writeConcern": {"w": 1},
    "$readPreference": {"mode": "primary"},
    "$clusterTime": {"clusterTime": Timestamp(1, 1)},
    "apiVersion": "1",
    "txnNumber": Int64(1),
    "bypassDocumentValidation": True,
    "stmtIds": [1],
}
_ADMIN = frozenset(row.name for row in COMMANDS.values() if row.admin_only)


def command(random: Random) -> Document:
    """A command as a client might send it."""
    ((_, make),) = random.choices(_MAKERS, _WEIGHTS)
    made = make(random)
    if random.random() < 0.2:
        made |= _some(random, _COMMON)
    return made | {"$db": "admin" if next(iter(made)) in _ADMIN else random.choice(DATABASES)}


def confused(random: Random) -> Document:
    """A command of which one or two fields have a value of another type, are missing, or are new."""
    made = command(random)
    for _ in range(random.randrange(1, 3)):
        _confuse(random, made)
    return made


def _confuse(random: Random, document: Document) -> None:
    """Change one value somewhere in the document."""
    if not document or random.random() < 0.1:
        document[field(random)] = value(random)
        return
    name = random.choice(list(document))
    inner = document[name]
    if isinstance(inner, list) and inner and isinstance(inner[0], dict):
        inner = inner[0]
    if isinstance(inner, dict) and inner is not _SESSION and random.random() < 0.6:
        document[name] = changed = [dict(inner)] if isinstance(document[name], list) else dict(inner)
        _confuse(random, changed[0] if isinstance(changed, list) else changed)
    elif random.random() < 0.1:
        del document[name]
    else:
        document[name] = value(random)


def named(random: Random) -> Document:
    """A command under the name of another one, or under no command's name."""
    made = command(random)
    _, *rest = made.items()
    if random.random() < 0.7:
        name = random.choice(KNOWN)
    else:
        name = "".join(random.choice("abcdeFIND$.\u00e9\U0001f980 ") for _ in range(random.choice((0, 1, 5, 200))))
    first = value(random) if random.random() < 0.5 else random.choice(COLLECTIONS)
    return {name: first} | {key: item for key, item in rest if key != name}


def wordy(random: Random) -> Document:
    """A query that is refused in words that repeat it."""
    word = WORD.decode()
    words = [[word, {word: 1}], [Regex(word)], [Code(word)], {word: word}, Code(word, {word: 1}), word]
    operator = random.choice(_MATCH if random.random() < 0.7 else (*_LOGIC, *_COMPUTE))
    filtered = {random.choice(_FIELDS): {operator: random.choice(words)}}
    statement = {"q": filtered, "u": {random.choice(_CHANGE): random.choice(words)}, "limit": 1}
    name, options = random.choice(
        (
            ("find", {"filter": filtered}),
            ("count", {"query": filtered}),
            ("findAndModify", {"query": filtered, "remove": True}),
            ("update", {"updates": [statement]}),
            ("delete", {"deletes": [statement]}),
            ("aggregate", {"pipeline": [{random.choice(_STAGES): filtered}], "cursor": {}}),
        )
    )
    return {name: random.choice(COLLECTIONS), **options, "$db": random.choice(DATABASES)}

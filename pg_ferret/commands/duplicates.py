"""Duplicate keys in MongoDB's words.

The engine tells of one only the index.  Drivers and ODMs look for E11000 with keyPattern and keyValue, so these are
found again: the pattern in the list of indexes, the values in the statement that failed, if it tells them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from bson import Binary, DatetimeMS, MaxKey, MinKey, ObjectId

from pg_ferret.commands import documents
from pg_ferret.commands.arguments import database
from pg_ferret.commands.statements import UNKNOWN, Index, Statement
from pg_ferret.engine import calls
from pg_ferret.errors import EngineError
from pg_ferret.state.client import Client
from pg_ferret.wire import bson
from pg_ferret.wire.message import Request

_INDEX_NAME = re.compile(r"Index '(.*)'", re.DOTALL)
# Raised errors name PostgreSQL's constraint.
_ID_CONSTRAINT = re.compile(r"constraint \"collection_pk_\d+\"")
_CONSTRAINT = re.compile(r"constraint \"documents_rum_index_(\d+)\"")
_ID_INDEX = "_id_"
_UUID_BYTES = 16


class Keys:
    """Describes duplicate keys; asks for the collection's indexes at most once."""

    def __init__(self, db: bytes, collection: bytes, client: Client) -> None:
        self._db = db
        self._collection = collection
        self._client = client
        self._indexes: dict[str, Index] | None = None

    @classmethod
    def of(cls, request: Request, client: Client) -> Keys:
        """Those of the collection that a command names."""
        return cls(database(request), request.string(request.name) or b"", client)

    async def describe(self, message: str, statement: Statement | None) -> dict[str, Any] | None:
        """errmsg, keyPattern and, if the statement tells it, keyValue of a duplicate key; None if of no index."""
        index = await self.index(message)
        return None if index is None else description(self._db + b"." + self._collection, index, statement)

    async def index(self, message: str) -> Index | None:
        """The index that a message names."""
        found = _CONSTRAINT.search(message)
        if found:
            row = await self._client.services.engine.call(calls.INDEX_BY_ID, (found[1].encode(),))
            name = (row[0] or b"").decode("utf-8", "replace") if row else ""
        elif _ID_CONSTRAINT.search(message):
            name = _ID_INDEX
        else:
            name = named_index(message) or ""
        if not name or name == _ID_INDEX:
            return Index(name, {"_id": 1}) if name else None
        if self._indexes is None:
            self._indexes = await self._load()
        return self._indexes.get(name) or Index(name, {})

    async def _load(self) -> dict[str, Index]:
        spec = bson.document(bson.string(b"listIndexes", self._collection.decode("utf-8", "replace")))
        try:
            (page,) = await self._client.services.engine.call(calls.LIST_INDEXES, (self._db, spec))
        except EngineError:
            return {}
        return {
            index["name"]: Index(index["name"], index["key"], "partialFilterExpression" in index)
            for index in documents.decode(page or b"")["cursor"]["firstBatch"]
        }


def named_index(message: str) -> str | None:
    """The name of the index in a message about a duplicate key."""
    found = _INDEX_NAME.search(message)
    return found[1] if found else None


def description(namespace: bytes, index: Index, statement: Statement | None = None) -> dict[str, Any]:
    """errmsg, keyPattern and keyValue of a duplicate key, as far as they are known."""
    text = f"E11000 duplicate key error collection: {namespace.decode('utf-8', 'replace')} index: {index.name}"
    if not index.pattern:
        return {"errmsg": text}
    values = None if statement is None else statement.values(index)
    if values is None or UNKNOWN in values.values():
        return {"errmsg": text, "keyPattern": index.pattern}
    return {"errmsg": f"{text} dup key: {_shell(values)}", "keyPattern": index.pattern, "keyValue": values}


def _shell(values: Mapping[str, Any]) -> str:
    """Values as MongoDB's shell prints them in this message."""
    if not values:
        return "{ }"
    return "{ " + ", ".join(f"{path}: {_shell_value(value)}" for path, value in values.items()) + " }"


def _shell_value(value: Any) -> str:
    text = str(value)
    match value:
        case None:
            text = "null"
        case bool():
            text = text.lower()
        case str():
            text = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        case float() if not math.isfinite(value):
            text += ".0"
        case Mapping():
            text = _shell(value)
        case list():
            text = "[ " + ", ".join(map(_shell_value, value)) + " ]"
        case ObjectId():
            text = f"ObjectId('{value}')"
        case Binary(subtype=4) if len(value) == _UUID_BYTES:
            text = f'UUID("{UUID(bytes=bytes(value))}")'
        case bytes():
            text = f"BinData({getattr(value, 'subtype', 0)}, {value.hex().upper()})"
        case DatetimeMS():
            text = f"new Date({int(value)})"
        case datetime():
            text = f"new Date({int(DatetimeMS(value))})"
        case MinKey() | MaxKey():
            text = type(value).__name__
    return text

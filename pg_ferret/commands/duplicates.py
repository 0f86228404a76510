"""Duplicate keys in MongoDB's words.

The engine tells of one only the index.  Drivers and ODMs look for E11000 with keyPattern and keyValue, so these are
found again: the pattern in the list of indexes, the values in the statement that failed, if it tells them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pg_ferret.commands import documents
from pg_ferret.commands.arguments import database, namespace_text
from pg_ferret.commands.statements import UNKNOWN, Statement
from pg_ferret.engine import calls
from pg_ferret.errors import EngineError
from pg_ferret.state.client import Client
from pg_ferret.wire import bson
from pg_ferret.wire.message import Request

_INDEX_NAME = re.compile(r"Index '(.*)'", re.DOTALL)
# Raised errors name PostgreSQL's constraint; those of collection_pk_N are about _id.
_CONSTRAINT = re.compile(r"constraint \"documents_rum_index_(\d+)\"")
_ID_INDEX = "_id_"


class Keys:
    """Describes duplicate keys; asks for the collection's indexes at most once."""

    def __init__(self, request: Request, client: Client) -> None:
        self._request = request
        self._client = client
        self._patterns: dict[str, dict[str, Any]] | None = None

    async def describe(self, message: str, statement: Statement | None) -> dict[str, Any]:
        """errmsg, keyPattern and, if the statement tells it, keyValue of a duplicate key."""
        index, pattern = await self.index(message)
        return description(self._request, index, pattern, statement)

    async def index(self, message: str) -> tuple[str, dict[str, Any]]:
        """Name and key pattern of the index that a message names."""
        found = _CONSTRAINT.search(message)
        if found:
            row = await self._client.services.engine.call(calls.INDEX_BY_ID, (found[1].encode(),))
            return ((row[0] or b"").decode("utf-8", "replace"), documents.decode(row[1] or b"")) if row else ("", {})
        found = _INDEX_NAME.search(message)
        if not found or found[1] == _ID_INDEX:
            return _ID_INDEX, {"_id": 1}
        if self._patterns is None:
            self._patterns = await self._load()
        return found[1], self._patterns.get(found[1], {})

    async def _load(self) -> dict[str, dict[str, Any]]:
        name = (self._request.string(self._request.name) or b"").decode("utf-8", "replace")
        spec = bson.document(bson.string(b"listIndexes", name))
        try:
            (page,) = await self._client.services.engine.call(calls.LIST_INDEXES, (database(self._request), spec))
        except EngineError:
            return {}
        return {index["name"]: index["key"] for index in documents.decode(page or b"")["cursor"]["firstBatch"]}


def named_index(message: str) -> str | None:
    """The name of the index in a message about a duplicate key."""
    found = _INDEX_NAME.search(message)
    return found[1] if found else None


def description(
    request: Request, index: str, pattern: Mapping[str, Any], statement: Statement | None = None
) -> dict[str, Any]:
    """errmsg, keyPattern and keyValue of a duplicate key, as far as they are known."""
    described: dict[str, Any] = {
        "errmsg": f"E11000 duplicate key error collection: {namespace_text(request)} index: {index}"
    }
    if pattern:
        described["keyPattern"] = pattern
        values = {} if statement is None else statement.values(pattern)
        if values and UNKNOWN not in values.values():
            described["errmsg"] += f" dup key: {_shell(values)}"
            described["keyValue"] = values
    return described


def _shell(values: Mapping[str, Any]) -> str:
    """Values as MongoDB's shell prints them in this message."""
    if not values:
        return "{ }"
    return "{ " + ", ".join(f"{path}: {_shell_value(value)}" for path, value in values.items()) + " }"


def _shell_value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, Mapping):
        return _shell(value)
    if isinstance(value, list):
        return "[ " + ", ".join(map(_shell_value, value)) + " ]"
    if type(value).__name__ == "ObjectId":
        return f"ObjectId('{value}')"
    return str(value)

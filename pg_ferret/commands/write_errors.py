"""The cold path of writes: the engine's writeErrors in MongoDB's words.

The engine packs SQLSTATEs into ``code`` and tells of a duplicate key only the index.  Drivers and ODMs look for
E11000 with keyPattern and keyValue, so these are found again: the pattern in the list of indexes, the values in the
statement that failed.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

import structlog
from bson import encode
from bson.raw_bson import RawBSONDocument

from pg_ferret.commands import documents
from pg_ferret.commands.arguments import database
from pg_ferret.engine import calls, sqlstate
from pg_ferret.errors import CommandError, EngineError
from pg_ferret.state.client import Client
from pg_ferret.wire import bson
from pg_ferret.wire.message import Request

_log = structlog.get_logger()
INDEX_NAME = re.compile(r"Index '(.*)'", re.DOTALL)
# Raised errors name PostgreSQL's constraint; those of collection_pk_N are about _id.
_CONSTRAINT = re.compile(r"constraint \"documents_rum_index_(\d+)\"")
_ID_INDEX = "_id_"
_SQLSTATE = re.compile(r"[0-9A-Z]{5}")
# Smaller ones would be of the classes 10 to 90, second digit 0, which there are not.
_SMALLEST_PACKED = 64
# Beyond so many characters of explanations, an error is told by its code alone, as MongoDB does: a reply is bounded.
_MOST_TEXT = 1 << 20
# So many errors are explained before other clients have a turn.
_TURN = 200


def unpacked(code: int, message: str) -> tuple[int, str]:
    """MongoDB's code and message for a ``code`` of the engine that may be a packed SQLSTATE."""
    packed = sqlstate.packed(code)
    if code < _SMALLEST_PACKED or not _SQLSTATE.fullmatch(packed):
        return code, message
    return sqlstate.translate(packed, message)


async def rebuild(reply: bytes, statements: bytes, request: Request, client: Client) -> bytes:
    """The reply with its writeErrors as MongoDB gives them.

    Raises CommandError when one of them concerns the whole command.
    """
    document = documents.decode(reply)
    keys = _Keys(request, client)
    written = _Statements(request, statements)
    errors = []
    told = 0
    for number, entry in enumerate(document.get("writeErrors", ())):
        code, message = unpacked(entry["code"], entry["errmsg"])
        if code in sqlstate.TROUBLE:
            _log.error("the engine failed in a write", code=code, sqlstate=sqlstate.packed(entry["code"]))
            client.services.trouble(f"{request.name.decode()}: {message}")
        if code in sqlstate.WHOLE_COMMAND:
            raise CommandError(code, message)
        error = {"index": entry["index"], "code": code, "errmsg": message if told < _MOST_TEXT else ""}
        if code == sqlstate.DUPLICATE_KEY and told < _MOST_TEXT:
            error |= await _described(keys, message, written, entry["index"])
        told += len(error["errmsg"])
        errors.append(error)
        if number % _TURN == _TURN - 1:
            await asyncio.sleep(0)
    return encode(document | {"writeErrors": errors, "ok": 1.0})


async def _described(keys: _Keys, message: str, written: _Statements, index: int) -> dict[str, Any]:
    """What more there is to say; nothing if that fails, because what was written must be acknowledged."""
    try:
        return await keys.describe(message, written.document(index))
    except Exception as error:
        _log.warning("a duplicate key could not be described", error=type(error).__name__)
        return {}


async def explained(error: EngineError, request: Request, client: Client) -> CommandError:
    """A failed findAndModify's answer, with a duplicate key in MongoDB's words."""
    code, message = sqlstate.translate(error.sqlstate, error.message)
    if code != sqlstate.DUPLICATE_KEY:
        return CommandError(code, message)
    change = documents.decode(request.body).get("update")
    described = await _Keys(request, client).describe(message, _known(change))
    text = described.pop("errmsg")
    return CommandError(code, text, details=encode(described)[4:-1])


def _known(change: Any) -> Mapping[str, Any] | None:
    """The values that an update or a replacement sets; None if they take an engine to find out."""
    if not isinstance(change, Mapping):
        return None
    if not any(name.startswith("$") for name in change):
        return change
    known: dict[str, Any] = {}
    for operator in ("$set", "$setOnInsert"):
        if isinstance(change.get(operator), Mapping):
            known.update(change[operator])
    return known


class _Statements:
    """The statements of a write command; found once, not for each that failed."""

    def __init__(self, request: Request, name: bytes) -> None:
        self._are_documents = name == b"documents"
        sequence = request.sequences.get(name)
        kind, start, end = request.fields.get(name, bson.MISSING)
        self._items: list[memoryview] = []
        if sequence is not None:
            self._items = list(bson.split_sequence(sequence))
        elif kind == bson.ARRAY:
            frame = memoryview(request.frame)
            self._items = [frame[first:last] for _, first, last in bson.scan(request.frame, start, end).values()]

    def document(self, index: int) -> Mapping[str, Any] | None:
        """The document that statement ``index`` of an insert or update was to store, as far as it is known."""
        if index >= len(self._items):
            return None
        statement = RawBSONDocument(bytes(self._items[index]), documents.OPTIONS)
        return statement if self._are_documents else _known(statement.get("u"))


class _Keys:
    """Describes duplicate keys; asks for the collection's indexes at most once."""

    def __init__(self, request: Request, client: Client) -> None:
        self._request = request
        self._client = client
        self._patterns: dict[str, dict[str, Any]] | None = None

    async def describe(self, message: str, document: Mapping[str, Any] | None) -> dict[str, Any]:
        """errmsg, keyPattern and keyValue of a duplicate key."""
        index, pattern = await self._index(message)
        text = f"E11000 duplicate key error collection: {namespace(self._request)} index: {index} dup key: "
        described: dict[str, Any] = {"errmsg": text + _shell(pattern)}
        if pattern:
            described["keyPattern"] = pattern
            if document is not None:
                values = {path: _lookup(document, path) for path in pattern}
                described["keyValue"] = values
                described["errmsg"] = text + _shell(values)
        return described

    async def _index(self, message: str) -> tuple[str, dict[str, Any]]:
        """Name and key pattern of the index that a message names."""
        found = _CONSTRAINT.search(message)
        if found:
            row = await self._client.services.engine.call(calls.INDEX_BY_ID, (found[1].encode(),))
            return ((row[0] or b"").decode("utf-8", "replace"), documents.decode(row[1] or b"")) if row else ("", {})
        found = INDEX_NAME.search(message)
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


def namespace(request: Request) -> str:
    """``database.collection`` as error texts print it."""
    name = request.string(request.name) or b""
    return (database(request) + b"." + name).decode("utf-8", "replace")


def _lookup(document: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, or None as MongoDB indexes a missing field."""
    if path in document:
        return document[path]
    value: Any = document
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


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

"""Upserts that have lost a race are made again, as MongoDB does (manual, "Upsert with Unique Index").

Two clients look for a document by the fields of a unique index, neither finds it, both store it, and the second one
fails.  Once more, it finds the document that the first one has stored.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pg_ferret.commands import conflicts, documents
from pg_ferret.commands.arguments import database, without
from pg_ferret.commands.duplicates import Keys
from pg_ferret.commands.statements import Statement, Statements
from pg_ferret.engine import calls, sqlstate
from pg_ferret.errors import EngineError
from pg_ferret.state.client import Client
from pg_ferret.wire.message import Request

# The document could go and come again in between; for ever, if there were no end to it.
MOST_TRIES: Final = 10
# So many errors are looked at before other clients have a turn.
_TURN: Final = 200


async def lost(code: int, message: str, statement: Statement, keys: Keys) -> bool:
    """Whether this error of an upsert means only that somebody else was quicker."""
    if code != sqlstate.DUPLICATE_KEY or not statement.upsert:
        return False
    try:
        _, pattern = await keys.index(message)
    except EngineError:
        return False  # what was written must be acknowledged all the same
    return bool(pattern) and statement.raced(pattern)


async def settle(
    document: dict[str, Any], written: Statements, keys: Keys, request: Request, client: Client
) -> dict[str, Any]:
    """The reply of an update whose upserts that lost a race have been made again, each by itself.

    In an ordered command those behind it have not been made yet; they follow in one go.
    """
    ordered = b"ordered" not in request.fields or request.true(b"ordered")
    tally = _Tally(document)
    tries: Counter[int] = Counter()
    looked_at = 0
    pending = deque(tally.take_errors(document, 0))
    errors: list[dict[str, Any]] = []
    while pending:
        looked_at += 1
        if looked_at % _TURN == 0:
            await asyncio.sleep(0)
        error = pending.popleft()
        index = error["index"]
        code, message = sqlstate.unpack(error["code"], error["errmsg"])
        if tries[index] >= MOST_TRIES or not await lost(code, message, written[index], keys):
            errors.append(error)
            continue
        tries[index] += 1
        again = tally.add(await _update(written.sequence(index, index + 1), request, client), index)
        pending.extendleft(again)
        if not again and ordered and index + 1 < len(written):
            pending.extend(tally.add(await _update(written.sequence(index + 1), request, client), index + 1))
    return tally.reply(errors)


async def _update(sequence: bytes, request: Request, client: Client) -> Mapping[str, Any]:
    """The reply to a part of the command; an error of it as a whole is one of its first statement."""
    params = (database(request), without(request, b"updates"), sequence)
    try:
        try:
            row = await client.services.engine.write(calls.UPDATE, params)
        except EngineError as error:
            row = await conflicts.repeat(error, calls.UPDATE, params, request, client)
    except EngineError as error:
        code, message = sqlstate.translate(error.sqlstate, error.message)
        return {"n": 0, "nModified": 0, "writeErrors": [{"index": 0, "code": code, "errmsg": message}]}
    return documents.decode(row[0] or b"")


class _Tally:
    """Replies to parts of a command, added up."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self._upserted = list(document.get("upserted", ()))

    def add(self, part: Mapping[str, Any], first: int) -> Iterable[dict[str, Any]]:
        """Add the reply to the statements from ``first`` on; returns its errors."""
        for name in ("n", "nModified"):
            self._document[name] = self._document.get(name, 0) + part.get(name, 0)
        self._upserted += [dict(one) | {"index": one["index"] + first} for one in part.get("upserted", ())]
        return self.take_errors(part, first)

    def take_errors(self, part: Mapping[str, Any], first: int) -> list[dict[str, Any]]:
        """Its errors, numbered as the command's statements."""
        return [dict(one) | {"index": one["index"] + first} for one in part.get("writeErrors", ())]

    def reply(self, errors: list[dict[str, Any]]) -> dict[str, Any]:
        """The reply to the whole command."""
        rest = {name: value for name, value in self._document.items() if name not in ("upserted", "writeErrors")}
        if self._upserted:
            rest["upserted"] = sorted(self._upserted, key=lambda one: one["index"])
        if errors:
            rest["writeErrors"] = sorted(errors, key=lambda one: one["index"])
        return rest

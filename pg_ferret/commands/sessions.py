"""Logical sessions.  Without transactions a session is an id and the cursors that were opened in it."""

from __future__ import annotations

import uuid

from pg_ferret.commands.arguments import session_id
from pg_ferret.commands.cursors import end
from pg_ferret.errors import CommandError
from pg_ferret.registry import command
from pg_ferret.state.client import Client
from pg_ferret.wire import bson
from pg_ferret.wire.message import Request

TIMEOUT_MINUTES = 30


@command("startSession", help="Starts a session.")
async def start_session(_request: Request, _client: Client) -> bytes:
    identity = bson.document(b"\x05id\0\x10\0\0\0\x04" + uuid.uuid4().bytes)
    return bson.document(b"\x03id\0" + identity, bson.int32(b"timeoutMinutes", TIMEOUT_MINUTES), bson.OK)


@command("endSessions", help="Ends sessions and closes their cursors.")
async def end_sessions(request: Request, client: Client) -> bytes:
    registry = client.services.cursors
    opened = registry.of_sessions(_sessions(request))
    mine = [
        cursor_id
        for cursor_id in opened
        if (cursor := registry.get(cursor_id)) is not None and cursor.user == client.user
    ]
    await end(mine, client.services)
    return bson.OK_REPLY


@command("refreshSessions", help="Keeps sessions alive.")
async def refresh_sessions(request: Request, _client: Client) -> bytes:
    _sessions(request)
    return bson.OK_REPLY


def _sessions(request: Request) -> list[bytes]:
    kind, start, end = request.fields[request.name]
    if kind != bson.ARRAY:
        raise CommandError(14, f"Field '{request.name.decode()}' must be an array of session ids")
    return [session_id(request.frame, span) for span in bson.scan(request.frame, start, end).values()]

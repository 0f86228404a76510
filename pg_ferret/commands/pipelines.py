"""What a pipeline's last stage says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pg_ferret.commands import documents
from pg_ferret.commands.arguments import database
from pg_ferret.wire import bson
from pg_ferret.wire.message import Request


class Output(NamedTuple):
    """The collection that an aggregation writes to."""

    stage: str  # $merge or $out
    db: bytes
    collection: bytes

    @classmethod
    def of(cls, request: Request) -> Output | None:
        """None if it writes to none."""
        kind, start, end = request.fields.get(b"pipeline", bson.MISSING)
        stages = list(bson.scan(request.frame, start, end).values()) if kind == bson.ARRAY else []
        if not stages or stages[-1][0] != bson.DOCUMENT:
            return None
        _, first, last = stages[-1]
        ((stage, target), *_) = [*documents.decode(request.frame[first:last]).items(), ("", None)]
        if stage not in ("$merge", "$out"):
            return None
        if stage == "$merge" and isinstance(target, Mapping):
            target = target.get("into")
        db = database(request)
        if isinstance(target, Mapping):
            db = str(target.get("db", "")).encode() or db
            target = target.get("coll")
        return cls(stage, db, str(target or "").encode())

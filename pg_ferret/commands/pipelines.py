"""What a pipeline says about what it does."""

from __future__ import annotations

import contextlib
from collections import deque
from itertools import islice
from typing import NamedTuple

from pg_ferret.commands.arguments import database
from pg_ferret.errors import CommandError
from pg_ferret.wire import bson
from pg_ferret.wire.message import Request

# MongoDB's limit of stages; longer pipelines are not looked through.
_MOST_STAGES = 1000
# So many stages, and so many bytes of each, tell about what it costs.
_OUTLINED_STAGES = 16
_OUTLINED_BYTES = 64
_MATCH = bytes((bson.DOCUMENT,)) + b"$match"
_SKIP = b"$skip"


def may_write(request: Request) -> bool:
    """Whether an aggregation may write to a collection: all that do are among these."""
    return b"$merge\0" in request.frame or b"$out\0" in request.frame


def outline(frame: bytes, span: bson.Span) -> list[bytes]:
    """Type and name of the first condition of a filter, or the beginning of each stage of a pipeline.

    Of a stage that matches it is the same as of a filter, and how much is skipped does not count: these values are
    others each time.  Only as far as that can be made out: the engine judges pipelines.
    """
    kind, start, end = span
    if kind != bson.ARRAY:
        return [_first(frame[start + 4 : min(end, start + _OUTLINED_BYTES)])]
    names: list[bytes] = []
    with contextlib.suppress(bson.InvalidBSONError):
        for stage in islice(bson.split_array(frame, start, end), _OUTLINED_STAGES):
            head = bytes(stage[4:_OUTLINED_BYTES])
            operator = _first(head)
            if operator == _MATCH:
                names += operator, _first(head[len(operator) + 1 + 4 :])
            else:
                names.append(operator if operator[1:] == _SKIP else head)
    return names


def _first(fields: bytes) -> bytes:
    return fields.partition(b"\0")[0]


class Output(NamedTuple):
    """The collection that an aggregation writes to."""

    stage: bytes  # $merge or $out
    db: bytes
    collection: bytes

    @classmethod
    def of(cls, request: Request) -> Output | None:
        """None if it writes to none, or if that cannot be made out: the engine judges pipelines."""
        if not may_write(request):
            return None
        try:
            return cls._of(request)
        except CommandError:
            return None

    @classmethod
    def _of(cls, request: Request) -> Output | None:
        kind, start, end = request.fields.get(b"pipeline", bson.MISSING)
        stages = bson.split_array(request.frame, start, end) if kind == bson.ARRAY else iter(())
        for last in deque(islice(stages, _MOST_STAGES), maxlen=1):
            stage = bytes(last)
            for name, span in islice(bson.scan(stage, 0, len(stage)).items(), 1):
                if name in (b"$merge", b"$out"):
                    return cls._to(name, stage, span, database(request))
        return None

    @classmethod
    def _to(cls, name: bytes, stage: bytes, target: bson.Span, db: bytes) -> Output:
        fields = _fields(stage, target)
        if b"into" in fields:
            target = fields[b"into"]
            fields = _fields(stage, target)
        if not fields:
            return cls(name, db, bson.read_string(stage, target) or b"")
        other, collection = (bson.read_string(stage, fields.get(field, bson.MISSING)) for field in (b"db", b"coll"))
        return cls(name, other or db, collection or b"")


def _fields(data: bytes, span: bson.Span) -> dict[bytes, bson.Span]:
    kind, start, end = span
    return bson.scan(data, start, end) if kind == bson.DOCUMENT else {}

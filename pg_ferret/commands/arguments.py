"""What handlers take out of a request."""

from __future__ import annotations

from dataclasses import dataclass

from pg_ferret.errors import CommandError
from pg_ferret.wire import bson
from pg_ferret.wire.message import Request

# Fields that drivers and servers send and that the engine calls unknown.
_NOT_FOR_THE_ENGINE = frozenset(
    b"""stmtIds $audit $client $configServerState $queryOptions encryptionInformation mayBypassWriteBlocking
    maxAwaitTimeMS rawData querySettings""".split()
)
# Empty ones are as good as none, and the engine refuses them.
_NOTHING_IF_EMPTY = frozenset((b"collation", b"hint", b"max", b"min", b"sort"))
# MongoDB's limits: 63 bytes, and 255 for the whole namespace.
_MAX_DATABASE_BYTES = 63
_MAX_COLLECTION_BYTES = 255
_MAX_TIMEOUT_MS = 2**31 - 1
# Values of an _id that one document has at most: a document could be operators, a regular expression matches many.
_ID_TYPES = frozenset(
    (bson.DOUBLE, bson.STRING, bson.BINARY, bson.OBJECT_ID, bson.BOOL, bson.DATE, bson.INT32, bson.INT64)
)


def database(request: Request) -> bytes:
    """The name of the database; raises CommandError when there is none."""
    span = request.fields.get(b"$db")
    if span is None or span[0] != bson.STRING:
        raise CommandError(40414, "OP_MSG requests require a $db argument")
    name = request.frame[span[1] + 4 : span[2] - 1]
    if b"\0" in name or len(name) > _MAX_DATABASE_BYTES:
        raise CommandError(73, "Invalid database name")
    return name


def collection(request: Request, field: bytes | None = None) -> bytes:
    """The name of the collection, the value of the command's own field by default; raises CommandError."""
    field = field or request.name
    span = request.fields.get(field)
    if span is None or span[0] != bson.STRING:
        raise CommandError(73, f"collection name has invalid type: field '{field.decode()}' must be a string")
    name = request.frame[span[1] + 4 : span[2] - 1]
    # A NUL would end the name early on its way to the engine, and another collection would be meant.
    if not name or 0 in name or len(name) > _MAX_COLLECTION_BYTES:
        raise _invalid_namespace(request)
    return name


def _invalid_namespace(request: Request) -> CommandError:
    return CommandError(73, f"Invalid namespace specified '{database(request).decode('utf-8', 'replace')}.'")


def namespace_text(request: Request) -> str:
    """``database.collection`` as error texts print it."""
    name = request.string(request.name) or b""
    return (database(request) + b"." + name).decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Namespace:
    """Where to find the namespace in requests of one shape, whose collections' names differ but not in length."""

    prefix: bytes  # the database and a dot
    name: slice

    @classmethod
    def of(cls, request: Request, field: bytes | None = None) -> Namespace:
        """Raises CommandError, as `collection` does."""
        collection(request, field)
        _, start, end = request.fields[field or request.name]
        return cls(database(request) + b".", slice(start + 4, end - 1))

    def read(self, request: Request) -> bytes:
        """The namespace of a request of this shape; raises CommandError."""
        name = request.frame[self.name]
        if 0 in name:  # all that `collection` looks at and that is not the same in all of them
            raise _invalid_namespace(request)
        return self.prefix + name


def by_id(data: bytes, at: int) -> bool:
    """Whether the condition that begins there is first of all a value of the _id."""
    return data[at + 5 : at + 9] == b"_id\0" and data[at + 4] in _ID_TYPES


def spec(request: Request, *, besides: bytes | None = None) -> bytes | memoryview:
    """The command document as the engine takes it, nearly always the very bytes that came.

    Document sequences become array fields, all but ``besides``, which goes to the engine as it is.
    """
    sequences = request.sequences
    if sequences and besides in sequences:
        sequences = {name: data for name, data in sequences.items() if name != besides}
    unwanted = _unwanted(request)
    if not sequences and not unwanted:
        return request.body
    body = bson.without(request.frame, request.fields, unwanted)
    arrays = [
        bson.array(name, bson.DOCUMENT, [bytes(item) for item in bson.split_sequence(data)])
        for name, data in sequences.items()
        if name not in request.fields
    ]
    if len(arrays) != len(sequences):
        raise CommandError(40413, "a document sequence has the name of a field of the command")
    return bson.document(body[4:-1], *arrays)


def as_it_came(request: Request) -> slice | None:
    """Where the frame has what the engine can be given as it came, apart from document sequences; None: see `spec`.

    The same for all requests of a shape.
    """
    return None if _unwanted(request) else slice(request.start, request.end)


def _unwanted(request: Request) -> set[bytes]:
    """The fields that the engine is not to see; the same for all requests of a shape."""
    fields = request.fields
    return {name for name in _NOTHING_IF_EMPTY & fields.keys() if bson.is_empty(fields[name])} | (
        _NOT_FOR_THE_ENGINE & fields.keys()
    )


def timeout(request: Request) -> bytes | None:
    """maxTimeMS as text in milliseconds, if there is a limit; raises CommandError for none that MongoDB knows."""
    if b"maxTimeMS" not in request.fields:
        return None
    value = request.integer(b"maxTimeMS")
    if value is None or not 0 <= value <= _MAX_TIMEOUT_MS:
        raise CommandError(2, "maxTimeMS must be a whole number from 0 to 2147483647")
    return str(value).encode() if value else None


def session(request: Request) -> bytes:
    """The 16 bytes of the session's id, or nothing outside a session; raises CommandError for a malformed lsid."""
    span = request.fields.get(b"lsid")
    return b"" if span is None else session_id(request.frame, span)


def session_id(data: bytes, span: bson.Span) -> bytes:
    """The 16 bytes of the UUID in ``{id: UUID}``; raises CommandError."""
    kind, start, end = span
    if kind == bson.DOCUMENT:
        inner = bson.scan(data, start, end).get(b"id")
        # A UUID: length 16, subtype 4, 16 bytes.
        if inner is not None and inner[0] == bson.BINARY and data[inner[1] : inner[1] + 5] == b"\x10\0\0\0\x04":
            return data[inner[1] + 5 : inner[2]]
    raise CommandError(14, "a session id must be a document {id: <UUID>}")

"""The catalogue: every SQL text the gateway sends, once.

Each call is prepared on a connection when it is first used there, in the same round trip.  ``formats`` says how
the parameters are sent: 0 as text, 1 as the type's binary form, which for ``bson`` is the document itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final

TEXT: Final = 0
BINARY: Final = 1
# The types of an array's elements.
TEXT_OID: Final = 25
BYTEA_OID: Final = 17

# Shapes of parameters.
_BSON = (BINARY,)
_DB_BSON = (TEXT, BINARY)
_DB_BSON_BSON = (TEXT, BINARY, BINARY)
_DB_TEXT = (TEXT, TEXT)
_DB_BSON_FLAG = (TEXT, BINARY, TEXT)
_DB_BSON_BSON_FLAG = (TEXT, BINARY, BINARY, TEXT)

# A continuation begins with {qi: <int64>, qp: <whether the rest of the result is kept somewhere>, qk: <int32>}.
_KEEPS_AT: Final = 4 + len(b"\x12qi\0") + 8
_KEEPS_NOTHING: Final = b"\x08qp\0\0"
# Then comes the command, with its document's length, and in the newer kind of them {dc: {type: <kind of scan>, ...}}.
_COMMAND_AT: Final = _KEEPS_AT + len(_KEEPS_NOTHING) + len(b"\x10qk\0") + 4
_NEWER: Final = b"\x03qd\0"
_SCAN_AT: Final = len(b"\x03dc\0") + 4
_BY_ID: Final = b"\x10type\0\x02\0\0\0"

_ARRAY = Struct(">iiIii").pack  # dimensions, whether there are NULLs, type, and of the one dimension: size, first index
_LENGTH = Struct(">i").pack


@dataclass(frozen=True, slots=True, eq=False)  # read several times for each request: quicker than a named tuple
class Call:
    """One statement: its name as a prepared statement, its text, its parameters' formats."""

    name: bytes
    sql: bytes
    formats: tuple[int, ...]
    writes: bool = False  # the last parameter: whether to commit unflushed; the last column: whether that was done
    opens: bool = False  # a cursor, if there is a second column, a continuation; the third is its id


def streams(continuation: bytes) -> bool:
    """Whether a cursor is nothing but a position in its collection: the page behind it can be read again.

    Otherwise the engine keeps the result, in a file that goes with its last page, or in the transaction.
    """
    return continuation[_KEEPS_AT : _KEEPS_AT + len(_KEEPS_NOTHING)] == _KEEPS_NOTHING


def reads_by_id(continuation: bytes) -> bool:
    """Whether a cursor goes on as ever, or in the newer way in the order of _id, where that one is as exact."""
    at = _COMMAND_AT + len(_NEWER)
    if continuation[_COMMAND_AT:at] != _NEWER:
        return True
    scan = at + int.from_bytes(continuation[at : at + 4], "little") + _SCAN_AT
    return continuation[scan : scan + len(_BY_ID)] == _BY_ID


def id_array(cursor_ids: list[int]) -> bytes:
    """Cursor ids as PostgreSQL's bigint[]."""
    return b"{%s}" % ",".join(map(str, cursor_ids)).encode()


def array(kind: int, values: Sequence[bytes | memoryview]) -> bytes:
    """A one-dimensional array of PostgreSQL, as array_recv() takes it, of a type that is told by its oid."""
    parts: list[bytes | memoryview] = [_ARRAY(1, 0, kind, len(values), 1)]
    for value in values:
        parts += _LENGTH(len(value)), value
    return b"".join(parts)


def _columns(*names: str, of: str, source: str = "", more: str = "") -> str:
    """The statement for some columns of the row of a function that gives one, for each row of ``source``.

    In the FROM list that row would be stored first: a twentieth of what a page costs.  OFFSET 0 has the function called
    once, whatever its volatility.
    """
    columns = ", ".join(f"(result).{name}" for name in names)
    return f"SELECT {columns}{more} FROM (SELECT {of} AS result {source} OFFSET 0) AS called"


def _call(name: str, sql: str, formats: tuple[int, ...], *, writes: bool = False, opens: bool = False) -> Call:
    return Call(name.encode(), sql.encode(), formats, writes, opens)


# What clients send goes through these (extension/bson_check.c): the engine trusts documents, stores malformed ones as
# they are, and can take the whole server down when it reads one as a command.
_SPEC = "ferretdb.checked_bson($2)"
_PAGE = ("cursorpage", "continuation", "cursorid")
_FIRST_PAGE = _columns(*_PAGE, of="documentdb_api.{}_cursor_first_page($1, {})")

# (db, spec) -> page, continuation or NULL, cursor id (53 bits of pg_strong_random)
FIND = _call("find", _FIRST_PAGE.format("find", "ferretdb.checked_find($2)"), _DB_BSON, opens=True)
# (dbs, specs), as `array` makes them -> the same for each, in their order
FIND_MANY = _call(
    "find_many",
    _columns(
        *_PAGE,
        of="documentdb_api.find_cursor_first_page(db, ferretdb.checked_find(spec))",
        # With more than one array PostgreSQL takes it for its own, but only by this name.
        source="FROM unnest($1::pg_catalog.text[], $2::pg_catalog.bytea[]) AS asked(db, spec)",
    ),
    (BINARY, BINARY),
    opens=True,
)
# The same as FIND, whose cursor goes on as ever.
FIND_AS_EVER = _call("find_as_ever", _FIRST_PAGE.format("find", _SPEC), _DB_BSON, opens=True)
AGGREGATE = _call("aggregate", _FIRST_PAGE.format("aggregate", _SPEC), _DB_BSON, opens=True)
# (db, spec) -> page: these come whole
LIST_COLLECTIONS = _call(
    "list_collections",
    "SELECT cursorpage FROM documentdb_api.list_collections_cursor_first_page($1, ferretdb.checked_bson($2))",
    _DB_BSON,
)
LIST_INDEXES = _call(
    "list_indexes",
    "SELECT cursorpage FROM documentdb_api.list_indexes_cursor_first_page($1, ferretdb.checked_bson($2))",
    _DB_BSON,
)
# (db, spec, continuation) -> page, continuation or NULL
GET_MORE = _call(
    "get_more",
    _columns("cursorpage", "continuation", of="documentdb_api.cursor_get_more($1, ferretdb.checked_bson($2), $3)"),
    _DB_BSON_BSON,
)
# (bigint[]) -> nothing of use
DELETE_CURSORS = _call("delete_cursors", "SELECT documentdb_api_internal.delete_cursors($1)", (TEXT,))

_REPLY = ("p_result", "p_success")
# (db, spec, documents or NULL, whether to commit unflushed: TRUE or FALSE) -> reply, whether all went well, and if it
# is committed unflushed the server's incarnation, for FLUSH_COMMITS
_WRITE = _columns(
    *_REPLY,
    of="documentdb_api.{}($1, ferretdb.checked_bson($2), ferretdb.checked_bsonsequence($3), NULL)",
    more=", ferretdb.commit_unflushed($4)",
)
INSERT = _call("insert", _WRITE.format("insert"), _DB_BSON_BSON_FLAG, writes=True)
UPDATE = _call("update", _WRITE.format("update"), _DB_BSON_BSON_FLAG, writes=True)
DELETE = _call("delete", _WRITE.format("delete"), _DB_BSON_BSON_FLAG, writes=True)
FIND_AND_MODIFY = _call(
    "find_and_modify",
    _columns(
        *_REPLY,
        of="documentdb_api.find_and_modify($1, ferretdb.checked_bson($2), NULL)",
        more=", ferretdb.commit_unflushed($3)",
    ),
    _DB_BSON_FLAG,
    writes=True,
)
TRUE: Final = b"t"
FALSE: Final = b"f"
# (incarnation) -> nothing of use, when all that is committed is on disk
FLUSH_COMMITS = _call("flush_commits", "SELECT ferretdb.flush_commits($1)", _BSON)

# (db, spec) -> reply, NULL: there is no continuation
COUNT = _call("count", f"SELECT documentdb_api.count_query($1, {_SPEC}), NULL", _DB_BSON)
DISTINCT = _call("distinct", f"SELECT documentdb_api.distinct_query($1, {_SPEC}), NULL", _DB_BSON)
# (db, spec) -> reply
VALIDATE = _call("validate", "SELECT documentdb_api.validate($1, ferretdb.checked_bson($2))", _DB_BSON)
CREATE = _call("create", "SELECT documentdb_api.create_collection_view($1, ferretdb.checked_bson($2))", _DB_BSON)
# (db, collection, spec) -> reply
COLL_MOD = _call("coll_mod", "SELECT documentdb_api.coll_mod($1, $2, ferretdb.checked_bson($3))", (TEXT, TEXT, BINARY))
# (spec) -> reply
RENAME_COLLECTION = _call(
    "rename_collection", "SELECT documentdb_api.rename_collection(ferretdb.checked_bson($1))", _BSON
)
LIST_DATABASES = _call("list_databases", "SELECT documentdb_api.list_databases(ferretdb.checked_bson($1))", _BSON)
# (db, collection) -> bool; (db) -> void
DROP_COLLECTION = _call("drop_collection", "SELECT documentdb_api.drop_collection($1, $2)", _DB_TEXT)
DROP_DATABASE = _call("drop_database", "SELECT documentdb_api.drop_database($1)", (TEXT,))
# (db, collection, scale), (db, scale, free storage) -> reply
COLL_STATS = _call("coll_stats", "SELECT documentdb_api.coll_stats($1, $2, $3)", (TEXT, TEXT, TEXT))
DB_STATS = _call("db_stats", "SELECT documentdb_api.db_stats($1, $2, $3)", (TEXT, TEXT, TEXT))

# (db, spec) -> reply, whether it went well, requests of builds to wait for
CREATE_INDEXES = _call(
    "create_indexes",
    "SELECT retval, ok, requests FROM documentdb_api.create_indexes_background($1, ferretdb.checked_bson($2))",
    _DB_BSON,
)
BUILD_INDEX = _call("build_index", "CALL documentdb_api_internal.build_index_concurrently(1)", ())
# (requests) -> reply, whether it went well, whether it is over
INDEX_STATUS = _call(
    "index_status",
    "SELECT retval, ok, complete FROM documentdb_api_internal.check_build_index_status($1)",
    _BSON,
)
# (index id) -> name, key
INDEX_BY_ID = _call(
    "index_by_id",
    "SELECT (index_spec).index_name, (index_spec).index_key"
    " FROM documentdb_api_catalog.collection_indexes WHERE index_id = $1",
    (TEXT,),
)
# (db, spec) -> reply
DROP_INDEXES = _call("drop_indexes", "CALL documentdb_api.drop_indexes($1, ferretdb.checked_bson($2), NULL)", _DB_BSON)

# Housekeeping.
DELETE_EXPIRED_ROWS = _call("delete_expired_rows", "CALL documentdb_api_internal.delete_expired_rows(-1)", ())
# (idle seconds) -> the ids of cursors whose files nobody has touched for so long, as text divided by blanks, or NULL
IDLE_CURSOR_FILES = _call(
    "idle_cursor_files",
    "SELECT string_agg(substr(name, 8), ' ')"
    " FROM pg_catalog.pg_ls_dir('pg_documentdb_cursor_files', true, false) AS name,"
    " LATERAL pg_catalog.pg_stat_file('pg_documentdb_cursor_files/' || name, true) AS file"
    " WHERE name ~ '^cursor_[0-9]{1,19}$'"
    " AND file.modification < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $1)",
    (TEXT,),
)
# (milliseconds): bounds the call that follows it in the same batch
STATEMENT_TIMEOUT = _call("statement_timeout", "SELECT pg_catalog.set_config('statement_timeout', $1, true)", (TEXT,))
# (lock_timeout in milliseconds, cpu_operator_cost): for the session
SET_UP_WRITES = _call(
    "set_up_writes",
    "SELECT pg_catalog.set_config('lock_timeout', $1, false), pg_catalog.set_config('cpu_operator_cost', $2, false)",
    (TEXT, TEXT),
)

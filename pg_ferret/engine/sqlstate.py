"""PostgreSQL's errors as MongoDB's: SQLSTATE in, code and message out."""

from __future__ import annotations

import re
from typing import Final

from pg_ferret import codes
from pg_ferret.errors import CommandError, EngineError, EngineLostError

UNAUTHORIZED: Final = 13
DUPLICATE_KEY: Final = 11000
# These tell of the server's state rather than of the client's request.
TROUBLE: Final = frozenset({1, 6, 91, 14031})
# In writeErrors these concern the whole command, so MongoDB answers them at the top level.
WHOLE_COMMAND: Final = frozenset({1, 13, 24, 50, 112})
# PostgreSQL has rolled the transaction back because of others: the same again may go through.
CONFLICTS: Final = frozenset({"40001", "40P01"})
# The connection does not know the statement.
UNPREPARED: Final = "26000"
# By a time limit, or because somebody asked for it.
CANCELLED: Final = "57014"
# lock_timeout.
LOCKED: Final = "55P03"

EXTENSION_MISSING = (
    "documentdb and pg_ferret are not both installed as extensions in ferretdb.database; see ferretdb.status"
)
_SQLSTATE: Final = re.compile(r"[0-9A-Z]{5}")
# Smaller ones would be of the classes 10 to 90, second digit 0, which there are not.
_SMALLEST_PACKED: Final = 64
_UNKNOWN_FIELD = ("is an unknown field", "is not a recognized field")
# SQLSTATE -> code; None as text: the engine's message is fit for clients.
_TABLE: dict[str, tuple[int, str | None]] = {
    "0A000": (115, None),
    "22000": (2, None),
    "22016": (2, None),
    "22021": (2, None),
    "22023": (2, None),
    "22P02": (2, None),
    "22P03": (22, None),
    "23505": (DUPLICATE_KEY, None),
    "23P01": (DUPLICATE_KEY, None),
    "25006": (10107, "not primary: the server is read-only or in recovery"),
    "25P02": (251, None),
    "25P03": (251, None),
    "25P04": (251, None),
    "3F000": (6, EXTENSION_MISSING),
    "40001": (112, "Write conflict during the operation; please retry"),
    "40P01": (112, "Write conflict during the operation; please retry"),
    "42501": (UNAUTHORIZED, None),
    "42601": (2, None),
    "42704": (6, EXTENSION_MISSING),
    "42883": (6, EXTENSION_MISSING),
    "42939": (2, None),
    "42P01": (26, None),
    "53000": (146, None),
    "53100": (14031, None),
    "53200": (146, None),
    "54000": (201, None),
    "54001": (2, None),
    LOCKED: (24, None),
    CANCELLED: (11601, "operation was interrupted"),
    "57P01": (91, "PostgreSQL is shutting down"),
    "57P02": (91, "PostgreSQL is restarting after a crash"),
    "57P03": (91, "PostgreSQL is starting up or shutting down"),
}


def unpack(code: int, message: str) -> tuple[int, str]:
    """MongoDB's code and message for a ``code`` in a reply of the engine, which may be a packed SQLSTATE."""
    sqlstate = packed(code)
    return (
        translate(sqlstate, message) if code >= _SMALLEST_PACKED and _SQLSTATE.fullmatch(sqlstate) else (code, message)
    )


def packed(code: int) -> str:
    """The SQLSTATE that PostgreSQL packed into ``code``, five characters of six bits (elog.h, MAKE_SQLSTATE)."""
    return "".join(chr(((code >> (6 * index)) & 63) + 48) for index in range(5))


def pack(sqlstate: str) -> int:
    """The other way round."""
    return sum((ord(letter) - 48 & 63) << (6 * index) for index, letter in enumerate(sqlstate))


def translate(sqlstate: str, message: str) -> tuple[int, str]:
    """MongoDB's code and message of an error of the engine; InternalError keeps its message to the log."""
    if sqlstate[:1] == "M":
        try:
            code = codes.ENGINE[int(sqlstate[1:], 36)]
        except (ValueError, IndexError):
            return 1, message
        if code == 2 and message.endswith(_UNKNOWN_FIELD):
            return 40415, message
        if code == 2 and "larger than MaxDocumentSize" in message:
            return 10334, message  # BSONObjectTooLarge, which drivers know
        return code, message
    if sqlstate == CANCELLED and "statement timeout" in message:
        return 50, "operation exceeded time limit"
    if sqlstate[:2] == "08" or (sqlstate == "XX000" and message.startswith("postmaster was shut down")):
        return 91, "PostgreSQL lost a connection of its own"
    known = _TABLE.get(sqlstate)
    if known is None:
        return 1, f"internal error (SQLSTATE {sqlstate})"
    return known[0], known[1] or message


def command_error(error: EngineError | EngineLostError) -> CommandError:
    """The answer to give for a failed call."""
    if isinstance(error, EngineLostError):
        return CommandError(91, "the connection to PostgreSQL was lost")
    return CommandError(*translate(error.sqlstate, error.message))

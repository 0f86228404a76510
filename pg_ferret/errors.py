"""The three ways a request can fail.  Anything else that is raised is a defect and is reported as InternalError."""

from __future__ import annotations


class ProtocolError(Exception):
    """Bytes that cannot be answered: the connection is closed."""


class CommandError(Exception):
    """An answer of ``{ok: 0, code, codeName, errmsg}``; the connection goes on.

    ``details`` are finished BSON elements to add to the answer.
    """

    def __init__(self, code: int, message: str, *, labels: tuple[str, ...] = (), details: bytes = b"") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.labels = labels
        self.details = details


class EngineError(Exception):
    """PostgreSQL refused a call: its SQLSTATE and primary message.

    DETAIL, HINT and CONTEXT are not kept: they can hold documents and password verifiers.
    """

    def __init__(self, sqlstate: str, message: str) -> None:
        super().__init__(f"{sqlstate}: {message}")
        self.sqlstate = sqlstate
        self.message = message


class EngineLostError(Exception):
    """The connection to PostgreSQL ended in the middle of a call, or none could be had."""


class StateDirError(Exception):
    """The directory for the state that workers share cannot be used; the text names ``ferretdb.state_dir``."""

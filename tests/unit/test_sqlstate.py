"""PostgreSQL's errors as MongoDB's (the examples are those that were seen in the engine)."""

from __future__ import annotations

import pytest

from pg_ferret import codes
from pg_ferret.engine import sqlstate
from pg_ferret.errors import EngineError, EngineLostError


@pytest.mark.parametrize(
    ("state", "code", "name"),
    [
        ("M0001", 2, "BadValue"),
        ("M0004", 14, "TypeMismatch"),
        ("M0008", 26, "NamespaceNotFound"),
        ("M000E", 43, "CursorNotFound"),
        ("M000U", 115, "CommandNotSupported"),
        ("M001C", 11000, "DuplicateKey"),
        ("M0088", 40415, "IDLUnknownField"),
        ("M00DO", 16, "InvalidLength"),
        ("M00E8", 10107, "NotWritablePrimary"),
        ("M00EL", 143, "CursorInUse"),
        ("23505", 11000, "DuplicateKey"),
        ("42501", 13, "Unauthorized"),
        ("25006", 10107, "NotWritablePrimary"),
        ("22P03", 22, "InvalidBSON"),
        ("57P01", 91, "ShutdownInProgress"),
        ("XX000", 1, "InternalError"),
        ("M", 1, "InternalError"),
        ("M00ZZ", 1, "InternalError"),
        ("M??!!", 1, "InternalError"),
    ],
)
def test_known_states(state: str, code: int, name: str) -> None:
    assert sqlstate.translate(state, "text")[0] == code
    assert codes.name(code) == name


def test_an_engine_whose_own_connection_fails_is_away() -> None:
    text = "postmaster was shut down while establishing libpq connection, exiting"
    assert sqlstate.translate("XX000", text)[0] == 91
    assert sqlstate.translate("08006", "server closed the connection")[0] == 91


def test_a_document_that_is_too_large_has_a_code_of_its_own() -> None:
    assert sqlstate.translate("M0001", "Size 16777240 is larger than MaxDocumentSize 16777216")[0] == 10334


def test_a_timeout_is_told_from_a_cancel() -> None:
    assert sqlstate.translate("57014", "canceling statement due to statement timeout")[0] == 50
    assert sqlstate.translate("57014", "canceling statement due to user request")[0] == 11601


def test_internal_errors_keep_their_text_to_the_log() -> None:
    _, message = sqlstate.translate("XX000", "relation documents_7 is broken")
    assert message == "internal error (SQLSTATE XX000)"


@pytest.mark.parametrize(
    ("number", "state"),
    [(319029277, "M001C"), (50463045, "55P03"), (16797828, "42501"), (67108893, "M0004"), (100663808, "08006")],
)
def test_packed_states(number: int, state: str) -> None:
    assert sqlstate.packed(number) == state


def test_codes_without_a_name_are_locations() -> None:
    assert codes.name(40324) == "Location40324"
    assert codes.name(987654) == "Location987654"


def test_lost_connections_are_retryable() -> None:
    assert sqlstate.command_error(EngineLostError("gone")).code == 91
    assert sqlstate.command_error(EngineError("M0001", "bad")).message == "bad"

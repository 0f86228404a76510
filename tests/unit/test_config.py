"""The settings: what is generated from them is up to date, and what PostgreSQL sends is read strictly."""

from __future__ import annotations

import json
import os
import re
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import generate
from config.check import checked
from config.settings import Config, Settings, gucs, parse_address
from tests.unit.samples import SERVER, SETTINGS, config

HIDDEN_FROM_PLAIN_USERS = {"python", "state_dir"}
NEEDS_RESTART = {"database", "max_workers"}


# -- generated files --------------------------------------------------------------------------------------------------


def test_generated_files_are_up_to_date() -> None:
    assert generate.stale() == [], "run python3 -m config"


@pytest.mark.parametrize("name", ["extension/settings.h", "docs/settings.md", "config/ferretdb.conf.sample"])
def test_every_setting_is_in_every_generated_file(name: str) -> None:
    found = re.findall(r"^(?:#|\| `|\tDefineCustom\w+\(\")ferretdb\.(\w+)", generate.FILES[name](), re.MULTILINE)
    assert found == list(gucs())


def test_contexts_and_flags() -> None:
    definitions = dict(re.findall(r'"ferretdb\.(\w+)"(.*?)\);', generate.settings_h(), re.DOTALL))
    assert {name for name, text in definitions.items() if "PGC_POSTMASTER" in text} == NEEDS_RESTART
    assert {name for name, text in definitions.items() if "GUC_SUPERUSER_ONLY" in text} == HIDDEN_FROM_PLAIN_USERS
    for name, text in definitions.items():
        assert ("PGC_POSTMASTER" in text) != ("PGC_SIGHUP" in text)
        assert ("GUC_UNIT_MS" in text) == name.endswith("_timeout")
        assert ("GUC_UNIT_MB" in text) == name.endswith("_memory")


def test_the_sample_uses_units_that_postgresql_reads() -> None:
    sample = generate.sample()
    for line in (
        "#ferretdb.cursor_timeout = 10min",
        "#ferretdb.client_memory = 1GB",
        "#ferretdb.unix_socket_permissions = 0700",
        "#ferretdb.listen_addr = '127.0.0.1:27017'",
        "#ferretdb.enabled = on",
        "#ferretdb.log_level = info",
    ):
        assert re.search(rf"^{re.escape(line)}(\t|$)", sample, re.MULTILINE)


def test_help_texts_fit_postgresql() -> None:
    """One sentence or two for pg_settings.short_desc, ASCII so that every database encoding has them."""
    for item in generate.settings():
        assert item.guc.help.isascii() and item.guc.help.endswith(".") and "|" not in item.guc.help


def test_a_stale_file_is_found_and_written(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    for folder in ("extension", "docs", "config"):
        (tmp_path / folder).mkdir()
    assert generate.write() == list(generate.FILES)
    assert generate.stale() == []
    (tmp_path / "docs/settings.md").write_text("old")
    assert generate.stale() == ["docs/settings.md"]


# -- what pg_settings shows -------------------------------------------------------------------------------------------


def read(rows: dict[str, str]) -> Settings:
    """The settings from such rows, the others with their defaults."""
    return checked(json.dumps({"settings": rows, "server": SERVER})).settings


def shown(settings: Settings) -> dict[str, str]:
    """The rows of such settings."""
    return {item.name: item.text(getattr(settings, item.name)) for item in generate.settings()}


def test_defaults() -> None:
    assert read({}) == Settings()
    # What a fresh server shows, but for what the sample changes on purpose.
    assert shown(Settings()) | {"max_workers": "8", "workers": "2", "listen_addr": "-"} == SETTINGS


def test_texts_become_values() -> None:
    rows = {
        **SETTINGS,
        "enabled": "off",
        "workers": "0",
        "listen_addr": "127.0.0.1:27017,[::1]:27018 , -",
        "unix_socket_permissions": "0660",
        "log_level": "debug",
        "cursor_timeout": "1000",
    }
    settings = read(rows)
    assert settings.enabled is False
    assert settings.listen_addr == ("127.0.0.1:27017", "[::1]:27018")
    assert settings.unix_socket_permissions == 0o660
    assert settings.cursor_timeout == 1000
    assert settings.log_level == "debug"


@pytest.mark.parametrize("text", ["-", "", " - ", "-,-", ","])
def test_no_address(text: str) -> None:
    assert read({"listen_addr": text}).listen_addr == ()


def test_an_unknown_row_is_passed_over() -> None:
    """A newer library may have more settings than this Python, until the server is restarted."""
    assert read({"from_the_future": "1"}) == Settings()


@pytest.mark.parametrize("item", [item for item in generate.settings() if item.low is not None], ids=lambda i: i.name)
def test_ranges(item: generate.Setting) -> None:
    assert item.low is not None and item.high is not None
    write = "{:04o}".format if item.guc.octal else str
    for value in (item.low, item.high, item.default):
        assert getattr(read({item.name: write(value)}), item.name) == value
    for value in (item.low - 1, item.high + 1):
        with pytest.raises(
            ValueError, match=rf"^ferretdb\.{item.name}: .*(the range is {item.low} \.\. {item.high}|octal)"
        ):
            read({item.name: write(value)})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("enabled", "perhaps"),
        ("workers", "four"),
        ("workers", ""),
        ("workers", "9" * 5000),
        ("log_level", "trace"),
        ("log_level", ""),
        ("unix_socket_permissions", "0o700"),
        ("unix_socket_permissions", "0899"),
        ("unix_socket_permissions", "-700"),
        ("unix_socket_permissions", "77777"),
        ("listen_addr", "127.0.0.1"),
        ("listen_addr", "127.0.0.1:27017;-"),
        ("listen_unix", "relative.sock"),
        ("listen_unix", "/" + "x" * 107),
        ("listen_unix", "/" + "ü" * 54),
        ("python", "python3"),
        ("state_dir", "shm"),
    ],
)
def test_hostile_text_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=rf"^ferretdb\.{name}: ") as caught:
        read({name: text})
    assert "; " not in str(caught.value)
    assert len(text) < 4 or text not in str(caught.value), "the value is none of the log's business"


@given(st.dictionaries(st.sampled_from(list(gucs())), st.text(max_size=40)))
def test_any_text_is_read_or_refused(rows: dict[str, str]) -> None:
    try:
        settings = read(rows)
    except ValueError:
        return
    assert read(shown(settings)) == settings


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().workers = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("cores", "settings", "workers"),
    [
        (1, {}, 1),
        (2, {}, 1),
        (3, {}, 2),
        (8, {}, 4),
        (32, {}, 10),
        (32, {"pool_max_conns": 80}, 16),
        (32, {"pool_max_conns": 7}, 1),
        (32, {"pool_max_conns": 1}, 1),
        (32, {"max_workers": 3}, 3),
        (2, {"workers": 7}, 7),
        (2, {"workers": 7, "max_workers": 3}, 3),
        (2, {"workers": 12, "pool_max_conns": 12}, 12),
    ],
)
def test_worker_count(monkeypatch: pytest.MonkeyPatch, cores: int, settings: dict[str, Any], workers: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert replace(Settings(), **settings).worker_count() == workers


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:27017", "127.0.0.1", 27017),
        ("localhost:1", "localhost", 1),
        ("db-1.example_x:65535", "db-1.example_x", 65535),
        ("[::1]:27017", "::1", 27017),
        ("[fe80::1%eth0]:27017", "fe80::1%eth0", 27017),
        ("[::ffff:127.0.0.1]:27017", "::ffff:127.0.0.1", 27017),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    assert parse_address(text) == (host, port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        ":27017",
        "27017",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "127.0.0.1:027017",
        "127.0.0.1:+1",
        "127.0.0.1:1_0",
        "127.0.0.1:\u0661",
        "127.0.0.1: 1",
        "127.0.0.1:1\n",
        "::1:27017",
        "[::1]",
        "[]:1",
        "[::1:1",
        "[localhost]:1",
        "*:27017",
        "host name:1",
        "mongodb://127.0.0.1:27017",
    ],
)
def test_malformed_addresses(text: str) -> None:
    with pytest.raises(ValueError):
        parse_address(text)


# -- the message of the channel ---------------------------------------------------------------------------------------


def test_round_trip() -> None:
    first = config(listen_addr="127.0.0.1:27017, [::1]:27017", enabled="off", unix_socket_permissions="0777")
    sent = json.loads(json.dumps(first.plain()))
    assert Config.of(sent) == first
    assert sent["server"] == SERVER


def test_errors_of_the_configuration_files() -> None:
    errors = [{"name": "ferretdb.workers", "setting": "abc", "error": "setting could not be applied"}]
    message = json.dumps({"settings": SETTINGS, "server": {**SERVER, "setting_errors": errors}})
    found = checked(message)
    (error,) = found.server.setting_errors
    assert (error.name, error.setting, error.error) == tuple(errors[0].values())
    assert Config.of(json.loads(json.dumps(found.plain()))) == found


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"null", b"[]", b"\xff", b'{"settings": {}}', b'{"settings": 1, "server": {}}', b"[" * 100_000],
)
def test_a_broken_message_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError, match=": "):
        checked(text)


def test_an_error_in_a_message_names_the_setting() -> None:
    with pytest.raises(ValueError, match=r"^ferretdb\.workers: "):
        config(workers="-1")


@pytest.mark.parametrize(
    ("directories", "expected"),
    [
        ("/var/run/postgresql", "/var/run/postgresql"),
        ("/a, /b", "/a"),
        ('"/a b, c",/b', "/a b, c"),
        ('"/a""b"', '/a"b'),
        (", /b", "/b"),
        ("@abstract", "@abstract"),
    ],
)
def test_socket_directory(directories: str, expected: str) -> None:
    server = replace(config().server, socket_directories=directories)
    assert server.socket_directory() == expected


@pytest.mark.parametrize("directories", ["", " ", ","])
def test_no_socket_directory(directories: str) -> None:
    server = replace(config().server, socket_directories=directories)
    with pytest.raises(ValueError, match="unix_socket_directories"):
        server.socket_directory()

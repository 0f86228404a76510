"""The settings: what is generated from them is up to date, and what PostgreSQL sends is read strictly."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from config import generate
from config.settings import Config, Settings, parse_address
from tests.unit.samples import SERVER, SETTINGS, config

HIDDEN_FROM_PLAIN_USERS = {"python", "state_dir"}
NEEDS_RESTART = {"database", "max_workers"}


# -- generated files --------------------------------------------------------------------------------------------------


def test_generated_files_are_up_to_date() -> None:
    assert generate.stale() == [], "run python3 -m config"


@pytest.mark.parametrize("name", ["extension/settings.h", "docs/settings.md", "config/ferretdb.conf.sample"])
def test_every_setting_is_in_every_generated_file(name: str) -> None:
    found = re.findall(r"^(?:#|\| `|\tDefineCustom\w+\(\")ferretdb\.(\w+)", generate.FILES[name](), re.MULTILINE)
    assert found == list(Settings.model_fields)


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


# -- from_rows --------------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    assert Settings.from_rows({}) == Settings()
    # What a fresh server shows, but for what the sample changes on purpose.
    shown = Settings().to_rows()
    assert shown | {"max_workers": "8", "workers": "2", "listen_addr": "-"} == SETTINGS


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
    settings = Settings.from_rows(rows)
    assert settings.enabled is False
    assert settings.listen_addr == ("127.0.0.1:27017", "[::1]:27018")
    assert settings.unix_socket_permissions == 0o660
    assert settings.cursor_timeout == 1000
    assert settings.log_level == "debug"


@pytest.mark.parametrize("text", ["-", "", " - ", "-,-", ","])
def test_no_address(text: str) -> None:
    assert Settings.from_rows({"listen_addr": text}).listen_addr == ()


def test_an_unknown_row_is_passed_over() -> None:
    """A newer library may have more settings than this Python, until the server is restarted."""
    assert Settings.from_rows({"from_the_future": "1"}) == Settings()


@pytest.mark.parametrize("item", [item for item in generate.settings() if item.low is not None], ids=lambda i: i.name)
def test_ranges(item: generate.Setting) -> None:
    assert item.low is not None and item.high is not None
    write = "{:04o}".format if item.guc.octal else str
    for value in (item.low, item.high, item.default):
        assert getattr(Settings.from_rows({item.name: write(value)}), item.name) == value
    for value in (item.low - 1, item.high + 1):
        with pytest.raises(ValidationError):
            Settings.from_rows({item.name: write(value)})


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
    with pytest.raises(ValidationError) as caught:
        Settings.from_rows({name: text})
    assert [item["loc"] for item in caught.value.errors()] == [(name,)]


@given(st.dictionaries(st.sampled_from(list(Settings.model_fields)), st.text(max_size=40)))
def test_any_text_is_read_or_refused(rows: dict[str, str]) -> None:
    try:
        settings = Settings.from_rows(rows)
    except ValidationError:
        return
    assert Settings.from_rows(settings.to_rows()) == settings


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
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
def test_worker_count(monkeypatch: pytest.MonkeyPatch, cores: int, settings: dict[str, int], workers: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert Settings.model_validate(settings).worker_count() == workers


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
    assert Config.from_json(first.to_json()) == first
    assert json.loads(first.to_json())["settings"] == first.settings.to_rows()
    assert json.loads(first.to_json())["server"] == SERVER


def test_errors_of_the_configuration_files() -> None:
    errors = [{"name": "ferretdb.workers", "setting": "abc", "error": "setting could not be applied"}]
    message = json.dumps({"settings": SETTINGS, "server": {**SERVER, "setting_errors": errors}})
    (error,) = Config.from_json(message).server.setting_errors
    assert (error.name, error.setting, error.error) == tuple(errors[0].values())


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"null", b"[]", b"\xff", b'{"settings": {}}', b'{"settings": 1, "server": {}}', b"[" * 100_000],
)
def test_a_broken_message_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):
        Config.from_json(text)


def test_an_error_in_a_message_names_the_setting() -> None:
    with pytest.raises(ValidationError) as caught:
        config(workers="-1")
    assert caught.value.errors()[0]["loc"] == ("settings", "workers")


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
    server = config().server.model_copy(update={"socket_directories": directories})
    assert server.socket_directory() == expected


@pytest.mark.parametrize("directories", ["", " ", ","])
def test_no_socket_directory(directories: str) -> None:
    server = config().server.model_copy(update={"socket_directories": directories})
    with pytest.raises(ValueError, match="unix_socket_directories"):
        server.socket_directory()

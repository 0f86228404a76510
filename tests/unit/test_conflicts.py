"""Settings that cannot be in force as they were written."""

from __future__ import annotations

from dataclasses import replace

import pytest

from supervisor.conflicts import conflicts
from tests.unit.samples import config


def wrong(**settings: str) -> dict[str, str]:
    """What is told of them."""
    return {name: conflict.text for name, conflict in conflicts(config(**settings)).items() if conflict}


def test_defaults_are_fine() -> None:
    assert wrong() == {}


@pytest.mark.parametrize(
    ("settings", "name", "text"),
    [
        ({"workers": "9", "max_workers": "8"}, "workers", "9 are more than ferretdb.max_workers (8)"),
        ({"workers": "4", "pool_max_conns": "3", "pool_min_conns": "3"}, "pool_max_conns", "3 are fewer than workers"),
        ({"pool_max_conns": "101"}, "pool_max_conns", "101 are more than max_connections (100)"),
        ({"pool_min_conns": "41"}, "pool_min_conns", "41 are more than ferretdb.pool_max_conns (40)"),
        ({"python": "/nowhere"}, "python", 'cannot execute "/nowhere"'),
        ({"cursor_timeout": "600500"}, "cursor_timeout", "600.5 s are more than documentdb.defaultCursorExpiry"),
    ],
)
def test_what_is_wrong_is_told_by_the_settings_name(settings: dict[str, str], name: str, text: str) -> None:
    found = wrong(**settings)
    assert list(found) == [name]
    assert found[name].startswith(f"ferretdb.{name}: {text}")


def test_a_library_that_does_not_tell_of_cursors_is_not_blamed() -> None:
    silent = config(cursor_timeout="86400000")
    silent = replace(silent, server=replace(silent.server, cursor_files_seconds=None))
    assert not any(conflicts(silent).values())

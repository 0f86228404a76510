"""How a worker reaches PostgreSQL, and its share of the connections."""

from __future__ import annotations

from dataclasses import replace

import pytest
from psycopg.conninfo import conninfo_to_dict

from config.settings import Config
from pg_ferret.engine.limits import conninfo, pool_limits
from tests.unit.samples import config


def test_the_socket_directory_may_have_any_name() -> None:
    changed = replace(config().server, socket_directories="/tmp/a b\\c, /run/postgresql")
    parts = conninfo_to_dict(conninfo(Config(settings=config().settings, server=changed)))
    assert parts["host"] == "/tmp/a b\\c"
    assert "documentdb.localhost_connection_string=host=/tmp/a\\ b\\\\c " in str(parts["options"])


def test_without_a_unix_socket_there_is_a_clear_error() -> None:
    changed = replace(config().server, socket_directories="")
    with pytest.raises(ValueError, match="unix_socket_directories"):
        conninfo(Config(settings=config().settings, server=changed))


@pytest.mark.parametrize(
    ("workers", "pool", "server", "expected"),
    [
        (4, (4, 40), 100, (1, 10)),
        (4, (5, 40), 100, (2, 10)),
        (2, (0, 3), 100, (0, 1)),
        (4, (40, 400), 48, (10, 10)),
        (64, (4, 40), 100, (1, 1)),
    ],
)
def test_shares(workers: int, pool: tuple[int, int], server: int, expected: tuple[int, int]) -> None:
    base = config()
    settings = replace(base.settings, workers=workers, max_workers=64, pool_min_conns=pool[0], pool_max_conns=pool[1])
    facts = replace(base.server, max_connections=server, superuser_reserved_connections=3, reserved_connections=0)
    limits = pool_limits(Config(settings=settings, server=facts))
    assert (limits.smallest, limits.largest) == expected


@pytest.mark.parametrize(
    ("processors", "workers", "each", "gives_way"),
    [(1, 1, 1, False), (1, 2, 1, False), (2, 1, 2, False), (2, 2, 1, True), (3, 2, 2, False), (2, 8, 1, True)],
)
def test_a_worker_has_its_share_of_the_processors(
    monkeypatch: pytest.MonkeyPatch, processors: int, workers: int, each: int, gives_way: bool
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(processors)))
    base = config()
    for batch in (True, False):
        settings = replace(base.settings, workers=workers, max_workers=64, batch_scheduling=batch)
        limits = pool_limits(Config(settings=settings, server=base.server))
        assert (limits.processors, limits.gives_way) == (each, batch and gives_way)


def test_no_timeout_means_waiting_for_ever() -> None:
    base = config()
    settings = replace(base.settings, query_wait_timeout=0)
    assert pool_limits(Config(settings=settings, server=base.server)).wait_seconds is None

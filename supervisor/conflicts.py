"""Settings that are fine by themselves and cannot be in force as they were written, or are of no use so."""

from __future__ import annotations

import os
from typing import NamedTuple

from config.settings import SECOND, Config

_Wrong = tuple[str, str] | None  # text and hint


class Conflict(NamedTuple):
    """What is wrong with a setting."""

    text: str  # begins with its name
    hint: str
    value: object  # as it was written


def conflicts(config: Config) -> dict[str, Conflict | None]:
    """By the settings' names without prefix, all that are looked at."""
    found = {
        "workers": _workers(config),
        "pool_max_conns": _pool_max_conns(config),
        "pool_min_conns": _pool_min_conns(config),
        "cursor_timeout": _cursor_timeout(config),
        "python": _python(config),
    }
    return {
        name: wrong and Conflict(f"ferretdb.{name}: {wrong[0]}", wrong[1], getattr(config.settings, name))
        for name, wrong in found.items()
    }


def _workers(config: Config) -> _Wrong:
    workers, most = config.settings.workers, config.settings.max_workers
    if workers <= most:
        return None
    return f"{workers} are more than ferretdb.max_workers ({most})", "ferretdb.max_workers takes a restart"


def _pool_max_conns(config: Config) -> _Wrong:
    most, workers = config.settings.pool_max_conns, config.settings.worker_count()
    allowed = config.server.max_connections
    if most < workers:
        text = f"{most} are fewer than workers, each needs one ({workers})"
        return text, "lower ferretdb.workers or raise ferretdb.pool_max_conns"
    if most > allowed:
        return f"{most} are more than max_connections ({allowed})", "each worker has its part of what PostgreSQL allows"
    return None


def _pool_min_conns(config: Config) -> _Wrong:
    least, most = config.settings.pool_min_conns, config.settings.pool_max_conns
    if least <= most:
        return None
    return f"{least} are more than ferretdb.pool_max_conns ({most})", "ferretdb.pool_max_conns is in force for both"


def _cursor_timeout(config: Config) -> _Wrong:
    kept, removed_after = config.settings.cursor_timeout, config.server.cursor_files_seconds
    if removed_after is None or kept <= removed_after * SECOND:
        return None
    return (
        f"{kept / SECOND:g} s are more than documentdb.defaultCursorExpiryTimeLimitSeconds ({removed_after})",
        "sorted and grouped results end after that, when pg_cron removes their files; 3600 is the most there can be",
    )


def _python(config: Config) -> _Wrong:
    python = config.settings.python
    if os.access(python, os.X_OK):
        return None
    return f'cannot execute "{python}"', "the running supervisor goes on; the next one could not start"

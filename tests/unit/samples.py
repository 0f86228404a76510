"""A configuration as the launcher sends it, for tests that need some."""

from __future__ import annotations

import json

from config.check import checked
from config.settings import Config

SETTINGS = {
    "database": "postgres",
    "max_workers": "8",
    "max_requests": "0",
    "max_requests_jitter": "0",
    "client_timeout": "60000",
    "client_memory": "1024",
    "enabled": "on",
    "workers": "2",
    "listen_addr": "-",
    "listen_unix": "",
    "unix_socket_permissions": "0700",
    "pool_min_conns": "4",
    "pool_max_conns": "40",
    "batch_scheduling": "on",
    "query_wait_timeout": "30000",
    "max_connections": "10000",
    "cursor_timeout": "600000",
    "worker_timeout": "30000",
    "graceful_timeout": "30000",
    "log_level": "info",
    "python": "/usr/bin/python3",
    "state_dir": "",
}
SERVER = {
    "socket_directories": "/nowhere",
    "port": 5432,
    "user": "postgres",
    "database": "postgres",
    "data_directory": "/nowhere",
    "max_connections": 100,
    "superuser_reserved_connections": 3,
    "reserved_connections": 0,
    "version": "18.6",
    "documentdb": None,
    "cursor_files_seconds": 600,
    "in_recovery": False,
    "started": "2026-01-01 00:00:00+00",
    "setting_errors": [],
}


def message(**settings: str) -> bytes:
    """The JSON of a settings message."""
    return json.dumps({"settings": {**SETTINGS, **settings}, "server": SERVER}).encode()


def config(**settings: str) -> Config:
    """The same, read."""
    return checked(message(**settings))

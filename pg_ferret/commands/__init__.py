"""The commands.  Importing this package fills the registry."""

from pg_ferret.commands import cursors, ddl, diagnostic, handshake, indexes, reads, sessions, writes

__all__ = ["cursors", "ddl", "diagnostic", "handshake", "indexes", "reads", "sessions", "writes"]

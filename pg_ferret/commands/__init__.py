"""The commands.  Importing this package fills the registry."""

from pg_ferret.commands import crud, cursors, ddl, diagnostic, handshake, indexes, sessions

__all__ = ["crud", "cursors", "ddl", "diagnostic", "handshake", "indexes", "sessions"]

"""The supervisor: binds the listen sockets, preforks the gateway's workers, watches and replaces them.

The launcher (extension/launcher.c) execs ``python3 -P -m supervisor``.  No event loop, no thread and no
PostgreSQL connection lives here, so that every fork is clean.
"""

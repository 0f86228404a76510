"""The private directory that holds the workers' shared state.

It lives in memory (/dev/shm) unless ``ferretdb.state_dir`` says otherwise.  What is in it belongs to one run of the
postmaster, as the engine's cursor files do, and is wiped when that changes, or when another version of this code has
written it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from pathlib import Path

from config.settings import Config
from pg_ferret.errors import StateDirError
from pg_ferret.state.cursors import FORMAT, REGISTRY

_IDENTITY = "postmaster"
# LMDB's table of readers beside the registry: 2,048 of 64 bytes, and its head.
_LOCK_FILE = f"{REGISTRY}-lock"
_LOCK_BYTES = 2049 * 64


def path(config: Config) -> Path:
    """Where the state is: one directory per data directory, so that several servers can share a machine."""
    own = hashlib.sha256(_data_directory(config).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return Path(config.settings.state_dir or "/dev/shm") / f"pg_ferret.{own}"


def _data_directory(config: Config) -> str:
    """The data directory's path, device and inode: servers in containers may share /dev/shm and have equal paths."""
    place = config.server.data_directory
    try:
        found = os.stat(place)
    except OSError:
        return place
    return f"{place}\n{found.st_dev}:{found.st_ino}"


def prepare(config: Config) -> Path:
    """Make the directory ready for the workers of this postmaster; called before they are forked.

    Raises StateDirError when it cannot be made or belongs to somebody else.
    """
    place = path(config)
    identity = f"{_data_directory(config)}\n{config.server.started}\n{FORMAT}\n"
    try:
        _make_private(place)
        known = place / _IDENTITY
        if not known.exists() or known.read_text() != identity:
            shutil.rmtree(place)
            _make_private(place)
            known.write_text(identity)
        _reserve(place)
    except OSError as error:
        raise StateDirError(f"ferretdb.state_dir: {place}: {error.strerror or error}") from error
    return place


def _reserve(place: Path) -> None:
    """Have the room that is written to through a memory map: a full file system would end a worker by SIGBUS."""
    descriptor = os.open(place / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, _LOCK_BYTES)
    finally:
        os.close(descriptor)


def _make_private(place: Path) -> None:
    place.mkdir(mode=0o700, parents=False, exist_ok=True)
    found = place.lstat()
    # /dev/shm is open to all: somebody may have made the directory before us, to read our cursors.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PermissionError(1, "belongs to another user")
    place.chmod(0o700)

"""The file behind the registry of cursors: an LMDB environment that all workers map, and that grows.

In memory it is written to through the map, which spares several system calls for each commit.  But where the file
system is full, whoever writes to a page that is not there yet is ended by SIGBUS.  So every page of the file has been
allocated, and LMDB's own limit, the size of the map, is the size of the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import lmdb

MOST_BYTES: Final = 1 << 30
_FIRST_BYTES: Final = 1 << 20
# What it grows by, or by a quarter if that is more; where there is no room for it, by half of that, down to the least.
_STEP_BYTES: Final = 1 << 20
_LEAST_STEP_BYTES: Final = 1 << 16
_BLOCK_BYTES: Final = 512  # of stat(2)


def in_memory(place: Path) -> bool:
    """Whether this directory is in a tmpfs, where what has been allocated once can be written to ever after.

    File systems that write each change to another place (Btrfs, ZFS) need room for that each time.  Without /proc the
    answer is no.
    """
    device = os.stat(place).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:
        return False
    # See proc_pid_mountinfo(5): the device is the third field, the type the first one behind the hyphen.
    for mount in mounts.splitlines():
        fields, _, more = mount.partition(" - ")
        if fields.split(" ")[2] == wanted:
            return more.split(" ")[0] == "tmpfs"
    return False


class Store:
    """The environment; who gets MapFullError or MapResizedError from it calls `grow` and tries again."""

    def __init__(self, file: Path) -> None:
        """Raises OSError or lmdb.Error when there is no room."""
        self._mapped = in_memory(file.parent)
        # For as long as LMDB has the file, which may be removed, and another one be made in its place.
        self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with self._alone():
                self.environment = self._open(file)
        except BaseException:
            os.close(self._descriptor)
            raise
        self.environment.reader_check()
        self._page_bytes: int = self.environment.stat()["psize"]

    def _open(self, file: Path) -> lmdb.Environment:
        found = os.fstat(self._descriptor)
        self._bytes = max(found.st_size, _FIRST_BYTES) if self._mapped else MOST_BYTES
        with contextlib.ExitStack() as failed:
            if not found.st_size:
                # Half of a beginning would be no registry, also when there is room again.
                failed.callback(os.ftruncate, self._descriptor, 0)
            environment = lmdb.open(
                str(file),
                subdir=False,
                map_size=self._bytes,
                max_dbs=1,
                max_readers=2048,
                sync=False,
                metasync=False,
                writemap=self._mapped,
                mode=0o600,
            )
            failed.callback(environment.close)
            if not os.path.samestat(found, os.stat(file)):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            # LMDB has made the file as large as its map.
            if self._mapped and os.fstat(self._descriptor).st_blocks * _BLOCK_BYTES < self._bytes:
                os.posix_fallocate(self._descriptor, 0, self._bytes)
            failed.pop_all()
        return environment

    @property
    def pages(self) -> int:
        """How many there is room for, as far as this process knows."""
        return self._bytes // self._page_bytes

    def grow(self) -> None:
        """Make room for more, or know of what others have made; nobody in this process has a transaction.

        Raises lmdb.MapFullError when there is as much as there may be, OSError when the file system is full.
        """
        if not self._mapped:
            raise lmdb.MapFullError
        with self._alone():
            found = os.fstat(self._descriptor).st_size
            if found == self._bytes:
                found = _larger(self._descriptor, found)
            self.environment.set_mapsize(found)
            self._bytes = found

    def close(self) -> None:
        """Unmap the file."""
        with self._alone():  # the last one may end what somebody who opens it begins to use
            self.environment.close()
        os.close(self._descriptor)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else maps the file meanwhile: with each map LMDB makes it as large as that, or as small."""
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)


def _larger(descriptor: int, size: int) -> int:
    """Make the file larger; its new size in bytes."""
    if size >= MOST_BYTES:
        raise lmdb.MapFullError
    step = max(size // 4, _STEP_BYTES)
    while True:
        larger = min(size + step, MOST_BYTES)
        try:
            os.posix_fallocate(descriptor, size, larger - size)
        except OSError:
            if step == _LEAST_STEP_BYTES:
                raise
            step = max(step // 2, _LEAST_STEP_BYTES)
        else:
            return larger

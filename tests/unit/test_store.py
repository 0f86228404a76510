"""The file of the registry: LMDB must never get to a page that has not been allocated, and use all that have been."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import lmdb
import pytest

from pg_ferret.errors import CommandError, StateDirError
from pg_ferret.state.cursors import REGISTRY, Cursor, Cursors, owner
from pg_ferret.state.store import Store, _larger, in_memory

_NEVER = float("inf")


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have a file system with room for files of so many bytes."""
    allocate = os.posix_fallocate

    def limit(size: int) -> None:
        def posix_fallocate(descriptor: int, offset: int, length: int) -> None:
            if offset + length > size:
                raise OSError(errno.ENOSPC, "No space left on device")
            allocate(descriptor, offset, length)

        monkeypatch.setattr(os, "posix_fallocate", posix_fallocate)

    return limit


def cursor(size: int, session: bytes = b"s" * 16) -> Cursor:
    return Cursor(owner(b"db.c", b"me", session), _NEVER, b"x" * size)


def check(place: Path) -> None:
    """There is no page that has not been allocated, so none that LMDB could get to."""
    found = (place / REGISTRY).stat()
    assert found.st_blocks * 512 >= found.st_size


def start(work: Callable[[], None]) -> int:
    """In a process of its own; the process id."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def run(work: Callable[[], None]) -> None:
    """In a process of its own, which has to end well."""
    assert os.waitpid(start(work), 0)[1] == 0


def test_what_is_in_memory(place: Path) -> None:
    assert in_memory(place)
    assert not in_memory(Path("/proc"))


def use(place: Path, seed: int, turns: int) -> None:
    """Open, go on with and end cursors of all sizes."""
    registry = Cursors(place)
    chance = random.Random(seed)
    alive: dict[int, Cursor] = {}
    for turn in range(turns):
        what = chance.random()
        size = chance.choice([10, 300, 900, 3000, 40_000, 2_000_000 if turn % 20 == 0 else 50])
        if what < 0.4 or not alive:
            cursor_id = chance.getrandbits(63)
            alive[cursor_id] = cursor(size, chance.choice([b"", b"s" * 16, chance.randbytes(16)]))
            registry.open(cursor_id, alive[cursor_id])
        elif what < 0.75:
            cursor_id = chance.choice(list(alive))
            assert registry.advance(cursor_id, alive[cursor_id], _NEVER, b"y" * size)
            alive[cursor_id] = replace(alive[cursor_id], continuation=b"y" * size)
        elif what < 0.97:
            cursor_id = chance.choice(list(alive))
            del alive[cursor_id]
            assert registry.remove([cursor_id]) == [cursor_id]
        else:
            cursor_id, known = chance.choice(list(alive.items()))
            assert registry.get(cursor_id) == known
        check(place)
    for cursor_id, known in alive.items():
        assert registry.get(cursor_id) == known
    registry.close()


def test_several_processes_use_and_enlarge_one_registry(place: Path) -> None:
    def work(seed: int) -> None:
        use(place, seed, 600)
        use(place, seed + 4, 600)  # who comes later finds a large file

    processes = [start(partial(work, seed)) for seed in range(4)]
    assert [os.waitpid(pid, 0)[1] for pid in processes] == [0] * 4
    assert (place / REGISTRY).stat().st_size > 4 << 20


@pytest.mark.parametrize(
    "use",
    [
        lambda registry: registry.get(39) == cursor(100_000),
        lambda registry: registry.known(39),
        lambda registry: registry.count() == 39,
        lambda registry: registry.expired() == ([], None),
        lambda registry: registry.of_owners(b"db.c\0") == (list(range(1, 40)), None),
        lambda registry: registry.of_sessions([b"s" * 16]) == list(range(1, 40)),
        lambda registry: registry.advance(39, cursor(10), _NEVER, b"next"),
        lambda registry: registry.remove([39]) == [39],
        lambda registry: registry.bereave([39]) or registry.of_owners(b"db.c\0") == (list(range(1, 39)), None),
        lambda registry: registry.open(40, cursor(10)) or registry.count() == 40,
    ],
)
def test_who_comes_back_knows_what_another_process_has_added(place: Path, use: Callable[[Cursors], bool]) -> None:
    registry = Cursors(place)
    registry.open(1, cursor(10))
    before = (place / REGISTRY).stat().st_size

    def enlarge() -> None:
        other = Cursors(place)
        for number in range(2, 40):
            other.open(number, cursor(100_000))

    run(enlarge)
    after = (place / REGISTRY).stat().st_size
    assert after > before
    assert use(registry)
    assert (place / REGISTRY).stat().st_size == after, "there was room enough"
    registry.close()


# A record of several pages needs them in one piece: where there are hardly any, it may find none.
@pytest.mark.parametrize(
    ("size", "room"),
    [*product([100, 700, 5000], [1 << 20, (1 << 20) + (1 << 16), 4 << 20]), (20_000, 4 << 20)],
)
def test_where_the_file_system_is_full_open_cursors_go_on_and_end(
    place: Path, most: Callable[[int], None], size: int, room: int
) -> None:
    most(room)
    registry = Cursors(place)
    for _ in range(2):  # what has been removed makes room for others
        opened: list[int] = []

        def fill(opened: list[int] = opened) -> None:
            for number in range(100_000):
                registry.open(number, cursor(size, number.to_bytes(16)))
                opened.append(number)

        with pytest.raises(CommandError) as refused:
            fill()
        assert refused.value.code == 14031
        assert len(opened) * (size + 300) > room / 4
        with registry._env.begin() as transaction:
            found = [transaction.stat(), transaction.stat(registry._by_session)]
        used = sum(one["leaf_pages"] + one["overflow_pages"] for one in found) * mmap.PAGESIZE
        assert room / 2 < used < room * 0.8 + (size + 100_000)
        for cursor_id in opened * 2:
            assert registry.advance(cursor_id, cursor(size, cursor_id.to_bytes(16)), _NEVER, b"y" * size)
        check(place)
        registry.bereave(opened[:100])
        assert registry.remove(opened) == opened
        assert registry.count() == 0
    assert (place / REGISTRY).stat().st_size == room
    registry.close()


def test_a_file_system_without_room_is_told_at_once(place: Path, most: Callable[[int], None]) -> None:
    most(0)
    with pytest.raises(StateDirError, match=r"ferretdb\.state_dir: .*No space left"):
        Cursors(place)
    most(1 << 20)
    registry = Cursors(place)
    check(place)
    registry.close()


def test_half_of_a_beginning_is_no_obstacle_when_there_is_room_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_(path: str, **_: object) -> None:
        Path(path).write_bytes(bytes(4096))
        raise lmdb.DiskError("No space left on device")

    monkeypatch.setattr(lmdb, "open", open_)
    with pytest.raises(lmdb.DiskError):
        Store(place / REGISTRY)
    monkeypatch.undo()
    Store(place / REGISTRY).close()


@pytest.mark.parametrize(
    ("before", "room", "after"),
    [
        (1 << 20, 1 << 30, 2 << 20),
        (64 << 20, 1 << 30, 80 << 20),
        (64 << 20, 79 << 20, 72 << 20),
        (1 << 20, (1 << 20) + (1 << 16), (1 << 20) + (1 << 16)),
        ((1 << 30) - 4096, 1 << 31, 1 << 30),
    ],
)
def test_it_grows_by_a_quarter_or_what_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, before: int, room: int, after: int
) -> None:
    def posix_fallocate(_: int, offset: int, length: int) -> None:
        if offset + length > room:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", posix_fallocate)
    assert _larger(0, before) == after


def test_nothing_is_left_of_one_that_is_closed(place: Path) -> None:
    before = os.listdir("/proc/self/fd")
    store = Store(place / REGISTRY)
    with pytest.raises(BlockingIOError), open(place / REGISTRY) as other, store._alone():
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    store.close()
    assert os.listdir("/proc/self/fd") == before


def test_whoever_comes_later_allocates_nothing(place: Path, most: Callable[[int], None]) -> None:
    Store(place / REGISTRY).close()
    most(0)
    Store(place / REGISTRY).close()


def test_a_reader_that_was_killed_keeps_no_page(place: Path) -> None:
    reader, writer = os.pipe()
    started, ended = os.pipe()

    def hold() -> None:
        registry = Cursors(place)
        os.write(ended, b"!")
        os.read(reader, 1)
        registry.close()

    def read() -> None:
        transaction = Cursors(place)._env.begin()
        os.kill(os.getpid(), signal.SIGKILL)
        transaction.abort()

    holder = start(hold)  # whoever finds nobody else begins anew
    os.read(started, 1)
    assert os.waitpid(start(read), 0)[1] == signal.SIGKILL
    registry = Cursors(place)
    assert "no active readers" in registry._env.readers()
    registry.close()
    os.write(writer, b"!")
    assert os.waitpid(holder, 0)[1] == 0
    for descriptor in (reader, writer, started, ended):
        os.close(descriptor)


def test_a_registry_is_written_to_through_its_map_in_memory_only(place: Path, tmp_path: Path) -> None:
    for where in (place, tmp_path):
        store = Store(where / REGISTRY)
        assert store.environment.flags()["writemap"] == in_memory(where)
        store.close()


def test_a_registry_that_has_been_replaced_grows_by_itself(place: Path) -> None:
    """Its processes go on with it until they end; here the directory has been removed, and others use a new one."""
    old = place / "old"
    old.mkdir()
    registry = Cursors(old)
    for number in range(20):
        registry.open(number, cursor(200_000))
    old.rename(place / "gone")
    old.mkdir()
    new = Cursors(old)
    new.open(1, cursor(10))

    for number in range(20, 40):
        registry.open(number, cursor(200_000))
    assert (place / "gone" / REGISTRY).stat().st_size > 6 << 20
    assert (old / REGISTRY).stat().st_size == 1 << 20
    assert registry.get(39) == cursor(200_000)
    assert new.count() == 1
    registry.close()
    new.close()


def test_a_file_that_is_replaced_while_it_is_opened_is_not_used(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def replaced(descriptor: int, operation: int) -> None:
        (place / REGISTRY).unlink(missing_ok=True)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", replaced)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Stale"):
        Store(place / REGISTRY)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_worker_may_start_while_another_one_enlarges_the_registry(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enlarge() -> None:
        monkeypatch.undo()
        other = Cursors(place)
        for number in range(20):
            other.open(number, cursor(200_000))

    def slowly(file: Path) -> Store:
        store = Store(file)
        run(enlarge)
        return store

    monkeypatch.setattr("pg_ferret.state.cursors.Store", slowly)
    registry = Cursors(place)
    assert registry.count() == 20
    registry.close()


def test_there_is_an_end_to_growth(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pg_ferret.state.store.MOST_BYTES", 1 << 21)
    registry = Cursors(place)
    with pytest.raises(CommandError) as refused:
        registry.open(1, cursor(3 << 20))
    assert (refused.value.code, (place / REGISTRY).stat().st_size) == (146, 1 << 21)
    registry.open(1, cursor(10))
    registry.close()


def test_on_a_disk_the_file_is_as_large_as_what_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pg_ferret.state.store.in_memory", lambda _: False)  # temporary files may be
    registry = Cursors(tmp_path)
    registry.open(1, cursor(2 << 20))
    assert 2 << 20 < (tmp_path / REGISTRY).stat().st_size < 3 << 20
    registry.close()

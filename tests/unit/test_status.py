"""The status slots: what one process writes, another reads."""

from __future__ import annotations

import os

import pytest

from pg_ferret.status import LAST_EXIT_BYTES, MESSAGE_BYTES, NUMBERS, SLOT_BYTES, Kind, Slot, State, StatusTable


def test_a_slot_keeps_numbers_and_texts_apart() -> None:
    table = StatusTable(2)
    assert len(table) == 3
    for index, slot in enumerate(table.slots):
        slot.set(kind=Kind.WORKER, state=State.READY, rss=-1, requests=2**60 + index)
        slot.last_exit = "signal KILL"
        slot.message = f"slot {index}"
    for index, slot in enumerate(table.slots):
        assert slot.get("requests") == 2**60 + index
        assert slot.get("rss") == -1
        assert slot.last_exit == "signal KILL"
        assert slot.message == f"slot {index}"
        assert len(slot.raw()) == SLOT_BYTES == 512
    table[1].clear()
    assert table[1].raw() == bytes(SLOT_BYTES)
    assert table[2].get("requests") == 2**60 + 2


def test_a_child_process_shares_the_table() -> None:
    table = StatusTable(1)
    pid = os.fork()
    if not pid:
        table[1].set(pid=4711)
        table[1].beat()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert table[1].get("pid") == 4711
    assert 0 <= table[1].heartbeat_age() < 60


@pytest.mark.parametrize("text", ["x" * 1000, "ä" * 1000, "\0evil\0", "\udcff broken"])
def test_texts_fit_and_stay_utf8(text: str) -> None:
    slot = Slot(memoryview(bytearray(SLOT_BYTES)))
    slot.message = text
    slot.last_exit = text
    raw = slot.raw()
    assert raw[-1] == 0
    assert len(slot.message.encode()) < MESSAGE_BYTES
    assert len(slot.last_exit.encode()) < LAST_EXIT_BYTES
    raw[8 * len(NUMBERS) :].decode()
    assert "\0" not in slot.message

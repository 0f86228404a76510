"""The SEQPACKET channel against a real socket pair."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from pg_ferret.status import SLOT_BYTES
from supervisor.channel import MESSAGES_PER_ROUND, Channel, Closed, Verb

Pair = tuple[Channel, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, launcher = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, launcher:
        yield Channel(ours), launcher


def test_messages_come_whole_and_in_order(pair: Pair) -> None:
    channel, launcher = pair
    for message in (b'S{"a": 1}', b"Rprimary", b"Qfast"):
        launcher.send(message)
    expected = [(Verb.SETTINGS, b'{"a": 1}'), (Verb.ROLE, b"primary"), (Verb.QUIT, b"fast")]
    assert list(channel.receive()) == expected
    assert list(channel.receive()) == []


def test_an_unknown_verb_is_passed_over(pair: Pair) -> None:
    channel, launcher = pair
    launcher.send(b"?what")
    launcher.send(b"Qfast")
    assert list(channel.receive()) == [(Verb.QUIT, b"fast")]


def test_a_flood_does_not_hold_the_loop(pair: Pair) -> None:
    channel, launcher = pair
    launcher.setblocking(False)
    for _ in range(MESSAGES_PER_ROUND + 10):
        launcher.send(b"Rprimary")
    assert len(list(channel.receive())) == MESSAGES_PER_ROUND
    assert len(list(channel.receive())) == 10


def test_last_words_are_read_before_the_end(pair: Pair) -> None:
    channel, launcher = pair
    channel.send_slot(0, bytes(SLOT_BYTES))  # unread by the launcher: we get ECONNRESET once
    launcher.send(b"Qfast")
    launcher.close()
    messages = channel.receive()
    assert next(messages) == (Verb.QUIT, b"fast")
    with pytest.raises(Closed):
        next(messages)


def test_slot_message(pair: Pair) -> None:
    channel, launcher = pair
    assert channel.send_slot(258, b"x" * SLOT_BYTES)
    assert launcher.recv(1000) == b"s\x02\x01\x00\x00" + b"x" * SLOT_BYTES


def test_sending_never_blocks(pair: Pair) -> None:
    channel, launcher = pair
    while channel.send_slot(1, bytes(SLOT_BYTES)):
        pass
    launcher.recv(1000)
    assert channel.send_slot(1, bytes(SLOT_BYTES))
    launcher.close()
    assert not channel.send_slot(1, bytes(SLOT_BYTES))


def test_the_descriptor_stays_blocking_for_its_other_holders(pair: Pair) -> None:
    channel, _ = pair
    assert list(channel.receive()) == []
    assert channel.socket.getblocking()

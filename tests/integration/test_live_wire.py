"""The wire protocol at the live server, byte by byte."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Any

import bson
import crc32c
import psycopg
import pytest
from pymongo import MongoClient
from pymongo.database import Database

from dev.cluster import Cluster, wait_for
from pg_ferret.engine.limits import conninfo
from tests.integration.conftest import configuration
from tests.wire import frame, message, sequence

Document = dict[str, Any]


@pytest.fixture
def wire(cluster: Cluster) -> Iterator[socket.socket]:
    """A bare connection."""
    with socket.create_connection(("127.0.0.1", cluster.port), timeout=30) as made:
        yield made


def exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        assert more, "the server closed the connection"
        data += more
    return data


def reply(connection: socket.socket) -> tuple[int, Document]:
    """The answered id and the document."""
    length, _, answered, opcode = struct.unpack("<iiii", exactly(connection, 16))
    body = exactly(connection, length - 16)
    return answered, bson.decode(body[5:] if opcode == 2013 else body[20:])


def closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_old_hello(wire: socket.socket) -> None:
    query = struct.pack("<i", 0) + b"admin.$cmd\0" + struct.pack("<ii", 0, -1) + bson.encode({"isMaster": 1})
    wire.sendall(frame(query, 7, 2004))
    answered, document = reply(wire)
    assert (answered, document["ismaster"]) == (7, True)


def test_requests_sent_ahead_are_answered_in_order(wire: socket.socket) -> None:
    wire.sendall(b"".join(message({"ping": 1, "$db": "admin"}, number) for number in range(100)))
    assert [reply(wire) for _ in range(100)] == [(number, {"ok": 1.0}) for number in range(100)]


def test_more_to_come_is_not_answered(wire: socket.socket, database: Database[Document]) -> None:
    insert = {"insert": "c", "documents": [{"_id": 1}], "$db": database.name}
    wire.sendall(message(insert, 1, flags=2) + message({"nonsense": 1, "$db": "x"}, 2, flags=2))
    wire.sendall(message({"ping": 1, "$db": "admin"}, 3))
    assert reply(wire)[0] == 3
    assert database.c.count_documents({}) == 1


def test_unacknowledged_writes_are_made_though_the_client_has_gone(
    cluster: Cluster, database: Database[Document]
) -> None:
    database.c.insert_one({"_id": 0})
    name = f"'{database.name}'"
    (table,) = cluster.psql(
        "select 'documentdb_data.documents_' || collection_id from documentdb_api_catalog.collections"
        f" where database_name = {name} and collection_name = 'c'"
    )[0]
    with psycopg.connect(conninfo(configuration(cluster))) as blocker:
        blocker.execute(f"lock table {table} in exclusive mode")
        with socket.create_connection(("127.0.0.1", cluster.port), timeout=30) as leaving:
            for number in (1, 2, 3):
                insert = {"insert": "c", "documents": [{"_id": number}], "$db": database.name}
                leaving.sendall(message(insert, number, flags=2))
        wait_for(
            lambda: cluster.psql("select 1 from pg_stat_activity where wait_event_type = 'Lock'"),
            what="the first one waits",
        )
    wait_for(lambda: database.c.count_documents({}) == 4, what="all are made")


def test_checksums_are_verified(wire: socket.socket) -> None:
    bare = message({"ping": 1, "$db": "admin"}, 5, flags=1)
    bare = struct.pack("<i", len(bare) + 4) + bare[4:]
    wire.sendall(bare + struct.pack("<I", crc32c.crc32c(bare)))
    assert reply(wire) == (5, {"ok": 1.0})
    wire.sendall(bare + struct.pack("<I", crc32c.crc32c(bare) ^ 1))
    assert closed(wire)


def test_document_sequences(wire: socket.socket, database: Database[Document]) -> None:
    documents = [bson.encode({"_id": number}) for number in range(5)]
    command = {"insert": "c", "$db": database.name}
    wire.sendall(message(command, sections=sequence("documents", documents)))
    assert reply(wire)[1] == {"n": 5, "ok": 1.0}
    update = sequence("updates", [bson.encode({"q": {"_id": 1}, "u": {"$set": {"a": 1}}})])
    wire.sendall(message({"update": "c", "$db": database.name}, sections=update))
    assert reply(wire)[1]["nModified"] == 1
    wire.sendall(message(command, sections=sequence("documents", documents) + sequence("other", documents)))
    assert reply(wire)[1]["code"] == 40415


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        struct.pack("<iiii", 2**31 - 1, 1, 0, 2013),
        struct.pack("<iiii", 48_000_001, 1, 0, 2013),
        struct.pack("<iiii", 0, 1, 0, 2013),
        frame(b"", opcode=2012),
        frame(b"\0\0\0\0"),
    ],
    ids=["http", "2GB", "48MB+1", "empty", "compressed", "no sections"],
)
def test_the_offender_alone_is_closed(wire: socket.socket, client: MongoClient[Document], garbage: bytes) -> None:
    wire.sendall(garbage)
    assert closed(wire)
    assert client.admin.command("ping") == {"ok": 1.0}


def test_half_a_message(wire: socket.socket, client: MongoClient[Document]) -> None:
    wire.sendall(message({"ping": 1, "$db": "admin"})[:30])
    wire.shutdown(socket.SHUT_WR)
    assert closed(wire)
    assert client.admin.command("ping") == {"ok": 1.0}


def test_connection_ids_are_unique(cluster: Cluster) -> None:
    seen = set()
    connections = [socket.create_connection(("127.0.0.1", cluster.port), timeout=30) for _ in range(50)]
    for connection in connections:
        connection.sendall(message({"hello": 1, "$db": "admin"}))
        seen.add(reply(connection)[1]["connectionId"])
        connection.sendall(message({"hello": 1, "$db": "admin"})[:20])  # and half a message, which harms nobody
    assert len(seen) == 50
    with socket.create_connection(("127.0.0.1", cluster.port), timeout=30) as other:
        other.sendall(message({"ping": 1, "$db": "admin"}))
        assert reply(other)[1] == {"ok": 1.0}
    for connection in connections:
        connection.close()


def test_malformed_documents_are_refused_and_not_stored(wire: socket.socket, database: Database[Document]) -> None:
    broken = bytearray(bson.encode({"_id": 1, "nested": {"text": "abcdef"}}))
    at = broken.index(b"abcdef") - 4
    broken[at : at + 4] = struct.pack("<i", 900)
    wire.sendall(message({"insert": "c", "$db": database.name}, 1, sections=sequence("documents", [bytes(broken)])))
    answered, document = reply(wire)
    assert (answered, document["code"], document["codeName"]) == (1, 22, "InvalidBSON")
    body = bson.encode(
        {"update": "c", "updates": [{"q": {}, "u": {"text": "abcdef"}, "upsert": True}], "$db": database.name}
    )
    wire.sendall(frame(struct.pack("<I", 0) + b"\0" + body.replace(b"\7\0\0\0abcdef", b"\7\0\0\1abcdef"), 2))
    assert reply(wire)[1]["code"] == 22
    assert database.c.count_documents({}) == 0
    wire.sendall(message({"ping": 1, "$db": "admin"}, 3))
    assert reply(wire) == (3, {"ok": 1.0})


def test_the_largest_message(wire: socket.socket, database: Database[Document]) -> None:
    command = {"insert": "c", "$db": database.name}
    documents = [bson.encode({"_id": number, "x": "y" * 15_900_000}) for number in range(3)]
    room = 48_000_000 - len(message(command, sections=sequence("documents", documents)))
    documents.append(bson.encode({"_id": 9, "x": "y" * (room - len(bson.encode({"_id": 9, "x": ""})))}))
    data = message(command, sections=sequence("documents", documents))
    assert len(data) == 48_000_000
    wire.sendall(data)
    assert reply(wire)[1] == {"n": 4, "ok": 1.0}

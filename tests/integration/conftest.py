"""One server for the session, clients of the stock drivers, and more servers for tests that break theirs."""

from __future__ import annotations

import atexit
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import motor.motor_asyncio
import pytest
from pymongo import AsyncMongoClient, MongoClient
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.database import Database

from config.settings import Config, Server, Settings
from dev.cluster import Cluster

Document = dict[str, Any]
NewCluster = Callable[..., Cluster]

WORKERS = 4
# No test may wait for ever for a gateway that is gone.
CLIENT_OPTIONS: dict[str, Any] = {
    "serverSelectionTimeoutMS": 10_000,
    "connectTimeoutMS": 5_000,
    "socketTimeoutMS": 30_000,
}


def _made(settings: dict[str, str], preload: bool) -> Cluster:
    """A running cluster in a new folder; destroyed when Python ends, whatever becomes of its fixture."""
    directory = Path(tempfile.mkdtemp(prefix="pgf-test-", dir="/tmp"))
    cluster = Cluster(directory, settings=settings, preload=preload)
    atexit.register(cluster.destroy)
    cluster.start()
    return cluster


def configuration(cluster: Cluster, **settings: Any) -> Config:
    """The configuration of a worker in the test's own process."""
    server = Server(
        socket_directories=str(cluster.socket_dir),
        port=cluster.pg_port,
        user="postgres",
        database="postgres",
        data_directory=str(cluster.data),
        max_connections=100,
        superuser_reserved_connections=3,
        reserved_connections=0,
        version="18",
        documentdb="1.0",
        cursor_files_seconds=600,
        in_recovery=False,
        started="now",
        setting_errors=(),
    )
    return Config(settings=Settings(workers=1, **settings), server=server)


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    """The session's server with four workers; tests take ``cluster``."""
    # The gateway does not wait for what the server was told about deadlocks.
    cluster = _made({"ferretdb.workers": str(WORKERS), "deadlock_timeout": "60s"}, preload=True)
    yield cluster
    cluster.destroy()


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    """The session's server, for tests that leave it as they found it (workers that are killed come back)."""
    return shared_cluster


@pytest.fixture
def new_cluster(request: pytest.FixtureRequest) -> NewCluster:
    """Makes and starts a server of the test's own, as ``new_cluster(**{"ferretdb.workers": "2"})``; gone after it."""

    def make(*, preload: bool = True, **settings: str) -> Cluster:
        made = _made({"ferretdb.workers": "2", **settings}, preload)
        request.addfinalizer(made.destroy)
        return made

    return make


@pytest.fixture
def new_standby(request: pytest.FixtureRequest) -> Callable[[Cluster], Cluster]:
    """Makes and starts a hot standby of a server; gone after the test."""

    def make(primary: Cluster) -> Cluster:
        made = primary.standby(tempfile.mkdtemp(prefix="pgf-test-", dir="/tmp"))
        atexit.register(made.destroy)
        request.addfinalizer(made.destroy)
        made.start()
        return made

    return make


@pytest.fixture
def client(cluster: Cluster) -> Iterator[MongoClient[Document]]:
    """PyMongo on the session's server."""
    with MongoClient[Document](cluster.uri, **CLIENT_OPTIONS) as made:
        yield made


@pytest.fixture
def database_name(cluster: Cluster) -> Iterator[str]:
    """A name no other test uses; the database is dropped afterwards."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield name
    # By a client of its own: the test's may hold connections to workers that the test has killed.
    with MongoClient[Document](cluster.uri, **CLIENT_OPTIONS) as cleaner:
        cleaner.drop_database(name)


@pytest.fixture
def database(client: MongoClient[Document], database_name: str) -> Database[Document]:
    """An empty database of the test's own."""
    return client[database_name]


@pytest.fixture
async def aclient(cluster: Cluster) -> AsyncIterator[AsyncMongoClient[Document]]:
    """PyMongo's own asyncio client."""
    async with AsyncMongoClient[Document](cluster.uri, **CLIENT_OPTIONS) as made:
        yield made


@pytest.fixture
def adatabase(aclient: AsyncMongoClient[Document], database_name: str) -> AsyncDatabase[Document]:
    """The database of ``database`` through PyMongo's asyncio client."""
    return aclient[database_name]


@pytest.fixture
async def motor_client(cluster: Cluster) -> AsyncIterator[motor.motor_asyncio.AsyncIOMotorClient[Document]]:
    """Motor on the session's server."""
    made: motor.motor_asyncio.AsyncIOMotorClient[Document] = motor.motor_asyncio.AsyncIOMotorClient(
        cluster.uri, **CLIENT_OPTIONS
    )
    yield made
    made.close()

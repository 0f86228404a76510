"""The table of commands.  Implemented, known but missing, and unknown are three different answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pg_ferret.state.client import Client
from pg_ferret.wire.message import Request

Handler = Callable[[Request, Client], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Command:
    """One row: what listCommands tells and what dispatch calls."""

    name: str
    handler: Handler
    help: str
    admin_only: bool


COMMANDS: dict[bytes, Command] = {}

# MongoDB's other commands: clients get NotImplemented for these, CommandNotFound for anything else.
MISSING: frozenset[bytes] = frozenset(
    b"""abortTransaction appendOplogNote authenticate autoCompact balancerCollectionStatus balancerStart
    balancerStatus balancerStop bulkWrite cloneCollectionAsCapped commitTransaction compact connPoolStats
    convertToCapped coordinateCommitTransaction createRole createSearchIndexes createUser currentOp dbHash
    dropAllRolesFromDatabase dropAllUsersFromDatabase dropConnections dropRole dropSearchIndex dropUser explain
    features filemd5 fsync fsyncUnlock getAuditConfig getClusterParameter getDefaultRWConcern getDiagnosticData
    getnonce getShardMap grantPrivilegesToRole grantRolesToRole grantRolesToUser invalidateUserCache isdbgrid
    killAllSessions killAllSessionsByPattern killOp killSessions listSearchIndexes listSessions listShards
    lockInfo logRotate logout mapReduce moveChunk planCacheClear planCacheClearFilters planCacheListFilters
    planCacheSetFilter prepareTransaction profile reIndex replSetGetConfig replSetGetStatus replSetInitiate
    reshardCollection revokePrivilegesFromRole revokeRolesFromRole revokeRolesFromUser rolesInfo
    rotateCertificates saslContinue saslStart serverStatusSections setAuditConfig setClusterParameter
    setDefaultRWConcern setFeatureCompatibilityVersion setIndexCommitQuorum setParameter shardCollection
    shutdown split top unshardCollection updateRole updateSearchIndex updateUser usersInfo""".split()
)


def command(*names: str, help: str, admin_only: bool = False) -> Callable[[Handler], Handler]:  # noqa: A002
    """Enter a handler under its name and aliases; raises ValueError for a name that is taken."""

    def enter(handler: Handler) -> Handler:
        for name in names:
            key = name.encode()
            if key in COMMANDS or key in MISSING:
                raise ValueError(f"command {name} is registered twice")
            COMMANDS[key] = Command(name, handler, help, admin_only)
        return handler

    return enter

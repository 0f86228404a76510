"""Results that the engine keeps in files, and that nobody will go on with."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Coroutine

from pg_ferret.engine.calls import DELETE_CURSORS, Call, id_array, streams
from pg_ferret.engine.pipeline import Params, Row
from pg_ferret.errors import CommandError, EngineError, EngineLostError


class Leftovers:
    """They are deleted, all of a turn of the loop at once."""

    __slots__ = ("_call", "_ids", "_spawn")

    def __init__(
        self, call: Callable[[Call, Params], Awaitable[Row]], spawn: Callable[[Coroutine[None, None, None]], object]
    ) -> None:
        """`call` makes a call, `spawn` has work done beside what is under way."""
        self._call = call
        self._spawn = spawn
        self._ids: list[int] = []  # their cursors'

    def note(self, call: Call, row: Row) -> None:
        """Nobody waits for a row any more: it may have opened a cursor whose result is in a file."""
        if not call.opens or not row or row[1] is None or row[2] is None or streams(row[1]):
            return
        if not self._ids:
            self._spawn(self._delete())
        self._ids.append(int.from_bytes(row[2], "big"))

    async def _delete(self) -> None:
        taken, self._ids = self._ids, []
        with contextlib.suppress(CommandError, EngineError, EngineLostError):  # else the housekeeper finds the files
            await self._call(DELETE_CURSORS, (id_array(taken),))

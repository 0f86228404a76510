"""The load generator (bench/load) as a process that is told when to run."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import IO, Any, ClassVar


class Load:
    """A load generator that has prepared everything and runs for a turn whenever it is told to."""

    group: ClassVar[int | None] = None  # an open cgroup.procs: there it moves, away from the servers

    def __init__(self, command: list[str | Path]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        if self.group is not None:
            os.write(self.group, str(self._process.pid).encode())
        self.ready = _pipe(self._process.stdout).readline() == "ready\n"

    def run(self) -> dict[str, Any]:
        """Say go, wait for the result of all turns so far, or for {"error": …}."""
        line = ""
        if self.ready:
            stdin = _pipe(self._process.stdin)
            stdin.write("go\n")
            stdin.flush()
            line = _pipe(self._process.stdout).readline()
        if line:
            result: dict[str, Any] = json.loads(line)
            return result
        self.ready = False
        self._process.communicate()
        self._errors.seek(0)
        return {"error": self._errors.read().strip() or f"exit status {self._process.returncode}"}

    def close(self) -> None:
        """Wait until it has removed what it made."""
        self._process.communicate()
        self._errors.close()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream

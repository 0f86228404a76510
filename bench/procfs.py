"""CPU and memory of trees of processes, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on (state is 0, parent 1, utime 11)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def children() -> dict[int, list[int]]:
    """The process ids of every process's children."""
    found: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                found.setdefault(int(_stat(int(entry))[1]), []).append(int(entry))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def tree(root: int) -> set[int]:
    """``root`` and all below it."""
    below = children()
    found: set[int] = set()
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        found.add(pid)
        waiting += below.get(pid, [])
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time these processes and their exited children took since they started."""
    ticks = 0
    for pid in pids:
        try:
            ticks += sum(map(int, _stat(pid)[11:15]))
        except (FileNotFoundError, ProcessLookupError):
            continue  # its parent has its time now
    return ticks / _TICKS


def machine_seconds() -> tuple[float, float]:
    """CPU time since the machine started: of all programs, and what its host gave to others though wanted here."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split(None, 9)[1:9])
    return (user + nice + system + irq + softirq) / _TICKS, steal / _TICKS


def pss_bytes(pids: Iterable[int]) -> int:
    """Memory of these processes; what is shared with others counts in proportion."""
    total = 0
    for pid in pids:
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def command_line(pid: int) -> str:
    """The arguments of a process, joined by spaces; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""

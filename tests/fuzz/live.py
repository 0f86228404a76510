"""Mutated messages at a live server: ``dev/enter --private --as postgres python3 -m tests.fuzz.live``.

Starts a server of its own with two workers and sends messages of every kind, right and wrong, by several connections,
while a stock client works beside it.  Exit code 1 if the server took harm: see `Findings` at the end of the output.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dev.cluster import Cluster, ClusterError, wait_for
from tests.fuzz.messages import message
from tests.fuzz.traffic import Findings, Traffic
from tests.fuzz.watch import Log, Reader, Watchdog, Workers

_LINKS = 8
_WARM_MESSAGES = 20_000
_GROWTH_PERCENT = 10
_LOOK_EVERY = 1_000
_SHOW_EVERY = 20_000
_SETTINGS = {
    "ferretdb.workers": "2",
    # The fuzzer leaves its cursors lying about: what they hold must not count as growth.
    "ferretdb.cursor_timeout": "10s",
    # Nobody knows what a pipeline drawn by lot takes; an engine that does not stop then is a finding.
    "statement_timeout": "3s",
    "log_min_error_statement": "panic",
    "fsync": "off",
}
# What the engine answers with code 1 is told, but is not ours to mend.
_TOLD_ONLY = "(engine) "


class Run:
    """One run from the start of the server to the verdict."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster = cluster
        self._seed = seed
        self.findings = Findings()
        self.traffic = Traffic(cluster.port, _LINKS, self.findings)
        self.watchdog = Watchdog(cluster.uri, self.findings)
        self.reader = Reader(cluster.port, self.findings)
        self._log = Log(cluster.log_file, self.findings)
        self.workers = Workers(cluster, self.findings)
        self.seconds = 0.0

    def go(self, numbers: range) -> None:
        """Send, look, and read everything back; a crash of PostgreSQL ends it early."""
        started = time.monotonic()
        self.watchdog.start()
        try:
            for number in numbers:
                self.traffic.send(number, message(self._seed, number))
                sent = number - numbers.start + 1
                if (sent % _LOOK_EVERY == 0 or self.traffic.alarmed) and not self._look(sent):
                    break
            self.traffic.finish()
            self._look(len(numbers))
        except (OSError, ClusterError) as error:
            self.findings.add("the server cannot be reached", str(error))
        self.seconds = time.monotonic() - started
        self.watchdog.stop()
        self._log.look()
        if not self._log.crashed:
            self._read_back()
        self._log.close()
        self.workers.judge_growth(_WARM_MESSAGES, _GROWTH_PERCENT)

    def _look(self, sent: int) -> bool:
        """Whether PostgreSQL still runs as it did."""
        self._log.look()
        if self._log.crashed:
            for frame in self.traffic.in_flight():
                self.findings.add("not answered before PostgreSQL crashed", frame.hex())
            return False
        self.workers.look(sent)
        return True

    def _read_back(self) -> None:
        try:
            self.reader.read_all()
        except OSError as error:
            self.findings.add("what is stored cannot be read back", str(error))

    @property
    def failed(self) -> bool:
        """Whether anything is wrong that is not the engine's alone."""
        return any(not kind.startswith(_TOLD_ONLY) for kind in self.findings.counts)

    def table(self) -> str:
        """The counts."""
        counts = self.traffic.counts
        rows = [(name, f"{counts[name]:,}") for name in ("sent", "answered", "connections", "closed by the server")]
        rows += [(name, f"{count:,}") for name, count in sorted(counts.items()) if name not in dict(rows)]
        for (code, name), count in sorted(self.traffic.codes.items()):
            rows.append((f"  code {code} {name}" if code else "  ok", f"{count:,}"))
        rows += [
            ("read back: collections", f"{self.reader.collections:,}"),
            ("read back: documents", f"{self.reader.documents:,}"),
            ("probes of the watchdog", f"{self.watchdog.probes:,}"),
            ("longest probe", f"{self.watchdog.longest:.3f} s"),
            ("messages per second", f"{counts['sent'] / max(self.seconds, 0.001):,.0f}"),
            *self._memory(),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {figure:>15}" for name, figure in rows)

    def _memory(self) -> list[tuple[str, str]]:
        """Some of the measurements: a leak goes on to the last, what is only warming up does not."""
        sizes = self.workers.sizes
        shown = [sent for sent in sizes if sent % _SHOW_EVERY < _LOOK_EVERY or sent == max(sizes)]
        return [(f"PSS after {sent:,}, kB", " + ".join(f"{size:,}" for size in sizes[sent])) for sent in shown]

    def report(self) -> str:
        """The table and what was found, with the messages to find it again."""
        parts = [self.table(), "", "Findings:" if self.findings.counts else "No findings."]
        for kind, count in sorted(self.findings.counts.items()):
            parts.append(f"- {kind} ({count})")
            parts += [f"    {line}" for case in self.findings.cases[kind] for line in case.splitlines()]
        return "\n".join(parts) + "\n"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.fuzz.live", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--messages", type=int, default=100_000, help="how many to send")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same messages")
    parser.add_argument("--first", type=int, default=1, help="number of the first message")
    parser.add_argument("--report", type=Path, help="a file for what is printed")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 if the server is none the worse for it."""
    options = _options(arguments)
    cluster = Cluster(tempfile.mkdtemp(prefix="pgf-fuzz-", dir="/tmp"), settings=_SETTINGS)
    try:
        cluster.start()
        wait_for(lambda: [row["state"] for row in cluster.status()] == ["ready"] * 3, what="two workers")
        run = Run(cluster, options.seed)
        run.go(range(options.first, options.first + options.messages))
        text = run.report()
    finally:
        cluster.destroy()
    print(text, end="")
    if options.report is not None:
        options.report.write_text(text)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())

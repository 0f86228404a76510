"""``python3 -m tests.faults [--rounds N] [--only TEXT] [--seed N] [--json FILE] [--page FILE]``: the table of faults.

Exit status 1 if a row misses what it expects.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from dev.cluster import ClusterError
from tests.faults import report, settings
from tests.faults.runner import FAULTS, Result, run


def main() -> int:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(prog="make faults")
    parser.add_argument("--rounds", type=int, default=0, help="each fault so often, instead of as its row says")
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    started = time.monotonic()
    results: list[Result] = []
    for item in FAULTS:
        if arguments.only in item.name:
            results.append(run(item, arguments.rounds or item.rounds))
            print(report.line(results[-1]), flush=True)
    facts = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": report.machine(),
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - started),
    }
    if arguments.json:
        arguments.json.write_text(report.as_json(results, facts))
    if arguments.page:
        arguments.page.write_text(report.page(results, facts))
    if not results:
        names = "\n  ".join(item.name for item in FAULTS)
        print(f"no fault has {arguments.only!r} in its name:\n  {names}")
        return 2
    missed = [result.fault.name for result in results if result.problems]
    print(f"{len(results)} faults in {facts['seconds']} s; missed: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    assert settings.CHANGES  # importing it, and with it the catalogue, has filled FAULTS
    try:
        sys.exit(main())
    except ClusterError as error:
        sys.exit(f"make faults: {error}")

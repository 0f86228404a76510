"""``python3 -m config`` writes the generated files; ``--check`` only tells whether they are up to date."""

from __future__ import annotations

import argparse
import sys

from config.generate import stale, write


def main() -> int:
    """Exit status 1 if ``--check`` finds a stale file."""
    parser = argparse.ArgumentParser(prog="python3 -m config", description="Write the files generated from config/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is stale")
    if parser.parse_args().check:
        for name in (names := stale()):
            print(f"{name} is stale: run python3 -m config", file=sys.stderr)
        return 1 if names else 0
    for name in write():
        print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

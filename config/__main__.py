"""``python3 -m config`` writes the generated files; ``--check`` only tells whether they are current."""

from __future__ import annotations

import sys

from config.generate import ROOT, outputs


def main(arguments: list[str]) -> int:
    """The exit status: 1 if ``--check`` found a stale file, 2 for other arguments."""
    if arguments not in ([], ["--check"]):
        print("usage: python3 -m config [--check]", file=sys.stderr)
        return 2
    stale = [path for path, text in outputs().items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if arguments:
            print(f"{path.relative_to(ROOT)} is stale: run python3 -m config", file=sys.stderr)
        else:
            path.write_text(outputs()[path])
    return 1 if stale and arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

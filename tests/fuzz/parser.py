"""Coverage-guided fuzzing of pg_ferret.wire with atheris: ``python3 -m tests.fuzz.parser -runs=N corpus``.

Takes libFuzzer's options; a folder that is named keeps what is found of use, the golden frames of tests/unit are always
read.  A file that is named is run once.  atheris has no build for every Python, so it is no dependency of the project:

    python3.11 -m venv /tmp/fuzzvenv && /tmp/fuzzvenv/bin/pip install atheris crc32c pymongo
    /tmp/fuzzvenv/bin/python -m tests.fuzz.parser -runs=2000000 -max_len=4096 /tmp/fuzzcorpus
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

_FRAMES = Path(__file__).resolve().parent.parent / "unit" / "frames"


def with_corpus(arguments: list[str], spare: str) -> list[str]:
    """The arguments and the golden frames; libFuzzer writes to the first folder, the caller's own or ``spare``."""
    named = [argument for argument in arguments if not argument.startswith("-")]
    if any(Path(argument).is_file() for argument in named):
        return arguments
    for argument in named:
        Path(argument).mkdir(parents=True, exist_ok=True)
    return [*arguments, *([] if named else [spare]), str(_FRAMES / "valid"), str(_FRAMES / "invalid")]


def main() -> int:
    """Fuzz until the runs are over or an input breaks a rule; atheris itself ends the process then."""
    try:
        atheris = importlib.import_module("atheris")
    except ImportError as error:
        print(f"tests.fuzz.parser: atheris cannot be imported ({error}); see the head of this file", file=sys.stderr)
        return 2
    # Only what is imported here is watched, so the target must not be imported before.
    with atheris.instrument_imports(include=["pg_ferret"]):
        target = importlib.import_module("tests.fuzz.wire_target")
    with tempfile.TemporaryDirectory(prefix="pgf-corpus-") as spare:
        atheris.Setup([sys.argv[0], *with_corpus(sys.argv[1:], spare)], target.check_input)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())

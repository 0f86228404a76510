"""What is left without a collection."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """All that was left before has been collected; what is left from now on stays."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def alive(kind: type) -> list[object]:
    """All that is of this type and not of a derived one: to ask a weak reference's proxy would fail."""
    return [one for one in gc.get_objects() if type(one) is kind]

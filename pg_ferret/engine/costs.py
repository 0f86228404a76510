"""What reads cost."""

from __future__ import annotations

from typing import Final

from pg_ferret.engine.scheduling import Lag

# Seconds: what takes no longer is cheap.
CHEAP_SECONDS: Final = 0.004
# Shapes of reads whose cost is remembered.
_MOST_SHAPES: Final = 10_000
# Seconds: a shape whose reads have been slow for so long, each of them, is measured only so often.
_SETTLED_SECONDS: Final = 1.0
_AGAIN_SECONDS: Final = 0.1


class Costs:
    """Which shapes of reads have been cheap lately.  Times are the loop's."""

    __slots__ = ("_slow", "cheap", "cheap_seconds", "lag", "late_seconds")

    def __init__(self, lag: Lag) -> None:
        self.cheap_seconds = CHEAP_SECONDS  # how long a read may take PostgreSQL
        self.late_seconds = CHEAP_SECONDS  # and how long it may be until we have the answer
        self.cheap: set[int] = set()  # the shapes whose last read was cheap; those never seen are not
        self.lag = lag  # how late we may read an answer
        self._slow: dict[int, tuple[float, float]] = {}  # shape -> since when; from when on one that is cheap will do

    def slow(self, shape: int) -> bool:
        """Whether reads of this shape are known not to be cheap."""
        return shape in self._slow

    def settled(self, shape: int, now: float) -> bool:
        """Whether a read of this shape need not be measured: it is slow, or stays away whatever it takes."""
        if shape not in self._slow:
            return False
        since, away = self._slow[shape]
        return now < (away if now < since + _SETTLED_SECONDS else away + _AGAIN_SECONDS)

    def note(self, shape: int, seconds: float, now: float) -> None:
        """A read of this shape has taken so long."""
        if seconds > self.cheap_seconds:
            self.keep_away(shape, now)
        elif shape not in self._slow or self._slow[shape][1] <= now:
            self._slow.pop(shape, None)
            if len(self.cheap) >= _MOST_SHAPES:
                self.cheap.clear()
            self.cheap.add(shape)

    def keep_away(self, shape: int, until: float) -> None:
        """Reads of this shape are not cheap, whatever they take until then."""
        self.cheap.discard(shape)
        if len(self._slow) >= _MOST_SHAPES:
            self._slow.clear()
        since, away = self._slow.get(shape, (until, until))
        self._slow[shape] = since, max(until, away)

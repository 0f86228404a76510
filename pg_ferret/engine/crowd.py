"""Whether requests meet so many others that they had better share connections.

How many are under way at one moment says little: those whom one flush has served are gone at once, and come back
together.  So the mean counts, and sharing itself, which makes each wait a little longer, does not end it.
"""

from __future__ import annotations

from typing import Final

# Of each new request in that mean: it changes within some dozens.
_WEIGHT: Final = 1 / 32
# More count as so many, so that whoever is left alone after a rush is soon served alone.
_MOST: Final = 8


class Crowd:
    """One kind of requests."""

    __slots__ = ("_few", "_many", "_mean", "there")

    def __init__(self, many: float, few: float) -> None:
        """It is there from so ``many`` others in the mean on, fewer than 8, until there are so ``few``."""
        self._many = many
        self._few = few
        self._mean = 0.0
        self.there = False

    def meets(self, others: int) -> bool:
        """To be asked once for every request, which has met so many others under way: whether there is a crowd."""
        self._mean = mean = self._mean + ((others if others < _MOST else _MOST) - self._mean) * _WEIGHT
        if self.there:
            if mean > self._few:
                return True
            self.there = False
        elif mean >= self._many:
            self.there = True
        return self.there

    def forget(self) -> None:
        """There has been nobody for long."""
        self._mean = 0.0
        self.there = False

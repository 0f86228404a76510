"""When requests meet so many others that they had better share."""

from __future__ import annotations

from pg_ferret.engine.crowd import Crowd


def test_there_is_a_crowd_from_many_others_in_the_mean_on_until_there_are_few() -> None:
    crowd = Crowd(4.0, 2.5)
    for others, there in ((3, False), (5, True), (3, True), (2, False), (3, False)):
        assert [crowd.meets(others) for _ in range(200)][-1] == there


def test_a_moment_without_others_does_not_end_it() -> None:
    """Those whom one flush has served come back together."""
    crowd = Crowd(4.0, 2.5)
    rounds = [[crowd.meets(others) for others in (0, 1, 2, 6, 7, 8, 8, 8)] for _ in range(30)]
    assert all(all(turn) for turn in rounds[10:])


def test_a_moment_with_many_does_not_make_one() -> None:
    crowd = Crowd(4.0, 2.5)
    assert not any(crowd.meets(1000) for _ in range(15))
    assert not any(crowd.meets(others) for _ in range(100) for others in (0, 0, 0, 0, 0, 0, 0, 1000))


def test_whoever_is_left_alone_is_soon_served_alone() -> None:
    crowd = Crowd(4.0, 2.5)
    assert all([crowd.meets(1000) for _ in range(1000)][500:])
    assert sum(crowd.meets(0) for _ in range(1000)) < 50
    assert all([crowd.meets(1000) for _ in range(1000)][500:])
    crowd.forget()
    assert not any(crowd.meets(2) for _ in range(1000))

"""What runs requests goes on, ends and is cancelled as a task would be."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from pg_ferret.runner import Runner, Turn, Waiter, let_go
from tests.garbage import alive, no_collection
from tests.turns import settle


class Rig:
    """Runners, and what became of what they waited for."""

    def __init__(self) -> None:
        self.events: list[object] = []
        self.failures: list[dict[str, Any]] = []
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(lambda _, context: self.failures.append(context))
        self.turn = Turn(self.loop)

    def waiter(self) -> Waiter[object]:
        return Waiter(self.turn)

    def start(self, *awaited: Awaitable[object]) -> Runner:
        runner = Runner()
        runner.start(self.wait(awaited))
        return runner

    async def wait(self, awaited: tuple[Awaitable[object], ...]) -> None:
        self.events.append("begin")
        for one in awaited:
            try:
                self.events.append(await one)
            except ValueError as error:
                self.events.append(str(error))
            except asyncio.CancelledError:
                self.events.append("cancelled")
                raise
        self.events.append("end")


async def test_it_runs_at_once_and_goes_on_in_the_next_turn() -> None:
    rig = Rig()
    assert not rig.start().running
    first, second, done = rig.waiter(), rig.waiter(), rig.waiter()
    done.set_result("already")
    runner = rig.start(first, done, second)
    assert rig.events == ["begin", "end", "begin"]
    assert runner.running
    first.set_result("row")
    assert len(rig.events) == 3
    await settle()
    assert rig.events[3:] == ["row", "already"]
    second.set_exception(ValueError("refused"))
    await settle()
    assert rig.events[5:] == ["refused", "end"]
    assert not runner.running
    assert not rig.failures


async def test_it_goes_on_again_and_again() -> None:
    rig = Rig()
    runner = rig.start()
    runner.start(rig.wait(()))
    assert rig.events == ["begin", "end"] * 2


async def test_all_that_are_answered_in_one_turn_go_on_by_one_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    waiters = [rig.waiter() for _ in range(5)]
    runners = [rig.start(waiter) for waiter in waiters]
    handles: list[object] = []
    call_soon = rig.loop.call_soon

    def counted(call: Callable[..., object], *arguments: Any, context: Any = None) -> asyncio.Handle:
        handles.append(call)
        return call_soon(call, *arguments, context=context)

    monkeypatch.setattr(rig.loop, "call_soon", counted)
    for number, waiter in enumerate(waiters):
        waiter.set_result(number)
    assert len(handles) == 1
    monkeypatch.undo()
    await settle()
    assert not any(runner.running for runner in runners)
    assert [event for event in rig.events if isinstance(event, int)] == list(range(5))


async def test_whose_answer_is_read_goes_on_at_the_end_of_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    first, second, third = rig.waiter(), rig.waiter(), rig.waiter()
    rig.start(first, second)
    monkeypatch.setattr(rig.loop, "call_soon", None)
    rig.turn.reading = True
    first.set_result("row")
    assert rig.events == ["begin"]
    rig.turn.go_on()
    assert rig.events == ["begin", "row"]
    monkeypatch.undo()
    rig.turn.reading = True
    rig.turn.go_on()
    second.set_result("later")  # nobody reads any more
    rig.turn.reading = True
    rig.start(third)
    third.set_result("read")
    rig.turn.go_on()
    assert rig.events[2:] == ["begin", "later", "end", "read", "end"]
    await settle()
    assert len(rig.events) == 7


async def test_it_waits_for_whatever_a_task_waits_for() -> None:
    rig = Rig()
    plain: asyncio.Future[object] = rig.loop.create_future()
    task = rig.loop.create_task(asyncio.sleep(0, "task"))
    runner = rig.start(plain, asyncio.sleep(0, "turn"), task, asyncio.shield(asyncio.sleep(0, "shielded")))
    plain.set_result("plain")
    await settle()
    assert rig.events == ["begin", "plain", "turn", "task", "shielded", "end"]
    assert not runner.running


async def test_a_task_waits_for_a_waiter() -> None:
    rig = Rig()
    waiter = rig.waiter()
    task = rig.loop.create_task(rig.wait((waiter,)))
    await settle()
    waiter.set_result("row")
    _, pending = await asyncio.wait([task, cast(asyncio.Future[Any], waiter)], timeout=5)
    assert not pending
    assert rig.events == ["begin", "row", "end"]


async def test_a_task_that_waits_for_a_waiter_is_cancelled() -> None:
    rig = Rig()
    waiter = rig.waiter()
    task = rig.loop.create_task(rig.wait((waiter,)))
    await settle()
    task.cancel()
    await settle()
    assert waiter.cancelled()
    assert task.cancelled()
    assert rig.events == ["begin", "cancelled"]


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("plain", [False, True])
async def test_it_is_cancelled_where_it_waits(plain: bool, answered: bool) -> None:
    rig = Rig()
    awaited = rig.loop.create_future() if plain else rig.waiter()
    runner = rig.start(awaited)
    if answered:
        awaited.set_result("too late")
    runner.cancel()
    assert awaited.cancelled() is not answered
    await settle()
    assert rig.events == ["begin", "cancelled"]
    assert not runner.running
    assert not rig.failures


async def test_it_is_cancelled_between_two_turns() -> None:
    rig = Rig()
    runner = rig.start(asyncio.sleep(0))
    runner.cancel()
    await settle()
    assert rig.events == ["begin", "cancelled"]
    assert not runner.running


@pytest.mark.parametrize("answered", [False, True])
async def test_what_is_cancelled_may_clear_up(answered: bool) -> None:
    rig = Rig()
    first, last = rig.waiter(), rig.waiter()

    async def careful() -> None:
        try:
            await first
        finally:
            rig.events.append(await last)

    runner = Runner()
    runner.start(careful())
    if answered:
        first.set_result("too late")
        runner.cancel()
    runner.cancel()  # it hears it once
    await settle()
    assert runner.running
    last.set_result("cleared up")
    await settle()
    assert rig.events == ["cleared up"]
    assert not runner.running
    assert not rig.failures


async def test_it_may_cancel_itself() -> None:
    rig = Rig()
    first, second = rig.waiter(), rig.waiter()
    runner = Runner()

    async def tired() -> None:
        await first
        runner.cancel()
        await second

    runner.start(tired())
    first.set_result(None)
    await settle()
    assert not runner.running
    assert second.cancelled()


async def test_several_wait_for_the_same_future_but_only_one_for_a_waiter() -> None:
    rig = Rig()
    plain: asyncio.Future[object] = rig.loop.create_future()
    runners = [rig.start(plain) for _ in range(2)]
    waiter = rig.waiter()
    rig.start(waiter)
    await settle()
    assert not rig.failures
    assert not rig.start(waiter).running
    assert len(rig.failures) == 1
    plain.set_result("both")
    await settle()
    assert not any(runner.running for runner in runners)


async def test_what_cancels_itself_and_ends_harms_nobody_after_it() -> None:
    rig = Rig()
    runner = Runner()

    async def hasty() -> None:
        runner.cancel()

    runner.start(hasty())
    runner.start(rig.wait((asyncio.sleep(0, "turn"),)))
    await settle()
    assert rig.events == ["begin", "turn", "end"]


async def test_a_turn_ends_where_a_coroutine_says_so() -> None:
    rig = Rig()
    waiter = rig.waiter()

    async def polite() -> None:
        await waiter
        rig.loop.call_soon(rig.events.append, "another")
        for number in range(3):
            await asyncio.sleep(0)
            rig.events.append(number)

    Runner().start(polite())
    waiter.set_result(None)
    await settle()
    assert rig.events == ["another", 0, 1, 2]


async def test_what_ends_the_process_does_not_keep_the_others_from_going_on() -> None:
    rig = Rig()
    waiters = [rig.waiter(), rig.waiter()]

    class Enough(BaseException):
        pass

    async def last() -> None:
        await waiters[0]
        raise Enough

    ended = Runner()
    ended.start(last())
    other = rig.start(waiters[1])
    rig.turn.reading = True
    for waiter in waiters:
        waiter.set_result(None)
    with pytest.raises(Enough):
        rig.turn.go_on()
    await settle()
    assert not ended.running
    assert not other.running


async def test_a_failure_is_told_and_harms_nobody_else() -> None:
    rig = Rig()
    waiters = [rig.waiter(), rig.waiter()]

    async def broken() -> None:
        await waiters[0]
        raise ZeroDivisionError

    first = Runner()
    first.start(broken())
    second = rig.start(waiters[1])
    for waiter in waiters:
        waiter.set_result(None)
    await settle()
    assert not first.running
    assert not second.running
    assert [type(failure["exception"]) for failure in rig.failures] == [ZeroDivisionError]


async def test_what_is_to_happen_then_happens_at_once() -> None:
    rig = Rig()
    waiter = rig.waiter()
    waiter.then(rig.events.append)
    waiter.set_result("row")
    assert rig.events == [waiter]
    waiter.then(rig.events.append)
    assert rig.events == [waiter, waiter]


async def test_what_is_to_happen_then_happens_though_somebody_waits() -> None:
    rig = Rig()
    waiter = rig.waiter()
    rig.start(waiter)
    waiter.then(lambda _: rig.events.append("then"))
    waiter.set_result("row")
    await settle()
    assert rig.events == ["begin", "then", "row", "end"]


async def test_callbacks_are_the_loops() -> None:
    rig = Rig()
    waiter, other = rig.waiter(), rig.waiter()
    waiter.add_done_callback(rig.events.append)
    other.add_done_callback(rig.events.append)
    assert other.remove_done_callback(rig.events.append) == 1
    for one in (waiter, other):
        one.set_result("row")
    assert not rig.events
    await settle()
    waiter.add_done_callback(rig.events.append)
    await settle()
    assert rig.events == [waiter, waiter]


async def test_a_wait_ends_once() -> None:
    waiter = Rig().waiter()
    for unknown in (waiter.result, waiter.exception):
        with pytest.raises(asyncio.InvalidStateError):
            unknown()
    waiter.set_result("row")
    for again in (waiter.set_result, waiter.set_exception):
        with pytest.raises(asyncio.InvalidStateError):
            again(ValueError())
    assert not waiter.cancel()
    assert not waiter.cancelled()
    assert waiter.result() == "row"
    assert waiter.exception() is None


async def test_a_cancelled_wait_says_so() -> None:
    waiter = Rig().waiter()
    assert waiter.cancel()
    for asked in (waiter.result, waiter.exception):
        with pytest.raises(asyncio.CancelledError):
            asked()


def test_an_error_is_let_go_of_with_those_that_it_came_from() -> None:
    class Message:
        pass

    def fail() -> None:
        message = Message()
        messages.append(weakref.ref(message))
        kept = ValueError()
        try:
            raise kept
        except ValueError:
            raise LookupError from None

    messages: list[weakref.ref[Message]] = []
    with no_collection():
        try:
            fail()
        except LookupError as error:
            let_go(error)
        assert messages[0]() is None


async def test_what_is_cancelled_lets_go_of_all_it_held() -> None:
    class Message:
        pass

    messages: list[weakref.ref[Message]] = []

    async def serve(waiter: Waiter[object]) -> None:
        message = Message()
        messages.append(weakref.ref(message))
        await waiter

    turn = Turn(asyncio.get_running_loop())
    runner = Runner()
    runner.start(serve(Waiter(turn)))
    with no_collection():
        runner.cancel()
        turn.go_on()
        assert not runner.running
        assert messages[0]() is None


@pytest.mark.parametrize("end", ["result", "error", "cancelled"])
@pytest.mark.parametrize("when", ["waits", "answered before", "in a task"])
async def test_nothing_is_left_of_it_without_a_collection(end: str, when: str) -> None:
    class Message:
        pass

    turn = Turn(asyncio.get_running_loop())
    waiter: Waiter[object] = Waiter(turn)
    given = [waiter]
    messages: list[weakref.ref[Message]] = []

    async def serve() -> None:
        message = Message()
        messages.append(weakref.ref(message))
        with contextlib.suppress(ValueError):
            await given.pop()

    ended = Runner()
    if when == "waits":
        ended.start(serve())
    elif when == "in a task":
        task = asyncio.create_task(serve())
        await settle()
    with no_collection():
        if end == "result":
            waiter.set_result(Message())
        elif end == "error":
            waiter.set_exception(ValueError())
        else:
            waiter.cancel()
        if when == "answered before":
            ended.start(serve())
        turn.go_on()
        assert not ended.running
        for asked in ("result", "exception"):
            with contextlib.suppress(ValueError, asyncio.CancelledError):
                getattr(waiter, asked)()
        del waiter
        await settle()
        if when == "in a task":
            assert task.done()
            del task
        assert messages[0]() is None
        assert not alive(Waiter)

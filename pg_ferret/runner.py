"""Runs the coroutines of clients' requests, as asyncio's tasks do, for less.

A task needs a context, and each answer that it waits for a handle of the loop and another turn of it.  A `Runner` does
without: all whose answers have come in one reading go on at its end.

Such a coroutine has neither a task of its own nor a context: what needs them (asyncio.timeout, asyncio.TaskGroup,
asyncio.wait_for, context variables that are set) belongs in a task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from typing import Any, Generic, TypeVar, cast

_Result = TypeVar("_Result")


def let_go(error: BaseException | None) -> None:
    """Of the frames that it has passed: those that hold it would stay until a collection, and so would the message."""
    while error is not None:
        error.__traceback__ = None
        error = error.__context__


class Turn:
    """Those who have been answered lately, in one event loop: they go on in its next turn, or at the end of a reading.

    Who reads answers sets `reading` before and calls `go_on` after, whatever happens.
    """

    __slots__ = ("answered", "loop", "reading")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.answered: list[Runner] = []
        self.reading = False

    def add(self, runner: Runner) -> None:
        """One more."""
        if not self.answered and not self.reading:
            self.loop.call_soon(self.go_on)
        self.answered.append(runner)

    def go_on(self) -> None:
        """All of them do."""
        self.reading = False
        if not self.answered:
            return
        answered, self.answered = self.answered, []
        rest = iter(answered)
        try:
            for runner in rest:
                runner.go_on()
        finally:
            for runner in rest:  # there are some if one of them has raised what is no Exception
                self.add(runner)


class Waiter(Generic[_Result]):
    """What a request waits for: a future that takes less to be made and told; only one may await it.

    A `Runner` may, or a task.
    """

    __slots__ = ("_asyncio_future_blocking", "_calls", "_done", "_error", "_result", "_turn", "runner")

    def __init__(self, turn: Turn) -> None:
        self.runner: Runner | None = None  # that waits for it
        self._turn = turn
        self._done = False
        self._error: BaseException | None = None
        self._calls: list[tuple[Callable[[Any], object], Context | None]] | None = None
        self._asyncio_future_blocking = False  # by this tasks know a future; True: somebody awaits it

    def done(self) -> bool:
        """Whether it has a result, an exception, or was cancelled."""
        return self._done

    def cancelled(self) -> bool:
        """Whether it was cancelled: nobody waits any more."""
        return isinstance(self._error, asyncio.CancelledError)

    def set_result(self, result: _Result) -> None:
        """End the wait; raises InvalidStateError if it has ended."""
        if self._done:
            raise asyncio.InvalidStateError
        self._result = result
        self._done = True
        runner = self.runner
        if runner is not None:
            self._turn.add(runner)
        if self._calls is not None:
            self._call()

    def set_exception(self, error: BaseException) -> None:
        """The same, by an exception."""
        if not self._done:
            self._error = error
        self.set_result(cast(_Result, None))

    def cancel(self, msg: Any = None) -> bool:
        """The same, by CancelledError; False if it has ended."""
        if self._done:
            return False
        self.set_exception(asyncio.CancelledError())
        return True

    def result(self) -> _Result:
        """The result; raises the exception, or InvalidStateError while there is neither."""
        if not self._done:
            raise asyncio.InvalidStateError
        if self._error is not None:
            try:
                raise self._error
            finally:
                del self  # the error's traceback holds this frame
        return self._result

    def exception(self) -> BaseException | None:
        """The exception, if there is one; raises CancelledError, or InvalidStateError before the end."""
        if self.cancelled():
            raise asyncio.CancelledError
        if not self._done:
            raise asyncio.InvalidStateError
        return self._error

    def __await__(self) -> Generator[Waiter[_Result], None, _Result]:
        try:
            if not self._done:
                if self._asyncio_future_blocking:
                    raise RuntimeError("somebody else awaits this")
                self._asyncio_future_blocking = True
                yield self
                if not self._done:
                    raise RuntimeError("the wait has not ended")
            if self._error is not None:
                raise self._error
            return self._result
        finally:
            del self  # the error's traceback holds this frame

    def then(self, call: Callable[[Waiter[_Result]], object]) -> None:
        """Have it called in the very moment in which the wait ends, with this as argument; it must not raise."""
        self._calls = [*(self._calls or ()), (call, None)]
        if self._done:
            self._call()

    # What tasks and asyncio.wait() ask of a future.

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The loop that it was made for."""
        return self._turn.loop

    def add_done_callback(self, call: Callable[[Any], object], *, context: Context | None = None) -> None:
        """Have the loop call it, with this as argument, when the wait has ended."""
        self._calls = [*(self._calls or ()), (call, context or copy_context())]
        if self._done:
            self._call()

    def remove_done_callback(self, call: Callable[[Any], object]) -> int:
        """Forget what was to be called; returns how often."""
        calls = self._calls or []
        self._calls = [one for one in calls if one[0] != call]
        return len(calls) - len(self._calls)

    def _call(self) -> None:
        calls, self._calls = self._calls or (), None
        for call, context in calls:
            if context is None:
                call(self)
            else:
                self._turn.loop.call_soon(call, self, context=context)


class Runner:
    """Runs coroutines, one at a time."""

    __slots__ = ("_awaited", "_cancelled", "_coroutine")

    def __init__(self) -> None:
        self._coroutine: Coroutine[Any, Any, None] | None = None  # there while one runs
        self._awaited: Waiter[Any] | asyncio.Future[Any] | None = None
        self._cancelled = False  # the coroutine has yet to hear it

    @property
    def running(self) -> bool:
        """Whether a coroutine has not ended."""
        return self._coroutine is not None

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine at once, up to its first wait: a ping never costs a turn of the loop.

        An Exception that it raises goes to the loop's exception handler, any other one but CancelledError to whoever
        has it go on.
        """
        self._coroutine = coroutine
        self._cancelled = False
        self.go_on()

    def go_on(self, _: object = None) -> None:
        """What it waits for is done: run up to the next wait, or to the end."""
        coroutine = self._coroutine
        assert coroutine is not None
        self._awaited = None
        try:
            if self._cancelled:
                self._cancelled = False
                awaited = coroutine.throw(asyncio.CancelledError())
            else:
                awaited = coroutine.send(None)
        except StopIteration:
            self._coroutine = None
        except asyncio.CancelledError as error:
            self._coroutine = None
            let_go(error)
        except BaseException as error:
            self._coroutine = None
            if not isinstance(error, Exception):
                raise
            asyncio.get_running_loop().call_exception_handler({"message": "a request failed", "exception": error})
        else:
            if type(awaited) is Waiter:
                self._awaited = awaited
                awaited.runner = self
            else:
                self._wait(awaited)
            if self._cancelled:  # by itself, while it ran
                self.cancel()

    def _wait(self, awaited: Any) -> None:
        """For what is no `Waiter`."""
        if awaited is None:  # asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(self.go_on)
        else:
            self._awaited = awaited
            awaited._asyncio_future_blocking = False  # as tasks do
            awaited.add_done_callback(self.go_on)

    def cancel(self) -> None:
        """Have CancelledError raised where the coroutine waits, as Task.cancel does; not for one that has ended."""
        self._cancelled = self._awaited is None or not self._awaited.cancel()

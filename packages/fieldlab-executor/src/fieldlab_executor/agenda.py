"""What the machine waits for: timers, questions and running attempts; and whether any of it will come by itself.

Names of timers and numbers of questions are made here, so that what comes back finds what it is for, and what comes
back too late finds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from fieldlab_executor.instructions import ClearTimer, Effect, Evaluate, Evaluated, Key, SetTimer
from fieldlab_executor.steps import Item

__all__ = ["Agenda"]


class Agenda:
    """``do`` takes the effects that it asks for."""

    def __init__(self, do: Callable[[Effect], None]) -> None:
        self._do = do
        self._timers: dict[str, Callable[[], None]] = {}
        self._questions: dict[int, Callable[[Evaluated], None]] = {}
        self._asked = 0
        self._moving: set[str | int | Key] = set()

    @property
    def stalled(self) -> bool:
        """Whether nothing is under way that brings a stimulus by itself."""
        return not self._moving

    def expect(self, key: Key) -> None:
        """The attempt will end, or call ``ctx.ready()``, by itself."""
        self._moving.add(key)

    def expect_no_more(self, key: Key) -> None:
        """It may run on for ever."""
        self._moving.discard(key)

    def set(self, kind: str, item: Item, at: float, then: Callable[[], None], *, moving: bool = False) -> None:
        """Call ``then`` at ``at``. ``moving``: the run goes on by it."""
        name = _name(kind, item)
        self._timers[name] = then
        if moving:
            self._moving.add(name)
        self._do(SetTimer(name=name, at=at))

    def clear(self, kind: str, item: Item) -> None:
        """Forget the timer, if it is set."""
        name = _name(kind, item)
        if self._timers.pop(name, None) is not None:
            self._moving.discard(name)
            self._do(ClearTimer(name=name))

    def fired(self, name: str) -> None:
        """A timer's time has come."""
        self._moving.discard(name)
        if then := self._timers.pop(name, None):
            then()

    def ask(
        self,
        kind: Literal["when", "until", "retry_if", "length"],
        then: Callable[[Evaluated], None],
        *,
        code: str | None = None,
        handle: Any = None,
        many: bool = False,
        path: tuple[str | int, ...] = (),
        text: str = "",
        shared: bool = False,
    ) -> None:
        """Have user code evaluated; ``then`` takes the answer."""
        self._asked += 1
        self._questions[self._asked] = then
        self._moving.add(self._asked)
        self._do(
            Evaluate(
                id=self._asked,
                kind=kind,
                code=code,
                handle=handle,
                many=many,
                path=path,
                text=text,
                shared=shared,
            )
        )

    def answered(self, answer: Evaluated) -> None:
        """An answer came."""
        self._moving.discard(answer.id)
        if then := self._questions.pop(answer.id, None):
            then(answer)


def _name(kind: str, item: Item) -> str:
    iteration = "" if item.iteration is None else item.iteration
    return f"{kind}:{item.step.name}:{iteration}:{item.attempt}"

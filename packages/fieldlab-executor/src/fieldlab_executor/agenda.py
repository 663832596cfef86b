"""What the machine waits for: timers, questions and running attempts; and whether any of it will come by itself.

Names of timers and numbers of questions are made here, so that what comes back finds what it is for, and what comes
back too late finds nothing. Each belongs to one run of one DAG (``Mover``): that run is stalled when nothing of it is
under way, even if other DAGs of the deployment go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

from fieldlab_executor.instructions import ClearTimer, Effect, Evaluate, Evaluated, Key, SetTimer
from fieldlab_executor.steps import Item, Step

__all__ = ["Agenda", "Mover"]


class Mover(Protocol):
    """Whose timers, questions and attempts they are."""

    moving: int  # how many of them will bring a stimulus by themselves


class Agenda:
    """``do`` takes the effects that it asks for, ``still`` whoever has nothing under way any more."""

    def __init__(self, do: Callable[[Effect], None], still: Callable[[Any], None]) -> None:
        self._do = do
        self._still = still
        self._timers: dict[str, Callable[[], None]] = {}
        self._questions: dict[int, Callable[[Evaluated], None]] = {}
        self._asked = 0
        self._moving: dict[str | int | Key, Mover] = {}

    @property
    def stalled(self) -> bool:
        """Whether nothing at all is under way that brings a stimulus by itself."""
        return not self._moving

    def expect(self, mover: Mover, token: str | int | Key) -> None:
        """It will come by itself: an attempt will end, or call ``ctx.ready()``."""
        if token not in self._moving:
            self._moving[token] = mover
            mover.moving += 1

    def expect_no_more(self, token: str | int | Key) -> None:
        """It came, or may never come."""
        mover = self._moving.pop(token, None)
        if mover is not None:
            mover.moving -= 1
            if not mover.moving:
                self._still(mover)

    def set(
        self, mover: Mover, kind: str, item: Item, at: float, then: Callable[[], None], *, moving: bool = False
    ) -> None:
        """Call ``then`` at ``at``. ``moving``: the run goes on by it."""
        name = _name(kind, item)
        self._timers[name] = then
        if moving:
            self.expect(mover, name)
        self._do(SetTimer(name=name, at=at))

    def clear(self, kind: str, item: Item) -> None:
        """Forget the timer, if it is set."""
        if not self._timers:  # most often; a name would be made for nothing
            return
        name = _name(kind, item)
        if self._timers.pop(name, None) is not None:
            self.expect_no_more(name)
            self._do(ClearTimer(name=name))

    def fired(self, name: str) -> None:
        """A timer's time has come."""
        self.expect_no_more(name)
        if then := self._timers.pop(name, None):
            then()

    def ask(
        self,
        mover: Mover,
        kind: Literal["when", "until", "retry_if", "length"],
        step: Step,
        then: Callable[[Evaluated], None],
        *,
        code: str | None = None,
        handle: Any = None,
        many: bool = False,
        path: tuple[str | int, ...] = (),
        text: str = "",
    ) -> None:
        """Have user code of ``step`` evaluated; ``then`` takes the answer."""
        self._asked += 1
        self._questions[self._asked] = then
        self.expect(mover, self._asked)
        self._do(
            Evaluate(
                id=self._asked,
                kind=kind,
                step=step.path,
                code=code,
                handle=handle,
                many=many,
                path=path,
                text=text,
                shared=step.shared,
            )
        )

    def answered(self, answer: Evaluated) -> None:
        """An answer came."""
        self.expect_no_more(answer.id)
        if then := self._questions.pop(answer.id, None):
            then(answer)


def _name(kind: str, item: Item) -> str:
    iteration = "" if item.iteration is None else item.iteration
    return f"{kind}:{item.step.path}:{iteration}:{item.attempt}"

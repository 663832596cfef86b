"""Plays the supervisor to a machine: keeps what it was told to do, and answers when the test says so."""

from __future__ import annotations

import math
from typing import Any

from fieldlab_common.deployment import Graph, Need, On, StepSpec
from fieldlab_common.lifecycle import Reason, StepState
from fieldlab_common.protocol import StepRecord
from fieldlab_executor.machine import (
    AttemptBegan,
    AttemptEnded,
    AttemptReady,
    ClearTimer,
    Effect,
    Evaluate,
    Evaluated,
    Finish,
    Key,
    KillAttempt,
    Machine,
    Measuring,
    Outcome,
    Report,
    SetTimer,
    StartAttempt,
    Stimulus,
    StopAttempt,
    TimerFired,
)

OK, FAILED, SKIPPED, CANCELLED = StepState.SUCCEEDED, StepState.FAILED, StepState.SKIPPED, StepState.CANCELLED


def step(name: str, *needs: str | Need, **fields: Any) -> StepSpec:
    """A step; a need given by name is its success, ``"a!"`` its failure, ``"a?"`` its end."""
    marks = {"!": On.FAILURE, "?": On.ALWAYS}
    edges = tuple(
        need if isinstance(need, Need) else Need(step=need.rstrip("!?"), on=marks.get(need[-1], On.SUCCESS))
        for need in needs
    )
    return StepSpec(name=name, task="task", code="code", args="args", needs=edges, **fields)


class Play:
    """A machine that runs ``steps``, and its world."""

    def __init__(
        self, *steps: StepSpec, start: bool = True, workers: float = math.inf, begins: bool = True, **graph: Any
    ) -> None:
        graph.setdefault("stop_on_failure", False)
        self.machine = Machine(Graph(name="g", steps=steps, **graph), now=0.0, cancel_grace=5.0, workers=workers)
        self.now = 0.0
        self.begins = begins  # attempts have their process at once
        self.effects: list[Effect] = []
        self.running: dict[Key, StartAttempt] = {}
        self.started: list[str] = []
        self.timers: dict[str, float] = {}
        self.questions: dict[str, Evaluate] = {}
        self.records: list[StepRecord] = []
        self.stopping: dict[Key, int | None] = {}
        self.killed: list[Key] = []
        self.measuring: list[bool] = []
        self.finish: Finish | None = None
        if start:
            self.begin()

    def begin(self, now: float = 0.0) -> None:
        self.now = now
        self._perform(self.machine.start(now))

    def send(self, stimulus: Stimulus) -> list[Effect]:
        effects = self.machine.handle(stimulus, self.now)
        self._perform(effects)
        return effects

    def _perform(self, effects: list[Effect]) -> None:
        assert self.finish is None or not effects, "nothing may follow the end"
        self.effects += effects
        for effect in effects:
            match effect:
                case StartAttempt(key=key):
                    assert key not in self.running
                    self.running[key] = effect
                    self.started.append(named(key))
                    if self.begins:
                        self.send(AttemptBegan(key=key))
                case StopAttempt(key=key, signal=signal):
                    assert key in self.running
                    self.stopping[key] = signal
                case KillAttempt(key=key):
                    assert key in self.running
                    self.killed.append(key)
                case SetTimer(name=name, at=at):
                    assert at >= self.now
                    self.timers[name] = at
                case ClearTimer(name=name):
                    del self.timers[name]
                case Evaluate(kind=kind):
                    self.questions[kind] = effect
                case Report(record=record):
                    self.records.append(record)
                case Measuring(active=active):
                    self.measuring.append(active)
                case Finish():
                    self.finish = effect

    # --- what a test lets happen

    def key(self, name: str) -> Key:
        """``"a"``, or ``"a#2"`` for iteration 2: the attempt of it that runs."""
        (found,) = [key for key in self.running if named(key).partition("@")[0] == name]
        return found

    def end(self, name: str, state: StepState, **outcome: Any) -> list[Effect]:
        key = self.key(name)
        del self.running[key]
        self.stopping.pop(key, None)
        reason = outcome.pop("reason", Reason.RETURNED if state is OK else Reason.RAISED)
        return self.send(AttemptEnded(key=key, outcome=Outcome(state=state, reason=reason, **outcome)))

    def ok(self, *names: str, **outcome: Any) -> None:
        for name in names:
            self.end(name, OK, **{"handle": f"value of {name}", **outcome})

    def fail(self, *names: str, **outcome: Any) -> None:
        for name in names:
            self.end(name, FAILED, **{"message": "It raised.", "error": f"traceback of {name}", **outcome})

    def ready(self, name: str) -> None:
        self.send(AttemptReady(key=self.key(name)))

    def answer(self, kind: str, value: bool | int | None = None, error: str = "") -> Evaluate:
        question = self.questions.pop(kind)
        self.send(Evaluated(id=question.id, value=value, error=error))
        return question

    def wait(self, until: float) -> None:
        """Let time pass, firing timers when they are due."""
        while due := [name for name, at in self.timers.items() if at <= until]:
            name = min(due, key=lambda one: self.timers[one])
            self.now = max(self.now, self.timers.pop(name))
            self.send(TimerFired(name=name))
        self.now = until

    # --- what a test looks at

    @property
    def runs(self) -> list[str]:
        return sorted(named(key) for key in self.running)

    @property
    def states(self) -> dict[str, str]:
        return {name: state.value for name, state in self.machine.states.items()}

    def settled(self, name: str) -> StepRecord:
        (record,) = [one for one in self.records if one.step == name and one.settled]
        return record

    def reason(self, name: str) -> Reason | None:
        return self.settled(name).reason

    def iterations(self, name: str) -> list[StepRecord]:
        return [one for one in self.records if one.step == name and not one.settled and one.state.terminal]


def named(key: Key) -> str:
    iteration = "" if key.iteration is None else f"#{key.iteration}"
    return f"{key.step}{iteration}" + (f"@{key.attempt}" if key.attempt > 1 else "")

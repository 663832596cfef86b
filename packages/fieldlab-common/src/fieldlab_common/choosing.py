"""Which implementation each step of a DAG uses on a node, and why: worked out once for all nodes that decide alike.

A DAG of 10,000 steps for 100 nodes has a million choices, nearly all of them the same. So a DAG is looked through once
(``Survey``); a node is asked only what may make a difference; nodes that answer alike share one ``Decision``, and those
whose answers differ in words only share what was ``Picked``. The words for each step of each deployment are made when
somebody reads them (``Choices``).
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

from fieldlab_common.environment import Requirements
from fieldlab_common.expand import Use, walk
from fieldlab_common.node import Node
from fieldlab_common.selector import Always, Field
from fieldlab_common.step import ByNode
from fieldlab_common.task import Implementation, Task, task_of

__all__ = ["Choices", "Decision", "Picked", "Rejected", "StepChoice", "Survey"]


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """An implementation that does not fit a node, and why."""

    implementation: str
    because: str


@dataclass(frozen=True, kw_only=True)
class StepChoice:
    """Which implementation a deployment's step uses, and why."""

    deployment: str
    step: str
    task: str
    implementation: str
    because: str
    rejected: tuple[Rejected, ...] = ()


class _Verdict(NamedTuple):
    """What a node makes of a task: which implementation fits it, by its place, or None."""

    place: int | None
    because: str
    rejected: tuple[Rejected, ...]


def _ask(implementations: Iterable[Implementation], node: Node) -> _Verdict:
    rejected: list[Rejected] = []
    for index, implementation in enumerate(implementations):
        verdict = implementation.when.explain(node)
        if verdict.holds:
            return _Verdict(index, verdict.because, tuple(rejected))
        rejected.append(Rejected(implementation=implementation.name, because=verdict.because))
    return _Verdict(None, "", tuple(rejected))


class Picked:
    """The implementations of a DAG's steps, by step in its order; those that nothing fits are not in it."""

    def __init__(self, implementations: Mapping[str, Implementation]) -> None:
        self.implementations = implementations

    @functools.cached_property
    def requirements(self) -> Requirements:
        """What they need together."""
        needs = Requirements()
        for one in {id(one): one for one in self.implementations.values()}.values():
            if one.settings.requirements != Requirements():
                needs = needs.merged(one.settings.requirements)
        return needs

    @functools.cached_property
    def preload(self) -> tuple[str, ...]:
        """The modules that are imported ahead for them."""
        one_each = {id(one): one for one in self.implementations.values()}.values()
        return tuple(dict.fromkeys(name for one in one_each for name in one.settings.preload))

    @functools.cached_property
    def asking(self) -> tuple[str, ...]:
        """The steps that ask for packages or set-up commands."""
        asks = {id(i): bool(i.settings.packages or i.settings.setup) for i in self.implementations.values()}
        return tuple(name for name, one in self.implementations.items() if asks[id(one)])


class Decision:
    """What nodes that answer alike decide for each task of a DAG, and why."""

    def __init__(self, survey: Survey, verdicts: Mapping[int, _Verdict], picked: Picked) -> None:
        self._survey, self._verdicts, self.picked = survey, verdicts, picked

    def __len__(self) -> int:
        """How many steps have an implementation."""
        return len(self.picked.implementations)

    def unfit(self) -> Iterator[tuple[str, tuple[Rejected, ...]]]:
        """The steps that no implementation of their task fits, and why."""
        for use in self._survey.uses if len(self) < len(self._survey.uses) else ():
            verdict = self._verdicts[id(use.step.task)]
            if verdict.place is None:
                yield use.path, verdict.rejected

    def choices(self, deployment: str) -> Iterator[StepChoice]:
        """The choices, as those of ``deployment``."""
        for use in self._survey.uses:
            verdict = self._verdicts[id(use.step.task)]
            if verdict.place is not None:
                yield StepChoice(
                    deployment=deployment,
                    step=use.path,
                    task=use.step.task.task_name,
                    implementation=self.picked.implementations[use.path].name,
                    because=verdict.because,
                    rejected=verdict.rejected,
                )


class Survey:
    """The steps of a DAG, and of those inside of it, looked through once.

    ``fields``: the steps that each node property is an argument of, by its name.
    """

    def __init__(self, top: tuple[Use, ...]) -> None:
        self.top = top
        self.uses = tuple(walk(top))
        self.fields: dict[str, list[str]] = {}
        self.by_node: set[str] = set()  # the steps with an argument that is computed for each node
        self._ways: dict[int, tuple[Implementation, ...]] = {}  # by the task's id
        self._made: dict[int, Task[Any]] = {}  # the tasks that make implementations up for each node
        for use in self.uses:
            task = task_of(use.step)
            if id(task) not in self._ways:
                self._ways[id(task)] = task.implementations()
                if type(task).implementations_for is not Task.implementations_for:
                    self._made[id(task)] = task
            if use.step.refers:
                self._note(use)
        ways = self._ways.items()
        self._open = [key for key, one in ways if key in self._made or not isinstance(one[0].when, Always)]
        self._fixed: dict[int, _Verdict] = {}  # of the other tasks; the first node that is asked gives them
        self._decisions: dict[tuple[_Verdict, ...], Decision] = {}
        self._picked: dict[tuple[int | None, ...], Picked] = {}

    def _note(self, use: Use) -> None:
        for reference in use.refers:
            if isinstance(reference, ByNode):
                self.by_node.add(use.path)
            elif isinstance(reference, Field) and not use.inside:  # else it is noted where it is used
                self.fields.setdefault(reference.__fieldlab_reference__()[1], []).append(use.path)

    def decide(self, node: Node) -> Decision:
        """What ``node`` decides."""
        if not self._decisions:
            self._fixed = {key: _ask(ways, node) for key, ways in self._ways.items() if key not in set(self._open)}
        for key, task in self._made.items():
            self._ways[key] = task.implementations_for(node)
        answers = tuple(_ask(self._ways[key], node) for key in self._open)
        if answers not in self._decisions:
            verdicts = self._fixed | dict(zip(self._open, answers, strict=True))
            self._decisions[answers] = Decision(self, verdicts, self._pick(verdicts, answers))
        return self._decisions[answers]

    def _pick(self, verdicts: Mapping[int, _Verdict], answers: tuple[_Verdict, ...]) -> Picked:
        key = tuple(one.place for one in answers)
        if key not in self._picked:
            found: dict[str, Implementation] = {}
            for use in self.uses:
                place = verdicts[id(use.step.task)].place
                if place is not None:
                    found[use.path] = self._ways[id(use.step.task)][place]
            self._picked[key] = Picked(found)
        return self._picked[key]


class Choices(Sequence[StepChoice]):
    """The choice of every step of every deployment, in their order."""

    def __init__(self, decided: Iterable[tuple[str, Decision]] = ()) -> None:
        self._decided = tuple(decided)
        self._ends = tuple(itertools.accumulate(len(decision) for _, decision in self._decided))

    def of(self, deployment: str) -> tuple[StepChoice, ...]:
        """Those of one deployment."""
        return tuple(one for name, decision in self._decided if name == deployment for one in decision.choices(name))

    def alike(self) -> list[tuple[Decision, list[int]]]:
        """The decisions, each with the deployments that share it: by their place in ``names``."""
        found: dict[int, tuple[Decision, list[int]]] = {}
        for place, (_, decision) in enumerate(self._decided):
            found.setdefault(id(decision), (decision, []))[1].append(place)
        return list(found.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The deployments for which there are choices."""
        return tuple(name for name, _ in self._decided)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[StepChoice]:
        for name, decision in self._decided:
            yield from decision.choices(name)

    @overload
    def __getitem__(self, index: int) -> StepChoice: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[StepChoice, ...]: ...
    def __getitem__(self, index: int | slice) -> StepChoice | tuple[StepChoice, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        place = range(len(self))[index]
        which = bisect.bisect_right(self._ends, place)
        name, decision = self._decided[which]
        first = self._ends[which] - len(decision)
        return next(itertools.islice(decision.choices(name), place - first, None))

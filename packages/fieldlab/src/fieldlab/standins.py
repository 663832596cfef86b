"""What a simulation takes in place of running: how long a step takes, how it ends, what its conditions say.

No user code runs in a simulation, so everything that it would decide is given here, or drawn. Draws come from a
generator of the deployment's own, so that another deployment more does not change what befalls the others.

A stand-in is looked up by ``(deployment, step)``, then by the step's name, then by its task's name, then by ``"*"``.
The name of a step inside of a DAG that is a step is its plain path: ``"collect/fetch"``.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from fieldlab_common.deployment import Deployment, StepSpec
from fieldlab_common.environment import parse_duration
from fieldlab_common.errors import DefinitionError, UnknownNameError

from fieldlab.text import closest

__all__ = ["Answer", "Duration", "Name", "Outcome", "StandIn", "StandIns", "probability", "span"]

Name: TypeAlias = str | tuple[str, str]
Duration: TypeAlias = float | str | tuple[float | str, float | str]
Outcome: TypeAlias = bool | float | str | Sequence[bool | float | str]
Answer: TypeAlias = bool | float

QUESTIONS = ("when", "until", "retry_if", "length")
EVERY = "*"
_SECONDS = (1.0, 10.0)  # a step takes so long if nothing is said
_CHANCES = {"when": 0.5, "until": 0.1, "retry_if": 1.0}
_ITEMS = (1, 10)  # of a fan-out
_WORDS = {"succeeded": 1.0, "failed": 0.0}


class StandIn(NamedTuple):
    """What stands in for running a step. ``bounds`` None: in the background until it is told to stop."""

    bounds: tuple[float, ...] | None
    chances: tuple[float, ...]

    def succeeds(self, attempt: int, rng: random.Random) -> bool:
        """Whether an attempt ends well."""
        return _happens(self.chances[min(attempt, len(self.chances)) - 1], rng)

    def seconds(self, rng: random.Random) -> float | None:
        """How long an attempt takes; None: until it is told to stop."""
        if self.bounds is None:
            return None
        low, high = self.bounds
        return low if low == high else rng.uniform(low, high)


class StandIns:
    """The stand-ins of one simulation, checked."""

    def __init__(
        self,
        deployments: Iterable[Deployment],
        builtin: Iterable[str],
        *,
        durations: Mapping[Name, Duration],
        outcomes: Mapping[Name, Outcome],
        answers: Mapping[Name, Answer],
    ) -> None:
        self._names: set[Name] = {EVERY}  # of what takes a duration and an outcome
        self._asking: set[Name] = {EVERY}  # of what may have a condition
        played = set(builtin)
        for deployment in deployments:
            for path, spec in deployment.graph.walk():
                names: set[Name] = {path, spec.task, (deployment.name, path)}
                self._asking |= names
                if spec.code not in played and spec.graph is None:
                    self._names |= names
        self._durations = {_known(name, self._names, "durations"): span(value) for name, value in durations.items()}
        self._outcomes = {_known(name, self._names, "outcomes"): _chances(value) for name, value in outcomes.items()}
        self._answers = dict(answers)
        self._by_deployment = any(isinstance(name, tuple) for name in (*durations, *outcomes))
        self._known_ones: dict[tuple[str, int], StandIn] = {}  # by deployment, if that counts, and the spec's id
        for name in answers:
            self._check_question(name)

    def of(self, deployment: str, path: str, spec: StepSpec) -> StandIn:
        """What stands in for an attempt of a step."""
        key = (deployment if self._by_deployment else "", id(spec))
        if key not in self._known_ones:
            bounds = _find(self._durations, deployment, path, spec.task)
            if bounds is None and spec.background is None:
                bounds = _SECONDS
            self._known_ones[key] = StandIn(bounds, _find(self._outcomes, deployment, path, spec.task) or (1.0,))
        return self._known_ones[key]

    def says(self, kind: str, deployment: str, path: str, task: str, rng: random.Random) -> bool | int:
        """What a step's condition says; ``length``: how many items the list has that it is mapped over."""
        for name in ((deployment, f"{path}.{kind}"), f"{path}.{kind}", f"{task}.{kind}", f"*.{kind}"):
            if name in self._answers:
                value = self._answers[name]
                return int(value) if kind == "length" else _happens(float(value), rng)
        return rng.randint(*_ITEMS) if kind == "length" else _happens(_CHANCES[kind], rng)

    def _check_question(self, name: Name) -> None:
        text = name if isinstance(name, str) else name[1]
        step, _, kind = text.rpartition(".")
        if kind not in QUESTIONS:
            raise DefinitionError(f"answers: {text!r} does not end in one of {', '.join('.' + q for q in QUESTIONS)}.")
        _known(step if isinstance(name, str) else (name[0], step), self._asking, "answers")
        value = self._answers[name]
        if kind == "length":
            if isinstance(value, bool) or value != int(value) or value < 0:
                raise DefinitionError(f"answers: {text!r} is {value!r}; a length is a whole number from 0.")
        else:
            probability(value, f"answers: {text!r}")


def _known(name: Name, names: Collection[Name], what: str) -> Name:
    if name in names:
        return name
    shown = name if isinstance(name, str) else " of ".join(reversed(name))
    texts = [n for n in names if isinstance(n, str)]
    inside = [text for text in texts if text.endswith(f"/{shown}")]
    near = f" Did you mean {inside[0]!r}?" if inside else closest(shown, texts)
    raise UnknownNameError(
        f"{what}: no step or task {shown!r} of this experiment takes a stand-in.{near}",
        advice='Name a step, a task, (deployment, step), or "*". Gates, barriers and sent events take none.',
    )


def _find(table: Mapping[Name, tuple[float, ...]], deployment: str, path: str, task: str) -> tuple[float, ...] | None:
    if not table:
        return None
    for name in ((deployment, path), path, task, EVERY):
        if name in table:
            return table[name]
    return None


def _happens(chance: float, rng: random.Random) -> bool:
    return chance >= 1.0 or (chance > 0.0 and rng.random() < chance)


def _chances(value: Outcome) -> tuple[float, ...]:
    many = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not many:
        raise DefinitionError("outcomes: an empty list; give one outcome for each attempt, the last one stays.")
    return tuple(_chance(one) for one in many)


def _chance(value: object) -> float:
    if isinstance(value, str) and value in _WORDS:
        return _WORDS[value]
    if isinstance(value, str) or not isinstance(value, int | float):
        raise DefinitionError(f"outcomes: {value!r} is none; give 'succeeded', 'failed', or a probability of success.")
    return probability(value, "outcomes")


def probability(value: float, what: str) -> float:
    """``value`` if it is a probability."""
    if not 0.0 <= value <= 1.0:
        raise DefinitionError(f"{what}: {value!r} is no probability from 0 to 1.")
    return float(value)


def span(value: Duration) -> tuple[float, float]:
    """The bounds, in seconds, between which a duration is drawn."""
    low, high = value if isinstance(value, tuple) else (value, value)
    bounds = parse_duration(low), parse_duration(high)
    if bounds[0] > bounds[1]:
        raise DefinitionError(f"{value!r}: the lower bound stands first.")
    return bounds

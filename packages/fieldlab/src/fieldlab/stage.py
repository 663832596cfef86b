"""The director's side of a simulation: the log of events, the deployments' states, and what was found wrong.

It knows executors by what they do (``Player``), not what they are. An event is numbered once however often it comes; a
barrier is judged by ``fieldlab_common.events.barrier_view``, over just those events of the log that it looks at; when
the experiment starts, what silence means and what it ends as is asked of ``fieldlab_common.course``.
"""

from __future__ import annotations

import bisect
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

from fieldlab_common.builtin import check_event_name
from fieldlab_common.course import (
    CLAIM_SECONDS,
    LAUNCHES,
    NEVER,
    SILENCE_SECONDS,
    Abandon,
    ExperimentStanding,
    MoveExperiment,
    after_silence,
    decide_beginning,
    decide_experiment,
    experiment_outcome,
    way_to,
)
from fieldlab_common.deployment import Deployment
from fieldlab_common.environment import parse_duration
from fieldlab_common.errors import DefinitionError, UnknownNameError
from fieldlab_common.events import BARRIER, DEPLOYMENT, BarrierView, Event, Member, barrier_view
from fieldlab_common.lifecycle import DeploymentState, ExperimentState, Reason, advance
from fieldlab_common.paths import Round

from fieldlab.simulated import Finding, SimulatedDeployment, SimulatedStep
from fieldlab.standins import Duration, span
from fieldlab.text import closest, counted, listed
from fieldlab.timeline import Row
from fieldlab.virtual import Line, Network, Party, VirtualTime

__all__ = ["WITHIN", "Away", "Player", "Settings", "Stage", "barrier_topic", "topic_of"]

WITHIN = 3600.0  # when nodes are lost, or cannot be reached, if that is drawn, in seconds
EVERY = "*"
FAILED = "failed"
_MOST_VIEWS = 1000

_D, _E = DeploymentState, ExperimentState
_CLAIMED = (_D.RUNNING, _D.UNREACHABLE)

Span: TypeAlias = tuple[float | str, float | str]
Away: TypeAlias = Span | list[Span]


class Player(Party, Protocol):
    """An executor, as the director's side knows it."""

    deployment: Deployment
    offset: float
    cursor: int
    told: bool

    def clock(self) -> float:
        """What the node's clock shows."""
        ...

    def begin(self) -> None:
        """The launch came."""
        ...

    def start(self) -> None:
        """The order came to begin now."""
        ...

    def vanish(self) -> None:
        """The node goes silent for good."""
        ...

    def topics(self) -> list[str]:
        """What its steps wait for."""
        ...

    def receive(self, upto: int) -> None:
        """The director's events up to that number came."""
        ...

    def ended(self) -> Mapping[str, SimulatedStep]:
        """How its steps stand."""
        ...


@dataclass(slots=True)
class _Standing:
    """A deployment as the director knows it."""

    state: DeploymentState = _D.PENDING
    reason: Reason | None = None
    message: str = ""
    ended: float | None = None
    preparing: float = 0.0  # how long its preparation takes
    unfit: bool = False  # it cannot be prepared
    away: int = 0  # how many spans in which it cannot be reached have begun and not ended
    silent_since: float | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Those of the experiment that the director follows; ``start_at`` in virtual seconds."""

    lost_after: float
    min_nodes: int | None = None
    start_at: float | None = None


class Stage:
    """The director's log, the network, the clock, and everybody who is in it."""

    def __init__(
        self,
        deployments: Iterable[Deployment],
        players: Callable[[Stage, Deployment], Player],
        *,
        seed: int,
        network: Network,
        settings: Settings,
    ) -> None:
        self.time = VirtualTime()
        self.line = Line(self.time, network, random.Random(f"{seed}/network"))
        self.rows: list[Row] = []
        self.log: dict[str, list[Event]] = {}  # by topic, each in the director's order
        self.waiting: dict[str, dict[str, None]] = {}  # topic -> the deployments that wait for something of it
        self.barriers: dict[tuple[str, int | str, Round], list[str]] = {}  # that were come to, and by whom
        # That were waited at, and by whom: the event's name, the number that it has to be above, and how many of its
        # name opened the gate in earlier rounds.
        self.gates: dict[tuple[str, int, int], list[str]] = {}
        self.numbers: dict[str, int] = {}  # of events, by key
        self.state = _E.PREPARING
        self._seed, self._settings = seed, settings
        self._abandoned = ""
        self._begins: float | None = None  # when the executors were told to begin
        self._rng = random.Random(f"{seed}/stage")
        self._views: dict[Any, BarrierView] = {}
        self._players = {one.name: players(self, one) for one in deployments}
        self._standing = {name: _Standing() for name in self._players}
        self._counts = Counter(one.state for one in self._standing.values())
        self._members = tuple(
            Member(deployment=d.name, role=d.role, node=d.node.name)
            for d in (player.deployment for player in self._players.values())
        )

    # --- what is planned before it starts

    def plan_events(self, events: Mapping[str, float | str]) -> None:
        """Have events sent by a person."""
        for name, at in events.items():
            event = Event(name=check_event_name(name), key=f"person:{name}")
            self.time.at(parse_duration(at), self.add, event)

    def plan_clocks(self, skew: Mapping[str, float] | float) -> None:
        """Set the nodes' clocks wrong."""
        if not isinstance(skew, Mapping):
            skew = {name: self._rng.uniform(-skew, skew) for name in self._players}
        for name, offset in skew.items():
            self._player(name, "skew").offset = float(offset)

    def plan_losses(self, lost: Mapping[str, float | str] | int) -> None:
        """Have nodes go silent for good."""
        if isinstance(lost, int):
            lost = {name: self._rng.uniform(0.0, WITHIN) for name in self._drawn(lost, "lost")}
        for name, at in lost.items():
            self._player(name, "lost")
            self.time.at(parse_duration(at), self._vanish, name)

    def plan_silences(self, unreachable: Mapping[str, Away] | int) -> None:
        """Have nodes go silent for a while: they go on, and what they say comes later."""
        if isinstance(unreachable, int):
            begins = {name: self._rng.uniform(0.0, WITHIN) for name in self._drawn(unreachable, "unreachable")}
            unreachable = {name: (begin, begin + self._rng.uniform(60.0, WITHIN)) for name, begin in begins.items()}
        for name, away in unreachable.items():
            self._player(name, "unreachable")
            for begin, end in _spans(name, away):
                self.time.at(begin, self._go_silent, name)
                self.time.at(end, self._come_back, name)

    def plan_preparation(self, preparing: Mapping[str, Duration]) -> None:
        """Set how long each deployment's preparation takes, and which cannot be prepared."""
        for name in preparing:
            if name != EVERY:
                self._player(name, "preparing")
        for name, standing in self._standing.items():
            said = preparing.get(name, preparing.get(EVERY, 0.0))
            standing.unfit = said == FAILED
            low, high = (0.0, 0.0) if standing.unfit else span(said)
            standing.preparing = random.Random(f"{self._seed}/preparing/{name}").uniform(low, high)

    def _drawn(self, count: int, what: str) -> list[str]:
        if not 0 <= count <= len(self._players):
            raise DefinitionError(f"{what}={count}: there are {counted(len(self._players), 'deployment')}.")
        return self._rng.sample(list(self._players), count)

    def _player(self, name: str, what: str) -> Player:
        if name not in self._players:
            raise UnknownNameError(f"{what}: there is no deployment {name!r}.{closest(name, self._players)}")
        return self._players[name]

    # --- the course of the experiment

    def run(self, horizon: float, most: int) -> bool:
        """Prepare every deployment and let time pass; whether all of it came to rest."""
        self._say(None, self.state)
        for name, standing in self._standing.items():
            self._set(name, _D.PREPARING)
            self.time.after(standing.preparing, self._prepared, name)
        return self.time.run(horizon, most)

    def _prepared(self, name: str) -> None:
        if self._standing[name].unfit:
            self.move(name, _D.FAILED, Reason.PREPARE_FAILED, "It could not be prepared, as told.")
        else:
            self.move(name, _D.READY)

    def _settle(self) -> None:
        """Do what follows for the experiment from how its deployments stand."""
        while self.state in (_E.PREPARING, _E.READY):
            action = decide_experiment(self._experiment(), self.time.now)
            if isinstance(action, MoveExperiment):
                self._move_experiment(action.state)
            elif isinstance(action, Abandon):
                self._abandon(action.message)
            else:
                if action.at < NEVER:
                    self.time.at(action.at, self._settle)
                break
        self._begin_together()
        found = [state for state, count in self._counts.items() if count]
        outcome = experiment_outcome(found, cancelling=False)
        for state in way_to(self.state, outcome) if outcome else ():
            self._move_experiment(state)

    def _experiment(self) -> ExperimentStanding:
        return ExperimentStanding(
            state=self.state,
            deployments=self._counts,
            min_nodes=self._settings.min_nodes,
            start_requested=True,
            start_at=self._settings.start_at,
        )

    def _move_experiment(self, state: ExperimentState) -> None:
        self.state = advance(self.state, state)
        self._say(None, state)
        ready = [n for n, one in self._standing.items() if one.state is _D.READY] if state is _E.RUNNING else []
        if len(ready) == 1:  # it has nobody to wait for
            self._begins = max(self.time.now, self._settings.start_at or 0.0)
        for name in ready:
            self._set(name, _D.LAUNCHING)
            self.line.carry(self._players[name], self._players[name].begin)
            self.time.after(CLAIM_SECONDS * LAUNCHES, self._unclaimed, name)

    def _abandon(self, message: str) -> None:
        self._abandoned = message
        for name, standing in self._standing.items():
            if not standing.state.terminal:
                self._set(name, _D.CANCELLED, Reason.CANCELLED, message)

    def claim(self, name: str) -> bool:
        """An executor asks for its deployment: whether it has it."""
        if self._standing[name].state is not _D.LAUNCHING:
            return False
        known = self._begins  # then the answer says when to begin
        self.move(name, _D.RUNNING)
        if known is not None:
            self.time.at(max(known, self.time.now), self._players[name].start)
        return True

    def _begin_together(self) -> None:
        """Order the executors to begin, all at one time, if none is to be waited for any more."""
        if self.state is not _E.RUNNING or self._begins is not None:
            return
        counts = {(state, state in _CLAIMED): count for state, count in self._counts.items()}
        action = decide_beginning(counts, self._settings.min_nodes)
        if isinstance(action, Abandon):
            self._abandon(action.message)
        elif action is not None:
            self._begins = max(self.time.now, self._settings.start_at or 0.0)
            for name in [name for name, one in self._standing.items() if one.state in _CLAIMED]:
                self.line.carry(self._players[name], self._told_to_begin, self._players[name], self._begins)

    def _told_to_begin(self, player: Player, at: float) -> None:
        """The order to begin came to an executor."""
        self.time.at(max(at, self.time.now), player.start)

    def _unclaimed(self, name: str) -> None:
        if self._standing[name].state is _D.LAUNCHING:
            text = f"It was launched {LAUNCHES} times, and never claimed its deployment within {CLAIM_SECONDS:g} s."
            self.move(name, _D.FAILED, Reason.LAUNCH_FAILED, text)

    # --- silence

    def _vanish(self, name: str) -> None:
        self._players[name].vanish()
        self._begin_silence(name)

    def _go_silent(self, name: str) -> None:
        self._standing[name].away += 1
        self._players[name].reachable = False
        self._begin_silence(name)

    def _come_back(self, name: str) -> None:
        standing, player = self._standing[name], self._players[name]
        standing.away -= 1
        if standing.away or not player.lives:
            return
        player.reachable, standing.silent_since = True, None
        if standing.state is _D.UNREACHABLE:
            self.move(name, _D.RUNNING)
        self.line.reached(player)

    def _begin_silence(self, name: str) -> None:
        standing, lost_after = self._standing[name], self._settings.lost_after
        if standing.silent_since is None:
            since = standing.silent_since = self.time.now
            for seconds in sorted({min(SILENCE_SECONDS, lost_after), lost_after}):
                self.time.after(seconds, self._still_silent, name, since, seconds)

    def _still_silent(self, name: str, since: float, seconds: float) -> None:
        standing = self._standing[name]
        while standing.silent_since == since:
            move = after_silence(standing.state, seconds, lost_after=self._settings.lost_after)
            if move is None:
                return
            self.move(name, move.state, move.reason, move.message)

    # --- states and events

    def move(self, name: str, state: DeploymentState, reason: Reason | None = None, message: str = "") -> None:
        """Advance a deployment, unless it has ended: terminal is terminal. What follows for the experiment is done."""
        if not self._standing[name].state.terminal:
            self._set(name, state, reason, message)
            self._settle()

    def _set(self, name: str, state: DeploymentState, reason: Reason | None = None, message: str = "") -> None:
        standing = self._standing[name]
        self._counts[standing.state] -= 1
        standing.state = advance(standing.state, state)
        self._counts[state] += 1
        standing.reason, standing.message = reason, message
        standing.ended = self.time.now if state.terminal else None
        self._say(name, state, reason, message)
        data = {"deployment": name, "state": state.value, "reason": reason.value if reason else None}
        key = f"director:{name}:{len(self.numbers)}"
        self.add(Event(name=DEPLOYMENT, data=data, sent_at=self.time.now, key=key))

    def _say(
        self,
        name: str | None,
        state: DeploymentState | ExperimentState,
        reason: Reason | None = None,
        message: str = "",
    ) -> None:
        clock = self.time.now if name is None else self._players[name].clock()
        self.rows.append(Row(self.time.now, name, None, state, reason, message=message, clock=clock))

    def add(self, event: Event) -> None:
        """Number an event, unless it is known, and tell those who wait for it."""
        if event.key in self.numbers:
            return
        number = self.numbers[event.key] = len(self.numbers) + 1
        topic = topic_of(event)
        self.log.setdefault(topic, []).append(replace(event, number=number))
        for name in list(self.waiting.get(topic, ())):
            self.tell(self._players[name])

    def tell(self, executor: Player) -> None:
        """Bring an executor the events that it has not seen, if it waits for one of them and none are on their way."""
        if executor.told or not any(self._last(topic) > executor.cursor for topic in executor.topics()):
            return
        executor.told = True
        self.line.carry(executor, executor.receive, len(self.numbers))

    def _last(self, topic: str) -> int:
        events = self.log.get(topic)
        return (events[-1].number or 0) if events else 0

    def seen(self, topic: str, cursor: int) -> int:
        """How many events of a topic stand at or before ``cursor``."""
        return bisect.bisect_right(self.log.get(topic, []), cursor, key=lambda event: event.number or 0)

    def barrier(self, name: str, parties: int | str, round: Round, cursor: int, own: tuple[Event, ...]) -> BarrierView:
        """How a barrier stands for who has seen the log up to ``cursor``, and events of its own."""
        topic = barrier_topic(name, round)
        arrived, ended = self.seen(topic, cursor), self.seen(DEPLOYMENT, cursor)
        key = (topic, parties, arrived, ended, tuple(event.key for event in own))
        if key not in self._views:
            if len(self._views) > _MOST_VIEWS:
                self._views.clear()
            log = [*self.log.get(topic, [])[:arrived], *own, *self.log.get(DEPLOYMENT, [])[:ended]]
            self._views[key] = barrier_view(name, parties, log, self._members, round)
        return self._views[key]

    # --- what a simulation says

    def ended(self) -> dict[str, SimulatedDeployment]:
        """How every deployment ended."""
        return {
            name: SimulatedDeployment(
                name=name,
                node=executor.deployment.node.name,
                dag=executor.deployment.graph.name,
                role=executor.deployment.role,
                state=(standing := self._standing[name]).state,
                reason=standing.reason,
                message=standing.message,
                ended=standing.ended,
                steps=executor.ended(),
            )
            for name, executor in self._players.items()
        }

    def findings(self, ended: Mapping[str, SimulatedDeployment], whole: bool) -> list[Finding]:
        """What is probably not meant. ``whole``: nothing was left to happen."""
        found = self._unfilled_barriers()
        for (name, after, before), who in self.gates.items():
            if len(self.log.get(name, ())) - self.seen(name, after) <= before:
                names = self._ordered(who)
                what = f"event number {before + 1} of that name" if before else "an event"
                text = f"Nobody opens the gate {name!r}: {listed(names, 4)} waited for {what} that nobody sent."
                found.append(Finding(kind="gate", name=name, message=text, deployments=names))
        idle = [] if self._abandoned else _never_ran(ended)
        return [*self._not_started(), *found, *idle, *self._unfinished(whole)]

    def _not_started(self) -> list[Finding]:
        if not self._abandoned:
            return []
        failed = tuple(name for name, one in self._standing.items() if one.state is _D.FAILED)
        return [Finding(kind="not_started", name="", message=self._abandoned, deployments=failed)]

    def _unfilled_barriers(self) -> list[Finding]:
        """Of each barrier the first round that never fills, with how many others there are."""
        found: dict[tuple[str, int | str], list[Finding]] = {}
        for (name, parties, round), who in self.barriers.items():
            if (finding := self._unfilled(name, parties, round, who)) is not None:
                found.setdefault((name, parties), []).append(finding)
        return [
            replace(first, message=f"{first.message} Nor does it in {counted(len(more), 'other round')}.")
            if more
            else first
            for first, *more in found.values()
        ]

    def _unfilled(self, name: str, parties: int | str, round: Round, who: list[str]) -> Finding | None:
        view = self.barrier(name, parties, round, len(self.numbers), ())
        if view.open:
            return None
        every = isinstance(parties, int) or parties == "all"
        wanted = [one.deployment for one in self._members if every or one.role == parties]
        missing = tuple(f"{d} ({self._standing[d].state.value})" for d in wanted if d not in view.arrived)
        who_not = f"missing: {listed(missing)}" if wanted else f"no deployment has the role {parties!r}"
        if wanted and not missing:
            who_not = "there are no more"
        barrier = f"{name!r}" + (f" in round {'.'.join(map(str, round))}" if round else "")
        text = f"The barrier {barrier} never fills: it needs {view.needed}, came: {listed(view.arrived, 4)}; {who_not}."
        return Finding(kind="barrier", name=name, message=text, deployments=self._ordered(who), missing=missing)

    def _ordered(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those deployments, each once, in the experiment's order."""
        known = set(names)
        return tuple(name for name in self._players if name in known)

    def _unfinished(self, whole: bool) -> list[Finding]:
        names = tuple(name for name, standing in self._standing.items() if not standing.state.terminal)
        if not names:
            return []
        why = "waiting for what never comes" if whole else f"still under way when it was cut, at {self.time.now:g} s"
        text = f"{counted(len(names), 'deployment')} would not end ({listed(names, 4)}): {why}."
        return [Finding(kind="unfinished", name="", message=text, deployments=names)]


def _never_ran(ended: Mapping[str, SimulatedDeployment]) -> list[Finding]:
    where: dict[tuple[str, str], list[str]] = {}
    ran: set[tuple[str, str]] = set()
    for deployment in ended.values():
        for step in deployment.steps.values():
            where.setdefault((deployment.dag, step.name), []).append(deployment.name)
            if step.attempts:
                ran.add((deployment.dag, step.name))
    return [
        Finding(
            kind="never_ran",
            name=step,
            message=f"Step {step!r} of {dag!r} ran in none of {counted(len(names), 'deployment')}.",
            deployments=tuple(names),
        )
        for (dag, step), names in where.items()
        if (dag, step) not in ran
    ]


def topic_of(event: Event) -> str:
    """Under what an event is kept, and waited for: its name; a barrier's by barrier, a deployment's end by itself."""
    if event.name == BARRIER:
        return barrier_topic(event.data["barrier"], tuple(event.data.get("round", ())))
    if event.name == DEPLOYMENT and not DeploymentState(event.data["state"]).terminal:
        return f"{DEPLOYMENT}:under way"  # no barrier's fate depends on it
    return event.name


def barrier_topic(name: str, round: Round) -> str:
    """Under what arrivals at a barrier are kept."""
    return f"{BARRIER}:{round}:{name}" if round else f"{BARRIER}:{name}"


def _spans(name: str, away: Away) -> list[tuple[float, float]]:
    """The spans of time in which a node is away."""
    found = []
    for one in away if isinstance(away, list) else [away]:
        if not isinstance(one, tuple) or len(one) != 2:
            raise DefinitionError(f"unreachable: {one!r} of {name!r} is no (from, to).")
        begin, end = parse_duration(one[0]), parse_duration(one[1])
        if begin >= end:
            raise DefinitionError(f"unreachable: {one!r} of {name!r} ends before it begins.")
        found.append((begin, end))
    return found

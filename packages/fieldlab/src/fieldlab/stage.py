"""The director's side of a simulation: the log of events, the deployments' states, and what was found wrong.

It knows executors by what they do (``Player``), not what they are. An event is numbered once however often it comes; a
barrier is judged by ``fieldlab_common.events.barrier_view``, over just those events of the log that it looks at.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fieldlab_common.builtin import check_event_name
from fieldlab_common.deployment import Deployment
from fieldlab_common.environment import parse_duration
from fieldlab_common.errors import DefinitionError, UnknownNameError
from fieldlab_common.events import BARRIER, DEPLOYMENT, BarrierView, Event, Member, barrier_view
from fieldlab_common.lifecycle import DeploymentState, Reason, advance

from fieldlab.simulated import Finding, Row, SimulatedDeployment, SimulatedStep
from fieldlab.text import closest, counted, listed
from fieldlab.virtual import Line, Network, VirtualTime

__all__ = ["LOST_WITHIN", "Player", "Stage", "topic_of"]

LOST_WITHIN = 3600.0  # when nodes are lost whose time is drawn, in seconds
_MOST_VIEWS = 1000

_D = DeploymentState


class Player(Protocol):
    """An executor, as the director's side knows it."""

    deployment: Deployment
    offset: float
    cursor: int
    told: bool
    lives: bool

    def clock(self) -> float:
        """What the node's clock shows."""
        ...

    def begin(self) -> None:
        """The launch came."""
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


@dataclass
class _Standing:
    """A deployment as the director knows it."""

    state: DeploymentState = _D.PENDING
    reason: Reason | None = None
    message: str = ""
    ended: float | None = None


class Stage:
    """The director's log, the network, the clock, and everybody who is in it."""

    def __init__(
        self,
        deployments: Iterable[Deployment],
        players: Callable[[Stage, Deployment], Player],
        *,
        seed: int,
        network: Network,
        lost_after: float,
    ) -> None:
        self.time = VirtualTime()
        self.line = Line(self.time, network, random.Random(f"{seed}/network"))
        self.rows: list[Row] = []
        self.log: dict[str, list[Event]] = {}  # by topic, each in the director's order
        self.waiting: dict[str, dict[str, None]] = {}  # topic -> the deployments that wait for something of it
        self.barriers: dict[tuple[str, int | str], list[str]] = {}  # that were come to, and by whom
        self.gates: dict[tuple[str, int], list[str]] = {}  # that were waited at, and by whom
        self.numbers: dict[str, int] = {}  # of events, by key
        self._lost_after = lost_after
        self._rng = random.Random(f"{seed}/stage")
        self._views: dict[Any, BarrierView] = {}
        self._players = {one.name: players(self, one) for one in deployments}
        self._standing = {name: _Standing() for name in self._players}
        self._members = tuple(
            Member(deployment=d.name, role=d.role, node=d.node.name)
            for d in (player.deployment for player in self._players.values())
        )

    # --- what is planned before it starts

    def plan_events(self, events: Mapping[str, float | str]) -> None:
        """Have events sent by a person."""
        for name, at in events.items():
            event = Event(name=check_event_name(name), key=f"person:{name}")
            self.time.at(parse_duration(at), lambda event=event: self.add(event))  # type: ignore[misc]

    def plan_clocks(self, skew: Mapping[str, float] | float) -> None:
        """Set the nodes' clocks wrong."""
        if not isinstance(skew, Mapping):
            skew = {name: self._rng.uniform(-skew, skew) for name in self._players}
        for name, offset in skew.items():
            self._player(name, "skew").offset = float(offset)

    def plan_losses(self, lost: Mapping[str, float | str] | int) -> None:
        """Have nodes go silent."""
        if isinstance(lost, int):
            if not 0 <= lost <= len(self._players):
                raise DefinitionError(f"lost={lost}: there are {counted(len(self._players), 'deployment')}.")
            names = self._rng.sample(list(self._players), lost)
            lost = {name: self._rng.uniform(0.0, LOST_WITHIN) for name in names}
        for name, at in lost.items():
            seconds = parse_duration(at)
            self.time.at(seconds, self._player(name, "lost").vanish)
            self.time.at(seconds + self._lost_after, lambda name=name: self._lose(name))  # type: ignore[misc]

    def _player(self, name: str, what: str) -> Player:
        if name not in self._players:
            raise UnknownNameError(f"{what}: there is no deployment {name!r}.{closest(name, self._players)}")
        return self._players[name]

    def run(self, horizon: float, most: int) -> bool:
        """Launch every deployment and let time pass; whether all of it came to rest."""
        for name, executor in self._players.items():
            for state in (_D.PREPARING, _D.READY, _D.LAUNCHING):
                self.move(name, state)
            self.line.carry(executor.begin, lambda: True)
        return self.time.run(horizon, most)

    # --- states and events

    def move(self, name: str, state: DeploymentState, reason: Reason | None = None, message: str = "") -> None:
        """Advance a deployment, unless it has ended: terminal is terminal."""
        standing = self._standing[name]
        if standing.state.terminal:
            return
        standing.state = advance(standing.state, state)
        standing.reason, standing.message = reason, message
        standing.ended = self.time.now if state.terminal else None
        clock = self._players[name].clock()
        self.rows.append(Row(self.time.now, name, None, state, reason, message=message, clock=clock))
        data = {"deployment": name, "state": state.value, "reason": reason.value if reason else None}
        self.add(Event(name=DEPLOYMENT, data=data, sent_at=self.time.now, key=f"director:{name}:{state.value}"))

    def _lose(self, name: str) -> None:
        self.move(name, _D.LOST, Reason.SILENT, f"Nothing was heard of it for {self._lost_after:g} s.")

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
        upto = len(self.numbers)
        self.line.carry(lambda: executor.receive(upto), lambda: executor.lives)

    def _last(self, topic: str) -> int:
        events = self.log.get(topic)
        return (events[-1].number or 0) if events else 0

    def seen(self, topic: str, cursor: int) -> int:
        """How many events of a topic stand at or before ``cursor``."""
        return bisect.bisect_right(self.log.get(topic, []), cursor, key=lambda event: event.number or 0)

    def barrier(self, name: str, parties: int | str, cursor: int, own: tuple[Event, ...]) -> BarrierView:
        """How a barrier stands for who has seen the log up to ``cursor``, and events of its own."""
        topic = f"{BARRIER}:{name}"
        arrived, ended = self.seen(topic, cursor), self.seen(DEPLOYMENT, cursor)
        key = (name, parties, arrived, ended, tuple(event.key for event in own))
        if key not in self._views:
            if len(self._views) > _MOST_VIEWS:
                self._views.clear()
            log = [*self.log.get(topic, [])[:arrived], *own, *self.log.get(DEPLOYMENT, [])[:ended]]
            self._views[key] = barrier_view(name, parties, log, self._members)
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
        found = [f for (name, parties), who in self.barriers.items() if (f := self._unfilled(name, parties, who))]
        for (name, after), who in self.gates.items():
            if self._last(name) <= after:
                names = self._ordered(who)
                text = f"Nobody opens the gate {name!r}: {listed(names, 4)} waited for an event that nobody sent."
                found.append(Finding(kind="gate", name=name, message=text, deployments=names))
        return [*found, *_never_ran(ended), *self._unfinished(whole)]

    def _unfilled(self, name: str, parties: int | str, who: list[str]) -> Finding | None:
        view = self.barrier(name, parties, len(self.numbers), ())
        if view.open:
            return None
        every = isinstance(parties, int) or parties == "all"
        wanted = [one.deployment for one in self._members if every or one.role == parties]
        missing = tuple(f"{d} ({self._standing[d].state.value})" for d in wanted if d not in view.arrived)
        who_not = f"missing: {listed(missing)}" if wanted else f"no deployment has the role {parties!r}"
        if wanted and not missing:
            who_not = "there are no more"
        text = f"The barrier {name!r} never fills: it needs {view.needed}, came: {listed(view.arrived, 4)}; {who_not}."
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
        return f"{BARRIER}:{event.data['barrier']}"
    if event.name == DEPLOYMENT and not DeploymentState(event.data["state"]).terminal:
        return f"{DEPLOYMENT}:under way"  # no barrier's fate depends on it
    return event.name

"""Play an experiment on a virtual clock: ``fl.simulate``. Besides ``local`` the one module that knows the executor.

Each deployment is decided by the ``fieldlab_executor.machine.Machine`` that decides it on a node, and barriers by the
``barrier_view`` that executors use; what is played is what is around them: here the executor's attempts, with
stand-ins (``fieldlab.standins``); the director's log in ``fieldlab.stage``, the network in ``fieldlab.virtual``.

What always holds: no user code runs; the same experiment, arguments and seed give the same simulation. An executor sees
its own events at once and those of others when a message brought them, in the director's order; it asks for them
only while it waits for one, which no step can tell from having had them before.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import gc
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fieldlab_common import paths
from fieldlab_common.builtin import Barrier, Send, WaitFor
from fieldlab_common.dag import DAG
from fieldlab_common.deployment import Deployment, StepSpec
from fieldlab_common.environment import parse_duration
from fieldlab_common.errors import DefinitionError
from fieldlab_common.events import BARRIER, DEPLOYMENT, Event, Gates, arrival
from fieldlab_common.experiment import Experiment
from fieldlab_common.lifecycle import Reason, StepState
from fieldlab_common.protocol import StepRecord
from fieldlab_common.resolve import resolve
from fieldlab_executor import machine as m
from fieldlab_executor.slots import places

from fieldlab.here import this_node
from fieldlab.ship import PYTHON, Blobs, Shipment, require_sound
from fieldlab.simulated import SimulatedStep, Simulation
from fieldlab.stage import Away, Settings, Stage, barrier_topic, topic_of
from fieldlab.standins import Answer, Duration, Name, Outcome, StandIn, StandIns
from fieldlab.timeline import Row, Timeline
from fieldlab.virtual import Network

__all__ = ["MAX_CALLS", "simulate"]

MAX_CALLS = 5_000_000  # things that happen in one simulation; one that would take more is cut there, and says so
STOP_SECONDS = 0.1  # from a request to stop to the end of an attempt

_OK, _FAILED = StepState.SUCCEEDED, StepState.FAILED


def simulate(
    experiment: Experiment | DAG,
    *,
    seed: int = 1,
    durations: Mapping[Name, Duration] | None = None,
    outcomes: Mapping[Name, Outcome] | None = None,
    answers: Mapping[Name, Answer] | None = None,
    events: Mapping[str, float | str] | None = None,
    network: Network | None = None,
    lost: Mapping[str, float | str] | int = 0,
    unreachable: Mapping[str, Away] | int = 0,
    preparing: Mapping[str, Duration] | None = None,
    skew: Mapping[str, float] | float = 0.0,
    submitted: dt.datetime | None = None,
    horizon: float | str = "7d",
) -> Simulation:
    """Play the control flow of ``experiment`` on a virtual clock; no user code runs, and nothing is sent.

    ``durations``: seconds, or ``(from, to)`` to be drawn between; ``outcomes``: ``"succeeded"``, ``"failed"``, a
    probability of success, or a list with one for each attempt; both by step, task, ``(deployment, step)`` or ``"*"``.
    Undefined steps succeed after 1 to 10 s. ``answers`` are for conditions: ``{"trace.when": 0.3, "probe.until":
    False, "fetch.retry_if": True, "sizes.length": 20}``. ``events``: when a person, or a task, sends which event.

    ``lost``: when which deployment's node goes silent for good, or how many do, drawn. ``unreachable``: from when to
    when which one cannot be reached, ``(from, to)`` or a list of those; or how many. ``preparing``: how long which
    deployment's (or ``"*"``) preparation takes, or ``"failed"``; ``min_nodes`` is then as it is with a director.
    ``skew``: how many seconds a deployment's clock is ahead, or the most by which each is off, drawn. ``submitted``:
    when second 0 is, for an experiment with ``start_at``; by default that very time. It ends at ``horizon`` if not
    before.

    Raises:
        PlanError: the experiment cannot run as it is.
        DefinitionError: a stand-in makes no sense; UnknownNameError: it is for nothing in the experiment.
    """
    if isinstance(experiment, DAG):
        experiment = Experiment(experiment.name).map(experiment, this_node())
    elif not isinstance(experiment, Experiment):
        raise DefinitionError(f"fl.simulate takes a DAG or an experiment, not {experiment!r:.80}.")
    objects = _Objects()
    resolution = resolve(experiment, objects, python=PYTHON)
    require_sound(Shipment(name=experiment.name, resolution=resolution, blobs=Blobs(), graphs={}))
    stand_ins = StandIns(
        resolution.deployments,
        (code for code in objects.kept if objects.builtin(code) is not None),
        durations=durations or {},
        outcomes=outcomes or {},
        answers=answers or {},
    )

    def player(stage: Stage, deployment: Deployment) -> _Executor:
        rng = random.Random(f"{seed}/deployment/{deployment.name}")
        return _Executor(deployment, stage, objects, stand_ins, rng)

    settings = _settings(experiment, submitted)
    stage = Stage(resolution.deployments, player, seed=seed, network=network or {}, settings=settings)
    stage.plan_events(events or {})
    stage.plan_clocks(skew)
    stage.plan_losses(lost)
    stage.plan_silences(unreachable)
    stage.plan_preparation(preparing or {})
    with _uncollected():
        whole = stage.run(parse_duration(horizon), MAX_CALLS)
        ended = stage.ended()
    findings = stage.findings(ended, whole)
    return Simulation(experiment.name, seed, stage.state, ended, Timeline(stage.rows), tuple(findings))


def _settings(experiment: Experiment, submitted: dt.datetime | None) -> Settings:
    start_at = None
    if submitted is not None and submitted.tzinfo is None:
        raise DefinitionError("submitted has no time zone.", advice="Use datetime(..., tzinfo=...).")
    if experiment.start_at is not None and submitted is not None:
        start_at = (experiment.start_at - submitted).total_seconds()
    return Settings(lost_after=experiment.lost_after, min_nodes=experiment.needed, start_at=start_at)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the collector of cycles away: nearly all that is made stays until the end, and looking through it again and
    again would take a third of the time. ``MAX_CALLS`` bounds what there can be.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class _Objects:
    """The sealer of a simulation: nothing is pickled, and every object is kept under a name of its own."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def seal(self, obj: Any, what: str) -> str:
        name = f"{len(self.kept)}: {what}"
        self.kept[name] = obj
        return name

    seal_arguments = seal

    def seal_file(self, path: str) -> str:
        return f"file {path}"

    def bundles(self) -> tuple[str, ...]:
        return ()

    def builtin(self, code: str) -> Barrier | Send | WaitFor | None:
        """The gate, barrier or sent event whose code this is; None: a user's."""
        task = getattr(self.kept[code], "__self__", None)
        return task if isinstance(task, Barrier | Send | WaitFor) else None

    def arguments(self, spec: StepSpec) -> tuple[Any, ...]:
        """The positional arguments of a step of fieldlab's own: name, timeout and so on, without the context."""
        return tuple(self.kept[spec.args][0])[:3]


# --- the executor's side ----------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Part:
    """A step, what stands in for it, and what became of it in all iterations of the DAGs around it together."""

    spec: StepSpec
    builtin: Barrier | Send | WaitFor | None
    stand_in: StandIn
    well: m.Outcome  # how an attempt ends that ends well
    attempts: int = 0
    started: float | None = None
    ended: float | None = None
    last: StepRecord | None = None  # how it ended

    @property
    def status(self) -> StepState:
        if self.last is not None:
            return self.last.state
        return StepState.WAITING if self.started is None else StepState.RUNNING


@dataclass(slots=True, eq=False)
class _Attempt:
    """One attempt that runs; ``look``: it waits for events of ``topics``, until this gives its outcome."""

    key: m.Key
    part: _Part
    topics: tuple[str, ...] = ()
    look: Callable[[], m.Outcome | None] | None = None


@dataclass
class _Outbox:
    """What is to be told to the director, in order, and how much of it has come there."""

    messages: list[Callable[[], None]] = field(default_factory=list)
    arrived: int = 0
    sending: bool = False


class _Executor:
    """Performs what the machine of one deployment asks for, on virtual time."""

    def __init__(
        self, deployment: Deployment, stage: Stage, objects: _Objects, stand_ins: StandIns, rng: random.Random
    ) -> None:
        self.deployment = deployment
        self.offset = 0.0
        self.cursor = 0  # the number of the last event of the director's that it has
        self.told = False  # events are on their way to it
        self.lives = self.reachable = True
        self._stage, self._time, self._rng = stage, stage.time, rng
        self._objects, self._stand_ins = objects, stand_ins
        self._machine: m.Machine | None = None
        self._claimed = False
        self._parts = {path: self._part(path, spec) for path, spec in deployment.graph.walk()}
        self._attempts: dict[m.Key, _Attempt] = {}
        self._timers: dict[str, m.SetTimer] = {}
        self._own: list[Event] = []  # sent, and not yet seen in the director's log
        self._came: set[tuple[Any, ...]] = set()
        self._gates = Gates()
        self._outbox = _Outbox()
        self._events = 0
        self._performers: dict[type, Callable[[Any], None]] = {
            m.StartAttempt: self._start,
            m.StopAttempt: lambda effect: self._stop(effect.key, effect.signal, STOP_SECONDS),
            m.KillAttempt: lambda effect: self._stop(effect.key, 9, 0.0),
            m.SetTimer: self._set_timer,
            m.ClearTimer: self._clear_timer,
            m.Evaluate: self._evaluate,
            m.Report: self._report,
            m.Measuring: lambda effect: None,
            m.Finish: self._finish,
        }

    def _part(self, path: str, spec: StepSpec) -> _Part:
        well = m.Outcome(state=_OK, reason=Reason.RETURNED, handle=path)
        builtin = self._objects.builtin(spec.code) if spec.graph is None else None
        return _Part(spec, builtin, self._stand_ins.of(self.deployment.name, path, spec), well)

    def clock(self) -> float:
        """What the node's clock shows."""
        return self._time.now + self.offset

    # --- beginning and end

    def begin(self) -> None:
        """The launch came; it may come twice."""
        if not self._claimed and self.lives:
            self._claimed = self._stage.claim(self.deployment.name)

    def start(self) -> None:
        """The order came to begin now; it may come twice."""
        if self._machine is not None or not self.lives:
            return
        cpus = self.deployment.node.get("cpus")
        workers = places(self.deployment.resources.cpus, cpus if isinstance(cpus, int | float) else None)
        self._machine = m.Machine(self.deployment.graph, now=self.clock(), workers=workers)
        walltime = self.deployment.resources.walltime_seconds
        if walltime is not None:
            terminated = m.Terminated(message=f"Its walltime of {walltime:g} s is over.")
            self._time.after(walltime, self._tell, terminated)
        self._perform(self._machine.start(self.clock()))

    def vanish(self) -> None:
        """The node goes silent for good."""
        self.lives = False
        for attempt in self._attempts.values():
            self._wait_no_more(attempt)

    def _finish(self, effect: m.Finish) -> None:
        name = self.deployment.name
        self._post(lambda: self._stage.move(name, effect.state, effect.reason, effect.message))

    def _tell(self, stimulus: m.Stimulus) -> None:
        if self._machine is not None and self.lives:
            self._perform(self._machine.handle(stimulus, self._time.now + self.offset))

    def _perform(self, effects: list[m.Effect]) -> None:
        performers = self._performers
        for effect in effects:
            performers[type(effect)](effect)

    # --- what the machine asks for

    def _set_timer(self, effect: m.SetTimer) -> None:
        self._timers[effect.name] = effect
        self._time.at(effect.at - self.offset, self._fire, effect)

    def _fire(self, timer: m.SetTimer) -> None:
        if self._timers.get(timer.name) is timer:
            del self._timers[timer.name]
            self._tell(m.TimerFired(name=timer.name))

    def _clear_timer(self, effect: m.ClearTimer) -> None:
        del self._timers[effect.name]

    def _evaluate(self, effect: m.Evaluate) -> None:
        path = paths.plain(effect.step)
        value = self._stand_ins.says(effect.kind, self.deployment.name, path, self._parts[path].spec.task, self._rng)
        self._time.after(0.0, self._tell, m.Evaluated(id=effect.id, value=value))

    def _report(self, effect: m.Report) -> None:
        record, now = effect.record, self._time.now
        part = self._parts[paths.plain(record.step)]
        if record.state is StepState.RUNNING:
            part.last = part.ended = None  # it runs again, inside of a DAG that is repeated
            part.started = now if part.started is None else part.started
            part.attempts += part.spec.graph is not None
        if record.settled:
            part.last, part.ended = record, now
        row = (now, self.deployment.name, record.step, record.state, record.reason, record.attempt, record.iteration)
        self._stage.rows.append(Row._make((*row, record.message, now + self.offset)))

    def _start(self, effect: m.StartAttempt) -> None:
        key = effect.key
        part = self._parts[paths.plain(key.step)]
        part.attempts += 1
        attempt = self._attempts[key] = _Attempt(key, part)
        if part.spec.timeout is not None:
            self._tell(m.AttemptBegan(key=key))
        match part.builtin:
            case None:
                self._stand_in(attempt, part)
            case WaitFor():
                self._wait_at_gate(attempt, *self._objects.arguments(part.spec))
            case Barrier():
                self._come_to_barrier(attempt, *self._objects.arguments(part.spec))
            case Send():
                self._send(key, self._objects.arguments(part.spec)[0], None)
                self._end(attempt, part.well, 0.0)

    def _stand_in(self, attempt: _Attempt, part: _Part) -> None:
        key, background = attempt.key, part.spec.background
        if background is not None and background.announces:
            self._time.after(STOP_SECONDS, self._tell, m.AttemptReady(key=key))
        well = part.stand_in.succeeds(key.attempt, self._rng)
        seconds = part.stand_in.seconds(self._rng)
        if seconds is not None:
            self._end(attempt, part.well if well else _AS_TOLD, seconds)
        elif not well:
            self._end(attempt, _AS_TOLD, 0.0)

    def _stop(self, key: m.Key, number: int | None, seconds: float) -> None:
        attempt = self._attempts.get(key)
        if attempt is None:
            return
        signalled = number is not None and attempt.part.spec.background is None
        self._wait_no_more(attempt)
        outcome = _failed(Reason.SIGNAL, f"Signal {number} ended it.") if signalled else attempt.part.well
        self._end(attempt, outcome, seconds)

    def _end(self, attempt: _Attempt, outcome: m.Outcome, seconds: float) -> None:
        self._time.after(seconds, self._over, attempt, outcome)

    def _over(self, attempt: _Attempt, outcome: m.Outcome) -> None:
        if self._attempts.get(attempt.key) is attempt:
            self._wait_no_more(attempt)
            del self._attempts[attempt.key]
            self._tell(m.AttemptEnded(key=attempt.key, outcome=outcome))

    # --- events, gates and barriers

    def topics(self) -> list[str]:
        """What its steps wait for."""
        return [topic for attempt in self._attempts.values() for topic in attempt.topics]

    def receive(self, upto: int) -> None:
        """The director's events up to that number came; they may come twice."""
        if not self.lives or upto <= self.cursor:
            return
        self.cursor, self.told = upto, False
        self._own = [event for event in self._own if self._stage.numbers.get(event.key, upto + 1) > upto]
        self._look()
        self._stage.tell(self)

    def _send(self, key: m.Key, name: str, data: Any) -> None:
        self._events += 1
        event = Event(
            name=name,
            data=data,
            sender=self.deployment.name,
            step=key.step,
            iteration=key.iteration or 0,
            sent_at=self.clock(),
            key=f"{self.deployment.name}:{self._events}",
        )
        self._own.append(event)
        self._post(lambda: self._stage.add(event))
        self._look()

    def _post(self, message: Callable[[], None]) -> None:
        self._outbox.messages.append(message)
        if not self._outbox.sending:
            self._ship()

    def _ship(self) -> None:
        box = self._outbox
        box.sending = True
        self._stage.line.carry(self, self._shipped, len(box.messages))

    def _shipped(self, upto: int) -> None:
        """The messages up to that came to the director; they may come twice."""
        box = self._outbox
        if upto <= box.arrived:
            return
        new, box.arrived = box.messages[box.arrived : upto], upto
        for message in new:
            message()
        box.sending = False
        if len(box.messages) > upto:
            self._ship()

    def _place(self, key: m.Key) -> tuple[str, paths.Round]:
        return paths.place(key.step, key.iteration, lambda plain: self._parts[plain].spec.repeat is not None)

    def _wait_at_gate(self, attempt: _Attempt, name: str, timeout: float | None, after: int) -> None:
        place, round = self._place(attempt.key)
        mark = self._gates.mark(place, name, round)
        self._stage.gates.setdefault((name, after, mark), []).append(self.deployment.name)

        def look() -> m.Outcome | None:
            came = self._stage.seen(name, self.cursor) - self._stage.seen(name, after)
            came += sum(event.name == name for event in self._own)
            if came <= mark:
                return None
            self._gates.opened(place, name, mark + 1)
            return attempt.part.well

        self._wait(attempt, (name,), look, timeout, f"No event {name!r} came")

    def _come_to_barrier(self, attempt: _Attempt, name: str, parties: int | str, timeout: float | None) -> None:
        round = self._place(attempt.key)[1]
        party = (name, round, paths.untried(attempt.key.step), attempt.key.iteration or 0)
        topic = barrier_topic(name, round)
        if party not in self._came:
            self._came.add(party)
            self._stage.barriers.setdefault((name, parties, round), []).append(self.deployment.name)
            self._send(attempt.key, BARRIER, arrival(name, round))

        def look() -> m.Outcome | None:
            own = tuple(event for event in self._own if topic_of(event) == topic)
            view = self._stage.barrier(name, parties, round, self.cursor, own)
            if view.broken:
                missing = ", ".join(view.missing_for_good)
                return _failed(Reason.BARRIER_BROKEN, f"The barrier {name!r} can no longer fill; missing: {missing}.")
            return attempt.part.well if view.open else None

        self._wait(attempt, (topic, DEPLOYMENT), look, timeout, f"The barrier {name!r} did not fill")

    def _wait(
        self,
        attempt: _Attempt,
        topics: tuple[str, ...],
        look: Callable[[], m.Outcome | None],
        timeout: float | None,
        text: str,
    ) -> None:
        attempt.topics, attempt.look = topics, look
        self._waits(attempt, True)
        for topic in topics:
            self._stage.waiting.setdefault(topic, {})[self.deployment.name] = None
        if timeout is not None:
            self._end(attempt, _failed(Reason.RAISED, f"{text} within {timeout:g} s."), timeout)
        self._look()
        self._stage.tell(self)

    def _look(self) -> None:
        for attempt in list(self._attempts.values()):
            if attempt.look is not None and (outcome := attempt.look()) is not None:
                self._wait_no_more(attempt)
                self._end(attempt, outcome, 0.0)

    def _wait_no_more(self, attempt: _Attempt) -> None:
        if attempt.look is None:
            return
        topics, attempt.topics, attempt.look = attempt.topics, (), None
        for topic in set(topics) - set(self.topics()):
            self._stage.waiting[topic].pop(self.deployment.name, None)
        self._waits(attempt, False)

    def _waits(self, attempt: _Attempt, waits: bool) -> None:
        """It only waits, or no more: another may use its place in a shared worker meanwhile."""
        if attempt.part.spec.isolation == "shared":
            self._tell(m.AttemptWaits(key=attempt.key, waits=waits))

    # --- what became of it

    def ended(self) -> dict[str, SimulatedStep]:
        """How every step stands, by plain path."""
        return {
            name: SimulatedStep(
                name=name,
                status=part.status,
                reason=part.last.reason if part.last else None,
                message=part.last.message if part.last else "",
                attempts=part.attempts,
                started=part.started,
                ended=part.ended,
            )
            for name, part in self._parts.items()
        }


def _failed(reason: Reason, message: str) -> m.Outcome:
    return m.Outcome(state=_FAILED, reason=reason, message=message, error=message)


_AS_TOLD = _failed(Reason.RAISED, "It failed, as told.")

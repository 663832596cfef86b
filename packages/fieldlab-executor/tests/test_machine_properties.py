"""Any small graph, any outcome, any order of arrival: what must hold of every run, and a plain model of how it ends.

The model knows nothing of order, queues or timers: it reads the rules of edges, conditions, retries and iterations off
the graph, step by step, given what each attempt would bring. Where background steps, a cancel or ``stop_on_failure``
make the end depend on the order, only what must always hold is checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fieldlab_common.deployment import Background, Condition, Graph, Need, On, Repeat, Retry, StepSpec
from fieldlab_common.lifecycle import DeploymentState, Reason, StepState
from fieldlab_common.protocol import StepRecord
from fieldlab_executor.machine import (
    AttemptEnded,
    AttemptReady,
    CancelRequested,
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
    Refused,
    Report,
    SetTimer,
    StartAttempt,
    Stimulus,
    StopAttempt,
    Terminated,
    TimerFired,
)
from hypothesis import given, settings
from hypothesis import strategies as st

OK, FAILED = StepState.SUCCEEDED, StepState.FAILED
NEVER = 10_000  # stimuli; no small graph needs so many
WORKERS = 2


# --- graphs -----------------------------------------------------------------------------------------------------------


@st.composite
def specs(draw: st.DrawFn, index: int, before: list[StepSpec], ordered: bool) -> StepSpec:
    names = [spec.name for spec in before]
    hosts = [spec.name for spec in before if spec.background is not None]
    some = st.sampled_from(names) if names else st.nothing()
    needs = draw(st.lists(some, max_size=3, unique=True)) if names else []
    fields: dict[str, object] = {}
    if hosts:
        fields["during"] = tuple(draw(st.lists(st.sampled_from(hosts), max_size=2, unique=True)))
    if not ordered and draw(st.integers(0, 3)) == 0:
        fields["background"] = Background(announces=draw(st.booleans()), grace=draw(st.sampled_from([0.0, 3.0])))
    if draw(st.integers(0, 3)) == 0:
        fields["retry"] = Retry(
            times=draw(st.integers(1, 2)),
            delay=draw(st.sampled_from([0.0, 2.0])),
            condition=draw(st.sampled_from([None, f"if:{index}"])),
        )
    shape = draw(st.integers(0, 5))
    if shape == 0:
        fields["repeat"] = Repeat(
            times=draw(st.integers(1, 3)),
            every=draw(st.sampled_from([0.0, 2.0])),
            until=draw(st.sampled_from([None, f"until:{index}"])),
            keep_going=draw(st.booleans()),
        )
    elif shape == 1 and names:
        fields["over"], fields["over_path"] = draw(some), (f"length:{index}",)
    if names and draw(st.integers(0, 4)) == 0:
        fields["when"] = Condition(step=draw(some), code=f"when:{index}")
    return StepSpec(
        name=f"s{index}",
        task="task",
        code="code",
        args="args",
        needs=tuple(Need(step=name, on=draw(st.sampled_from(On)), data=draw(st.booleans())) for name in needs),
        need=draw(st.sampled_from(["all", "any"])),
        timeout=None if ordered else draw(st.sampled_from([None, None, 5.0])),
        isolation="process" if "background" in fields else draw(st.sampled_from(["process", "shared"])),
        exclusive=tuple(draw(st.lists(st.sampled_from(["x", "y"]), max_size=2, unique=True))),
        slot=draw(st.booleans()),
        measured=draw(st.booleans()),
        **fields,  # type: ignore[arg-type]
    )


@st.composite
def graphs(draw: st.DrawFn, *, ordered: bool = False) -> Graph:
    """``ordered``: how the graph ends depends on what its attempts bring, and on no order or time."""
    steps: list[StepSpec] = []
    for index in range(draw(st.integers(1, 6))):
        steps.append(draw(specs(index, steps, ordered)))
    return Graph(
        name="g",
        steps=tuple(steps),
        max_parallel=draw(st.sampled_from([None, 1, 2])),
        stop_on_failure=not ordered and draw(st.booleans()),
    )


@dataclass
class Fate:
    """What user code does each time it is asked: drawn once, then the same for machine and model."""

    data: st.DataObject
    known: dict[object, Any] = field(default_factory=dict)

    def attempt(self, key: Key) -> bool:
        return bool(self._of(st.sampled_from([True, True, False]), key))

    def answer(self, code: str, subject: object = None) -> int | None:
        """None: it raises."""
        values = [0, 1, 3, None] if code.startswith("length") else [True, True, False, None]
        found: int | None = self._of(st.sampled_from(values), (code, subject))
        return found

    def _of(self, values: st.SearchStrategy[Any], place: object) -> Any:
        if place not in self.known:
            self.known[place] = self.data.draw(values, label=str(place))
        return self.known[place]


# --- the world --------------------------------------------------------------------------------------------------------


class World:
    """Performs effects, offers every stimulus that may come next, and holds what must always hold."""

    def __init__(self, graph: Graph, fate: Fate) -> None:
        self.graph, self.fate = graph, fate
        self.specs = {spec.name: spec for spec in graph.steps}
        self.machine = Machine(graph, now=0.0, workers=WORKERS)
        self.now = 0.0
        self.running: dict[Key, bool] = {}  # whether it is ready
        self.ready: set[str] = set()  # background steps of which an attempt ever was
        self.stopping: set[Key] = set()
        self.failed: set[Key] = set()  # attempts of which it was reported, and their steps went on
        self.ever: set[Key] = set()
        self.timers: dict[str, float] = {}
        self.questions: dict[int, tuple[str, object]] = {}
        self.settled: Counter[str] = Counter()
        self.told = False  # to stop
        self.refused = False
        self.measuring = False
        self.finish: Finish | None = None
        self.states = self.machine.states
        effects = self.machine.start(0.0)
        self.states = self.machine.states
        self.perform(effects)

    # --- what may come next

    def stimuli(self) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = [("end", key) for key in self.running]
        found += [("ready", key) for key, ready in self.running.items() if not ready]
        found += [("answer", number) for number in self.questions]
        if self.timers:
            found.append(("timer", min(self.timers, key=lambda name: self.timers[name])))
        return found

    def happen(self, kind: str, what: Any) -> None:
        if kind == "end":
            del self.running[what]
            self.stopping.discard(what)
            ok = self.fate.attempt(what)
            state, reason = (OK, Reason.RETURNED) if ok else (FAILED, Reason.RAISED)
            outcome = Outcome(state=state, reason=reason, error="" if ok else repr(what), handle=what if ok else None)
            self.send(AttemptEnded(key=what, outcome=outcome))
        elif kind == "ready":
            self.running[what] = True
            self.ready.add(what.step)
            self.send(AttemptReady(key=what))
        elif kind == "timer":
            self.now = max(self.now, self.timers.pop(what))
            self.send(TimerFired(name=what))
        else:
            code, subject = self.questions.pop(what)
            value = self.fate.answer(code, subject)
            self.send(Evaluated(id=what, value=value, error="raised" if value is None else ""))

    def send(self, stimulus: Stimulus) -> None:
        before = self.states
        effects = self.machine.handle(stimulus, self.now)
        self.states = self.machine.states
        for name, state in before.items():
            assert not state.terminal or self.states[name] is state, f"{name} was {state}"
        self.perform(effects)

    def run(self, choose: st.DataObject, interruptions: Mapping[int, Stimulus]) -> None:
        for position in range(NEVER):
            if self.finish is None and position in interruptions:
                stimulus = interruptions[position]
                self.told = self.told or isinstance(stimulus, CancelRequested | Terminated)
                self.refused = self.refused or isinstance(stimulus, Refused)
                self.send(stimulus)
            if self.finish is not None:
                return
            stimuli = self.stimuli()
            assert stimuli, f"it hangs: {self.states}"
            self.happen(*choose.draw(st.sampled_from(stimuli)))
        raise AssertionError("it never ends")

    # --- what it is told to do

    def perform(self, effects: list[Effect]) -> None:
        assert self.finish is None or not effects
        for effect in effects:
            match effect:
                case StartAttempt(key=key):
                    self.start(key)
                case StopAttempt(key=key):
                    assert key in self.running
                    self.stopping.add(key)
                case KillAttempt(key=key):
                    assert key in self.stopping
                case SetTimer(name=name, at=at):
                    assert at >= self.now
                    self.timers[name] = at
                case ClearTimer(name=name):
                    del self.timers[name]
                case Evaluate(kind="length", id=number, path=path):
                    self.questions[number] = (str(path[0]), None)
                case Evaluate(id=number, code=code, handle=handle, text=text):
                    subject = text if text else handle if str(code).startswith("until") else None
                    self.questions[number] = (str(code), subject)
                case Report(record=record):
                    self.report(record)
                case Measuring(active=active):
                    assert active is not self.measuring
                    self.measuring = active
                case Finish():
                    self.finish = effect
        assert self.measuring is any(self.specs[key.step].measured for key in self.running)

    def report(self, record: StepRecord) -> None:
        key = Key(step=record.step, attempt=record.attempt, iteration=record.iteration)
        if record.settled:
            self.settled[record.step] += 1
            assert record.state is self.states[record.step] or record.reason is Reason.REFUSED
        elif record.state is FAILED:
            assert key in self.ever
            self.failed.add(key)

    def start(self, key: Key) -> None:
        spec = self.specs[key.step]
        assert not self.told
        assert key not in self.ever
        assert key.attempt == 1 or key._replace(attempt=key.attempt - 1) in self.failed
        met = [self.met(need) for need in spec.needs]
        assert all(met) if spec.need == "all" else (any(met) or not met)
        assert all(self.states[n] is OK for n in (spec.over, spec.when and spec.when.step) if n)
        if not any(one.step == key.step for one in self.ever):
            for name in spec.during:
                assert self.states[name] is StepState.RUNNING
                assert name in self.ready
        others = [self.specs[one.step] for one in self.running]
        assert not any(set(one.exclusive) & set(spec.exclusive) for one in others)
        if spec.slot and spec.background is None and self.graph.max_parallel:
            assert sum(one.slot and one.background is None for one in others) < self.graph.max_parallel
        if spec.isolation == "shared":
            assert sum(one.isolation == "shared" for one in others) < WORKERS
        self.ever.add(key)
        self.running[key] = not (spec.background and spec.background.announces)
        if self.running[key]:
            self.ready.add(key.step)

    def met(self, need: Need) -> bool:
        state = self.states[need.step]
        return state.terminal and (need.on is On.ALWAYS or state is (OK if need.on is On.SUCCESS else FAILED))

    def check_end(self) -> None:
        assert self.finish is not None
        assert not self.running
        assert not self.timers
        assert all(state.terminal for state in self.states.values())
        assert set(self.settled) == set(self.specs)
        assert self.refused or set(self.settled.values()) <= {1}
        for spec in self.graph.steps:
            if self.states[spec.name] is StepState.SKIPPED:
                self.check_skip(spec)
        if not self.told and not self.refused:
            unhandled = [n for n, state in self.states.items() if state is FAILED and not self.handled(n)]
            assert self.finish.state is (DeploymentState.FAILED if unhandled else DeploymentState.SUCCEEDED)

    def check_skip(self, spec: StepSpec) -> None:
        met = [self.met(need) for need in spec.needs]
        impossible = not all(met) if spec.need == "all" else bool(met) and not any(met)
        no_value = any(self.states[n] is not OK for n in (spec.over, spec.when and spec.when.step) if n)
        was_false = spec.when is not None and self.fate.known.get((spec.when.code, None)) is False
        assert impossible or no_value or was_false or any(self.states[name].terminal for name in spec.during)

    def handled(self, name: str) -> bool:
        edges = [(spec.name, need) for spec in self.graph.steps for need in spec.needs]
        return any(n.step == name and n.on is not On.SUCCESS and self.states[target] is OK for target, n in edges)


# --- the model --------------------------------------------------------------------------------------------------------


def model(graph: Graph, fate: Fate) -> dict[str, StepState]:
    states: dict[str, StepState] = {}
    for spec in graph.steps:
        states[spec.name] = end_of(spec, states, fate)
    return states


def end_of(spec: StepSpec, states: dict[str, StepState], fate: Fate) -> StepState:
    wanted = {On.SUCCESS: (OK,), On.FAILURE: (FAILED,), On.ALWAYS: tuple(StepState)}
    met = [states[need.step] in wanted[need.on] for need in spec.needs]
    values = [states[name] is OK for name in (spec.over, spec.when and spec.when.step) if name]
    if not all(values) or not (all(met) if spec.need == "all" else any(met) or not met):
        return StepState.SKIPPED
    if spec.when is not None:
        answer = fate.answer(spec.when.code)
        if not answer:
            return FAILED if answer is None else StepState.SKIPPED
    if spec.over is not None:
        length = fate.answer(str(spec.over_path[0]))
        if length is None:
            return FAILED
        return OK if all(item_ends_well(spec, index, fate) for index in range(length)) else FAILED
    if spec.repeat is not None:
        return OK if repeat_ends_well(spec, spec.repeat, fate) else FAILED
    return OK if item_ends_well(spec, None, fate) else FAILED


def item_ends_well(spec: StepSpec, iteration: int | None, fate: Fate) -> bool:
    return successful_attempt(spec, iteration, fate) is not None


def successful_attempt(spec: StepSpec, iteration: int | None, fate: Fate) -> Key | None:
    for attempt in range(1, spec.retry.times + 2):
        key = Key(step=spec.name, attempt=attempt, iteration=iteration)
        if fate.attempt(key):
            return key
        if attempt <= spec.retry.times and spec.retry.condition and not fate.answer(spec.retry.condition, repr(key)):
            return None
    return None


def repeat_ends_well(spec: StepSpec, repeat: Repeat, fate: Fate) -> bool:
    for iteration in range(repeat.times or NEVER):
        key = successful_attempt(spec, iteration, fate)
        if key is None and not repeat.keep_going:
            return False
        if iteration + 1 == repeat.times:
            return True
        if key is not None and repeat.until is not None:
            answer = fate.answer(repeat.until, key)
            if answer is None:
                return False
            if answer:
                return True
    return True


# --- the properties ---------------------------------------------------------------------------------------------------


INTERRUPTIONS = st.one_of(
    st.just(CancelRequested(reason="c")),
    st.just(Terminated(message="t")),
    st.builds(Refused, step=st.sampled_from([f"s{i}" for i in range(6)]), message=st.just("r")),
)


@settings(deadline=None, max_examples=150)
@given(graph=graphs(), interruptions=st.dictionaries(st.integers(0, 25), INTERRUPTIONS, max_size=2), data=st.data())
def test_every_run_ends_and_keeps_the_rules(
    graph: Graph, interruptions: dict[int, Stimulus], data: st.DataObject
) -> None:
    world = World(graph, Fate(data))
    world.run(data, interruptions)
    world.check_end()


@settings(deadline=None, max_examples=150)
@given(graph=graphs(ordered=True), data=st.data())
def test_the_end_is_that_of_the_model_whatever_the_order(graph: Graph, data: st.DataObject) -> None:
    fate = Fate(data)
    world = World(graph, fate)
    world.run(data, {})
    world.check_end()
    assert dict(world.states) == model(graph, fate)

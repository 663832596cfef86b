"""Any small graph, any outcome, any order of arrival: what must hold of every run, and a plain model of how it ends.

The model knows nothing of order, queues or timers: it goes through the graph step by step, given what each attempt
would bring. What holds of edges, skips, handled failures and the end of a DAG it has from the table of
docs/lifecycle.md (``rules``), and nowhere else. Where background steps, a cancel or ``stop_on_failure`` make the end
depend on the order, only what must always hold is checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from fieldlab_common import paths
from fieldlab_common.deployment import Background, Condition, Graph, Need, On, Repeat, Retry, StepSpec
from fieldlab_common.lifecycle import DeploymentState, Reason, StepState
from fieldlab_common.protocol import StepRecord
from fieldlab_executor.machine import (
    AttemptBegan,
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

from . import rules
from .rules import RULES

OK, FAILED = StepState.SUCCEEDED, StepState.FAILED
NEVER = 10_000  # stimuli; no small graph needs so many
DEPTH = 2  # of DAGs in DAGs
WORKERS = 2


# --- graphs -----------------------------------------------------------------------------------------------------------


@st.composite
def specs(draw: st.DrawFn, index: int, before: list[StepSpec], ordered: bool, depth: int) -> StepSpec:
    names = [spec.name for spec in before]
    hosts = [spec.name for spec in before if spec.background is not None]
    some = st.sampled_from(names) if names else st.nothing()
    needs = draw(st.lists(some, max_size=3, unique=True)) if names else []
    fields: dict[str, object] = {}
    if hosts:
        fields["during"] = tuple(draw(st.lists(st.sampled_from(hosts), max_size=2, unique=True)))
    inner = depth < DEPTH and draw(st.integers(0, 3)) == 0
    if inner:
        fields["graph"] = draw(graphs(ordered=ordered, depth=depth + 1))
    elif not ordered and draw(st.integers(0, 3)) == 0:
        fields["background"] = Background(announces=draw(st.booleans()), grace=draw(st.sampled_from([0.0, 3.0])))
    if draw(st.integers(0, 3)) == 0:
        fields["retry"] = Retry(
            times=draw(st.integers(1, 2)),
            delay=draw(st.sampled_from([0.0, 2.0])),
            condition=None if inner else draw(st.sampled_from([None, f"if:{index}"])),
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
        code="" if inner else "code",
        args="" if inner else "args",
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
def graphs(draw: st.DrawFn, *, ordered: bool = False, depth: int = 0) -> Graph:
    """``ordered``: how the graph ends depends on what its attempts bring, and on no order or time."""
    steps: list[StepSpec] = []
    for index in range(draw(st.integers(1, 3 if depth else 6))):
        steps.append(draw(specs(index, steps, ordered, depth)))
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
        self.specs = dict(graph.walk())  # by plain path
        self.graphs = {"": graph} | {path: spec.graph for path, spec in graph.walk() if spec.graph is not None}
        self.machine = Machine(graph, now=0.0, workers=WORKERS)
        self.now = 0.0
        self.running: dict[Key, bool] = {}  # whether it is ready
        self.begun: set[str] = set()  # paths of steps of which something ever ran
        self.ready: set[str] = set()  # background steps of which an attempt ever was
        self.stopping: set[Key] = set()
        self.failed: set[Key] = set()  # attempts of which it was reported, and their steps went on
        self.ever: set[Key] = set()
        self.timers: dict[str, float] = {}
        self.questions: dict[int, tuple[str, object]] = {}
        self.asked: Counter[str] = Counter()  # how often a step asked whether to go on
        self.settled: Counter[str] = Counter()
        self.told = False  # to stop
        self.refused = False
        self.measuring = False
        self.finish: Finish | None = None
        self.states: dict[str, StepState] = {}  # by path; what was never heard of, waits
        self.perform(self.machine.start(0.0))

    def spec(self, path: str) -> StepSpec:
        return self.specs[paths.plain(path)]

    def state(self, path: str) -> StepState:
        return self.states.get(path, StepState.WAITING)

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
        self.perform(self.machine.handle(stimulus, self.now))

    def run(self, choose: st.DataObject, interruptions: Mapping[int, Stimulus]) -> None:
        for position in range(NEVER):
            stimulus = interruptions.get(position)
            unheard = isinstance(stimulus, Refused) and "/" in stimulus.step and stimulus.step not in self.states
            if self.finish is None and stimulus is not None and not unheard:  # only what was reported can be refused
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
        begun: list[Key] = []
        for effect in effects:
            match effect:
                case StartAttempt(key=key):
                    self.start(key)
                    begun.append(key)
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
                case Evaluate():
                    self.ask(effect)
                case Report(record=record):
                    self.report(record)
                case Measuring(active=active):
                    assert active is not self.measuring
                    self.measuring = active
                case Finish():
                    self.finish = effect
        self.check_measuring()
        for key in begun:
            self.send(AttemptBegan(key=key))

    def ask(self, question: Evaluate) -> None:
        subject: object = question.text or None
        if question.kind == "until":
            self.asked[question.step] += 1
            subject = (question.step, self.asked[question.step])
        code = str(question.path[0]) if question.kind == "length" else str(question.code)
        self.questions[question.id] = (code, subject)

    def check_measuring(self) -> None:
        """It is told while an attempt of a measured step runs, and, of one that is a DAG, as long as the step does."""
        assert self.measuring or not any(self.spec(key.step).measured for key in self.running)
        runs = (path for path, state in self.states.items() if state is StepState.RUNNING)
        assert not self.measuring or any(self.spec(path).measured for path in runs)

    def report(self, record: StepRecord) -> None:
        key = Key(step=record.step, attempt=record.attempt, iteration=record.iteration)
        before = self.state(record.step)
        if record.settled:
            self.settled[record.step] += 1
            assert not before.terminal or record.reason is Reason.REFUSED
            self.states[record.step] = before if before.terminal else record.state
        elif record.state is StepState.RUNNING:
            assert before is StepState.WAITING
            self.states[record.step] = record.state
            if self.spec(record.step).graph is not None:  # what is inside may have to wait until its host has ended
                self.check_start(record.step)
        elif record.state is FAILED:
            assert key in self.ever or self.spec(record.step).graph is not None
            self.failed.add(key)

    def start(self, key: Key) -> None:
        spec = self.spec(key.step)
        assert not self.told
        assert key not in self.ever
        assert key.attempt == 1 or key._replace(attempt=key.attempt - 1) in self.failed
        self.check_start(key.step)
        others = [self.spec(one.step) for one in self.running]
        assert not any(set(one.exclusive) & set(spec.exclusive) for one in others)
        if spec.slot and spec.background is None:
            self.check_slots(key)
        if spec.isolation == "shared":
            assert sum(one.isolation == "shared" for one in others) < WORKERS
        self.ever.add(key)
        self.begun.add(key.step)
        self.running[key] = not (spec.background and spec.background.announces)
        if self.running[key]:
            self.ready.add(key.step)

    def check_start(self, path: str) -> None:
        """It may run now, and so may each DAG around it."""
        while path:
            scope, spec = paths.split(path)[0], self.spec(path)
            met = self.met(scope, spec)
            assert not met or RULES.holds[spec.need](met)
            assert all(self.state(paths.join(scope, name)) in RULES.value for name in sources(spec))
            if path not in self.begun:
                for name in spec.during:
                    host = paths.join(scope, name)
                    assert self.state(host) is StepState.RUNNING
                    assert host in self.ready
            self.begun.add(path)
            path = outer(path)

    def check_slots(self, key: Key) -> None:
        scope = paths.split(key.step)[0]
        while True:
            limit = self.graphs[paths.plain(scope)].max_parallel
            inside = [self.spec(one.step) for one in self.running if not scope or paths.below(one.step, scope)]
            assert limit is None or sum(one.slot and one.background is None for one in inside) < limit
            if not scope:
                return
            scope = paths.split(scope)[0]

    def met(self, scope: str, spec: StepSpec) -> list[bool]:
        """For each edge to it, whether it holds."""
        return [self.state(paths.join(scope, need.step)) in RULES.edges[need.on] for need in spec.needs]

    def check_end(self) -> None:
        assert self.finish is not None
        assert not self.running
        assert not self.timers
        assert all(state.terminal for state in self.states.values())
        assert set(self.machine.states.items()) <= set(self.states.items())
        assert self.refused or set(self.settled.values()) <= {1}
        for path, state in self.states.items():
            if state is RULES.not_started:
                self.check_skip(*paths.split(path), self.spec(path))
        if not self.told and not self.refused:
            self.check_ends()

    def check_ends(self) -> None:
        """The deployment, and each DAG in it, ended as its steps say."""
        assert self.finish is not None
        assert self.finish.state is (DeploymentState.SUCCEEDED if self.well("") else DeploymentState.FAILED)
        for path, state in self.states.items():
            spec = self.spec(path)
            if spec.graph is None or spec.over or spec.repeat or state not in (OK, FAILED):
                continue
            last = max(
                (a for a in range(1, spec.retry.times + 2) if self.began(paths.inside(path, None, a))), default=0
            )
            assert not last or state is FAILED or self.well(paths.inside(path, None, last))

    def began(self, scope: str) -> bool:
        return any(paths.split(path)[0] == scope for path in self.states)

    def well(self, scope: str) -> bool:
        ends = {name: self.state(paths.join(scope, name)) for name in self.names(scope)}
        return ends_well(self.graphs[paths.plain(scope)], ends)

    def names(self, scope: str) -> list[str]:
        return [spec.name for spec in self.graphs[paths.plain(scope)].steps]

    def check_skip(self, scope: str, name: str, spec: StepSpec) -> None:
        met = self.met(scope, spec)
        impossible = bool(met) and RULES.lost[spec.need](met)
        no_value = any(self.state(paths.join(scope, one)) not in RULES.value for one in sources(spec))
        was_false = spec.when is not None and self.fate.known.get((spec.when.code, None)) is False
        hosts = [self.state(paths.join(scope, host)) for host in spec.during]
        assert impossible or no_value or was_false or any(host in RULES.during_lost for host in hosts), name


# --- the model ---------------------------------------------------------------------------------------------------


def ends_well(graph: Graph, ends: Mapping[str, StepState]) -> bool:
    return all(
        end in RULES.well or (end in RULES.well_if_handled and handled(graph, name, ends)) for name, end in ends.items()
    )


def handled(graph: Graph, name: str, ends: Mapping[str, StepState]) -> bool:
    behind = [spec.name for spec in graph.steps for n in spec.needs if n.step == name and n.on in RULES.handling]
    return any(ends[one] in RULES.handled_by for one in behind)


def sources(spec: StepSpec) -> list[str]:
    """The steps whose values decide on it: the list that it is mapped over, what its condition looks at."""
    return [name for name in (spec.over, spec.when and spec.when.step) if name]


def outer(path: str) -> str:
    """The path of the step that is the DAG around a step; empty: it is the deployment's."""
    parts = paths.parts_of(path) or ()
    scope = ""
    for name, iteration, attempt in parts[:-2]:
        scope = paths.inside(paths.join(scope, name), iteration, attempt)
    return paths.join(scope, parts[-2][0]) if len(parts) > 1 else ""


def model(graph: Graph, fate: Fate, scope: str = "") -> dict[str, StepState]:
    """How each step of a graph ends."""
    states: dict[str, StepState] = {}
    for spec in graph.steps:
        states[spec.name] = end_of(spec, paths.join(scope, spec.name), states, fate)
    return states


def end_of(spec: StepSpec, path: str, states: dict[str, StepState], fate: Fate) -> StepState:
    met = [states[need.step] in RULES.edges[need.on] for need in spec.needs]
    if not all(states[name] in RULES.value for name in sources(spec)):
        return RULES.not_started
    if met and not RULES.holds[spec.need](met):
        assert RULES.lost[spec.need](met), "what does not hold when all have ended can no longer hold"
        return RULES.not_started
    if spec.when is not None:
        answer = fate.answer(spec.when.code)
        if not answer:
            return FAILED if answer is None else RULES.not_started
    if spec.over is not None:
        length = fate.answer(str(spec.over_path[0]))
        if length is None:
            return FAILED
        return OK if all(item_ends_well(spec, path, index, fate) for index in range(length)) else FAILED
    if spec.repeat is not None:
        return OK if repeat_ends_well(spec, path, spec.repeat, fate) else FAILED
    return OK if item_ends_well(spec, path, None, fate) else FAILED


def item_ends_well(spec: StepSpec, path: str, iteration: int | None, fate: Fate) -> bool:
    """Whether one of its attempts does."""
    for attempt in range(1, spec.retry.times + 2):
        key = Key(step=path, attempt=attempt, iteration=iteration)
        if spec.graph is not None:
            well = ends_well(spec.graph, model(spec.graph, fate, paths.inside(path, iteration, attempt)))
        else:
            well = fate.attempt(key)
        if well:
            return True
        if attempt <= spec.retry.times and spec.retry.condition and not fate.answer(spec.retry.condition, repr(key)):
            return False
    return False


def repeat_ends_well(spec: StepSpec, path: str, repeat: Repeat, fate: Fate) -> bool:
    asked = 0
    for iteration in range(repeat.times or NEVER):
        well = item_ends_well(spec, path, iteration, fate)
        if not well and not repeat.keep_going:
            return False
        if iteration + 1 == repeat.times:
            return True
        if well and repeat.until is not None:
            asked += 1
            answer = fate.answer(repeat.until, (path, asked))
            if answer is None:
                return False
            if answer:
                return True
    return True


# --- the properties ---------------------------------------------------------------------------------------------------


INTERRUPTIONS = st.one_of(
    st.just(CancelRequested(reason="c")),
    st.just(Terminated(message="t")),
    st.builds(
        Refused,
        step=st.sampled_from([*(f"s{i}" for i in range(6)), "s0/s1", "s1/s0", "s1[0]/s0", "s2[1]/s1", "s0~2/s0"]),
        message=st.just("r"),
    ),
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
    expected = model(graph, fate)
    assert {name: world.state(name) for name in expected} == expected
    for path, state in world.states.items():
        scope, name = paths.split(path)
        if scope:
            assert state is model(world.graphs[paths.plain(scope)], fate, scope)[name]


@pytest.mark.parametrize(
    ("said", "instead"),
    [
        ("| every edge holds |", "| one edge holds |"),
        (
            '`failed`, `skipped`, `cancelled` |\n| an edge `on="failure"`',
            '`failed`, `skipped` |\n| an edge `on="failure"`',
        ),
        ("ended as `succeeded` | every such step", "ended as `failed` | every such step"),
        ("as `skipped`, or as", "as `cancelled`, or as"),
    ],
)
def test_the_rules_are_those_of_the_page(said: str, instead: str) -> None:
    page = rules.PAGE.read_text()
    assert page.count(said) == 1
    try:
        other = rules.read(page.replace(said, instead))
    except ValueError:
        return
    assert other != RULES

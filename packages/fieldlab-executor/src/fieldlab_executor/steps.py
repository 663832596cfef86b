"""What the machine remembers of one run of a graph: each step's place between waiting and ended.

``wire`` turns a graph into ``Step`` objects that know each other, with counters instead of sets to be searched, so that
an edge is looked at once when its source ends, however large the graph is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fieldlab_common import paths
from fieldlab_common.deployment import MAX_DEPTH, Graph, Need, On, StepSpec
from fieldlab_common.errors import InvalidMessage
from fieldlab_common.lifecycle import Reason, StepState
from fieldlab_common.protocol import StepRecord

from fieldlab_executor.instructions import Input, Key, Outcome
from fieldlab_executor.slots import Order, Resource

if TYPE_CHECKING:
    from fieldlab_executor.traversal import Traversal

__all__ = [
    "Item",
    "Step",
    "attempt_record",
    "check_inner",
    "judged",
    "last_steps",
    "settled_record",
    "wire",
]


@dataclass(slots=True, eq=False)
class Item:
    """One iteration of a step, or a step that is not iterated (``iteration`` None): what is tried, and tried again."""

    within: Traversal
    step: Step
    iteration: int | None
    planned: float  # when it was to start; when it did, if it had to wait for its turn
    delay: float  # before its next attempt
    attempt: int = 1
    live: bool = True  # it has not ended, and was not dropped
    running: bool = False
    ready: bool = False  # of a background step: those that are `during` it may start
    timed_out: bool = False
    killed: bool = False
    kill_at: float | None = None
    offered: float = 0.0
    started: float = 0.0
    failed: Outcome | None = None  # how its last attempt failed, if it is to be tried again
    lent: bool = False  # it waits, and another may use its place in a shared worker
    order: Order = ()  # its place among those that want to start
    queued: bool = False  # it wants to start
    woken: Resource | None = None  # whose release brought it back to the queue
    inner: Traversal | None = None  # of a step that is a DAG: the run of it that is this attempt

    @property
    def key(self) -> Key:
        """The key of its present attempt."""
        return Key(step=self.step.path, attempt=self.attempt, iteration=self.iteration)


@dataclass(slots=True, eq=False)
class Edge:
    """The way from a step to one that needs it. ``required``: it must be satisfied whatever ``StepSpec.need`` says."""

    target: Step
    need: Need
    required: bool


@dataclass(slots=True, eq=False)
class Step:
    """One step of the graph as it stands. What most have nothing of is an empty tuple: a list for each takes room."""

    spec: StepSpec
    path: str
    state: StepState = StepState.WAITING
    # what it waits for, and who waits for it
    edges: list[Edge] = field(default_factory=list)
    open: int = 0  # edges to it that must be satisfied and are not yet
    open_any: int = 0  # edges to it of which one is enough
    met: bool = True  # one of those is satisfied, or there are none
    sources: tuple[Step, ...] = ()  # the steps that its arguments may refer to
    inputs: Mapping[str, Input] | None = None
    seen: Input | None = None  # what others' arguments may take of it, once it has ended
    admitted: bool = False  # all that it waited for has come; its condition is asked, or it is queued
    # as a background step, and beside background steps
    hosts: tuple[Step, ...] = ()  # the background steps that it is `during`
    followers: list[Step] | tuple[()] = ()  # the steps that are `during` it
    followers_left: int = 0
    unready: int = 0  # those of `hosts` that are not ready
    held: tuple[Item, ...] = ()  # what was to start while they were not
    ready: bool = False
    awaited: int = 1  # how many of its items must be ready before it is
    asked: bool = False  # nothing is `during` it any more
    own_left: int = 0  # foreground steps that descend from it and have not ended
    ancestors: tuple[Step, ...] = ()  # the background steps whose `own_left` it counts for
    # as it runs
    resources: tuple[Resource, ...] = ()  # what each of its items takes
    listed: tuple[Any, ...] = ()  # of a fan-out: the handle of each item of the list
    items: dict[int | None, Item] = field(default_factory=dict)  # those that have not ended
    handles: list[Any] | tuple[Any, ...] = ()  # of an iterated step a list, which grows
    failure: Outcome | None = None  # how the first item failed
    started: float | None = None
    intent: Reason | None = None  # why it was told to stop; the first reason stays
    intent_message: str = ""
    stopped_as: StepState = StepState.CANCELLED  # what it then becomes
    error: str = ""
    message: str = ""
    summary: str = ""  # of its value

    @property
    def name(self) -> str:
        """Its name."""
        return self.spec.name

    @property
    def shared(self) -> bool:
        """Whether it runs in shared workers."""
        return self.spec.isolation == "shared"

    @property
    def iterated(self) -> bool:
        """Whether its value is the list of its iterations' values."""
        return self.spec.repeat is not None or self.spec.over is not None

    @property
    def free(self) -> bool:
        """Whether all that it waits for has come to pass."""
        return self.met and not self.open and not self.unready

    @property
    def rescued(self) -> bool:
        """Whether another step waits for its failure, or for its end in whatever way."""
        return any(edge.need.on is not On.SUCCESS for edge in self.edges)

    @property
    def handled(self) -> bool:
        """Whether such a step succeeded."""
        return any(e.need.on is not On.SUCCESS and e.target.state is StepState.SUCCEEDED for e in self.edges)

    def input(self) -> Input:
        """What other steps' arguments may take of it now."""
        if self.seen is not None:
            return self.seen
        handles = tuple(self.handles) if self.state is StepState.SUCCEEDED else ()
        seen = Input(handles=handles, many=self.iterated, error=self.error or self.message, status=self.state.value)
        if self.state.terminal:
            self.seen = seen
        return seen


# --- from the graph ---------------------------------------------------------------------------------------------------


def check_inner(graph: Graph, depth: int = 0) -> None:
    """Refuse a graph with a DAG inside of it that breaks an invariant of ``deployment``; ``depth``: DAGs around it.

    Raises:
        InvalidMessage: running it might never end, or fail in the middle.
    """
    for spec in graph.steps:
        if any(len(name) - len(name.lstrip("^")) > depth for name in spec.outer):
            raise InvalidMessage(f"Step {spec.name!r} refers to a DAG around it that is not there.")
        if spec.graph is None:
            continue
        if depth >= MAX_DEPTH:
            raise InvalidMessage(f"Step {spec.name!r} is a DAG inside of more than {MAX_DEPTH} others.")
        if spec.background is not None or not spec.graph.steps:
            raise InvalidMessage(f"Step {spec.name!r} is a DAG; it must have steps, and cannot be a background step.")
        wire(spec.graph)
        check_inner(spec.graph, depth + 1)


def wire(graph: Graph, scope: str = "") -> dict[str, Step]:
    """Make the steps of ``graph``, each knowing its neighbours, in the graph's order.

    Raises:
        InvalidMessage: the graph breaks an invariant of ``deployment``; running it might never end.
    """
    if graph.max_parallel is not None and graph.max_parallel < 1:
        raise InvalidMessage(f"max_parallel is {graph.max_parallel}; it must be at least 1, or None for no limit.")
    steps: dict[str, Step] = {}
    for spec in graph.steps:
        if spec.name in steps:
            raise InvalidMessage(f"The graph has two steps named {spec.name!r}.")
        step = Step(spec, paths.join(scope, spec.name))
        if step.iterated:
            step.handles = []
        _connect(step, steps)
        steps[spec.name] = step
    _count_descendants(steps.values())
    return steps


def last_steps(steps: Mapping[str, Step]) -> list[Step]:
    """Those that no other step waits for, in whatever way."""
    return [step for step in steps.values() if not step.edges and not step.followers]


def _connect(step: Step, before: Mapping[str, Step]) -> None:
    spec = step.spec
    if spec.need not in ("all", "any") or (spec.repeat is not None and spec.over is not None):
        raise InvalidMessage(f"Step {spec.name!r} has need={spec.need!r}, or is both repeated and mapped.")
    for need in spec.needs:
        required = spec.need == "all"
        _earlier(spec, need.step, before).edges.append(Edge(step, need, required))
        step.open += required
        step.open_any += not required
    step.met = not step.open_any
    for name in dict.fromkeys(n for n in (spec.over, spec.when and spec.when.step) if n):
        _earlier(spec, name, before).edges.append(Edge(step, Need(step=name), required=True))
        step.open += 1
    names = [need.step for need in spec.needs if need.data] + ([spec.over] if spec.over else [])
    step.sources = tuple(before[name] for name in dict.fromkeys(names))
    for name in dict.fromkeys(spec.during):
        host = _earlier(spec, name, before)
        if host.spec.background is None:
            raise InvalidMessage(f"Step {spec.name!r} is during {name!r}, which is not a background step.")
        if isinstance(host.followers, tuple):
            host.followers = []
        host.followers.append(step)
        host.followers_left += 1
        step.hosts += (host,)
        step.unready += 1


def _earlier(spec: StepSpec, name: str, before: Mapping[str, Step]) -> Step:
    if name not in before:
        raise InvalidMessage(f"Step {spec.name!r} needs {name!r}, which does not stand before it in the graph.")
    return before[name]


def _count_descendants(steps: Iterable[Step]) -> None:
    """For each background step that nothing is `during`: count the foreground steps that descend from it."""
    for host in steps:
        if host.spec.background is None or host.followers:
            continue
        found: set[int] = set()
        queue = [edge.target for edge in host.edges]
        while queue:
            step = queue.pop()
            if id(step) in found:
                continue
            found.add(id(step))
            queue.extend(edge.target for edge in step.edges)
            if step.spec.background is None:
                step.ancestors += (host,)
                host.own_left += 1


# --- what became of it ------------------------------------------------------------------------------------------------


def judged(item: Item, outcome: Outcome) -> Outcome:
    """What the end of an attempt means, given what was asked of it. What was asked first counts."""
    step = item.step
    if item.timed_out:
        message = f"It took longer than {step.spec.timeout:g} s."
        return replace(outcome, state=StepState.FAILED, reason=Reason.TIMEOUT, message=message)
    if step.intent is None:
        return outcome
    if step.intent is Reason.STOPPED:
        if item.killed and outcome.state is StepState.FAILED:
            message = f"It was asked to stop, and was killed when it did not. {outcome.message}".rstrip()
            return replace(outcome, message=message)
        return replace(outcome, state=StepState.SUCCEEDED, reason=Reason.STOPPED, message="", error="")
    return replace(outcome, state=step.stopped_as, reason=step.intent, message=step.intent_message)


def attempt_record(item: Item, outcome: Outcome, now: float) -> StepRecord:
    """The record of an attempt, or an iteration, that does not end its step."""
    return StepRecord(
        step=item.step.path,
        state=outcome.state,
        attempt=item.attempt,
        iteration=item.iteration,
        reason=outcome.reason,
        message=outcome.message,
        error=outcome.error,
        started=item.started if outcome.started is None else outcome.started,
        ended=now if outcome.ended is None else outcome.ended,
        value=outcome.value,
        usage=outcome.usage,
    )


def settled_record(step: Step, outcome: Outcome, now: float, attempt: int = 1) -> StepRecord:
    """The record of a step's end."""
    return StepRecord(
        step=step.path,
        state=outcome.state,
        settled=True,
        attempt=attempt,
        iterations=len(step.handles) if step.iterated and step.started is not None else None,
        reason=outcome.reason,
        message=outcome.message,
        error=outcome.error,
        started=step.started if outcome.started is None else outcome.started,
        ended=now if outcome.ended is None else outcome.ended,
        value=outcome.value,
        usage=outcome.usage,
    )

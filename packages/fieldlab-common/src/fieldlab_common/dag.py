"""DAGs: steps and the edges between them, and the short form for linear stages.

A DAG is built by using tasks inside ``with fl.DAG(...)``, or step by step; a step made outside any DAG joins the one
it is given to. It is checked once, when it is used (``checked``), and cannot change afterwards.

A DAG can be a step of another: calling it makes one, as calling a task does. The arguments fill its parameters, the
``fl.arg("name")`` in the arguments of its steps.

Invariants of a checked DAG: names are unique, edges stay inside it and form no circle, ``order`` has every step after
everything it needs; what is inside of it is checked, too, so none can be inside of itself.
"""

from __future__ import annotations

import contextvars
import graphlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from fieldlab_common.deployment import MAX_DEPTH
from fieldlab_common.drawing import Box, Drawing, Line, Svg, lines_to, notes_of
from fieldlab_common.environment import check_count, parse_duration
from fieldlab_common.errors import (
    ArgumentError,
    CycleError,
    DefinitionError,
    DuplicateNameError,
    FieldlabError,
    UnknownNameError,
)
from fieldlab_common.node import Node
from fieldlab_common.selector import Always, Selector, as_selector
from fieldlab_common.step import (
    REQUIRED,
    Arg,
    Step,
    StepOwner,
    check_name,
    current_dag,
    name_of,
    needs_of,
)
from fieldlab_common.task import Implementation, Isolation, Task, TaskSettings, check_isolation

__all__ = ["DAG", "Choice", "DagTask", "Pipeline", "choose", "steps_of"]

R = TypeVar("R")


class DAG:
    """Steps and the edges between them.

    ``stop_on_failure``: when a step fails and nothing handles it, what runs is stopped and the rest is cancelled.
    ``max_parallel``: at most so many steps at a time on one node, those of DAGs inside of it counted. ``isolation``: of
    the steps whose task (or DAG inside) does not say: ``"process"`` (the default), or ``"shared"`` for many tiny steps,
    which then run in warm workers. A background step always has a process of its own.

    Calling it makes a step of another DAG: ``collect(host="10.0.0.1")``. The arguments are for its parameters.
    """

    def __init__(
        self,
        name: str = "dag",
        *,
        stop_on_failure: bool = True,
        max_parallel: int | None = None,
        isolation: Isolation = None,
    ) -> None:
        check_count("max_parallel", max_parallel)
        self.name = check_name(name, "a DAG")
        self.stop_on_failure = stop_on_failure
        check_isolation(isolation)
        self.max_parallel = max_parallel
        self.isolation: Isolation = isolation
        self._steps: dict[str, Step[Any]] = {}
        self._counts: dict[str, int] = {}
        self._order: tuple[Step[Any], ...] | None = None
        self._parameters: Mapping[str, Any] = {}
        self._depth = 0
        self._token: contextvars.Token[StepOwner | None] | None = None

    @property
    def steps(self) -> Mapping[str, Step[Any]]:
        """Its steps by name, in the order in which they joined."""
        return dict(self._steps)

    def add(self, step: Step[Any]) -> None:
        """Take ``step`` in, and every step that it needs.

        Raises:
            DefinitionError: it belongs to another DAG, or this one is in use already.
        """
        stack = [step]
        while stack:
            one = stack.pop()
            if one.dag is self:
                continue
            if one.dag is not None:
                raise DefinitionError(
                    f"{one!r} belongs to another DAG.", advice="Call its task again to make a step for this one."
                )
            self._take(one)
            stack.extend(other for other in one.neighbours() if other.dag is not self)

    def _take(self, step: Step[Any]) -> None:
        self._open("take another step")
        name = step.name
        if step.is_named:
            if name in self._steps:
                raise self._taken(name)
        elif name in self._steps:
            count = self._counts.get(name, 1) + 1
            while f"{name}-{count}" in self._steps:
                count += 1
            self._counts[name] = count
            name = f"{name}-{count}"
        self._steps[name] = step
        step.dag = self
        step.called(name)

    def rename(self, step: Step[Any], name: str) -> None:
        """Give a step of this DAG another name, in its place; used by ``Step.named``."""
        self._open("rename a step")
        if name == step.name:
            return
        if name in self._steps:
            raise self._taken(name)
        self._steps = {(name if s is step else n): s for n, s in self._steps.items()}

    def _taken(self, name: str) -> DuplicateNameError:
        return DuplicateNameError(
            f"DAG {self.name!r} has a step {name!r} already.", advice="Give one of them another name."
        )

    def _open(self, what: str) -> None:
        if self._order is not None:
            raise DefinitionError(f"DAG {self.name!r} is in use and cannot {what}.", advice="Define it fully first.")

    def checked(self) -> tuple[Step[Any], ...]:
        """Its steps in an order in which everything a step needs stands before it; from now on it cannot change.

        Raises:
            CycleError: the edges form a circle; the error lists it.
            DefinitionError: it has no step, an edge leads to another DAG, or DAGs are inside of it too deeply.
        """
        if self._order is None:
            order = self._sound()
            inner = [dag for step in order if isinstance(step.task, DagTask) for dag in step.task.dags]
            self._depth = max((dag._depth + 1 for dag in inner), default=0)
            if self._depth > MAX_DEPTH:
                raise DefinitionError(
                    f"DAG {self.name!r} has DAGs inside of DAGs more than {MAX_DEPTH} deep.",
                    advice="Put steps of the innermost ones into one DAG.",
                )
            self._parameters = _parameters(self.name, self._steps.values())
            self._order = order
        return self._order

    # --- as a step of another ---

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What it can be called with, by name, in the order in which its steps mention them; ``REQUIRED`` or a default.

        Asking fixes it: it cannot change afterwards.
        """
        self.checked()
        return self._parameters

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The value of each parameter, when it is called like that.

        Raises:
            ArgumentError: one is missing, unknown or given twice.
        """
        known = self.parameters
        shape = f"{self.name}({', '.join(known)})"
        if len(args) > len(known):
            raise ArgumentError(f"{shape}: it takes {len(known)} arguments, not {len(args)}.")
        given = dict(zip(known, args, strict=False))
        for what, names in (("unknown", kwargs.keys() - known.keys()), ("given twice", given.keys() & kwargs.keys())):
            if names:
                raise ArgumentError(
                    f"{shape}: {what}: {', '.join(sorted(names))}.", advice='Its steps say fl.arg("name") for each.'
                )
        bound = {**known, **given, **kwargs}
        missing = [name for name, one in bound.items() if one is REQUIRED]
        if missing:
            raise ArgumentError(
                f"{shape}: missing: {', '.join(missing)}.",
                advice=f"Give them where it is a step: {self.name}({missing[0]}=...).",
            )
        return bound

    def __call__(self, *args: Any, **kwargs: Any) -> Step[Any]:
        """Make a step that runs this DAG, with its parameters filled in; from now on it cannot change.

        An argument is whatever a task takes: a value, a step of the DAG around, a pick, a node property. The step's
        value is that of the last step (which no other waits for), or a dict by name if there are several.

        Raises:
            ArgumentError: a parameter is missing, unknown or given twice.
        """
        return self.as_task()(*args, **kwargs)

    def as_task(
        self,
        *,
        timeout: float | str | None = None,
        retries: int = 0,
        retry_delay: float | str = 0.0,
        retry_backoff: float = 1.0,
        retry_if: Callable[[str], bool] | None = None,
    ) -> DagTask:
        """It as a task with settings for its attempts, which mean what they mean for ``fl.task``."""
        return _as_task(self, self.name, timeout, retries, retry_delay, retry_backoff, retry_if)

    def __rshift__(self, other: DAG | Sequence[DAG]) -> Pipeline:
        """Run ``other`` (a DAG, or several beside each other) after this one: a pipeline of DAGs."""
        return _chained(self, other)

    def __rrshift__(self, other: Sequence[DAG]) -> Pipeline:
        return _chained(other, self)

    def _sound(self) -> tuple[Step[Any], ...]:
        if not self._steps:
            raise DefinitionError(f"DAG {self.name!r} has no step.", advice="Call a task inside `with fl.DAG(...)`.")
        for step in list(self._steps.values()):
            for other in step.neighbours():
                if other.dag is None:
                    self.add(other)
                elif other.dag is not self:
                    raise DefinitionError(f"{step!r} needs {other!r}, which belongs to another DAG.")
        return self._sorted()

    def _sorted(self) -> tuple[Step[Any], ...]:
        needs = {name: dict.fromkeys(s.name for s in step.neighbours()) for name, step in self._steps.items()}
        try:
            names = tuple(graphlib.TopologicalSorter(needs).static_order())
        except graphlib.CycleError as error:
            circle = list(reversed(error.args[1]))
            raise CycleError(
                f"DAG {self.name!r} has a circle: {' -> '.join(circle)}.",
                advice="Remove one of these edges; for repetition use fl.repeat.",
                details={"steps": circle},
            ) from None
        return tuple(self._steps[name] for name in names)

    # --- drawing ---

    def to_svg(self) -> Svg:
        """A picture of it as an SVG document; a notebook shows it. The DAG can be changed afterwards.

        Raises:
            UnsupportedError: it is too large for a picture that somebody could read.
        """
        return self._drawing().to_svg()

    def to_mermaid(self) -> str:
        """It as a Mermaid flowchart, for Markdown."""
        return self._drawing().to_mermaid()

    def to_dot(self) -> str:
        """It in the DOT language, for Graphviz."""
        return self._drawing().to_dot()

    def _drawing(self) -> Drawing:
        steps = self._order or self._sound()  # what is drawn can still be changed
        return Drawing(
            title=self.name,
            boxes=tuple(_box(step) for step in steps),
            lines=tuple(line for step in steps for line in _lines(step)),
        )

    def _repr_html_(self) -> str | None:
        try:
            return self.to_svg()._repr_html_()
        except FieldlabError:  # a notebook then shows the text
            return None

    def _repr_svg_(self) -> str | None:
        try:
            return self.to_svg()
        except FieldlabError:
            return None

    def __getitem__(self, name: str) -> Step[Any]:
        if name not in self._steps:
            raise UnknownNameError(
                f"DAG {self.name!r} has no step {name!r}; it has {', '.join(self._steps) or 'none'}."
            )
        return self._steps[name]

    def __iter__(self) -> Iterator[Step[Any]]:
        return iter(self._steps.values())

    def __len__(self) -> int:
        return len(self._steps)

    def __enter__(self) -> DAG:
        self._open("be opened again")
        self._token = current_dag.set(self)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._token is not None:
            current_dag.reset(self._token)
            self._token = None

    def __repr__(self) -> str:
        return f"<DAG {self.name}: {len(self)} steps>"


def _box(step: Step[Any]) -> Box:
    background, repeated, mapped = step.background is not None, step.repetition is not None, step.over is not None
    dags = step.task.dags if isinstance(step.task, DagTask) else ()
    inside = [len(dag) for dag in dags]
    return Box(
        name=step.name,
        notes=notes_of(background=background, repeated=repeated, mapped=mapped, need=step.need, inside=inside),
        background=background,
        several=repeated or mapped,
        inside=dags[0]._drawing() if len(dags) == 1 else None,
    )


def _lines(step: Step[Any]) -> Iterable[Line]:
    during = [other.name for other in step.during_steps]
    return lines_to(step.name, needs_of(step), during, name_of(step.condition and step.condition[0]))


class Pipeline(DAG):
    """A DAG of linear stages: the steps of a stage run beside each other, each stage after the one before.

    A stage may have DAGs, which become steps of it. ``dag_a >> [dag_b, dag_c] >> dag_d`` makes such a pipeline.
    """

    def __init__(
        self,
        name: str = "pipeline",
        *,
        stop_on_failure: bool = True,
        max_parallel: int | None = None,
        isolation: Isolation = None,
    ) -> None:
        super().__init__(name, stop_on_failure=stop_on_failure, max_parallel=max_parallel, isolation=isolation)
        self._last: list[Step[Any]] = []
        self.joined: tuple[Sequence[DAG], ...] = ()  # its stages, if it was made of DAGs with >>

    def then(self, stage: Step[Any] | DAG | Sequence[Step[Any] | DAG]) -> Pipeline:
        """Add a stage: a step or a DAG, or several. A DAG is called without arguments; call it to give it some.

        Raises:
            DefinitionError: the stage is empty, or holds something else.
            ArgumentError: a DAG needs arguments.
        """
        self.joined = ()
        members = list(stage) if isinstance(stage, list | tuple) else [stage]
        if not members:
            raise DefinitionError(f"A stage of pipeline {self.name!r} has no step.")
        steps = [_member(self, one) for one in members]
        for step in steps:
            self.add(step)
            if self._last:
                step.after(self._last)
        self._last = steps
        return self


def _member(pipeline: Pipeline, one: object) -> Step[Any]:
    if isinstance(one, Step):
        return one
    if not isinstance(one, DAG):
        raise DefinitionError(f"{one!r:.80} cannot be in a stage of pipeline {pipeline.name!r}: it is no step or DAG.")
    token = current_dag.set(None)  # it is for this pipeline, whatever DAG is being defined
    try:
        return one()
    finally:
        current_dag.reset(token)


def _stage(dags: Any) -> Sequence[DAG]:
    return tuple(dags) if isinstance(dags, list | tuple) else (dags,)


def _chained(first: DAG | Sequence[DAG], second: DAG | Sequence[DAG]) -> Pipeline:
    before = first.joined if isinstance(first, Pipeline) else ()
    stages = (*(before or (_stage(first),)), _stage(second))
    for one in (one for stage in stages for one in stage):
        if not isinstance(one, DAG):
            raise DefinitionError(
                f">> joins DAGs with DAGs, not with {one!r:.80}.", advice="Among steps it makes edges: a() >> b()."
            )
    pipeline = Pipeline("-".join("+".join(dag.name for dag in stage) for stage in stages)[:200])
    for stage in stages:
        pipeline.then(stage)
    pipeline.joined = stages
    return pipeline


@dataclass(frozen=True)
class Choice:
    """Several DAGs for one purpose: each node gets the first whose condition holds, else the default.

    Calling it makes a step, as calling a DAG does; every one of the DAGs must take the arguments.
    """

    options: tuple[tuple[Selector, DAG], ...]
    default: DAG | None = None

    @property
    def dags(self) -> tuple[DAG, ...]:
        """All of them, the default last."""
        return (*(dag for _, dag in self.options), *((self.default,) if self.default is not None else ()))

    def __call__(self, *args: Any, **kwargs: Any) -> Step[Any]:
        """Make a step that runs the DAG that fits the node.

        Raises:
            ArgumentError: a parameter of one of them is missing, unknown or given twice.
        """
        return self.as_task()(*args, **kwargs)

    def as_task(
        self,
        *,
        timeout: float | str | None = None,
        retries: int = 0,
        retry_delay: float | str = 0.0,
        retry_backoff: float = 1.0,
        retry_if: Callable[[str], bool] | None = None,
    ) -> DagTask:
        """It as a task with settings for its attempts, which mean what they mean for ``fl.task``."""
        return _as_task(self, "choice", timeout, retries, retry_delay, retry_backoff, retry_if)


class DagTask(Task[Any]):
    """A DAG, or a choice of DAGs, as a task. Its implementations are the DAGs; none is called as a function."""

    def __init__(self, what: DAG | Choice, name: str, settings: TaskSettings) -> None:
        self._what, self._name, self._settings = what, name, settings

    @property
    def task_name(self) -> str:
        return self._name

    @property
    def dags(self) -> tuple[DAG, ...]:
        """What may run."""
        return (self._what,) if isinstance(self._what, DAG) else self._what.dags

    def dag_for(self, node: Node) -> DAG | None:
        """The one that fits a node; None: none does."""
        found = (one.call for one in self.implementations() if one.when.explain(node).holds)
        return cast(DAG | None, next(found, None))

    def implementations(self) -> tuple[Implementation, ...]:
        settings = self._settings
        if isinstance(self._what, DAG):
            return (Implementation(name="", when=Always(), call=self._what, settings=settings),)
        options = [*self._what.options, *([(Always(), self._what.default)] if self._what.default is not None else [])]
        return tuple(Implementation(name=dag.name, when=when, call=dag, settings=settings) for when, dag in options)

    def __call__(self, *args: Any, **kwargs: Any) -> Step[Any]:
        for dag in self.dags:
            if current_dag.get() is dag:
                raise DefinitionError(
                    f"DAG {dag.name!r} cannot be a step of itself.", advice="For repetition use fl.repeat."
                )
            dag.bind(args, kwargs)
        step: Step[Any] = Step(self, args, kwargs)
        step.takes_slot = False  # the steps inside do
        return step


def _as_task(
    what: DAG | Choice,
    name: str,
    timeout: float | str | None,
    retries: int,
    retry_delay: float | str,
    retry_backoff: float,
    retry_if: Callable[[str], bool] | None,
) -> DagTask:
    settings = TaskSettings(
        timeout=None if timeout is None else parse_duration(timeout),
        retries=retries,
        retry_delay=parse_duration(retry_delay),
        retry_backoff=retry_backoff,
        retry_if=retry_if,
    )
    return DagTask(what, name, settings)


def _parameters(dag: str, steps: Iterable[Step[Any]]) -> dict[str, Any]:
    """The parameters that the arguments of ``steps`` mention."""
    found: dict[str, Any] = {}
    for step in steps:
        for one in step.refers:
            if not isinstance(one, Arg):
                continue
            known = found.setdefault(one.name, one.default)
            if one.default is REQUIRED or known is one.default:
                continue
            if known is not REQUIRED and repr(known) != repr(one.default):
                raise DefinitionError(
                    f"Parameter {one.name!r} of DAG {dag!r} has the defaults {known!r:.60} and {one.default!r:.60}.",
                    advice="Give it one, in one place.",
                )
            found[one.name] = one.default
    return found


def choose(*options: tuple[Selector | Callable[[Node], bool], DAG], default: DAG | None = None) -> Choice:
    """Choose a DAG by what the node is: ``choose((fl.node.os == "linux", dag_a), default=dag_b)``."""
    if not all(isinstance(o, tuple) and len(o) == 2 and isinstance(o[1], DAG) for o in options):
        raise DefinitionError("choose() takes pairs of a condition and a DAG.")
    return Choice(tuple((as_selector(when), dag) for when, dag in options), default)


def steps_of(dag: DAG | Choice) -> Iterator[Step[Any]]:
    """Every step of a DAG, or of all DAGs of a choice, and of those inside of it."""
    for one in (dag,) if isinstance(dag, DAG) else dag.dags:
        for step in one.checked():
            yield step
            for inner in step.task.dags if isinstance(step.task, DagTask) else ():
                yield from steps_of(inner)

"""DAGs: steps and the edges between them, and the short form for linear stages.

A DAG is built by using tasks inside ``with fl.DAG(...)``, or step by step; a step made outside any DAG joins the one
it is given to. It is checked once, when it is used (``checked``), and cannot change afterwards.

Invariants of a checked DAG: names are unique, edges stay inside it and form no circle, ``order`` has every step after
everything it needs.
"""

from __future__ import annotations

import contextvars
import graphlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fieldlab_common.deployment import Background
from fieldlab_common.drawing import Box, Drawing, Line, Svg, lines_to, notes_of
from fieldlab_common.environment import parse_duration
from fieldlab_common.errors import CycleError, DefinitionError, DuplicateNameError, FieldlabError, UnknownNameError
from fieldlab_common.node import Node
from fieldlab_common.selector import Selector, as_selector
from fieldlab_common.step import Item, Pick, Step, StepOwner, check_name, current_dag, name_of, needs_of
from fieldlab_common.task import Isolation, Task, check_isolation, task_of

__all__ = ["DAG", "Choice", "Pipeline", "background", "choose", "map_", "repeat"]

R = TypeVar("R")


class DAG:
    """Steps and the edges between them.

    ``stop_on_failure``: when a step fails and nothing handles it, what runs is stopped and the rest is cancelled.
    ``max_parallel``: at most so many steps at a time on one node. ``isolation``: of the steps whose task does not say:
    ``"process"`` (the default), or ``"shared"`` for many tiny steps, which then run in warm workers. A background step
    always has a process of its own.
    """

    def __init__(
        self,
        name: str = "dag",
        *,
        stop_on_failure: bool = True,
        max_parallel: int | None = None,
        isolation: Isolation = None,
    ) -> None:
        if max_parallel is not None and max_parallel < 1:
            raise DefinitionError(f"max_parallel={max_parallel}: it is at least 1, or None for no limit.")
        self.name = check_name(name, "a DAG")
        self.stop_on_failure = stop_on_failure
        check_isolation(isolation)
        self.max_parallel = max_parallel
        self.isolation: Isolation = isolation
        self._steps: dict[str, Step[Any]] = {}
        self._counts: dict[str, int] = {}
        self._order: tuple[Step[Any], ...] | None = None
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
            DefinitionError: it has no step, or an edge leads to another DAG.
        """
        if self._order is None:
            self._order = self._sound()
        return self._order

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
    return Box(
        name=step.name,
        notes=notes_of(background=background, repeated=repeated, mapped=mapped, need=step.need),
        background=background,
        several=repeated or mapped,
    )


def _lines(step: Step[Any]) -> Iterable[Line]:
    during = [other.name for other in step.during_steps]
    return lines_to(step.name, needs_of(step), during, name_of(step.condition and step.condition[0]))


class Pipeline(DAG):
    """A DAG of linear stages: the steps of a stage run beside each other, each stage after the one before."""

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

    def then(self, stage: Step[Any] | Sequence[Step[Any]]) -> Pipeline:
        """Add a stage: a step, or several."""
        steps = [stage] if isinstance(stage, Step) else list(stage)
        if not steps:
            raise DefinitionError(f"A stage of pipeline {self.name!r} has no step.")
        for step in steps:
            self.add(step)
            if self._last:
                step.after(self._last)
        self._last = steps
        return self


@dataclass(frozen=True)
class Choice:
    """Several DAGs for one purpose: each node gets the first whose condition holds, else the default."""

    options: tuple[tuple[Selector, DAG], ...]
    default: DAG | None = None


def choose(*options: tuple[Selector | Callable[[Node], bool], DAG], default: DAG | None = None) -> Choice:
    """Choose a DAG by what the node is: ``choose((fl.node.os == "linux", dag_a), default=dag_b)``."""
    if not all(isinstance(o, tuple) and len(o) == 2 and isinstance(o[1], DAG) for o in options):
        raise DefinitionError("choose() takes pairs of a condition and a DAG.")
    return Choice(tuple((as_selector(when), dag) for when, dag in options), default)


def background(step: Step[R], *, stop: int | None = None, grace: float | str = 10.0) -> Step[R]:
    """Let a step run in the background: until nothing is ``during`` it any more.

    It is then asked to stop: ``ctx.stopping`` is set, and its processes get the signal ``stop`` (None: SIGTERM if the
    task takes no context, else no signal). What is left after ``grace`` seconds is killed. A timeout, a cancel and a
    failure send the same signal (SIGTERM if there is none), so that a capture leaves a whole file; it then has 5 s.
    """
    if any(one.settings.isolation == "shared" for one in task_of(step).implementations()):
        raise DefinitionError(
            f"{step!r} is isolation='shared' and cannot run in the background: it would keep a worker from all others.",
            advice="Leave isolation out; a background step has a process of its own.",
        )
    signal = int(stop) if stop is not None else (None if step.takes_context else 15)
    step.background = Background(signal=signal, grace=parse_duration(grace), announces=step.takes_context)
    return step


def repeat(
    step: Step[R],
    *,
    every: float | str = 0.0,
    duration: float | str | None = None,
    times: int | None = None,
    until: Callable[[R], bool] | None = None,
    on_failure: Literal["fail", "continue"] = "fail",
) -> Step[list[R]]:
    """Run a step again and again; its value is the list of what each iteration gave.

    ``every``: time between two starts; it ends after ``times`` iterations, or ``duration``, or when ``until`` is true
    of the last value. ``on_failure="continue"``: a failed iteration gives None and the next runs.

    Raises:
        DefinitionError: nothing says when it ends.
    """
    if times is None and duration is None and until is None:
        raise DefinitionError(f"{step!r} would repeat for ever.", advice="Give times=, duration= or until=.")
    if on_failure not in ("fail", "continue"):
        raise DefinitionError(f"on_failure={on_failure!r}: it is 'fail' or 'continue'.")
    if times is not None and times < 1:
        raise DefinitionError(f"times={times}: it is at least 1.")
    if step.over is not None or step.background is not None:
        raise DefinitionError(f"{step!r} is mapped or in the background and cannot repeat.")
    step.repetition = {
        "every": parse_duration(every),
        "duration": None if duration is None else parse_duration(duration),
        "times": times,
        "until": until,
        "keep_going": on_failure == "continue",
    }
    return step  # type: ignore[return-value]


def map_(task: Task[R], items: Step[Any] | Pick, *args: Any, **kwargs: Any) -> Step[list[R]]:
    """Call ``task(item, *args, **kwargs)`` for each item of a list that is known only when it runs."""
    if not isinstance(items, Step | Pick):
        raise DefinitionError(
            f"fl.map takes a task and a step, not {items!r:.80}.",
            advice="For a list that is known now: [task(x) for x in items].",
        )
    token = current_dag.set(None)
    try:
        step = task(Item(), *args, **kwargs)
    finally:
        current_dag.reset(token)
    step.over = items
    owner = current_dag.get() or (items.dag if isinstance(items, Step) else items.step.dag)
    if owner is not None:
        owner.add(step)
    return step  # type: ignore[return-value]


def steps_of(dag: DAG | Choice) -> Iterable[Step[Any]]:
    """Every step of a DAG, or of all DAGs of a choice."""
    if isinstance(dag, DAG):
        return dag.checked()
    dags = [option for _, option in dag.options] + ([dag.default] if dag.default else [])
    return [step for one in dags for step in one.checked()]

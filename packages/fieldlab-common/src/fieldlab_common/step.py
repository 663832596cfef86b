"""Steps: what calling a task makes, and what stands for a value that does not exist yet.

A step stands for its value without being it: as an argument of another step it is a data edge, and every use that
would need the value now (iterating, comparing, formatting …) is an error that says what was meant.

Invariants: a step belongs to at most one DAG; its name is fixed once it belongs to one. ``__fieldlab_reference__``
is how steps, picks and items leave as references when arguments are sealed (``payload``).
"""

from __future__ import annotations

import contextvars
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, Protocol

from fieldlab_common.deployment import Background, Need, On
from fieldlab_common.errors import DefinitionError, InvalidNameError, StepMisuseError
from fieldlab_common.node import Node
from fieldlab_common.selector import Field

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    R = TypeVar("R", default=Any, covariant=True)
else:
    from typing import TypeVar

    R = TypeVar("R")

__all__ = [
    "REQUIRED",
    "Arg",
    "ByNode",
    "Edge",
    "File",
    "Item",
    "Pick",
    "Secret",
    "Step",
    "StepOwner",
    "TaskLike",
    "by_node",
    "check_name",
    "current_dag",
    "name_of",
    "needs_of",
    "references",
    "secret",
]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.#@+-]{0,199}")


def check_name(name: object, what: str) -> str:
    """Return ``name`` if it can name a step, a DAG, a node, a deployment or an experiment; else InvalidNameError."""
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    raise InvalidNameError(
        f"{name!r:.100} cannot be the name of {what}.",
        advice="Use letters, digits and any of _ . # @ + - (up to 200), beginning with a letter, a digit or _.",
    )


class TaskLike(Protocol):
    """What a step needs of its task."""

    @property
    def task_name(self) -> str:
        """What steps of it are called by default."""
        ...


# --- arguments that are filled in later ---


class Item:
    """In the arguments of a mapped step: the item of the iteration."""

    def __fieldlab_reference__(self) -> tuple[str]:
        return ("item",)


@dataclasses.dataclass(frozen=True)
class File:
    """A file of the client's machine as an argument: it travels as a blob, and the task gets a path on the node."""

    path: str


@dataclasses.dataclass(frozen=True)
class Secret:
    """A text that its user stored under ``name``: a task gets the text, on the node; nothing else ever has it."""

    name: str

    def __fieldlab_reference__(self) -> tuple[str, str]:
        return ("secret", self.name)


@dataclasses.dataclass(frozen=True)
class ByNode:
    """A parameter computed on the client for each node by ``function(node)``."""

    function: Callable[[Node], Any]


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Any = _Required()


@dataclasses.dataclass(frozen=True, eq=False)
class Arg:
    """A parameter: of the DAG whose step has it as an argument, or of the command whose list it is in."""

    name: str
    default: Any = REQUIRED


def by_node(function: Callable[[Node], Any]) -> Any:
    """A parameter that is computed, on the client, for each node: ``by_node(lambda node: node["rate"] * 2)``."""
    if not callable(function):
        raise DefinitionError(f"by_node() takes a function of a node, not {function!r:.80}.")
    return ByNode(function)


def secret(name: str) -> Any:
    """A secret as an argument, or as the value of a variable in ``env``: the task gets the text on the node.

    It was stored with ``client.secrets.set(name, text)``, or is given to ``fl.run(…, secrets={name: text})``. It is not
    in the plan, in blobs or in the journal. What the step prints, logs or raises has ``***`` in its place; a result or
    an event that holds it is refused.
    """
    return Secret(check_name(name, "a secret"))


def references(value: Any) -> Iterator[Any]:
    """Every step, pick, field, file, secret, by_node and arg that an argument is or holds (dataclasses looked into)."""
    if isinstance(value, _Stands | Field | File | Secret | ByNode | Arg):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from references(key)
            yield from references(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from references(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from references(getattr(value, f.name))


# --- steps -----------------------------------------------------------------------------------------------------------


class _Stands:
    """Stands for a value that exists only when the experiment runs."""

    def _misuse(self, what: str, advice: str) -> StepMisuseError:
        return StepMisuseError(f"{self!r} cannot be {what}: its value exists only when it runs.", advice=advice)

    if TYPE_CHECKING:  # so that type checkers refuse these before anything runs
        __iter__: None
        __contains__: None
        __len__: None
    else:

        def __iter__(self) -> Iterator[Any]:
            raise self._misuse("iterated", "Use fl.map(task, step) for each of its items, or step[0] for one of them.")

        def __contains__(self, item: object) -> bool:
            raise self._misuse("searched with `in`", "Do it in a task that takes it as an argument.")

        def __len__(self) -> int:
            raise self._misuse("measured with len()", "Do it in a task that takes it as an argument.")

        def __lt__(self, other: object) -> bool:
            return self.__eq__(other)

        __le__ = __gt__ = __ge__ = __lt__

    def __bool__(self) -> NoReturn:
        raise self._misuse("tested", "Use .when(step, lambda value: ...) to run a step on a condition.")

    def __format__(self, spec: str) -> str:
        raise self._misuse("formatted", "Format it in a task that takes it as an argument.")

    def __eq__(self, other: object) -> bool:
        raise self._misuse("compared", "Use .when(step, lambda value: value == ...) to run a step on a condition.")

    def __ne__(self, other: object) -> bool:
        return self.__eq__(other)

    def __hash__(self) -> int:
        return id(self)


class Pick(_Stands):
    """A part of a step's value (``step["key"]``), or its ``.error`` or ``.status``, as an argument."""

    def __init__(self, step: Step[Any], attribute: str = "value", path: tuple[Any, ...] = ()) -> None:
        self.step = step
        self.attribute = attribute
        self.path = path

    def __getitem__(self, key: Any) -> Pick:
        return Pick(self.step, self.attribute, (*self.path, key))

    def __fieldlab_reference__(self) -> tuple[Any, ...]:
        return ("step", self.step.name, self.attribute, self.path)

    def __repr__(self) -> str:
        path = "".join(f"[{key!r}]" for key in self.path)
        return f"<{self.attribute} of step {self.step.name}{path}>"


class StepOwner(Protocol):
    """What takes steps in: a DAG. ``isolation``: of the steps whose task does not say."""

    isolation: Literal["process", "shared"] | None

    def add(self, step: Step[Any]) -> None:
        """Take the step, and those it needs, in."""

    def rename(self, step: Step[Any], name: str) -> None:
        """Let the step have another name, if it is free."""


current_dag: contextvars.ContextVar[StepOwner | None] = contextvars.ContextVar("fieldlab_dag", default=None)

Steps = Any  # a step, or an iterable of steps


@dataclasses.dataclass
class Edge:
    """An order edge as it was written."""

    step: Step[Any]
    on: On


class Step(_Stands, Generic[R]):
    """One use of a task in a DAG."""

    def __init__(
        self, owner: TaskLike, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, takes_context: bool = False
    ) -> None:
        self.task = owner
        self.args = args
        self.kwargs = dict(kwargs)
        self.takes_context = takes_context
        self.dag: StepOwner | None = None
        self.edges: list[Edge] = []
        self.need = "all"
        self.over: Step[Any] | Pick | None = None
        self.background: Background | None = None
        self.during_steps: list[Step[Any]] = []
        self.condition: tuple[Step[Any] | Pick, Callable[[Any], bool]] | None = None
        self.repetition: Mapping[str, Any] | None = None
        self.is_measured = False
        self.exclusives: tuple[str, ...] = ()
        self.takes_slot = True
        self._name = ""
        self.refers = tuple(references((args, self.kwargs)))
        owner_dag = current_dag.get()
        if owner_dag is not None:
            owner_dag.add(self)

    @property
    def name(self) -> str:
        """Its name in its DAG; before it belongs to one, what it was named or its task's name."""
        return self._name or self.task.task_name

    @property
    def is_named(self) -> bool:
        """Whether a name was given to it, by the user or by its DAG."""
        return bool(self._name)

    def named(self, name: str) -> Step[R]:
        """Give it this name; unique in its DAG."""
        as_functions = isinstance(name, str) and name.isidentifier() and len(name) <= 200  # in any script
        new = name if as_functions else check_name(name, "a step")
        if self.dag is not None:
            self.dag.rename(self, new)
        self._name = new
        return self

    def called(self, name: str) -> None:
        """Its DAG gives it the name that it did not get from its user."""
        self._name = name

    def after(
        self,
        *steps: Steps,
        on: Literal["success", "failure", "always"] = "success",
        need: Literal["all", "any"] | None = None,
    ) -> Step[R]:
        """Start it when ``steps`` have ended: ``on`` ``"success"``, ``"failure"`` or ``"always"``.

        With several edges, ``need="all"`` (the default) waits for all of them, ``"any"`` for the first.
        """
        if on not in {member.value for member in On}:
            raise DefinitionError(f"on={on!r}: it is 'success', 'failure' or 'always'.")
        if need not in (None, "all", "any"):
            raise DefinitionError(f"need={need!r}: it is 'all' or 'any'.")
        self.need = need or self.need
        for step in _flat(steps):
            self.edges.append(Edge(step, On(on)))
            self._join(step)
        return self

    def during(self, *steps: Steps) -> Step[R]:
        """Run it while these background steps run: it starts when they are ready, and they end after it."""
        for step in _flat(steps):
            if step.background is None:
                raise DefinitionError(
                    f"{step!r} is no background step.", advice="Make it one with fl.background(step)."
                )
            self.during_steps.append(step)
            self._join(step)
        return self

    def when(self, step: Step[Any] | Pick, condition: Callable[[Any], bool]) -> Step[R]:
        """Run it only if ``condition``, given the value of ``step``, is true; otherwise it is skipped."""
        if isinstance(step, Arg):
            raise DefinitionError(
                f"The parameter {step.name!r} is no step, and a condition is on a step's value.",
                advice=f"Make a step of it: .when(fl.value(fl.arg({step.name!r})), ...).",
            )
        if not isinstance(step, Step | Pick) or not callable(condition):
            raise DefinitionError("when() takes a step and a function of its value.")
        if self.condition is not None:
            raise DefinitionError(f"{self!r} has a condition already.", advice="Put both into one function.")
        self.condition = (step, condition)
        self._join(step if isinstance(step, Step) else step.step)
        return self

    def measured(self) -> Step[R]:
        """Mark it as a measurement: with ``reporting="quiet"`` the executor keeps still while it runs."""
        self.is_measured = True
        return self

    def exclusive(self, *names: str) -> Step[R]:
        """Never run it at the same time as another step of the deployment that is exclusive for one of ``names``."""
        if not names or not all(isinstance(name, str) for name in names):
            raise DefinitionError("exclusive() takes the names of what it holds alone, such as 'nic'.")
        self.exclusives = tuple(dict.fromkeys((*self.exclusives, *names)))
        return self

    @property
    def error(self) -> Pick:
        """Its error text, as an argument: None if it succeeded. Implies no success edge."""
        return Pick(self, "error")

    @property
    def status(self) -> Pick:
        """Its state (``"succeeded"`` …), as an argument. Implies no success edge."""
        return Pick(self, "status")

    def __getitem__(self, key: Any) -> Pick:
        return Pick(self, "value", (key,))

    def __rshift__(self, others: Steps) -> Any:
        for step in _flat((others,)):
            step.after(self)
        return others

    def __rrshift__(self, others: Steps) -> Step[R]:
        return self.after(*_flat((others,)))

    def __fieldlab_reference__(self) -> tuple[Any, ...]:
        return ("step", self.name, "value", ())

    def __repr__(self) -> str:
        return f"<step {self.name}>"

    def neighbours(self) -> Iterator[Step[Any]]:
        """Every step that it needs, in any way."""
        for reference in self.refers:
            if isinstance(reference, Step | Pick):
                yield reference if isinstance(reference, Step) else reference.step
        yield from (edge.step for edge in self.edges)
        yield from self.during_steps
        for other in (self.over, self.condition and self.condition[0]):
            if other is not None:
                yield other if isinstance(other, Step) else other.step

    def _join(self, other: Step[Any]) -> None:
        if self.dag is other.dag:
            return
        if self.dag is not None and other.dag is not None:
            raise DefinitionError(f"{self!r} and {other!r} are in different DAGs.")
        for owner, newcomer in ((self.dag, other), (other.dag, self)):
            if owner is not None:
                owner.add(newcomer)


def check_step(given: Any) -> Step[Any]:
    """Return ``given`` if it is a step, and say how to make one of it if it is not."""
    if isinstance(given, Step):
        return given
    raise DefinitionError(
        f"{given!r:.80} is no step.", advice="Call a task or a DAG to make a step of it: task(...), dag(...)."
    )


def _flat(steps: Iterable[Any]) -> Iterator[Step[Any]]:
    for step in steps:
        if isinstance(step, Step):
            yield step
        elif isinstance(step, list | tuple):
            yield from _flat(step)
        else:
            yield check_step(step)


# --- what leads to a step --------------------------------------------------------------------------------------------


def name_of(reference: Step[Any] | Pick | None) -> str | None:
    """The name of the step that ``reference`` is, or is a part of."""
    if reference is None:
        return None
    return reference.name if isinstance(reference, Step) else reference.step.name


def needs_of(step: Step[Any]) -> tuple[Need, ...]:
    """The edges that lead to ``step``: from its arguments, its fan-out and its condition, then those of ``after``."""
    data: dict[str, bool] = {}  # name -> whether only its error or status is used
    sources: list[Any] = [r for r in step.refers if isinstance(r, Step | Pick)]
    sources += [step.over] if step.over is not None else []
    sources += [step.condition[0]] if step.condition is not None else []
    for reference in sources:
        name = name_of(reference) or ""
        weak = isinstance(reference, Pick) and reference.attribute != "value"
        data[name] = data.get(name, True) and weak
    written: dict[str, set[On]] = {}
    for edge in step.edges:
        written.setdefault(edge.step.name, set()).add(edge.on)
    found: list[Need] = []
    for name, weak in data.items():
        ons = written.pop(name, set())
        if not weak:
            ons.add(On.SUCCESS)
        found += [Need(step=name, on=on, data=True) for on in sorted(ons) or [On.ALWAYS]]
    found += [Need(step=name, on=on) for name, ons in written.items() for on in sorted(ons)]
    return tuple(found)

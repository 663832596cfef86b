"""The steps of a DAG for a node, with those of the DAGs inside of it, and what their parameters were given.

A DAG that is a step does not travel as a function with arguments: what it was called with is put into the arguments of
the steps inside of it. A value, a node property or a file stands there as if it had been written there; a step of the
DAG around becomes a reference to the scope around (``^name``), which the machine fills (``StepSpec.outer``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from fieldlab_common import paths
from fieldlab_common.dag import DAG, DagTask
from fieldlab_common.errors import DefinitionError
from fieldlab_common.node import Node
from fieldlab_common.step import Arg, ByNode, File, Item, Pick, Step, references

__all__ = ["Filler", "Scope", "Use", "expand", "has_choice", "walk"]


@dataclass(frozen=True, eq=False)
class Scope:
    """What a DAG was called with, where it is a step; ``around``: the same of the DAG that the step is in.

    ``isolation``: of its steps whose task does not say.
    """

    values: Mapping[str, Any]
    around: Scope | None = None
    isolation: str | None = None


@dataclass(frozen=True, eq=False)
class Use:
    """A step where it stands. ``dag``: of a step that is a DAG, the one that fits the node; its steps: ``inside``."""

    path: str
    step: Step[Any]
    scope: Scope
    dag: DAG | None = None
    inside: tuple[Use, ...] = ()

    @property
    def refers(self) -> Iterator[Any]:
        """What its arguments refer to, the values of parameters looked through."""
        yield from _referred(self.step.refers, self.scope)


def _referred(found: Iterable[Any], scope: Scope) -> Iterator[Any]:
    for one in found:
        yield one
        if isinstance(one, Arg):
            yield from _referred(references(scope.values[one.name]), scope.around or Scope({}))


def has_choice(dag: DAG) -> bool:
    """Whether what is inside of it depends on the node."""
    tasks = [step.task for step in dag.checked() if isinstance(step.task, DagTask)]
    return any(len(task.dags) > 1 or any(map(has_choice, task.dags)) for task in tasks)


def expand(dag: DAG, node: Node, scope: Scope, path: str = "") -> tuple[Use, ...]:
    """The steps of ``dag`` on ``node``. A choice of which no DAG fits has nothing inside."""
    found = []
    for step in dag.checked():
        here = paths.join(path, step.name)
        inner = step.task.dag_for(node) if isinstance(step.task, DagTask) else None
        if inner is None:
            found.append(Use(here, step, scope))
        else:
            bound = Scope(inner.bind(step.args, step.kwargs), scope, inner.isolation or scope.isolation)
            found.append(Use(here, step, scope, inner, expand(inner, node, bound, here)))
    return tuple(found)


def walk(uses: Iterable[Use]) -> Iterator[Use]:
    """All of them, what is inside of one right after it."""
    for use in uses:
        yield use
        yield from walk(use.inside)


def _computed(value: ByNode, node: Node) -> Any:
    try:
        return value.function(node)
    except Exception as error:  # the user's function may raise anything; for this node, that is a problem of the plan
        raise DefinitionError(
            f"the function of its fl.by_node failed: {type(error).__name__}: {error}.",
            advice="Give the node what it asks for, or let it ask with node.get(name).",
        ) from error


class Filler:
    """Fills in, in the arguments of one step, what is known before it runs: parameters, ``by_node``, files.

    ``outer`` then has what they refer to in the scopes around, and ``files`` the digests of the files.
    """

    def __init__(self, node: Node, seal_file: Callable[[str], str]) -> None:
        self._node, self._seal_file = node, seal_file
        self.outer: dict[str, None] = {}
        self.files: dict[str, None] = {}

    def fill(self, value: Any, scope: Scope, levels: int = 0) -> Any:
        """``value``, written ``levels`` scopes further out, where ``scope`` is."""
        if isinstance(value, Arg):
            return self.fill(scope.values[value.name], scope.around or Scope({}), levels + 1)
        if isinstance(value, ByNode):
            return _computed(value, self._node)
        if isinstance(value, File):
            return self._file(value)
        if levels and isinstance(value, Step | Pick | Item):
            return self._further_out(value, "^" * levels)
        if isinstance(value, Mapping):
            return {self.fill(k, scope, levels): self.fill(v, scope, levels) for k, v in value.items()}
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(self.fill(v, scope, levels) for v in value)
        if is_dataclass(value) and not isinstance(value, type):
            changed = {f.name: self.fill(getattr(value, f.name), scope, levels) for f in fields(value) if f.init}
            return type(value)(**changed)
        return value

    def _file(self, file: File) -> _Reference:
        digest = self._seal_file(file.path)
        self.files[digest] = None
        return _Reference("file", digest, file.path.replace("\\", "/").rpartition("/")[2])

    def _further_out(self, value: Step[Any] | Pick | Item, prefix: str) -> _Reference:
        _, name, attribute, path = (
            ("step", "", "value", ()) if isinstance(value, Item) else value.__fieldlab_reference__()
        )
        self.outer[prefix + name] = None
        return _Reference("step", prefix + name, attribute, path)


class _Reference:
    def __init__(self, *parts: Any) -> None:
        self._parts = parts

    def __fieldlab_reference__(self) -> tuple[Any, ...]:
        return self._parts

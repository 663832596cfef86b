"""netunicorn's execution graphs as DAGs of ours.

netunicorn's executor passes tokens along edges: a node starts when a token has come to it and every node with a
strong edge to it has run; when it ends, tokens leave it along the edges whose ``traverse_on`` fits. A weak edge brings
a token and asks nothing, and so closes cycles. A DAG has no cycles, so a graph is written out in *rounds*: the first
begins at the root and follows strong edges; each next one begins where the weak edges traversed in the round before
lead. Counters say how often an edge is there to be traversed, so they end it.

What an edge asks is put into edges of ours where they say precisely the same. Where they do not (one of several nodes
before a node was left out, or failed and that was provided for), a step ``join-...`` looks at the states of those
before and decides. Synchronisation points are steps that do nothing.

What netunicorn leaves to chance is refused: weak edges that leave different nodes start rounds beside each other, and
which of them uses up a counter is a race. Within a round a join waits for the nodes of that round; netunicorn's would
be content with those of a round before, and start a task while its last run goes on.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fieldlab_common.dag import DAG
from fieldlab_common.errors import DefinitionError, UnsupportedError
from fieldlab_common.step import Step
from fieldlab_common.task import task as make_task
from netunicorn.base import DockerImage, ExecutionGraph, TaskDispatcher
from netunicorn.base import Task as TheirTask

from fieldlab.contrib.netunicorn import node as node_side
from fieldlab.contrib.netunicorn.tasks import step_name, wrapped

__all__ = ["MAX_STEPS", "from_graph"]

MAX_STEPS = 20_000  # of a graph that is written out

_synchronise = make_task(node_side.synchronise)
_joined = make_task(node_side.joined)


def from_graph(graph: ExecutionGraph, *, rounds: int | None = None, install: bool = True, name: str = "") -> DAG:
    """A DAG that runs netunicorn's tasks in the order that an execution graph, or a pipeline, gives them.

    A task's steps are called as the task; those of later rounds of a cycle ``name#2``, ``name#3`` and so on.
    ``rounds``: how often a cycle runs at most; needed for one that has no counter. ``install``: as for ``from_task``;
    it also brings the commands of the graph's environment definition. The DAG is called ``name``, or as the graph.

    Raises:
        DefinitionError: netunicorn refuses the graph.
        UnsupportedError: something has no equivalent; it is named.
    """
    try:
        ExecutionGraph.is_execution_graph_valid(graph)
    except ValueError as error:
        raise DefinitionError(f"netunicorn refuses the graph: {error}") from error
    if rounds is not None and rounds < 1:
        raise DefinitionError(f"rounds={rounds}: it is at least 1.")
    return _Converter(graph, rounds, install, step_name(name or graph.name)).convert()


@dataclass(eq=False)
class _Ran:
    """One run of a node of the graph, in one round, with its step; the first run of the root has none."""

    step: Step[Any] | None
    is_task: bool
    rescued: bool  # what follows if it fails is provided for
    sure: bool  # unless the whole run is stopped, it runs
    sure_here: bool  # likewise, if its round takes place


@dataclass(frozen=True)
class _Source:
    """One of the nodes before a node: its runs so far, the edge's condition, and whether that brings a token now."""

    runs: tuple[_Ran, ...]
    condition: str
    counts: bool

    @property
    def last(self) -> _Ran:
        return self.runs[-1]

    @property
    def certain(self) -> bool:
        """Whether the edge is traversed if its source runs at all, or the whole run is stopped."""
        return (
            not self.last.is_task or self.condition == "any" or (self.condition == "success" and not self.last.rescued)
        )


@dataclass
class _Round:
    """The nodes that a round may reach, and the edges that start it: from which run, and on which condition."""

    reach: set[Any]
    tokens: Mapping[Any, tuple[_Source, ...]] = field(default_factory=dict)


class _Converter:
    def __init__(self, graph: ExecutionGraph, rounds: int | None, install: bool, name: str) -> None:
        self._early = graph.early_stopping
        self._edges = graph.graph.copy()
        self._rounds, self._install = rounds, install
        self._commands, self._env = _environment(graph) if install else ((), {})
        self._dag = DAG(name, stop_on_failure=self._early)
        self._order = tuple(self._sorted())
        self._names = self._unique_names()
        self._tasks: dict[Any, Any] = {}
        self._runs: dict[Any, list[_Ran]] = {}
        self._unsure: set[tuple[Any, Any]] = set()  # edges whose counter may not have gone down

    def convert(self) -> DAG:
        this = _Round(self._reached(["root"]))
        count = 0
        while this.reach:
            for node in (node for node in self._order if node in this.reach):
                self._place(node, this)
            count += 1
            if len(self._dag) > MAX_STEPS:
                raise UnsupportedError(
                    f"The graph has more than {MAX_STEPS} steps when its cycles are written out.",
                    advice="Give rounds=, or smaller counters.",
                )
            if self._rounds is not None and count >= self._rounds:
                break
            this = self._next(this)
        if not len(self._dag):
            raise DefinitionError("The graph has no task.")
        return self._dag

    # --- the graph

    def _sorted(self) -> Iterator[Any]:
        before: dict[Any, list[Any]] = {
            node: [u for u in self._edges.predecessors(node) if not self._weak(u, node)] for node in self._edges.nodes
        }
        try:
            yield from graphlib.TopologicalSorter(before).static_order()
        except graphlib.CycleError as error:
            circle = " -> ".join(map(_called, reversed(error.args[1])))
            raise UnsupportedError(
                f"The strong edges {circle} form a circle, in which every node waits for itself.",
                advice='Make the edge that closes it weak: type="weak".',
            ) from None

    def _weak(self, source: Any, target: Any) -> bool:
        return bool(self._edges.edges[source, target].get("type", "strong") == "weak")

    def _condition(self, source: Any, target: Any) -> str:
        given = self._edges.edges[source, target].get("traverse_on")
        return str(given) if given is not None else ("success" if self._early else "any")

    def _unique_names(self) -> dict[Any, str]:
        found: dict[Any, str] = {}
        taken: set[str] = set()
        for node in self._order:
            base = step_name(node.name) if _is_task(node) else f"sync-{step_name(node)}"
            name, number = base, 1
            while name in taken:
                number += 1
                name = f"{base}-{number}"
            taken.add(name)
            found[node] = name
        return found

    def _reached(self, starts: Iterable[Any]) -> set[Any]:
        found: set[Any] = set()
        queue = list(starts)
        while queue:
            node = queue.pop()
            if node not in found:
                found.add(node)
                queue += [v for v in self._edges.successors(node) if not self._weak(node, v)]
        return found

    # --- a round

    def _place(self, node: Any, this: _Round) -> None:
        """Make the step of ``node`` for this round."""
        strong = list(self._sources(node, this))
        tokens = this.tokens.get(node, ())
        sources = [*tokens, *strong]
        runs = self._runs.setdefault(node, [])
        if node == "root" and not sources:
            runs.append(_Ran(None, is_task=False, rescued=False, sure=True, sure_here=True))
            return
        name = self._names[node] + (f"#{len(runs) + 1}" if runs else "")
        step = self._step(node, name)
        for one in (runs[0].step, step) if runs and _is_task(node) else ():
            if one is not None:
                one.exclusive(f"netunicorn:{self._names[node]}")  # a task never runs beside itself
        self._connect(step, name, sources)
        rescued = not self._early or self._is_rescued(node)
        sure = any(s.counts and s.certain for s in sources) and all(s.last.sure for s in sources)
        brought = bool(tokens) or any(s.counts and s.certain for s in strong)
        here = brought and all(s.last.sure_here if s.counts else s.last.sure for s in strong)
        runs.append(_Ran(step, _is_task(node), rescued, sure=sure, sure_here=here))

    def _sources(self, node: Any, this: _Round) -> Iterator[_Source]:
        for before in self._edges.predecessors(node):
            if not self._weak(before, node):
                runs = tuple(self._runs.get(before, ()))
                if not runs:
                    raise UnsupportedError(f"{_called(node)} waits for {_called(before)}, which nothing leads to.")
                yield _Source(runs, self._condition(before, node), counts=before in this.reach)

    def _is_rescued(self, node: Any) -> bool:
        return any(self._condition(node, v) != "success" for v in self._edges.successors(node))

    def _step(self, node: Any, name: str) -> Step[Any]:
        if node not in self._tasks:
            self._tasks[node] = (
                wrapped(node, install=self._install, commands=self._commands, env=self._env)
                if _is_task(node)
                else _synchronise
            )
        step: Step[Any] = self._tasks[node]().named(name)
        self._dag.add(step)
        return step

    def _connect(self, step: Step[Any], name: str, sources: list[_Source]) -> None:
        """Let the step start when netunicorn would start it."""
        decided = [source for source in sources if not _is_plain(source, alone=len(sources) == 1)]
        if decided and len(sources) == 1:
            self._follow(step, decided[0])
            return
        plain = [source for source in sources if source not in decided]
        if decided:
            met = any(source.counts for source in plain)
            join = _joined(met, [_states(source) for source in decided]).named(f"join-{name}")
            self._dag.add(join)
            step.when(join, bool)
            step = join
        for last in (source.last for source in plain):
            if last.step is not None:
                step.after(last.step, on="always" if last.is_task and last.rescued else "success")

    def _follow(self, step: Step[Any], source: _Source) -> None:
        """The one node before it ran, and as the edge says."""
        if source.condition in ("success", "failure"):
            step.after(source.last.step, on=source.condition)  # type: ignore[arg-type]
        else:
            step.after(source.last.step, on="success").after(source.last.step, on="failure", need="any")

    # --- from a round to the next

    def _next(self, this: _Round) -> _Round:
        """Use up counters; the round that the weak edges of this one start."""
        leaving = [edge for edge in self._edges.edges if edge[0] in this.reach]
        starting = [edge for edge in leaving if self._weak(*edge)]
        self._check(starting)
        tokens = {v: (_Source((self._runs[u][-1],), self._condition(u, v), counts=True),) for u, v in starting}
        used = [edge for edge in leaving if self._use(edge)]
        reach = self._reached(tokens)
        closing = [(u, v) for u, v in starting if u in reach]
        if closing and not used and self._rounds is None:
            edges = ", ".join(f"{_called(u)} -> {_called(v)}" for u, v in closing)
            raise UnsupportedError(
                f"The cycle that {edges} closes has no counter, and would run for ever.",
                advice="Give rounds=, or the edge a counter.",
            )
        return _Round(reach, tokens)

    def _check(self, starting: list[tuple[Any, Any]]) -> None:
        """Refuse weak edges of one round that leave different nodes, or one node on different conditions."""
        first = starting[:1]
        for edge in starting[1:]:
            if edge[0] != first[0][0] or self._condition(*edge) != self._condition(*first[0]):
                one, other = (f"{_called(u)} -> {_called(v)}" for u, v in (first[0], edge))
                raise UnsupportedError(
                    f"The weak edges {one} and {other} are traversed in the same round.",
                    advice="netunicorn leaves to chance which of them counts first. Let one synchronisation point "
                    "stand before them, or write the DAG with fl.repeat.",
                )

    def _use(self, edge: tuple[Any, Any]) -> bool:
        """Count the edge down by one; whether it has a counter."""
        left = self._edges.edges[edge].get("counter")
        if left is None:
            return False
        last = self._runs[edge[0]][-1]
        source = _Source((last,), self._condition(*edge), counts=True)
        if not self._weak(*edge) and not (source.certain and last.sure_here):
            self._unsure.add(edge)
        if int(left) > 1:
            self._edges.edges[edge]["counter"] = int(left) - 1
            return True
        if edge in self._unsure:
            raise UnsupportedError(
                f"The counter of the edge {_called(edge[0])} -> {_called(edge[1])} goes down only in rounds in which it"
                " is traversed, which is known only when it runs.",
                advice="Count in the task before it, and let that fail; or write the DAG with fl.repeat.",
            )
        self._edges.remove_edge(*edge)
        return True


def _is_task(node: Any) -> bool:
    return isinstance(node, TheirTask | TaskDispatcher)


def _called(node: Any) -> str:
    return repr(getattr(node, "name", node))


def _is_plain(source: _Source, *, alone: bool) -> bool:
    """Whether an edge of ours, of which all are needed, says what this one does."""
    last = source.last
    if len(source.runs) > 1 and not last.sure_here and not alone:
        return False  # left out in this round, it may have run in an earlier one
    if not last.is_task or not last.rescued:
        return True
    return last.sure and (source.condition == "any" or not source.counts)


def _states(source: _Source) -> tuple[list[Any], str, bool]:
    runs = [run.step.status for run in source.runs if run.step is not None]
    return runs, source.condition, source.counts


def _environment(graph: ExecutionGraph) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """The commands and the variables of the graph's environment definition."""
    definition = graph.environment_definition
    context = definition.runtime_context
    lacking = {
        "the image": isinstance(definition, DockerImage) and definition.image,
        "ports_mapping": context.ports_mapping,
        "network": context.network,
        "additional_arguments": context.additional_arguments,
    }
    for what, given in lacking.items():
        if given:
            raise UnsupportedError(
                f"The graph's environment definition has {what} {given!r}, which a DAG cannot have.",
                advice="Convert with install=False, and give the environment where the DAG is mapped to nodes: env=.",
            )
    return tuple(definition.commands), dict(context.environment_variables)

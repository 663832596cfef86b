"""What the node knows of its steps' results, for tasks that ask by name (``ctx.results``) and for late inputs.

A task sees the steps of the DAG that it is in, then those of the DAGs around it. A step's result is kept as long as
somebody may ask: an iteration, or a failed attempt, of a step that is a DAG takes what is inside of it along when it
ends, so that repeating a DAG without end needs no more memory than running it once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from fieldlab_common import paths
from fieldlab_common.deployment import Graph, StepSpec
from fieldlab_common.lifecycle import StepState
from fieldlab_common.protocol import StepRecord

__all__ = ["Known"]


class _Ended(NamedTuple):
    """What is kept of a settled record, which is several times as large."""

    state: StepState
    error: str
    iterations: int | None


class Known:
    """The steps of one deployment by plain path, and what came of them by scope and name."""

    def __init__(self, graph: Graph) -> None:
        self._specs = dict(graph.walk())
        self._ended: dict[str, dict[str, _Ended]] = {}
        # Of an iterated step, the handles by iteration; of another, its one handle.
        self._handles: dict[str, dict[str, dict[int, Any] | tuple[Any]]] = {}

    def spec(self, path: str) -> StepSpec:
        """What the step at ``path`` is; KeyError if there is none."""
        return self._specs[paths.plain(path)]

    def place(self, path: str, iteration: int | None) -> tuple[str, paths.Round]:
        """Where an attempt stands among what is repeated (``paths.place``)."""
        return paths.place(path, iteration, lambda plain: self._specs[plain].repeat is not None)

    def returned(self, step: str, iteration: int | None, handle: Any) -> None:
        """A step, or an iteration of it, gave a value."""
        scope, name = paths.split(step)
        kept = self._handles.setdefault(scope, {})
        if iteration is None:
            kept[name] = (handle,)
            return
        several = kept.setdefault(name, {})
        if isinstance(several, dict):
            several[iteration] = handle

    def reported(self, record: StepRecord, handle: Any) -> None:
        """A step, or a part of it, began or ended; ``handle``: the value of one that is a DAG."""
        if not record.state.terminal:
            return
        if handle is not None:
            self.returned(record.step, record.iteration, handle)
        if record.settled:
            scope, name = paths.split(record.step)
            ended = _Ended(record.state, record.error or record.message, record.iterations)
            self._ended.setdefault(scope, {})[name] = ended
        elif self.spec(record.step).graph is not None:
            self._forget(paths.inside(record.step, record.iteration, record.attempt))

    def _forget(self, scope: str) -> None:
        for table in (self._ended, self._handles):
            for known in [one for one in table if one == scope or one.startswith(scope + paths.SEPARATOR)]:
                del table[known]

    def of(self, asking: str, name: str) -> dict[str, Any] | None:
        """What may be known of step ``name`` now, as the step at ``asking`` sees it; None: there is no such step."""
        bare = name.lstrip("^")
        scopes = list(_around(asking))[len(name) - len(bare) :]
        for scope in scopes:
            path = paths.join(scope, bare)
            spec = self._specs.get(paths.plain(path))
            if spec is not None:
                return self._result(path, spec)
        return None

    def _result(self, path: str, spec: StepSpec) -> dict[str, Any]:
        scope, name = paths.split(path)
        ended = self._ended.get(scope, {}).get(name)
        if ended is None:
            return {"handles": [], "many": False, "error": "", "status": "waiting"}
        many = spec.repeat is not None or spec.over is not None
        kept = self._handles.get(scope, {}).get(name, ()) if ended.state is StepState.SUCCEEDED else ()
        if many:
            several = kept if isinstance(kept, dict) else {}
            listed = [several.get(index) for index in range(ended.iterations or 0)]
        else:
            listed = list(kept) if isinstance(kept, tuple) else []
        return {"handles": listed, "many": many, "error": ended.error, "status": ended.state.value}

    def names(self, asking: str) -> list[str]:
        """The steps that have a value and that the step at ``asking`` sees."""
        found: dict[str, None] = {}
        for scope in _around(asking):
            ended = self._ended.get(scope, {})
            found.update(dict.fromkeys(name for name, one in ended.items() if one.state is StepState.SUCCEEDED))
        return list(found)


def _around(path: str) -> Iterator[str]:
    """The scopes that a step is in, the innermost first."""
    while path:
        path = paths.split(path)[0]
        yield path

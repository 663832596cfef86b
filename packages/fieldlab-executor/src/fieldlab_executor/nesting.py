"""A step that is a DAG: each attempt of it is a traversal of its own, inside of the one that the step is in.

The traversal around treats such an attempt like any other: it begins, may be told to stop, and ends with an outcome.
No process stands behind it, so nothing of it goes to the supervisor but the attempts of the steps inside, under the
path that ``fieldlab_common.paths`` gives them.

What always holds: the inner traversal has ended before its attempt does; its outcome follows the rule by which a
deployment succeeds or fails; no more than ``MAX_OPEN`` of a depth run at a time (the rest waits for its turn).

Its value is that of its last step, or a dict by name if several steps are last: those that no other step waits for.
No bytes are copied for it: the handle is made of the handles of those steps, and the client's reference names them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fieldlab_common import paths
from fieldlab_common.lifecycle import Reason, StepState
from fieldlab_common.protocol import ValueRef

from fieldlab_executor.instructions import Input, Outcome
from fieldlab_executor.slots import Resource
from fieldlab_executor.steps import Item, Step, last_steps

if TYPE_CHECKING:
    from fieldlab_executor.shared import Shared
    from fieldlab_executor.traversal import Traversal

__all__ = ["MAX_OPEN", "enter", "item_of", "leave", "locate", "opening", "outer_input", "unhandled", "why_failed"]

MAX_OPEN = 1000


def enter(around: Traversal, item: Item, shared: Shared) -> None:
    """Begin the attempt ``item`` of a step that is a DAG."""
    step = item.step
    assert step.spec.graph is not None
    entered = dict(around.inputs(step))
    if step.spec.over is not None:
        entered[""] = Input(handles=(item_of(item),), status=StepState.SUCCEEDED.value)
    item.inner = type(around)(
        step.spec.graph,
        shared,
        scope=paths.inside(step.path, item.iteration, item.attempt),
        around=around,
        opener=item,
        entered=entered,
    )
    around.inners += 1
    item.inner.start()


def leave(inner: Traversal, shared: Shared) -> None:
    """Every step of it has ended: end the attempt that it is."""
    around, item = inner.around, inner.opener
    assert around is not None
    assert item is not None
    item.inner = None
    around.inners -= 1
    shared.still.setdefault(around)
    around.item_over(item, replace(_outcome(inner), started=item.started))


def opening(known: dict[int, Resource], depth: int) -> Resource:
    """What an attempt of a step that is a DAG takes. One for each depth, so that inner ones never wait for outer."""
    return known.setdefault(depth, Resource(MAX_OPEN))


def item_of(item: Item) -> Any:
    """The handle of what the item is mapped over, if it is."""
    listed = item.step.listed
    return listed[item.iteration] if listed and item.iteration is not None else None


def outer_input(traversal: Traversal, name: str) -> Input:
    """What ``name`` of ``StepSpec.outer`` is: of the DAG around, or one further out for each further ``^``."""
    bare = name.lstrip("^")
    for _ in range(len(name) - len(bare) - 1):
        assert traversal.around is not None  # checked before anything ran
        traversal = traversal.around
    return traversal.entered.get(bare, Input())


def locate(root: Traversal, path: str) -> tuple[Traversal, Step] | None:
    """The step at ``path``, and the traversal that it is in; None if that is over, or never was."""
    traversal, parts = root, paths.parts_of(path) or ()
    for name, iteration, attempt in parts[:-1]:
        step = traversal.steps.get(name)
        item = step.items.get(iteration) if step is not None else None
        if item is None or item.inner is None or item.attempt != attempt:
            return None
        traversal = item.inner
    found = traversal.steps.get(parts[-1][0]) if parts else None
    return None if found is None else (traversal, found)


# --- how it ended -----------------------------------------------------------------------------------------------------


def unhandled(traversal: Traversal) -> list[Step]:
    """The steps that failed, of which nothing that waited for it succeeded."""
    return [step for step in traversal.steps.values() if step.state is StepState.FAILED and not step.handled]


def why_failed(failed: list[Step]) -> str:
    """What is said of a DAG in which these steps failed unhandled."""
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    return f"Step {failed[0].name!r} failed{more}: {failed[0].message}"


def _outcome(inner: Traversal) -> Outcome:
    if inner.halted not in (None, Reason.STOP_ON_FAILURE):
        return Outcome(state=StepState.FAILED, reason=inner.halted, message=inner.halt_message)
    failed = unhandled(inner)
    if failed:
        message = why_failed(failed)
        return Outcome(state=StepState.FAILED, reason=Reason.STEP_FAILED, message=message, error=failed[0].error)
    last = last_steps(inner.steps)
    if len(last) == 1:
        handle, value = _handle(last[0]), _reference(last[0])
    else:
        handle = {"d": {step.name: _handle(step) for step in last}}
        paths_ = {step.name: step.path if step.state is StepState.SUCCEEDED else None for step in last}
        value = ValueRef(format="steps", json=paths_, summary=_names(step.name for step in last))
    return Outcome(state=StepState.SUCCEEDED, reason=Reason.RETURNED, value=value, handle=handle)


def _handle(step: Step) -> Any:
    if step.state is not StepState.SUCCEEDED:
        return None
    return {"l": list(step.handles)} if step.iterated else (step.handles[0] if step.handles else None)


def _reference(step: Step) -> ValueRef | None:
    if step.state is not StepState.SUCCEEDED:
        return None
    summary = f"{len(step.handles)} iterations" if step.iterated else step.summary
    return ValueRef(format="step", json=step.path, summary=summary)


def _names(names: Iterable[str]) -> str:
    return "{" + ", ".join(names) + "}"

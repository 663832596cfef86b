"""The executor's decisions: a deterministic machine that is told what happened and says what to do.

``handle`` takes one stimulus and returns effects (``instructions``). It never acts, awaits or reads a clock, so that
the same stimuli give the same effects on a node, in a test and in a simulation.

The rules of a DAG are in ``traversal``: the machine has one for the deployment's DAG, with those of the DAGs inside of
it (``nesting``), and is the place where they meet the rest of the world: it hands them what happened, lets start what
may, and ends the deployment. What always holds: when nothing can move any more, the background steps are asked to
stop, so every run ends as long as its attempts do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fieldlab_common import paths
from fieldlab_common.deployment import Graph
from fieldlab_common.errors import IllegalTransition
from fieldlab_common.lifecycle import DeploymentState, Reason, StepState
from fieldlab_common.protocol import StepRecord

from fieldlab_executor import nesting
from fieldlab_executor.instructions import (
    AttemptBegan,
    AttemptEnded,
    AttemptReady,
    AttemptWaits,
    CancelRequested,
    ClearTimer,
    Effect,
    Evaluate,
    Evaluated,
    Finish,
    Input,
    Key,
    KillAttempt,
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
from fieldlab_executor.shared import Shared
from fieldlab_executor.slots import Slots
from fieldlab_executor.steps import Item, check_inner
from fieldlab_executor.traversal import MAX_DELAY, MAX_ITEMS, Traversal

__all__ = [
    "MAX_DELAY",
    "MAX_ITEMS",
    "AttemptBegan",
    "AttemptEnded",
    "AttemptReady",
    "AttemptWaits",
    "CancelRequested",
    "ClearTimer",
    "Effect",
    "Evaluate",
    "Evaluated",
    "Finish",
    "Input",
    "Key",
    "KillAttempt",
    "Machine",
    "Measuring",
    "Outcome",
    "Refused",
    "Report",
    "SetTimer",
    "StartAttempt",
    "Stimulus",
    "StopAttempt",
    "Terminated",
    "TimerFired",
]


class Machine:
    """Runs one graph.

    ``cancel_grace``: seconds between asking an attempt to stop before its time and killing it. ``workers``: how many
    attempts may run in shared workers at a time; those that wait for an event or a barrier do not count.
    """

    def __init__(self, graph: Graph, *, now: float, cancel_grace: float = 5.0, workers: float = math.inf) -> None:
        check_inner(graph)
        self._shared = Shared(now, cancel_grace, Slots(workers))
        self._root = Traversal(graph, self._shared)
        self._measuring = False
        self._refusals: dict[str, str] = {}
        self.done = False

    @property
    def states(self) -> Mapping[str, StepState]:
        """The state of every step of the deployment's own DAG now, in the graph's order."""
        return {name: step.state for name, step in self._root.steps.items()}

    def start(self, now: float) -> list[Effect]:
        """Begin. Call it once, before the first stimulus."""
        self._shared.now = now
        self._root.start()
        return self._flush()

    def handle(self, stimulus: Stimulus, now: float) -> list[Effect]:
        """Take in what happened; return what to do, in order.

        Raises:
            IllegalTransition: an attempt ended that does not run.
        """
        if self.done:
            return []
        self._shared.now = now
        match stimulus:
            case AttemptEnded(key=key, outcome=outcome):
                self._ended(key, outcome)
            case AttemptBegan(key=key) | AttemptReady(key=key) | AttemptWaits(key=key):
                if item := self._shared.running.get(key):
                    self._running(item, stimulus)
            case TimerFired(name=name):
                self._shared.agenda.fired(name)
            case Evaluated():
                self._shared.agenda.answered(stimulus)
            case CancelRequested(reason=reason):
                self._root.halt(Reason.CANCELLED, reason or "It was cancelled.")
            case Terminated(message=message):
                self._root.halt(Reason.TERMINATED, message or "The executor was told to stop.")
            case Refused(step=path, message=message):
                self._refused(path, message)
        return self._flush()

    def _ended(self, key: Key, outcome: Outcome) -> None:
        item = self._shared.running.pop(key, None)
        if item is None:
            raise IllegalTransition(f"Attempt {key.attempt} of step {key.step!r} ended, and does not run.")
        item.within.item_over(item, outcome)

    def _refused(self, path: str, message: str) -> None:
        text = f"The director refused a record of it: {message}"
        place = nesting.locate(self._root, path)
        if place is not None and not place[1].state.terminal:
            place[0].refuse(place[1], text)
        elif path not in self._refusals:
            self._refusals[path] = message
            if paths.plain(path) not in {plain for plain, _ in self._root.graph.walk()}:
                return
            # The record that ended it may be the very one that was refused; this one stands in for it.
            started = place[1].started if place is not None else None
            record = StepRecord(
                step=path,
                state=StepState.FAILED,
                settled=True,
                reason=Reason.REFUSED,
                message=text,
                started=started,
                ended=self._shared.now,
            )
            self._shared.effects.append(Report(record=record))

    def _running(self, item: Item, stimulus: AttemptBegan | AttemptReady | AttemptWaits) -> None:
        match stimulus:
            case AttemptBegan():
                item.within.began(item)
            case AttemptReady():
                item.within.item_ready(item)
            case AttemptWaits(waits=waits):
                self._shared.slots.lend(item, waits)

    # --- the round after each stimulus

    def _flush(self) -> list[Effect]:
        self._work()
        while not self._root.ended and self._unblock():
            self._work()
        effects = self._shared.effects
        if (self._shared.measured > 0) != self._measuring:
            self._measuring = not self._measuring
            # It is quiet before what is measured starts, and until it has ended.
            effects.insert(0 if self._measuring else len(effects), Measuring(active=self._measuring))
        if self._root.ended:
            self.done = True
            effects.append(self._finish())
        made = list(effects)
        effects.clear()
        return made

    def _work(self) -> None:
        shared = self._shared
        while True:
            if shared.settled:
                traversal, step = shared.settled.popleft()
                traversal.follow(step)
            elif (item := shared.slots.take()) is not None:
                item.within.take(item)
            else:
                return

    def _unblock(self) -> bool:
        """Where only background steps run, and what waits, waits for their end: ask them to stop. Whether any was."""
        still, asked = self._shared.still, False
        while still:
            one, _ = still.popitem()
            if not (one.moving or one.queued or one.inners) and one.left:
                asked = one.unblock() or asked
        if asked or not self._shared.agenda.stalled:
            return asked
        # What waits, waits for what background steps of other DAGs hold.
        if not [one for one in self._traversals() if one.unblock()]:
            raise RuntimeError("Nothing runs and steps are waiting: a fault in fieldlab's machine.")
        return True

    def _traversals(self) -> list[Traversal]:
        found = [self._root]
        for one in found:
            items = (item for step in one.steps.values() for item in step.items.values())
            found += [item.inner for item in items if item.inner is not None]
        return found

    def _finish(self) -> Finish:
        halted, message = self._root.halted, self._root.halt_message
        if halted is Reason.CANCELLED:
            return Finish(state=DeploymentState.CANCELLED, reason=Reason.CANCELLED, message=message)
        if halted is Reason.TERMINATED:
            return Finish(state=DeploymentState.FAILED, reason=Reason.TERMINATED, message=message)
        if failed := nesting.unhandled(self._root):
            message = nesting.why_failed(failed)
            return Finish(state=DeploymentState.FAILED, reason=Reason.STEP_FAILED, message=message)
        for path, why in self._refusals.items():
            message = f"The director refused a record of step {path!r}: {why}"
            return Finish(state=DeploymentState.FAILED, reason=Reason.REFUSED, message=message)
        return Finish(state=DeploymentState.SUCCEEDED, reason=Reason.COMPLETED)

"""The executor's decisions: a deterministic machine that is told what happened and says what to do.

``handle`` takes one stimulus and returns effects (``instructions``). It never acts, awaits or reads a clock, so that
the same stimuli give the same effects on a node, in a test and in a simulation.

What always holds: a step starts only when what it needs has come to pass; a terminal state never changes (every
change goes through ``lifecycle.advance``); when nothing can move any more the background steps are asked to stop, so
every run ends as long as its attempts do. The cost of a stimulus is that of the edges it settles: steps are never
searched, only a cancel looks at all of them.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import replace

from fieldlab_common.deployment import Graph, On, Repeat
from fieldlab_common.errors import IllegalTransition
from fieldlab_common.lifecycle import DeploymentState, Reason, StepState, advance
from fieldlab_common.protocol import StepRecord

from fieldlab_executor.agenda import Agenda
from fieldlab_executor.instructions import (
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
from fieldlab_executor.steps import STOPPED_AS, Item, Slots, Step, attempt_record, judged, settled_record, wire

__all__ = [
    "MAX_DELAY",
    "MAX_ITEMS",
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

MAX_ITEMS = 100_000  # of a fan-out; a longer list is a failure that says so
MAX_DELAY = 7 * 86_400.0  # seconds between two attempts, however often the back-off was applied
SIGTERM = 15

_W, _R = StepState.WAITING, StepState.RUNNING
_OK, _FAILED, _SKIPPED, _CANCELLED = StepState.SUCCEEDED, StepState.FAILED, StepState.SKIPPED, StepState.CANCELLED


class Machine:
    """Runs one graph.

    ``cancel_grace``: seconds between asking an attempt to stop before its time and killing it. ``workers``: how many
    attempts may run in shared workers at a time; those that wait for an event or a barrier do not count.
    """

    def __init__(self, graph: Graph, *, now: float, cancel_grace: float = 5.0, workers: float = math.inf) -> None:
        self._graph = graph
        self._now = now
        self._grace = cancel_grace
        self._steps = wire(graph)
        self._slots = Slots(graph.max_parallel, workers)
        self._effects: list[Effect] = []
        self._settled: deque[Step] = deque()  # ended, and what follows from it is not yet drawn
        self._running: dict[Key, Item] = {}
        self._agenda = Agenda(self._do)
        self._measured = 0
        self._measuring = False
        self._left = len(self._steps)
        self._foreground_left = sum(step.spec.background is None for step in self._steps.values())
        # Background steps that nothing is `during`, by how many of their descendants have not ended.
        self._alone: dict[int, list[Step]] = {}
        self._halted: Reason | None = None
        self._halt_message = ""
        self._refusals: dict[str, str] = {}
        self.done = False

    @property
    def states(self) -> Mapping[str, StepState]:
        """The state of every step now, in the graph's order."""
        return {name: step.state for name, step in self._steps.items()}

    def start(self, now: float) -> list[Effect]:
        """Begin. Call it once, before the first stimulus."""
        self._now = now
        for step in self._steps.values():
            if step.spec.background is not None and not step.followers:
                self._alone.setdefault(step.own_left, []).append(step)
        self._stop_alone()
        for step in self._steps.values():
            self._consider(step)
        return self._flush()

    def handle(self, stimulus: Stimulus, now: float) -> list[Effect]:
        """Take in what happened; return what to do, in order.

        Raises:
            IllegalTransition: an attempt ended that does not run.
        """
        if self.done:
            return []
        self._now = now
        match stimulus:
            case AttemptEnded(key=key, outcome=outcome):
                self._ended(key, outcome)
            case AttemptReady(key=key):
                if key in self._running:
                    self._item_ready(self._running[key])
            case AttemptWaits(key=key, waits=waits):
                if key in self._running:
                    self._slots.lend(self._running[key], waits)
            case TimerFired(name=name):
                self._agenda.fired(name)
            case Evaluated():
                self._agenda.answered(stimulus)
            case CancelRequested(reason=reason):
                self._halt(Reason.CANCELLED, reason or "It was cancelled.")
            case Terminated(message=message):
                self._halt(Reason.TERMINATED, message or "The executor was told to stop.")
            case Refused(step=name, message=message):
                self._refused(name, message)
        return self._flush()

    # --- the round after each stimulus

    def _flush(self) -> list[Effect]:
        self._work()
        while self._left and self._agenda.stalled:
            self._unblock()
            self._work()
        if (self._measured > 0) != self._measuring:
            self._measuring = not self._measuring
            self._do(Measuring(active=self._measuring))
        if not self._left:
            self.done = True
            self._do(self._finish())
        effects, self._effects = self._effects, []
        return effects

    def _work(self) -> None:
        while True:
            if self._settled:
                self._follow(self._settled.popleft())
            elif (item := self._slots.take()) is not None:
                self._start(item)
            else:
                return

    def _unblock(self) -> None:
        """Only background steps run, and what waits, waits for their end: ask all of them to stop."""
        hosts = dict.fromkeys(item.step for item in self._running.values() if item.step.intent is None)
        if not hosts:
            raise RuntimeError("Nothing runs and steps are waiting: a fault in fieldlab's machine.")
        for step in hosts:
            self._ask_background(step)

    def _finish(self) -> Finish:
        if self._halted is Reason.CANCELLED:
            return Finish(state=DeploymentState.CANCELLED, reason=Reason.CANCELLED, message=self._halt_message)
        if self._halted is Reason.TERMINATED:
            return Finish(state=DeploymentState.FAILED, reason=Reason.TERMINATED, message=self._halt_message)
        failed = [s for s in self._steps.values() if s.state is _FAILED and not s.handled]
        if failed:
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            message = f"Step {failed[0].name!r} failed{more}: {failed[0].message}"
            return Finish(state=DeploymentState.FAILED, reason=Reason.STEP_FAILED, message=message)
        for name, why in self._refusals.items():
            message = f"The director refused a record of step {name!r}: {why}"
            return Finish(state=DeploymentState.FAILED, reason=Reason.REFUSED, message=message)
        return Finish(state=DeploymentState.SUCCEEDED, reason=Reason.COMPLETED)

    def _do(self, effect: Effect) -> None:
        self._effects.append(effect)

    # --- from waiting to running

    def _consider(self, step: Step) -> None:
        """Let it go on if all that it waits for has come to pass."""
        if step.state is not _W or step.admitted or not step.free:
            return
        step.admitted = True
        when = step.spec.when
        if when is None:
            self._expand(step)
            return
        source = self._steps[when.step].input()
        handle = source.handles if source.many else source.handles[0]
        then = functools.partial(self._condition, step)
        self._agenda.ask(
            "when", then, code=when.code, handle=handle, many=source.many, path=when.path, shared=step.shared
        )

    def _condition(self, step: Step, answer: Evaluated) -> None:
        if step.state is not _W:
            return
        if answer.error:
            self._fail(step, Reason.RAISED, "Its condition could not be evaluated.", answer.error)
        elif answer.value:
            self._expand(step)
        else:
            self._settle(step, Outcome(state=_SKIPPED, reason=Reason.CONDITION, message="Its condition was false."))

    def _expand(self, step: Step) -> None:
        """Make the items to run: of a fan-out, as soon as its length is known."""
        spec = step.spec
        if spec.over is None:
            self._launch(step, 0 if spec.repeat else None)
            return
        source = self._steps[spec.over].input()
        if source.many and not spec.over_path:
            self._fan_out(step, len(source.handles))
            return
        handle = source.handles if source.many else source.handles[0]
        then = functools.partial(self._length, step)
        self._agenda.ask("length", then, handle=handle, many=source.many, path=spec.over_path, shared=step.shared)

    def _length(self, step: Step, answer: Evaluated) -> None:
        if step.state is not _W:
            return
        if answer.error or answer.value is None:
            self._fail(step, Reason.BAD_RESULT, "The list that it is mapped over could not be read.", answer.error)
        else:
            self._fan_out(step, int(answer.value))

    def _fan_out(self, step: Step, length: int) -> None:
        if length > MAX_ITEMS:
            message = (
                f"It is mapped over {length} items; at most {MAX_ITEMS} are possible. Map over chunks of the list."
            )
            self._fail(step, Reason.BAD_RESULT, message)
            return
        step.handles = [None] * length
        step.awaited = length
        if not length:
            self._mark_running(step)
            self._settle(step, Outcome(state=_OK, reason=Reason.RETURNED))
        for index in range(length):
            self._launch(step, index)

    def _launch(self, step: Step, iteration: int | None) -> None:
        item = Item(step, iteration, planned=self._now, delay=step.spec.retry.delay)
        step.items[iteration] = item
        self._offer(item)

    def _mark_running(self, step: Step) -> None:
        step.state = advance(step.state, _R)
        step.started = self._now
        self._do(Report(record=StepRecord(step=step.name, state=_R, started=self._now)))

    def _start(self, item: Item) -> None:
        step, spec, key = item.step, item.step.spec, item.key
        if step.unready:  # a background step that it is `during` is between two attempts
            self._slots.release(item)
            step.held.append(item)
            return
        if step.state is _W:
            self._mark_running(step)
        if item.attempt == 1 and item.offered < self._now:  # it had to wait for its turn
            item.planned = self._now
        item.running, item.started = True, self._now
        item.timed_out = item.killed = False
        item.kill_at = None
        self._running[key] = item
        self._measured += spec.measured
        self._do(StartAttempt(key=key, inputs=self._inputs(step)))
        if spec.timeout is not None:
            self._agenda.set("timeout", item, self._now + spec.timeout, lambda: self._timed_out(item))
        if spec.background is None or not item.ready:
            self._agenda.expect(key)
        if spec.background is not None and not spec.background.announces:
            self._item_ready(item)
        if step.asked:
            self._ask_background(step)

    def _inputs(self, step: Step) -> Mapping[str, Input]:
        if step.inputs is not None:
            return step.inputs
        inputs = {source.name: source.input() for source in step.sources}
        if all(source.state.terminal for source in step.sources):
            step.inputs = inputs
        return inputs

    # --- from running to ended

    def _ended(self, key: Key, outcome: Outcome) -> None:
        item = self._running.pop(key, None)
        if item is None:
            raise IllegalTransition(f"Attempt {key.attempt} of step {key.step!r} ended, and does not run.")
        step = item.step
        item.running = False
        self._agenda.expect_no_more(key)
        self._measured -= step.spec.measured
        self._slots.release(item)
        for kind in ("timeout", "kill"):
            self._agenda.clear(kind, item)
        outcome = judged(item, outcome)
        if outcome.state is not _FAILED or step.intent is not None or not self._retry(item, outcome):
            self._item_ended(item, outcome)

    def _retry(self, item: Item, outcome: Outcome) -> bool:
        """Whether it will, or may, be tried again."""
        retry = item.step.spec.retry
        if item.attempt > retry.times:
            return False
        if item.step.spec.background is not None:
            self._item_unready(item)
        item.failed = outcome
        if retry.condition is None:
            self._again(item, outcome)
            return True
        text = outcome.error or outcome.message
        then = functools.partial(self._retry_answer, item, outcome)
        self._agenda.ask("retry_if", then, code=retry.condition, text=text, shared=item.step.shared)
        return True

    def _retry_answer(self, item: Item, outcome: Outcome, answer: Evaluated) -> None:
        if not item.live:
            return
        if answer.error:
            message = f"{outcome.message} Its retry condition could not be evaluated: {answer.error}".strip()
            self._item_ended(item, replace(outcome, message=message))
        elif answer.value:
            self._again(item, outcome)
        else:
            self._item_ended(item, outcome)

    def _again(self, item: Item, outcome: Outcome) -> None:
        self._do(Report(record=attempt_record(item, outcome, self._now)))
        item.attempt += 1
        delay, item.delay = item.delay, min(item.delay * item.step.spec.retry.backoff, MAX_DELAY)
        self._offer_at(item, self._now + min(delay, MAX_DELAY))

    def _offer_at(self, item: Item, at: float) -> None:
        if at > self._now:
            self._agenda.set("next", item, at, lambda: self._offer(item), moving=True)
        else:
            self._offer(item)

    def _offer(self, item: Item) -> None:
        item.offered = self._now
        self._slots.offer(item)

    def _item_ended(self, item: Item, outcome: Outcome) -> None:
        step = item.step
        item.live = False
        del step.items[item.iteration]
        if item.iteration is None:
            step.handles = [outcome.handle] if outcome.state is _OK else []
            self._settle(step, outcome, attempt=item.attempt)
            return
        self._do(Report(record=attempt_record(item, outcome, self._now)))
        if step.spec.repeat is not None:
            step.handles.append(outcome.handle if outcome.state is _OK else None)
        elif outcome.state is _OK:
            step.handles[item.iteration] = outcome.handle
        if outcome.state is _FAILED and not (step.spec.repeat and step.spec.repeat.keep_going):
            step.failure = step.failure or outcome
        if step.intent is not None:
            self._settle_stopped(step)
        elif step.spec.repeat is not None:
            self._iterated(item, step.spec.repeat, outcome)
        else:
            self._item_of_fan_out_ended(item, outcome)

    def _item_of_fan_out_ended(self, item: Item, outcome: Outcome) -> None:
        step = item.step
        if outcome.state is _OK and step.spec.background is not None:
            self._item_ready(item)
        if outcome.state is _FAILED and self._graph.stop_on_failure and not step.rescued:
            self._halt(Reason.STOP_ON_FAILURE, f"Step {step.name!r} failed.")
        elif not step.items:
            self._settle_iterated(step)

    def _iterated(self, item: Item, repeat: Repeat, outcome: Outcome) -> None:
        """After an iteration of a repeated step: end it, ask ``until``, or plan the next."""
        step = item.step
        if step.failure is not None or (repeat.times is not None and len(step.handles) >= repeat.times):
            self._settle_iterated(step)
        elif repeat.until is not None and outcome.state is _OK:
            then = functools.partial(self._until, item, repeat)
            self._agenda.ask("until", then, code=repeat.until, handle=outcome.handle, shared=step.shared)
        else:
            self._next_iteration(item, repeat)

    def _until(self, item: Item, repeat: Repeat, answer: Evaluated) -> None:
        step = item.step
        if step.state is not _R:
            return
        if answer.error:
            self._fail(step, Reason.RAISED, "Its `until` could not be evaluated.", answer.error)
        elif answer.value:
            self._settle_iterated(step)
        else:
            self._next_iteration(item, repeat)

    def _next_iteration(self, last: Item, repeat: Repeat) -> None:
        step = last.step
        planned = max(last.planned + repeat.every, self._now)
        if repeat.duration is not None and planned > (step.started or 0.0) + repeat.duration:
            self._settle_iterated(step)
            return
        item = Item(step, len(step.handles), planned=planned, delay=step.spec.retry.delay, ready=last.ready)
        step.items[item.iteration] = item
        self._offer_at(item, planned)

    def _settle_iterated(self, step: Step) -> None:
        if step.failure is None:
            self._settle(step, Outcome(state=_OK, reason=Reason.RETURNED))
        else:
            self._settle(step, replace(step.failure, value=None, usage=None, started=None, ended=None))

    def _settle_stopped(self, step: Step) -> None:
        """End a step that was told to stop, once nothing of it runs any more."""
        if step.items or step.intent is None:
            return
        state = STOPPED_AS[step.intent]
        if step.failure is not None and step.intent in (Reason.STOPPED, Reason.STOP_ON_FAILURE):
            self._settle_iterated(step)
        else:
            self._settle(step, Outcome(state=state, reason=step.intent, message=step.intent_message))

    def _fail(self, step: Step, reason: Reason, message: str, error: str = "") -> None:
        self._settle(step, Outcome(state=_FAILED, reason=reason, message=message, error=error))

    def _settle(self, step: Step, outcome: Outcome, attempt: int = 1) -> None:
        step.state = advance(step.state, outcome.state)
        step.error, step.message = outcome.error, outcome.message
        self._left -= 1
        self._settled.append(step)
        self._do(Report(record=settled_record(step, outcome, self._now, attempt)))

    # --- what follows from the end of a step

    def _follow(self, step: Step) -> None:
        if step.spec.background is not None:
            self._background_ended(step)
        if step.state is _FAILED and self._graph.stop_on_failure and not step.rescued and self._halted is None:
            self._halt(Reason.STOP_ON_FAILURE, f"Step {step.name!r} failed.")
        for edge in step.edges:
            self._edge(step, edge.target, edge.need.on, edge.required)
        for host in step.hosts:
            host.followers_left -= 1
            if not host.followers_left:
                self._ask_background(host)
        if step.spec.background is None:
            self._foreground_left -= 1
            for host in step.ancestors:
                host.own_left -= 1
                self._alone.setdefault(host.own_left, []).append(host)
            self._stop_alone()

    def _edge(self, source: Step, target: Step, on: On, required: bool) -> None:
        if target.state is not _W:
            return
        satisfied = on is On.ALWAYS or source.state is (_OK if on is On.SUCCESS else _FAILED)
        if required:
            target.open -= satisfied
        else:
            target.open_any -= 1
            target.met = target.met or satisfied
        if satisfied:
            self._consider(target)
        elif required or (not target.met and not target.open_any):
            wanted = "succeed" if on is On.SUCCESS else "fail"
            message = f"It needs {source.name!r} to {wanted}, which ended as {source.state.value}."
            self._settle(target, Outcome(state=_SKIPPED, reason=Reason.UPSTREAM, message=message))

    # --- background steps

    def _item_ready(self, item: Item) -> None:
        step = item.step
        if item.ready or step.spec.background is None:
            return
        item.ready = True
        if item.kill_at is None:  # it may run on for ever, unless it was asked to stop
            self._agenda.expect_no_more(item.key)
        step.awaited -= 1
        if step.awaited or step.ready:
            return
        step.ready = True
        for follower in step.followers:
            follower.unready -= 1
            if not follower.unready:
                self._consider(follower)
                self._release_held(follower)

    def _item_unready(self, item: Item) -> None:
        step = item.step
        if not item.ready:
            return
        item.ready = False
        step.awaited += 1
        if step.ready:
            step.ready = False
            for follower in step.followers:
                follower.unready += 1

    def _release_held(self, step: Step) -> None:
        held, step.held = step.held, []
        for item in held:
            self._slots.offer(item)

    def _background_ended(self, host: Step) -> None:
        for step in host.followers:
            if step.state is _W:
                early = host.state is _OK
                message = f"It was to run while {host.name!r} does, which ended as {host.state.value} before."
                reason = Reason.EARLY_END if early else Reason.UPSTREAM
                for item in list(step.items.values()):
                    self._drop(item)
                self._settle(step, Outcome(state=_SKIPPED, reason=reason, message=message))
            elif step.state is _R and host.state is _FAILED:
                message = f"It ran while {host.name!r} did, which failed: {host.message}"
                self._stop(step, Reason.EARLY_END, message, _signal_of(step), self._grace)
            elif step.state is _R and not host.ready:
                step.unready -= 1
                if not step.unready:
                    self._release_held(step)

    def _stop_alone(self) -> None:
        """Ask those background steps to stop that no other foreground step is left beside."""
        for host in self._alone.pop(self._foreground_left, ()):
            if host.own_left == self._foreground_left:
                self._ask_background(host)

    def _ask_background(self, step: Step) -> None:
        """Nothing needs it to run any more: ask it to stop, as soon as it runs."""
        step.asked = True
        background = step.spec.background
        if step.state is _R and background is not None and step.intent is None:
            self._stop(step, Reason.STOPPED, "", background.signal, background.grace)

    # --- stopping

    def _stop(self, step: Step, reason: Reason, message: str, signal: int | None, grace: float) -> None:
        """Ask what runs of a step to stop, and drop what does not run yet."""
        if step.intent is None:
            step.intent, step.intent_message = reason, message
        for item in list(step.items.values()):
            if item.running:
                self._ask_item(item, signal, grace)
            else:
                self._drop(item)
        self._settle_stopped(step)

    def _drop(self, item: Item) -> None:
        item.live = False
        self._agenda.clear("next", item)
        del item.step.items[item.iteration]
        if item.step.intent is Reason.STOPPED:  # it was to be tried again, and will not be: it failed
            item.step.failure = item.step.failure or item.failed

    def _ask_item(self, item: Item, signal: int | None, grace: float) -> None:
        self._agenda.clear("timeout", item)
        self._agenda.expect(item.key)
        self._do(StopAttempt(key=item.key, signal=signal))
        at = self._now + grace
        if item.kill_at is None or at < item.kill_at:
            item.kill_at = at
            self._agenda.set("kill", item, at, lambda: self._kill(item))

    def _kill(self, item: Item) -> None:
        item.killed = True
        self._do(KillAttempt(key=item.key))

    def _timed_out(self, item: Item) -> None:
        item.timed_out = True
        self._ask_item(item, _signal_of(item.step), self._grace)

    def _halt(self, reason: Reason, message: str) -> None:
        """Stop everything: what runs is asked to, what waits is cancelled."""
        if self._halted in (Reason.CANCELLED, Reason.TERMINATED):
            return
        self._halted, self._halt_message = reason, message
        for step in self._steps.values():
            if not step.state.terminal:
                self._stop(step, reason, message, _signal_of(step), self._grace)

    def _refused(self, name: str, message: str) -> None:
        step = self._steps.get(name)
        text = f"The director refused a record of it: {message}"
        if step is not None and not step.state.terminal:
            self._stop(step, Reason.REFUSED, text, _signal_of(step), self._grace)
        elif name not in self._refusals:
            self._refusals[name] = message
            if step is not None:
                # The record that ended it may be the very one that was refused; this one stands in for it.
                outcome = Outcome(state=_FAILED, reason=Reason.REFUSED, message=text)
                self._do(Report(record=settled_record(step, outcome, self._now)))


def _signal_of(step: Step) -> int:
    """What ends it before its time: a background step knows one signal well, and leaves nothing half-written then."""
    background = step.spec.background
    return SIGTERM if background is None else background.signal or SIGTERM

"""One run of one graph: which step starts when, what its end means, and what follows from it.

The machine has one traversal for the deployment's DAG, and one more for each attempt of a step that is a DAG itself
(``nesting``). All rules of a DAG are here, and hold in each of them alike; what is shared by all (``Shared``) is what
the rest of the world knows of: effects, timers, questions, who holds what.

What always holds: a step starts only when what it needs has come to pass; a terminal state never changes (every
change goes through ``lifecycle.advance``). The cost of a step's end is that of the edges it settles: steps are never
searched, only a halt and the end of the traversal look at all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, cast

from fieldlab_common.deployment import Graph, On, Repeat, StepSpec
from fieldlab_common.lifecycle import Reason, StepState, advance
from fieldlab_common.protocol import StepRecord

from fieldlab_executor import nesting
from fieldlab_executor.instructions import (
    Effect,
    Evaluated,
    Input,
    KillAttempt,
    Outcome,
    Report,
    StartAttempt,
    StopAttempt,
)
from fieldlab_executor.shared import Shared
from fieldlab_executor.slots import Resource
from fieldlab_executor.steps import Item, Step, attempt_record, judged, settled_record, wire

__all__ = ["MAX_DELAY", "MAX_ITEMS", "Traversal"]

MAX_ITEMS = 100_000  # of a fan-out; a longer list is a failure that says so
MAX_DELAY = 7 * 86_400.0  # seconds between two attempts, however often the back-off was applied
ROUNDING = 0.001  # of `every`: what starts by so much before the end of `duration` would start at its end
SIGTERM = 15

# One for all steps: in a DAG of ten thousand, an empty dictionary or a list of one for each is a tenth of the memory.
_NO_INPUTS: Mapping[str, Input] = MappingProxyType({})
_NO_ITEMS = cast(dict[int | None, Item], MappingProxyType({}))  # of a step that has ended, and begins nothing more
_NONE = (None,)

_W, _R = StepState.WAITING, StepState.RUNNING
_OK, _FAILED, _SKIPPED, _CANCELLED = StepState.SUCCEEDED, StepState.FAILED, StepState.SKIPPED, StepState.CANCELLED


class Traversal:
    """``opener``: the attempt of a step that is this DAG, in the traversal ``around``; ``scope``: its path."""

    def __init__(
        self,
        graph: Graph,
        shared: Shared,
        *,
        scope: str = "",
        around: Traversal | None = None,
        opener: Item | None = None,
        entered: Mapping[str, Input] | None = None,
    ) -> None:
        self.graph = graph
        self.scope = scope
        self.around = around
        self.opener = opener
        self.entered = entered or {}  # what the opener's arguments may refer to; under "": its item
        self.depth: int = around.depth + 1 if around is not None else 0
        self.limit = None if graph.max_parallel is None else Resource(graph.max_parallel)
        self.exclusives: dict[str, Resource] = {}
        self.steps = wire(graph, scope)
        self.left = len(self.steps)
        self.inners = 0  # DAGs inside of it that run
        self.moving = 0
        self.queued = 0
        self.halted: Reason | None = None
        self.halt_message = ""
        self._shared = shared
        self._agenda = shared.agenda
        self._unfollowed = self.left
        self._foreground_left = sum(step.spec.background is None for step in self.steps.values())
        # Background steps that nothing is `during`, by how many of their descendants have not ended.
        self._alone: dict[int, list[Step]] = {}

    @property
    def ended(self) -> bool:
        """Whether every step has ended, and what follows from it was drawn."""
        return not self._unfollowed

    def start(self) -> None:
        """Begin."""
        for step in self.steps.values():
            if step.spec.background is not None and not step.followers:
                self._alone.setdefault(step.own_left, []).append(step)
        self._stop_alone()
        for step in self.steps.values():
            self._consider(step)

    def unblock(self) -> bool:
        """Only background steps run, and what waits, waits for their end: ask all to stop. Whether there were any."""
        hosts = [
            step
            for step in self.steps.values()
            if step.spec.background is not None
            and step.intent is None
            and any(item.running for item in step.items.values())
        ]
        for step in hosts:
            self._ask_background(step)
        return bool(hosts)

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
        source = self.steps[when.step].input()
        handle = source.handles if source.many else source.handles[0]
        then = functools.partial(self._condition, step)
        self._agenda.ask(self, "when", step, then, code=when.code, handle=handle, many=source.many, path=when.path)

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
        source = self.steps[spec.over].input()
        if source.many and not spec.over_path:
            self._fan_out(step, len(source.handles), source.handles)
            return
        handle = source.handles if source.many else source.handles[0]
        then = functools.partial(self._length, step)
        self._agenda.ask(self, "length", step, then, handle=handle, many=source.many, path=spec.over_path)

    def _length(self, step: Step, answer: Evaluated) -> None:
        if step.state is not _W:
            return
        if answer.error or answer.value is None:
            self._fail(step, Reason.BAD_RESULT, "The list that it is mapped over could not be read.", answer.error)
        else:
            self._fan_out(step, int(answer.value), answer.items)

    def _fan_out(self, step: Step, length: int, items: tuple[object, ...]) -> None:
        if length > MAX_ITEMS:
            message = (
                f"It is mapped over {length} items; at most {MAX_ITEMS} are possible. Map over chunks of the list."
            )
            self._fail(step, Reason.BAD_RESULT, message)
            return
        step.handles = [None] * length
        step.listed = items
        step.awaited = length
        if not length:
            self._mark_running(step)
            self._settle(step, Outcome(state=_OK, reason=Reason.RETURNED))
        for index in range(length):
            self._launch(step, index)

    def _launch(self, step: Step, iteration: int | None) -> None:
        item = Item(self, step, iteration, planned=self._shared.now, delay=step.spec.retry.delay)
        step.items[iteration] = item
        self._offer(item)

    def _mark_running(self, step: Step) -> None:
        step.state = advance(step.state, _R)
        step.started = self._shared.now
        self._report(StepRecord(step=step.path, state=_R, started=step.started))

    def take(self, item: Item) -> None:
        """Start an item: it holds what it needs."""
        step, now = item.step, self._shared.now
        item.queued = False
        self.queued -= 1
        if step.unready:  # a background step that it is `during` is between two attempts
            self._shared.slots.release(item)
            step.held += (item,)
            return
        if step.state is _W:
            self._mark_running(step)
        if item.attempt == 1 and item.offered < now:  # it had to wait for its turn
            item.planned = now
        item.running, item.started = True, now
        item.timed_out = item.killed = False
        item.kill_at = None
        self._shared.measured += step.spec.measured
        if step.spec.graph is not None:
            self.began(item)
        self._begin(item)
        if step.asked:
            self._ask_background(step)

    def began(self, item: Item) -> None:
        """Its time runs from now: waiting for a process is not its fault."""
        timeout = item.step.spec.timeout
        if timeout is not None:
            at = self._shared.now + timeout
            self._agenda.set(self, "timeout", item, at, lambda: self._timed_out(item))

    def _begin(self, item: Item) -> None:
        step, spec, key = item.step, item.step.spec, item.key
        if spec.graph is not None:
            nesting.enter(self, item, self._shared)
            return
        self._shared.running[key] = item
        given = nesting.item_of(item) if step.listed else None
        self._do(StartAttempt(key=key, inputs=self.inputs(step), item=given))
        if spec.background is None or not item.ready:
            self._agenda.expect(self, key)
        else:
            self._shared.still.setdefault(self)
        if spec.background is not None and not spec.background.announces:
            self.item_ready(item)

    def inputs(self, step: Step) -> Mapping[str, Input]:
        """By name, what the arguments of a step may refer to, as it is now."""
        if step.inputs is not None:
            return step.inputs
        if not step.sources and not step.spec.outer:
            return _NO_INPUTS
        inputs = {source.name: source.input() for source in step.sources}
        for name in step.spec.outer:
            inputs[name] = nesting.outer_input(self, name)
        if all(source.state.terminal for source in step.sources):
            step.inputs = inputs
        return inputs

    # --- from running to ended

    def item_over(self, item: Item, outcome: Outcome) -> None:
        """An attempt ended."""
        step = item.step
        item.running = False
        self._agenda.expect_no_more(item.key)
        self._shared.measured -= step.spec.measured
        self._shared.slots.release(item)
        if step.spec.timeout is not None:
            self._agenda.clear("timeout", item)
        if item.kill_at is not None:
            self._agenda.clear("kill", item)
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
        self._agenda.ask(self, "retry_if", item.step, then, code=retry.condition, text=text)
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
        now = self._shared.now
        self._report(attempt_record(item, outcome, now))
        item.attempt += 1
        delay, item.delay = item.delay, min(item.delay * item.step.spec.retry.backoff, MAX_DELAY)
        self._offer_at(item, now + min(delay, MAX_DELAY))

    def _offer_at(self, item: Item, at: float) -> None:
        if at > self._shared.now:
            self._agenda.set(self, "next", item, at, lambda: self._offer(item), moving=True)
        else:
            self._offer(item)

    def _offer(self, item: Item) -> None:
        item.offered = self._shared.now
        self._enqueue(item)

    def _enqueue(self, item: Item) -> None:
        if not item.step.resources:
            item.step.resources = self._resources(item.step.spec)
        item.queued = True
        self.queued += 1
        self._shared.slots.offer(item, self.opener.order if self.opener is not None else ())

    def _resources(self, spec: StepSpec) -> tuple[Resource, ...]:
        found = [self._exclusive(name) for name in dict.fromkeys(spec.exclusive)]
        if spec.graph is not None:
            found.append(nesting.opening(self._shared.opening, self.depth))
            return tuple(found)
        if spec.isolation == "shared":
            found.append(self._shared.slots.workers)
        if spec.slot and spec.background is None:  # what is `during` a background step would wait for ever
            scope: Traversal | None = self
            while scope is not None:
                found += [scope.limit] if scope.limit is not None else []
                scope = scope.around
        return tuple(found)

    def _exclusive(self, name: str) -> Resource:
        """The resource of that name: one that a DAG around it holds is shared among the steps inside of that DAG."""
        scope = self
        while scope.around is not None and scope.opener is not None and name not in scope.opener.step.spec.exclusive:
            scope = scope.around
        return scope.exclusives.setdefault(name, Resource(1))

    def _item_ended(self, item: Item, outcome: Outcome) -> None:
        step = item.step
        item.live = False
        del step.items[item.iteration]
        if item.iteration is None:
            step.items = _NO_ITEMS
            if outcome.state is _OK:
                step.handles = _NONE if outcome.handle is None else (outcome.handle,)
            self._settle(step, outcome, attempt=item.attempt)
            return
        self._report(attempt_record(item, outcome, self._shared.now), outcome.handle if step.spec.graph else None)
        handles = cast(list[Any], step.handles)
        if step.spec.repeat is not None:
            handles.append(outcome.handle if outcome.state is _OK else None)
        elif outcome.state is _OK:
            handles[item.iteration] = outcome.handle
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
            self.item_ready(item)
        if outcome.state is _FAILED and self.graph.stop_on_failure and not step.rescued:
            self.halt(Reason.STOP_ON_FAILURE, f"Step {step.name!r} failed.")
        elif not step.items:
            self._settle_iterated(step)

    def _iterated(self, item: Item, repeat: Repeat, outcome: Outcome) -> None:
        """After an iteration of a repeated step: end it, ask ``until``, or plan the next."""
        step = item.step
        if step.failure is not None or (repeat.times is not None and len(step.handles) >= repeat.times):
            self._settle_iterated(step)
        elif repeat.until is not None and outcome.state is _OK:
            then = functools.partial(self._until, item, repeat)
            self._agenda.ask(self, "until", step, then, code=repeat.until, handle=outcome.handle)
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
        planned = max(last.planned + repeat.every, self._shared.now)
        if repeat.duration is not None:
            end = (step.started or 0.0) + repeat.duration
            if planned >= end - ROUNDING * repeat.every:
                self._settle_iterated(step)
                return
        item = Item(self, step, len(step.handles), planned=planned, delay=step.spec.retry.delay, ready=last.ready)
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
        if step.failure is not None and step.intent in (Reason.STOPPED, Reason.STOP_ON_FAILURE):
            self._settle_iterated(step)
        else:
            self._settle(step, Outcome(state=step.stopped_as, reason=step.intent, message=step.intent_message))

    def _fail(self, step: Step, reason: Reason, message: str, error: str = "") -> None:
        self._settle(step, Outcome(state=_FAILED, reason=reason, message=message, error=error))

    def _settle(self, step: Step, outcome: Outcome, attempt: int = 1) -> None:
        step.state = advance(step.state, outcome.state)
        step.error, step.message = outcome.error, outcome.message
        step.summary = outcome.value.summary if outcome.value is not None else ""
        step.listed = ()
        self.left -= 1
        self._shared.settled.append((self, step))
        handle = outcome.handle if step.spec.graph else None
        self._report(settled_record(step, outcome, self._shared.now, attempt), handle)

    def _do(self, effect: Effect) -> None:
        self._shared.effects.append(effect)

    def _report(self, record: StepRecord, handle: object = None) -> None:
        self._shared.effects.append(Report(record=record, handle=handle))

    # --- what follows from the end of a step

    def follow(self, step: Step) -> None:
        """Draw what follows from the end of a step; with the last one, the traversal has ended."""
        if step.spec.background is not None:
            self._background_ended(step)
        if step.state is _FAILED and self.graph.stop_on_failure and not step.rescued and self.halted is None:
            self.halt(Reason.STOP_ON_FAILURE, f"Step {step.name!r} failed.")
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
        self._unfollowed -= 1
        if not self._unfollowed and self.around is not None:
            nesting.leave(self, self._shared)

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

    def item_ready(self, item: Item) -> None:
        """An attempt of a background step does its work now."""
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
        held, step.held = step.held, ()
        for item in held:
            self._enqueue(item)

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
                self._stop(step, Reason.EARLY_END, message, _FAILED)
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
            self._stop(step, Reason.STOPPED, "", _OK)

    # --- stopping

    def _stop(self, step: Step, reason: Reason, message: str, becomes: StepState) -> None:
        """Ask what runs of a step to stop, and drop what does not run yet; what it then ``becomes``."""
        if step.intent is None:
            step.intent, step.intent_message, step.stopped_as = reason, message, becomes
        background = step.spec.background
        signal: int | None = _signal_of(step)
        grace = self._shared.grace
        if reason is Reason.STOPPED and background is not None:
            signal, grace = background.signal, background.grace
        for item in list(step.items.values()):
            if item.running:
                self._ask_item(item, signal, grace)
            else:
                self._drop(item)
        self._settle_stopped(step)

    def _drop(self, item: Item) -> None:
        item.live = False
        if item.queued:
            item.queued = False
            self.queued -= 1
            self._shared.still.setdefault(self)
        self._agenda.clear("next", item)
        del item.step.items[item.iteration]
        if item.step.intent is Reason.STOPPED:  # it was to be tried again, and will not be: it failed
            item.step.failure = item.step.failure or item.failed

    def _ask_item(self, item: Item, signal: int | None, grace: float) -> None:
        self._agenda.clear("timeout", item)
        if item.inner is not None:  # each of its attempts is killed in its own time
            reason, message = item.step.intent or Reason.TIMEOUT, item.step.intent_message
            item.inner.halt(reason, message or f"The DAG that it is in took longer than {item.step.spec.timeout:g} s.")
            return
        self._agenda.expect(self, item.key)
        self._do(StopAttempt(key=item.key, signal=signal))
        at = self._shared.now + grace
        if item.kill_at is None or at < item.kill_at:
            item.kill_at = at
            self._agenda.set(self, "kill", item, at, lambda: self._kill(item))

    def _kill(self, item: Item) -> None:
        item.killed = True
        self._do(KillAttempt(key=item.key))

    def _timed_out(self, item: Item) -> None:
        item.timed_out = True
        self._ask_item(item, _signal_of(item.step), self._shared.grace)

    def halt(self, reason: Reason, message: str) -> None:
        """Stop everything: what runs is asked to, what waits is cancelled. What comes from outside overrules."""
        if self.halted not in (None, Reason.STOP_ON_FAILURE):
            return
        self.halted, self.halt_message = reason, message
        for step in self.steps.values():
            if not step.state.terminal:
                self._stop(step, reason, message, _CANCELLED)

    def refuse(self, step: Step, message: str) -> None:
        """The director refused a record of a step that has not ended."""
        self._stop(step, Reason.REFUSED, message, _FAILED)


def _signal_of(step: Step) -> int:
    """What ends it before its time: a background step knows one signal well, and leaves nothing half-written then."""
    background = step.spec.background
    return SIGTERM if background is None else background.signal or SIGTERM

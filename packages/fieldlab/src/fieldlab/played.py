"""Deployments that are played: decided by the executor's own machine, each step stood in for. For ``fieldlab.testing``.

A player is to its hub what an executor is: it claims, reports records, sends events, sees the order to stop. It differs
in that no process is started and no task runs: what a step gives, how long it takes and whether it fails stands in a
table. What fieldlab does itself is done for real: gates, barriers, sent events, values, and conditions (``when``,
``until``, ``retry_if``), which are called here, in the user's own program, with the values that were stood in.

Time is virtual, and passes only when somebody waits. Nothing here is thread-safe: the fake director holds one lock.
"""

from __future__ import annotations

import base64
import hashlib
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from fieldlab_common import paths, payload, wire
from fieldlab_common import protocol as p
from fieldlab_common.builtin import Barrier, Send, Value, WaitFor
from fieldlab_common.deployment import Graph, StepSpec, inlined
from fieldlab_common.environment import parse_duration
from fieldlab_common.errors import FieldlabError
from fieldlab_common.events import BARRIER, DEPLOYMENT, START, Gates, Member, arrival
from fieldlab_common.lifecycle import DeploymentState, Reason, StepState
from fieldlab_common.node import Node, facts_of
from fieldlab_executor import machine as m
from fieldlab_executor.eventlog import EventBook, Waiter
from fieldlab_executor.known import Known

from fieldlab.hub import Hub
from fieldlab.ship import Blobs
from fieldlab.virtual import VirtualTime

__all__ = ["InTurn", "Player", "Scene", "StandIn", "StandIns"]

EVERY = "*"


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """What stands in for running a step.

    ``value``: what it returns; ``error``: an exception, or a text, with which it fails instead; ``after``: how long it
    takes, in virtual seconds or as ``"10m"``; ``output``: what it writes.
    """

    value: Any = None
    error: BaseException | str | None = None
    after: float | str = 0.0
    output: str = ""


class InTurn:
    """Stand-ins for each step's runs one after the other: attempts, and iterations. The last one stays."""

    def __init__(self, *stand_ins: Any) -> None:
        if not stand_ins:
            raise ValueError("InTurn() needs at least one stand-in.")
        self.stand_ins = stand_ins


StandIns: TypeAlias = Mapping[Any, Any]  # keys: text, or (deployment, step); a checker infers no such key of a dict


@dataclass(slots=True, eq=False)
class _Attempt:
    """One attempt under way."""

    key: m.Key
    spec: StepSpec
    started: float
    result: StandIn
    waiter: Waiter | None = None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What all players of a run share."""

    hub: Hub
    blobs: Blobs
    time: VirtualTime
    clock: Callable[[], float]
    stand_ins: StandIns
    secrets: Mapping[str, str]
    members: tuple[Member, ...]


class Player:
    """One deployment, played."""

    def __init__(self, scene: Scene, spec: p.DeploymentSpec, node: Node) -> None:
        self._scene, self._name, self._node = scene, spec.name, node
        graph = wire.loads(Graph, b"".join(scene.blobs.chunks(spec.graph)))
        self._known = Known(graph)
        self._book = EventBook(scene.members)
        self._gates = Gates()
        self._machine = m.Machine(graph, now=scene.clock())
        self._attempts: dict[m.Key, _Attempt] = {}
        self._timers: dict[str, m.SetTimer] = {}
        self._turns: dict[str, int] = {}  # of steps whose stand-ins come in turn: the last one's place
        self._numbers = {lane.value: 0 for lane in p.Lane}
        self._cursor = 0
        self._begun = self._told = self._over = False

    # --- what a hub asks of an executor ---

    def begin(self) -> None:
        """Claim the deployment, and start when it is time: at once, or when the order to begin names one."""
        request = p.ClaimRequest(journal_id=self._name, epoch=1)
        answered = self._scene.hub.answer(self._name, "claim", {}, {}, wire.dumps(request))
        claim = wire.loads(p.Claim, answered.body)
        if claim.start_at is not None:
            self._start_at(claim.start_at)
        else:
            self._report("ready", p.Ready())
        self.look()

    def _start_at(self, at: float) -> None:
        self._scene.time.after(max(0.0, at - self._scene.clock()), self._go)

    def _go(self) -> None:
        if not self._over:
            self._begun = True
            self._report("started", p.Started(hostname=self._node.name))
            self._perform(self._machine.start(self._scene.clock()))
            self.look()

    def look(self) -> None:
        """See what is new: events, and the order to stop."""
        if self._over:
            return
        query = {"after": self._cursor, "journal": self._name}
        poll = wire.loads(p.Poll, self._scene.hub.answer(self._name, "poll", {}, query, b"").body)
        self._cursor = poll.cursor
        for event in poll.events:
            self._book.add(event)
            if event.name == START:
                self._start_at(event.data["at"])
        if poll.cancel is not None and not self._told:
            self._told = True
            if self._begun:
                self._tell(m.CancelRequested(reason=poll.cancel.reason))
            else:
                message = poll.cancel.reason or "It was cancelled."
                self._finish(m.Finish(state=DeploymentState.CANCELLED, reason=Reason.CANCELLED, message=message))

    def _report(self, kind: str, body: Any, lane: p.Lane = p.Lane.CONTROL) -> None:
        self._numbers[lane.value] += 1
        record = p.Record(kind=kind, at=self._scene.clock(), body=wire.encode(body))
        frame = wire.frame(self._numbers[lane.value], wire.dumps(record))
        self._scene.hub.answer(self._name, "report", {}, {"lane": lane.value, "journal": self._name}, frame)

    # --- what the machine asks for ---

    def _tell(self, stimulus: m.Stimulus) -> None:
        if not self._over:
            self._perform(self._machine.handle(stimulus, self._scene.clock()))

    def _perform(self, effects: list[m.Effect]) -> None:
        for effect in effects:
            match effect:
                case m.StartAttempt():
                    self._start(effect)
                case m.StopAttempt(key=key):
                    self._stop(key, StepState.SUCCEEDED)
                case m.KillAttempt(key=key):
                    self._stop(key, StepState.FAILED)
                case m.SetTimer():
                    self._timers[effect.name] = effect
                    self._scene.time.after(max(0.0, effect.at - self._scene.clock()), self._fire, effect)
                case m.ClearTimer(name=name):
                    self._timers.pop(name, None)
                case m.Evaluate():
                    self._scene.time.after(0.0, self._tell, self._evaluated(effect))
                case m.Report(record=record):
                    self._report("step", record)
                case m.Finish():
                    self._finish(effect)
                case _:
                    pass  # that a measured step runs: nothing is on the wire anyway

    def _finish(self, effect: m.Finish) -> None:
        self._over = True
        bulk = self._numbers[p.Lane.BULK.value]
        self._report("ended", p.Ended(state=effect.state, reason=effect.reason, message=effect.message, bulk=bulk))
        self._scene.hub.executor_gone(self._name, "")

    def _fire(self, timer: m.SetTimer) -> None:
        if self._timers.get(timer.name) is timer:
            del self._timers[timer.name]
            self._tell(m.TimerFired(name=timer.name))

    def _evaluated(self, effect: m.Evaluate) -> m.Evaluated:
        """A condition of the user's, called with the value that was stood in; or a list's length."""
        try:
            value = effect.text if effect.kind == "retry_if" else self._follow(effect)
            if effect.kind == "length":
                items = list(value)
                return m.Evaluated(id=effect.id, value=len(items), items=tuple({"v": item} for item in items))
            call = payload.unseal(self._blob(effect.code or ""), self._reference(effect.step, {}, None))
            return m.Evaluated(id=effect.id, value=bool(call(value)))
        except Exception as error:  # noqa: BLE001 - it is the user's code, which raises anything
            return m.Evaluated(id=effect.id, error=f"{type(error).__name__}: {error}")

    def _follow(self, effect: m.Evaluate) -> Any:
        value: Any = [_open(one) for one in effect.handle] if effect.many else _open(effect.handle)
        for key in effect.path:
            value = value[key]
        return value

    # --- attempts ---

    def _start(self, effect: m.StartAttempt) -> None:
        key, spec = effect.key, self._known.spec(effect.key.step)
        attempt = self._attempts[key] = _Attempt(key, spec, self._scene.clock(), StandIn())
        if spec.timeout is not None:
            self._tell(m.AttemptBegan(key=key))
        task = self._builtin(spec)
        if task is not None:
            self._do(attempt, task, effect)
            return
        attempt.result = self._stand_in(effect, spec)
        if attempt.result.output:
            log = p.LogRecord(step=key.step, text=attempt.result.output, attempt=key.attempt, iteration=key.iteration)
            self._report("log", log, p.Lane.BULK)
        if spec.background is None:
            self._end_after(attempt, parse_duration(attempt.result.after))
        elif spec.background.announces:
            self._scene.time.after(0.0, self._tell, m.AttemptReady(key=key))

    def _stop(self, key: m.Key, state: StepState) -> None:
        attempt = self._attempts.get(key)
        if attempt is None:
            return
        if attempt.spec.background is None or state is StepState.FAILED:
            attempt.result = StandIn(error="It was ended.")
        self._end_after(attempt, 0.0)

    def _end_after(self, attempt: _Attempt, seconds: float) -> None:
        self._scene.time.after(seconds, self._ended, attempt)

    def _ended(self, attempt: _Attempt) -> None:
        if self._attempts.get(attempt.key) is not attempt:
            return
        del self._attempts[attempt.key]
        if attempt.waiter is not None:
            self._book.leave(attempt.waiter)
        self._tell(m.AttemptEnded(key=attempt.key, outcome=self._outcome(attempt)))

    def _outcome(self, attempt: _Attempt) -> m.Outcome:
        result = attempt.result
        made = m.Outcome(
            state=StepState.FAILED, reason=Reason.RAISED, started=attempt.started, ended=self._scene.clock()
        )
        if result.error is not None:
            message, text = _said(result.error)
            return replace(made, message=message, error=text)
        try:
            value = self._travels(result.value, attempt.key)
        except FieldlabError as refused:
            return replace(made, reason=Reason.BAD_RESULT, message=str(refused))
        handle, usage = {"v": result.value}, p.Usage(exit_code=0)
        return replace(made, state=StepState.SUCCEEDED, reason=Reason.RETURNED, value=value, handle=handle, usage=usage)

    def _travels(self, value: Any, key: m.Key) -> p.ValueRef:
        """The reference to a value, as an executor makes it; a large one is a blob of its own."""
        made = payload.encode_value(value)
        reference = p.ValueRef(format=made.format, size=made.size, summary=made.summary)
        if made.size > p.INLINE_VALUE_BYTES or made.format == "parts":
            digest = hashlib.sha256(made.body).hexdigest()
            record = p.ArtifactRecord(step=key.step, name="value", size=made.size, sha256=digest, value=True)
            self._report("artifact", record)
            query = {"offset": 0, "size": made.size}
            self._scene.hub.answer(self._name, "put_blob", {"digest": digest}, query, made.body)
            return replace(reference, sha256=digest)
        if made.format == "pickle":
            return replace(reference, data=base64.b64encode(made.body).decode())
        return replace(reference, json=made.json)

    def _stand_in(self, effect: m.StartAttempt, spec: StepSpec) -> StandIn:
        found = self._named(effect.key.step, spec)
        if isinstance(found, InTurn):
            step = paths.plain(effect.key.step)
            turn = self._turns[step] = self._turns.get(step, -1) + 1
            found = found.stand_ins[min(turn, len(found.stand_ins) - 1)]
        if isinstance(found, BaseException):
            return StandIn(error=found)
        if callable(found):
            try:
                args, kwargs = self._arguments(effect, spec)
                found = found(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - a stand-in fails as a task does: by raising
                return StandIn(error=error)
        return found if isinstance(found, StandIn) else StandIn(value=found)

    def _named(self, path: str, spec: StepSpec) -> Any:
        plain = paths.plain(path)
        for name in ((self._name, plain), plain, spec.task, EVERY):
            if name in self._scene.stand_ins:
                return self._scene.stand_ins[name]
        return None

    # --- what fieldlab does itself ---

    def _builtin(self, spec: StepSpec) -> Barrier | Send | WaitFor | Value | None:
        if spec.task not in self._scene.stand_ins:
            try:
                call = payload.unseal(self._blob(spec.code), lambda reference: None)
            except Exception:  # noqa: BLE001 - a task that cannot be opened here is no builtin, and need not be
                return None
            task = getattr(call, "__self__", None)
            if isinstance(task, Barrier | Send | WaitFor | Value):
                return task
        return None

    def _do(self, attempt: _Attempt, task: Barrier | Send | WaitFor | Value, effect: m.StartAttempt) -> None:
        args, _ = self._arguments(effect, attempt.spec)
        match task:
            case Value():
                self._give(attempt, args[0])
            case Send():
                self._send(attempt.key, args[0], args[1])
                self._give(attempt, None)
            case WaitFor():
                self._at_gate(attempt, *args[:3])
            case Barrier():
                self._at_barrier(attempt, *args[:3])

    def _give(self, attempt: _Attempt, value: Any) -> bool:
        attempt.result = StandIn(value=value)
        self._end_after(attempt, 0.0)
        return True

    def _fail(self, attempt: _Attempt, message: str) -> bool:
        attempt.result = StandIn(error=message)
        self._end_after(attempt, 0.0)
        return True

    def _send(self, key: m.Key, name: str, data: Any) -> None:
        self._report("event", p.EventRecord(name=name, data=data, step=key.step, iteration=key.iteration or 0))
        self.look()

    def _at_gate(self, attempt: _Attempt, name: str, timeout: float | None, after: int) -> None:
        place, round = self._known.place(attempt.key.step, attempt.key.iteration)
        position = self._gates.mark(place, name, round)

        def look() -> bool:
            nonlocal position
            found, position = self._book.since(position, name, after, most=1)
            if not found:
                return False
            self._gates.opened(place, name, position)
            return self._give(attempt, found[0].data)

        self._wait(attempt, (name,), look, timeout, f"No event {name!r} came")

    def _at_barrier(self, attempt: _Attempt, name: str, parties: int | str, timeout: float | None) -> None:
        key, round = attempt.key, self._known.place(attempt.key.step, attempt.key.iteration)[1]
        if not self._book.arrivals.has(name, round, self._name, key.step, key.iteration or 0):
            self._send(key, BARRIER, arrival(name, round))

        def look() -> bool:
            view = self._book.barrier(name, parties, round)
            if view.open:
                return self._give(attempt, None)
            missing = ", ".join(view.missing_for_good)
            return view.broken and self._fail(attempt, f"The barrier {name!r} can no longer fill; missing: {missing}.")

        self._wait(attempt, (BARRIER, DEPLOYMENT), look, timeout, f"The barrier {name!r} did not fill")

    def _wait(
        self, attempt: _Attempt, names: tuple[str, ...], look: Callable[[], bool], timeout: float | None, text: str
    ) -> None:
        attempt.waiter = self._book.wait(names, look)
        if attempt.waiter is not None and timeout is not None:
            self._scene.time.after(timeout, self._time_is_over, attempt, f"{text} within {timeout:g} s.")

    def _time_is_over(self, attempt: _Attempt, message: str) -> None:
        if self._attempts.get(attempt.key) is attempt:
            self._fail(attempt, message)

    # --- sealed code and arguments ---

    def _blob(self, sealed: str) -> bytes:
        data = inlined(sealed)
        return b"".join(self._scene.blobs.chunks(sealed)) if data is None else data

    def _arguments(self, effect: m.StartAttempt, spec: StepSpec) -> tuple[tuple[Any, ...], dict[str, Any]]:
        resolve = self._reference(effect.key.step, effect.inputs, effect.item)
        args, kwargs = payload.unseal(self._blob(spec.args), resolve)
        return args, kwargs

    def _reference(self, step: str, inputs: Mapping[str, m.Input], item: Any) -> Callable[[tuple[Any, ...]], Any]:
        def resolve(reference: tuple[Any, ...]) -> Any:
            match reference[0]:
                case "step":
                    return _of_step(inputs[reference[1]], reference[2], reference[3])
                case "item":
                    return _open(item)
                case "node":
                    return facts_of(self._node).get(reference[1])
                case "secret":
                    return self._scene.secrets[reference[1]]
                case "file":
                    return reference[2]
            return None  # the context: there is nothing to ask it of

        return resolve


def _of_step(given: m.Input, attribute: str, path: Any) -> Any:
    if attribute == "status":
        return given.status
    if attribute == "error":
        return given.error or None
    value = [_open(one) for one in given.handles] if given.many else _open(given.handles[0] if given.handles else None)
    for key in path:
        value = value[key]
    return value


def _open(handle: Any) -> Any:
    """The value of a handle; the machine makes those of lists (``l``) and of DAGs with several last steps (``d``)."""
    if handle is None:
        return None
    if "l" in handle:
        return [_open(one) for one in handle["l"]]
    if "d" in handle:
        return {name: _open(one) for name, one in handle["d"].items()}
    return handle["v"]


def _said(error: BaseException | str) -> tuple[str, str]:
    """One sentence, and the traceback."""
    if isinstance(error, str):
        return error, error
    text = "".join(traceback.format_exception_only(type(error), error)).strip()
    return text, "".join(traceback.format_exception(error)).strip()

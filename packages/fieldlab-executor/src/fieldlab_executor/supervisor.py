"""Runs one deployment: performs what the machine asks for, and tells it what happened.

The supervisor owns everything that acts: the spawner's children, timers, what is recorded and announced. It decides
nothing about the graph; that is the machine's. All of it happens in one thread, which sleeps until a descriptor, a
timer or another thread has news; other threads only ever call ``Loop.call``.

What always holds: every ``StartAttempt`` and ``Evaluate`` is answered exactly once; what a child reports stands in the
journal before anything that follows from it is started; ``Started`` is the first control record and ``Ended`` the last;
when ``run`` returns, nothing below this process is alive, or it is named in the ``CancelRecord`` as a survivor.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fieldlab_common.compact import to_text
from fieldlab_common.deployment import Graph
from fieldlab_common.environment import Resources
from fieldlab_common.events import Event
from fieldlab_common.lifecycle import DeploymentState, Reason, StepState
from fieldlab_common.paths import Round
from fieldlab_common.protocol import (
    INLINE_VALUE_BYTES,
    ArtifactLost,
    ArtifactRecord,
    CancelRecord,
    Claim,
    EventRecord,
    Lane,
    LogRecord,
    Started,
)
from fieldlab_common.wire import encode

from fieldlab_executor import frames, outcomes, processes
from fieldlab_executor import machine as m
from fieldlab_executor.answers import Answers
from fieldlab_executor.artifacts import Hashed, Hasher
from fieldlab_executor.attempt import Attempt
from fieldlab_executor.eventlog import EventBook
from fieldlab_executor.jobs import Jobs
from fieldlab_executor.known import Known
from fieldlab_executor.learned import Learned
from fieldlab_executor.limits import Limits, Watch
from fieldlab_executor.loop import Loop, Timer
from fieldlab_executor.pool import Exit, Pool, Warm, wait_for
from fieldlab_executor.reports import step_record
from fieldlab_executor.room import Room, room
from fieldlab_executor.secrets import Secrets
from fieldlab_executor.slots import places
from fieldlab_executor.uploads import Upload
from fieldlab_executor.workers import Workers
from fieldlab_executor.workplace import Workplace, place_of

__all__ = ["EVALUATION_SECONDS", "Finished", "Supervisor"]

EVALUATION_SECONDS = 60.0  # for a condition, `until` or `retry_if`
SWEEP_SECONDS = 10.0
MAX_INPUT_HANDLES = 32  # more inputs than these are fetched by the child when it needs them
MAX_HANDED = 64  # attempts that wait for a child; what the machine asked for waits in less memory
MAX_REPORTED = 64  # records that are written at once
GARBAGE = 20_000  # objects
SPAWNERS = 3  # so often a spawner that died is replaced
_OWN = ""  # the step of log records that are the executor's own remarks


class Finished:
    """How the machine says that the deployment ended, and what a cancel did."""

    def __init__(self, finish: m.Finish, cancel: CancelRecord | None) -> None:
        self.finish = finish
        self.cancel = cancel


class Supervisor:
    """One deployment's run.

    ``append`` puts records, each of a step or of none, into a lane of the journal and returns the last one's number;
    ``announce`` has a file sent; ``hurry`` has what is in the control lane go out at once, for somebody waits for it;
    ``hold`` has the link keep still, or even silent; ``done`` hears how it ended.
    """

    def __init__(
        self,
        folder: Path,
        loop: Loop,
        env: Mapping[str, str],
        *,
        append: Callable[[Lane, Sequence[bytes], Sequence[str]], int],
        announce: Callable[[Upload], None],
        hurry: Callable[[], None],
        hold: Callable[[bool, bool], None],
        done: Callable[[Finished], None],
    ) -> None:
        self.folder = folder
        self.book = EventBook()
        self.name = self.journal_id = ""  # the deployment's, the journal's
        self.steps_cpu = 0.0
        self._told_cpu: dict[int, float] = {}  # of children that said so themselves, and whose exit will follow
        self._loop = loop
        self._env = env
        self._append = append
        self._announce_upload = announce
        self._hurry = hurry
        self._hold = hold
        self._done = done
        self._epoch = time.time() - time.monotonic()  # one steady clock, in seconds since the epoch
        self._pool = Pool(loop, self._exited, self._spawner_lost, self._full)
        self._workers = Workers(self._pool, 1)
        self._answers = Answers(self)
        self._hasher = Hasher(loop, self._hashed)
        self._limits = Limits(Resources())
        self.secrets = Secrets({})
        self._attempts: dict[Any, Attempt] = {}  # by key, or by the number of an evaluation
        self._told_full = False
        self._reported: list[tuple[str, bytes]] = []  # steps and records that are not in the journal yet
        self._later: dict[m.Key, m.StartAttempt] = {}  # what is to be started when fewer wait for a child
        self._order: deque[m.Key] = deque()  # of these, some of which may have been taken back
        self._by_pid: dict[int, Attempt] = {}
        self._watch = self._watching()
        self._keepers: set[int] = set()  # pids of attempts whose processes outlive them
        self._timers: dict[str, Timer] = {}
        self._place = Workplace(folder)
        self._jobs = Jobs(folder / "blobs")
        self._learned = Learned()
        self._job = 0
        self._spawners = 0
        self._killed = 0
        self._survivors: list[str] = []
        self._cancelled: str | None = None
        self._finish: m.Finish | None = None
        self._over = False
        self._machine: m.Machine | None = None
        self._known = Known(Graph(name="", steps=()))
        self._command: tuple[str, str] = ("", "")
        self._performers = self._performer()

    @property
    def running(self) -> bool:
        """Whether the machine has begun and not finished."""
        return self._machine is not None and not self._over

    def now(self) -> float:
        """Seconds since the epoch, by a clock that never jumps."""
        return self._epoch + time.monotonic()

    # --- beginning

    def warm_up(self, python: str, site: str, variables: Mapping[str, str] | None = None) -> None:
        """Start the spawner on ``python``, with more ``variables``; its modules are in the folder ``site``."""
        if self._command == (python, site) and not variables and self._pool.pid:
            return
        self._stop_spawner()
        self._command = (python, site)
        self._env = {**self._env, **(variables or {})}
        self._pool.start([python], site, self._env)

    def load(self, claim: Claim, graph: Graph, clock: tuple[float, float]) -> None:
        """Have everything there that the deployment takes; the spawner is warm, and every blob is in its folder."""
        self._claim = claim
        self.name = claim.deployment.name
        self.secrets = Secrets(claim.secrets)
        self._known = Known(graph)
        self._reporting = claim.settings.reporting
        self.book.members = claim.members  # events that came before this stay
        self._bundles = [str(self.folder / "blobs" / digest) for digest in graph.bundles]
        self._place.furnish(claim, graph, clock)
        self._preload = [*self._place.modules(graph), *graph.preload]
        self._limits = Limits(claim.deployment.resources, (self._pool.pid,))
        self._watch = self._watching()
        self._pool.room = room(claim.deployment.resources.memory_bytes)
        self._configure()
        self._graph = graph

    def begin(self) -> None:
        """Run the deployment that was loaded."""
        claim, graph = self._claim, self._graph
        started = Started(python=claim.deployment.python, pid=os.getpid(), hostname=os.uname().nodename)
        self.record("started", started)
        if held := self._limits.told():
            self.remark(held)
        if self._reporting == "silent":
            self._hold(True, True)
        walltime = claim.deployment.resources.walltime_seconds
        if walltime is not None:
            self._loop.after(walltime, lambda: self.terminate(f"Its walltime of {walltime:g} s is over."))
        workers = places(claim.deployment.resources.cpus, os.cpu_count())
        self._workers = Workers(self._pool, workers)
        self._machine = m.Machine(graph, now=self.now(), workers=workers)
        gc.freeze()  # what stays to the end; the rest makes few circles, and need not be searched for them all the time
        gc.set_threshold(GARBAGE)
        self._perform(self._machine.start(self.now()))

    def _watching(self) -> Watch:
        return Watch(self._loop, self._limits, lambda: self._pool.pid, self._by_pid.values)

    def _configure(self) -> None:
        self._spawners += 1
        self._learned = Learned()
        self._limits.enter(self._pool.pid)
        self._pool.configure(
            {
                "memory": self._limits.of_process,
                "spared": self._limits.grouped,
                "root": str(self.folder),
                "path": self._bundles,
                "site": self._command[1],
                "inline": INLINE_VALUE_BYTES,
                "preload": self._preload,
            }
        )

    # --- what comes from outside

    def cancel(self, reason: str) -> None:
        """A person or a program asked for the deployment to stop."""
        if self._cancelled is None:
            self._cancelled = reason
            self._tell(m.CancelRequested(reason=reason))

    def terminate(self, message: str) -> None:
        """The executor itself is to stop."""
        self._tell(m.Terminated(message=message))

    def refused(self, step: str, message: str) -> None:
        """The director refused a record of the step's."""
        self._tell(m.Refused(step=step, message=message))

    def events(self, events: tuple[Event, ...]) -> None:
        """Events came from the director, in its order."""
        for event in events:
            self.book.add(event, len(json.dumps(event.data)))

    # --- the journal

    def record(self, kind: str, body: Any, lane: Lane = Lane.CONTROL) -> int:
        """Append a record; its number."""
        if lane is Lane.CONTROL:
            self._write_out()
        # A protocol.Record, as wire.dumps makes it; written out, because the body would be gone through twice.
        data = to_text({"kind": kind, "at": self.now(), "body": encode(body)}).encode(errors="replace")
        return self._append(lane, [data], [getattr(body, "step", None) or ""])

    def _write_out(self) -> None:
        """Append what the machine reported in this round: before anything that follows from it is begun."""
        if self._reported:
            steps, records = zip(*self._reported, strict=True)
            self._reported.clear()
            self._append(Lane.CONTROL, records, steps)

    def remark(self, text: str, step: str = _OWN) -> None:
        """Say something in the log, as the executor."""
        self.record("log", LogRecord(step=step, text=text.rstrip("\n") + "\n", stream="executor"), Lane.BULK)

    # --- the machine

    def _tell(self, stimulus: m.Stimulus) -> None:
        if self._machine is not None and self._finish is None:
            self._perform(self._machine.handle(stimulus, self.now()))

    def _perform(self, effects: list[m.Effect]) -> None:
        for effect in effects:
            self._performers[type(effect)](effect)
        self._write_out()

    def _performer(self) -> dict[type, Callable[[Any], None]]:
        """What to do for each kind of effect."""
        return {
            m.StartAttempt: self._start,
            m.Report: self._report,
            m.SetTimer: lambda e: self._set_timer(e.name, e.at),
            m.ClearTimer: lambda e: self._clear_timer(e.name),
            m.Evaluate: self._evaluate,
            m.StopAttempt: lambda e: self._stop(e.key, e.signal),
            m.KillAttempt: lambda e: self._kill(e.key),
            m.Measuring: lambda e: self._measuring(e.active),
            m.Finish: self._finishing,
        }

    def _measuring(self, active: bool) -> None:
        self._watch.pause(active)
        if self._reporting == "quiet":
            self._hold(active, False)

    def _clear_timer(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()

    def _report(self, effect: m.Report) -> None:
        self._known.reported(effect.record, effect.handle)
        self._reported.append((effect.record.step, step_record(effect.record, self.now())))
        if len(self._reported) >= MAX_REPORTED:
            self._write_out()

    def _set_timer(self, name: str, at: float) -> None:
        self._clear_timer(name)

        def fire() -> None:
            self._timers.pop(name, None)
            self._tell(m.TimerFired(name=name))

        self._timers[name] = self._loop.at(at - self._epoch, fire)

    # --- attempts

    def _full(self, room: Room) -> None:
        if not self._told_full:
            self._told_full = True
            self.remark(
                f"There is room for {room.most} processes of steps at a time, for want {room.why}; further steps wait "
                "for their turn. A step that waits for one of those would wait for ever: see max_parallel, and "
                'isolation="shared".'
            )

    def _start(self, effect: m.StartAttempt) -> None:
        if len(self._pool.takers) >= MAX_HANDED and self._known.spec(effect.key.step).isolation != "shared":
            self._later[effect.key] = effect
            self._order.append(effect.key)
        else:
            self._start_now(effect)

    def _start_more(self) -> None:
        """Hand over what had to wait, as far as there is room."""
        while self._order and len(self._pool.takers) < MAX_HANDED:
            if effect := self._later.pop(self._order.popleft(), None):
                self._start_now(effect)

    def _start_now(self, effect: m.StartAttempt) -> None:
        key, spec = effect.key, self._known.spec(effect.key.step)
        more: dict[str, Any] = {}
        if effect.inputs:
            more["inputs"] = self._inputs(effect.inputs)
        if spec.over is not None:
            more["item"] = effect.item
        self._job += 1
        attempt = Attempt(self._loop, self, self._job, key, shared=spec.isolation == "shared")
        try:
            attempt.folder = self._place.lend()
            job = self._jobs.call(spec, key, self._job, attempt.folder, **more)
        except OSError as error:
            self._fail_start(key, f"It could not be made ready: {error}.")
            return
        self._hand_over(attempt, job, keeps=spec.keep_processes, traced=spec.timeout is not None)

    def _fail_start(self, key: m.Key, message: str) -> None:
        """It has no process, and will have none."""
        outcome = m.Outcome(state=StepState.FAILED, reason=Reason.INTERNAL, message=message)
        self._loop.call(lambda: self._tell(m.AttemptEnded(key=key, outcome=outcome)))

    def _inputs(self, inputs: Mapping[str, m.Input]) -> dict[str, Any]:
        if sum(len(one.handles) for one in inputs.values()) > MAX_INPUT_HANDLES:
            inputs = {name: one for name, one in inputs.items() if len(one.handles) <= 1}
        return {name: _as_json(one) for name, one in inputs.items()}

    def _hand_over(self, attempt: Attempt, job: frames.Job, *, keeps: bool = False, traced: bool = False) -> None:
        """Have the job done. ``keeps``: its processes outlive it; ``traced``: its time runs from when it has one."""
        self._attempts[attempt.subject] = attempt

        def take(child: Warm) -> None:
            self._by_pid[child.pid] = attempt
            self._watch.wake()
            attempt.taker = None
            attempt.started = self.now()
            self._write_out()
            if keeps:
                self._keepers.add(child.pid)
            attempt.begin(child, job)
            if traced:
                self._tell(m.AttemptBegan(key=attempt.key))
            self._start_more()

        attempt.taker = take
        self._source(attempt).take(take)

    def _source(self, attempt: Attempt) -> Workers | Pool:
        return self._workers if attempt.shared else self._pool

    def _evaluate(self, effect: m.Evaluate) -> None:
        self._job += 1
        attempt = Attempt(self._loop, self, self._job, m.Key(step=""), shared=effect.shared, question=effect)
        attempt.deadline = self._loop.after(EVALUATION_SECONDS, lambda: self._expire(attempt))
        self._hand_over(attempt, self._jobs.question(effect, self._job, str(self.folder)))

    def _expire(self, attempt: Attempt) -> None:
        if not self._withdraw(attempt):
            attempt.kill()

    def _stop(self, key: m.Key, number: int | None) -> None:
        attempt = self._started(key)
        if attempt is not None:
            self._killed += attempt.stop(number)

    def _kill(self, key: m.Key) -> None:
        attempt = self._started(key)
        if attempt is not None:
            attempt.kill()

    def _started(self, key: m.Key) -> Attempt | None:
        """The attempt, if it has a child; if it waits for one, it is taken back, and has ended."""
        if self._later.pop(key, None) is not None:
            self._fail_start(key, "It was not started.")
            return None
        attempt = self._attempts.get(key)
        return None if attempt is None or self._withdraw(attempt) else attempt

    def _withdraw(self, attempt: Attempt) -> bool:
        """Take back a job that no child has yet; whether it was so."""
        if attempt.taker is None or not self._source(attempt).takers.forget(attempt.taker):
            return False
        self._loop.call(lambda: self.over(attempt))
        return True

    # --- what attempts tell

    def requested(self, attempt: Attempt, header: dict[str, Any]) -> None:
        """A child asks."""
        self._answers.answer(attempt, header)

    def said(self, attempt: Attempt, stream: str, text: str) -> None:
        """A child wrote."""
        if attempt.question is None:
            step, number, iteration = attempt.key
            hidden = self.secrets.hide(text)
            log = LogRecord(step=step, text=hidden, stream=stream, attempt=number, iteration=iteration)
            self.record("log", log, Lane.BULK)

    def ready(self, attempt: Attempt) -> None:
        """A background step does its work now."""
        if attempt.question is None:
            self._tell(m.AttemptReady(key=attempt.key))

    def waits(self, attempt: Attempt, waits: bool) -> None:
        """An attempt only waits, for an event or a barrier (or no more): another may use its worker's place."""
        if attempt.shared:
            self._workers.wait(1 if waits else -1)
            if attempt.question is None:
                self._tell(m.AttemptWaits(key=attempt.key, waits=waits))

    def send_event(self, attempt: Attempt, name: str, data: Any, size: int) -> None:
        """Put an event into the journal, and into the log of this node at once."""
        step, iteration = attempt.key.step, attempt.key.iteration or 0
        number = self.record("event", EventRecord(name=name, data=data, step=step, iteration=iteration))
        self._hurry()
        event = Event(
            name=name,
            data=data,
            sender=self.name,
            step=step,
            iteration=iteration,
            sent_at=self.now(),
            key=f"{self.journal_id}:{number}",
        )
        self.book.add(event, size)

    def place_of(self, attempt: Attempt) -> tuple[str, Round]:
        """Where the attempt stands among what is repeated."""
        return self._known.place(attempt.key.step, attempt.key.iteration)

    def result_of(self, attempt: Attempt, step: str) -> dict[str, Any] | None:
        """What may be known now of the result of a step that the attempt names."""
        return self._known.of(attempt.key.step, step)

    def results(self, attempt: Attempt) -> list[str]:
        """The steps that have a value and that the attempt sees."""
        return self._known.names(attempt.key.step)

    def _exited(self, exit_: Exit) -> None:
        self.steps_cpu += exit_.cpu - self._told_cpu.pop(exit_.pid, 0.0)
        self._workers.ended(exit_.pid)
        attempt = self._by_pid.get(exit_.pid)
        if attempt is None and not any(one.exit is not None for one in self._by_pid.values()):
            return
        alone = all(one.exit is not None or one is attempt for one in self._by_pid.values())
        for one in list(self._by_pid.values()):
            if (one is attempt or one.exit is not None) and one.exited(exit_, alone, self._keepers):
                self.over(one)

    def over(self, attempt: Attempt) -> None:
        """A child and everything it left behind is gone: tell the machine what came of it."""
        self._by_pid.pop(attempt.pid, None)
        self._attempts.pop(attempt.subject, None)
        self._answers.leave(attempt)
        if attempt.deadline is not None:
            attempt.deadline.cancel()
        self._survivors += [processes.describe(pid) for pid in attempt.survivors]
        if attempt.result is not None and not attempt.shared:
            self._pool.preload(self._learned.heard(attempt.result.get("loaded")))
        if attempt.early and attempt.exit is not None:  # the executor may well end before it hears of the exit
            self.steps_cpu += attempt.exit.cpu
            self._told_cpu[attempt.pid] = self._told_cpu.get(attempt.pid, 0.0) + attempt.exit.cpu
            if attempt.worker is not None:
                self._workers.give_back(attempt.worker)
        if attempt.question is not None:
            self._tell(self._evaluated(attempt, attempt.question))
            return
        if attempt.left_behind:
            self.remark(f"{attempt.left_behind} processes that the step left behind were ended.", attempt.key.step)
        key = attempt.key
        self._collect(attempt)
        outcome = self._outcome(attempt)
        clean = attempt.exit is not None and not (attempt.left_behind or attempt.survivors)
        self._place.take_back(attempt.folder, key, again=clean and attempt.pid not in self._keepers)
        if outcome.state is StepState.SUCCEEDED:
            self._known.returned(key.step, key.iteration, outcome.handle)
        self._tell(m.AttemptEnded(key=key, outcome=outcome))

    # --- what came of an attempt

    def _outcome(self, attempt: Attempt) -> m.Outcome:
        outcome, large = outcomes.judge(attempt, self._limits, self.now())
        if self.secrets and (shown := self.secrets.shown_in(attempt.data)):  # of another step's, from ctx.store
            message = f"It holds the secret {shown!r}, which must not leave the node. Return something else."
            outcome = m.Outcome(state=StepState.FAILED, reason=Reason.BAD_RESULT, message=message, usage=outcome.usage)
        if outcome.state is StepState.FAILED:
            hidden = self.secrets.hide(outcome.message), self.secrets.hide(outcome.error)
            outcome = replace(outcome, message=hidden[0], error=hidden[1])
        if large is not None:
            path = str(self.folder / "values" / large.file)
            self._announce(attempt.key, f"value-{attempt.number}", large.sha256, large.size, path, value=True)
        return outcome

    def _evaluated(self, attempt: Attempt, question: m.Evaluate) -> m.Evaluated:
        result = attempt.result
        if result is not None and "reason" in result:
            error = self.secrets.hide(str(result.get("error") or result.get("message")))
            return m.Evaluated(id=question.id, error=error)
        if result is None or not isinstance(result.get("answer"), bool | int):
            if attempt.killed:
                return m.Evaluated(id=question.id, error=f"It took longer than {EVALUATION_SECONDS:g} s.")
            return m.Evaluated(id=question.id, error=outcomes.sudden_end(attempt, self._limits, self.now())[1])
        items = result.get("items") if question.kind == "length" else ()
        if not isinstance(items, list | tuple) or (items and len(items) != result["answer"]):
            return m.Evaluated(id=question.id, error="What the process said of the list's items is malformed.")
        return m.Evaluated(id=question.id, value=result["answer"], items=tuple(items))

    # --- artifacts

    def _collect(self, attempt: Attempt) -> None:
        for name in attempt.artifacts:
            self._hasher.add(Hashed(attempt.key, name, f"{self.folder}/artifacts/{place_of(attempt.key)}/{name}"))

    def _hashed(self, file: Hashed) -> None:
        key = file.key
        if file.digest is None:
            self.record("artifact_lost", ArtifactLost(step=key.step, name=file.name, reason=file.problem))
        else:
            self._announce(key, file.name, file.digest, file.size, file.path, value=False)
        self._maybe_finished()

    def _announce(self, key: m.Key, name: str, digest: str, size: int, path: str, *, value: bool) -> None:
        artifact = ArtifactRecord(
            step=key.step,
            name=name,
            size=size,
            sha256=digest,
            attempt=key.attempt,
            iteration=key.iteration,
            value=value,
        )
        number = self.record("artifact", artifact)
        self._announce_upload(Upload(digest, path, size, number, key.step, name))

    # --- the end

    def _spawner_lost(self) -> None:
        """The spawner died: everything that it held is swept, what ran has failed, and another takes its place."""
        if self._finish is not None:
            return
        lost = list(self._by_pid.values())
        left = processes.sweep(time.monotonic() + SWEEP_SECONDS)
        self._survivors += [processes.describe(one.pid) for one in left]
        if self._spawners < SPAWNERS:
            self._pool.start([self._command[0]], self._command[1], self._env)
            self._configure()
        self._workers.lost()
        for attempt in lost:
            attempt.abandon("The executor's spawner died, and the step with it.")
            self.over(attempt)
        if self._spawners >= SPAWNERS:
            self.terminate("The executor's spawner died again and again.")

    def _finishing(self, finish: m.Finish) -> None:
        self._finish = finish
        for attempt in list(self._attempts.values()):  # evaluations that nobody waits for any more
            if not self._withdraw(attempt):
                attempt.kill()
        for timer in self._timers.values():
            timer.cancel()
        self._maybe_finished()

    def _maybe_finished(self) -> None:
        if self._finish is None or self._hasher.busy:
            return
        finish, self._hasher = self._finish, Hasher(self._loop, self._hashed)
        self.stop()
        cancel = None
        if finish.state is DeploymentState.CANCELLED or self._survivors:
            cancel = CancelRecord(
                reason=self._cancelled or finish.message,
                killed=self._killed,
                survivors=tuple(map(self.secrets.hide, self._survivors)),  # command lines
            )
        self._over = True
        self._done(Finished(finish, cancel))

    def _stop_spawner(self) -> None:
        self._workers.close()
        if self._pool.pid:
            self._pool.close()
            wait_for(self._pool.pid, SWEEP_SECONDS)
            self._pool.pid = 0

    def stop(self) -> None:
        """End the spawner and everything below this process."""
        self._stop_spawner()
        left = processes.sweep(time.monotonic() + SWEEP_SECONDS)
        self._survivors += [processes.describe(one.pid) for one in left]
        self._limits.close()


def _as_json(given: m.Input) -> dict[str, Any]:
    return {"handles": given.handles, "many": given.many, "error": given.error, "status": given.status}

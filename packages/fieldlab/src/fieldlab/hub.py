"""The director's part in a run here: its answers to executors, and one run's state, in the memory of this process.

It answers the same rows of ``protocol.ENDPOINTS`` with the same messages, by the same rules: one claim, records taken
once and in order, events in one order for all, a deployment that ends when its ``ended`` record and every artifact are
there. What reads a run at a director reads this one too (``fieldlab.source.Source``).

Two sides meet here, under one lock: the thread that serves executors (``answer``, ``polls``) and readers. A record is
kept as the bytes it came in, in a file, and decoded when someone reads it: a long chain of small steps costs next to
nothing, and a step that writes gigabytes fills no memory.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fieldlab_common import errors as e
from fieldlab_common import protocol as p
from fieldlab_common import wire
from fieldlab_common.course import (
    NEVER,
    Abandon,
    ExperimentStanding,
    MoveExperiment,
    begins_at,
    decide_beginning,
    decide_experiment,
    experiment_outcome,
    way_to,
)
from fieldlab_common.events import DEPLOYMENT, START, Event, Member
from fieldlab_common.lifecycle import DeploymentState, ExperimentState, Reason, advance
from fieldlab_common.node import Node
from fieldlab_common.protocol import Lane

from fieldlab.ship import Order
from fieldlab.spool import PAGE, Spool

__all__ = ["Answered", "Hub"]

_D, _E = DeploymentState, ExperimentState
_TO_LAUNCH = (_D.PENDING, _D.PREPARING, _D.READY)
_PLAIN = (b'{"kind":"step"', b'{"kind":"log"', b'{"kind":"gap"', b'{"kind":"started"', b'{"kind":"cancel"')


@dataclass(frozen=True)
class Answered:
    """An answer: HTTP's status, and the body."""

    status: int
    body: bytes


@dataclass
class _Here:
    """One deployment of the run."""

    spec: p.DeploymentSpec
    node: Node
    state: DeploymentState = _D.PENDING
    reason: Reason | None = None
    message: str = ""
    journal: str = ""
    acked: dict[str, int] = field(default_factory=lambda: {"control": 0, "bulk": 0})
    announced: dict[str, int] = field(default_factory=dict)  # digest -> size of what has not come yet
    ready: float | None = None  # its executor could begin; how far its clock may be off
    ended_as: p.Ended | None = None
    cancel: p.CancelDeployment | None = None
    gone: bool = False  # its executor has ended: nothing more will come
    told: bool = False  # whether the executor has had the order to stop
    started: float | None = None
    ended: float | None = None


class Hub:
    """One run here. ``folder`` holds the blobs that executors send; ``woken`` is called when polls may have answers.

    ``name``: the run's, if it is not its experiment's; ``start``: it may start as soon as it is ready, else when
    ``request_start`` was called.
    """

    def __init__(
        self,
        order: Order,
        folder: Path,
        *,
        woken: Callable[[], None],
        clock: Callable[[], float] = time.time,
        secrets: Mapping[str, str] | None = None,
        name: str = "",
        run_id: str = "local",
        start: bool = True,
    ) -> None:
        self._secrets = dict(secrets or {})
        self._order, self._folder, self._woken, self._clock = order, folder, woken, clock
        self._name, self._id, self._start_requested = name or order.name, run_id, start
        lock = threading.RLock()
        self._changed = threading.Condition(lock)  # the run's state, or its events
        self._recorded = threading.Condition(lock)  # apart: whoever waits for the end is not woken by each record
        self._here = {spec.name: _Here(spec, node) for spec, node in order.deployments}
        self._members = tuple(
            Member(deployment=spec.name, role=spec.role, node=node.name, addresses=("127.0.0.1",))
            for spec, node in order.deployments
        )
        self._state, self._created = _E.PREPARING, clock()
        self._look_at = NEVER  # when the run may start
        self._started: float | None = None
        self._ended: float | None = None
        self._events: list[Event] = []
        self._keys: dict[str, Event] = {}
        self._artifacts: dict[tuple[str, str, str, int, int | None], p.ArtifactInfo] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._records = {lane.value: Spool(folder / f"records.{lane.value}") for lane in Lane}

    # --- what the run's owner does ------------------------------------------------------------------------------------

    def move(
        self, name: str, *states: DeploymentState, reason: Reason | None = None, message: str = ""
    ) -> DeploymentState:
        """Take a deployment through ``states``, unless it has ended; returns the state that it is then in."""
        with self._changed:
            here = self._here[name]
            for state in states:
                if not here.state.terminal:
                    self._to(here, state, reason if state.terminal else None, message if state.terminal else "")
            self._settle()
            return here.state

    def move_all(
        self, names: Sequence[str], state: DeploymentState, *, reason: Reason | None = None, message: str = ""
    ) -> None:
        """Move several at once, before anything follows from it."""
        with self._changed:
            for name in names:
                if not self._here[name].state.terminal:
                    self._to(self._here[name], state, reason, message)
            self._settle()

    def launchable(self) -> tuple[str, ...]:
        """The deployments that may be launched now."""
        with self._changed:
            self._settle()
            running = self._state is _E.RUNNING
            return tuple(name for name, here in self._here.items() if running and here.state is _D.READY)

    def request_start(self) -> None:
        """Let it start as soon as it is ready.

        Raises:
            IllegalState: it is being cancelled, or has ended without ever being started.
        """
        with self._changed:
            if not self._start_requested:
                if self._state.terminal or self._state is _E.CANCELLING:
                    raise e.IllegalState(f"Experiment {self._name!r} is {self._state.value}: it cannot be started.")
                self._start_requested = True
                self._settle()
        self._woken()

    def until_start(self) -> float:
        """Seconds until the run may start, if that is for a time only."""
        with self._changed:
            return max(0.0, self._look_at - self._clock())

    def claimed(self, name: str) -> bool:
        """Whether an executor has claimed it, and it may owe more than has come."""
        with self._changed:
            here = self._here[name]
            return bool(here.journal) and not here.gone

    def executor_gone(self, name: str, message: str) -> None:
        """The executor's process has ended: a deployment that has not ended by its own account has failed."""
        with self._changed:
            here = self._here[name]
            here.gone = True
            for digest in here.announced:
                self._lose(here, digest, "the executor ended before it was sent")
            here.announced.clear()
            if here.ended_as is not None:
                self._finish(here)
            elif not here.state.terminal:
                state = _D.CANCELLED if here.cancel is not None else _D.FAILED
                reason = Reason.CANCELLED if here.cancel is not None else Reason.EXECUTOR_LOST
                self._to(here, state, reason, message)
            self._settle()

    def cancel(self, reason: str, names: Sequence[str]) -> None:
        """Order deployments to stop; with no names, the run."""
        unknown = set(names) - set(self._here)
        if unknown:
            raise e.NotFound(f"The run has no deployment {', '.join(sorted(unknown))}.")
        with self._changed:
            if self._state.terminal:
                return
            for name in names or self._here:
                here = self._here[name]
                if here.state in _TO_LAUNCH:
                    self._to(here, _D.CANCELLED, Reason.CANCELLED, reason)
                elif not here.state.terminal and here.cancel is None:
                    here.cancel = p.CancelDeployment(reason=reason)
            if not names and self._state is not _E.CANCELLING:
                self._state = advance(self._state, _E.CANCELLING)
            self._settle()
        self._woken()

    def unfinished(self) -> tuple[str, ...]:
        """The deployments that have not ended."""
        with self._changed:
            return tuple(name for name, here in self._here.items() if not here.state.terminal)

    # --- what a reader asks (Source) ----------------------------------------------------------------------------------

    def info(self) -> p.ExperimentInfo:
        """How the run stands."""
        with self._changed:
            return p.ExperimentInfo(
                id=self._id,
                name=self._name,
                state=self._state,
                created=self._created,
                started=self._started,
                ended=self._ended,
                settings=self._order.settings,
                deployments=tuple(_info(here) for here in self._here.values()),
            )

    def records(self, lane: Lane, after: int, wait: float, deployment: str = "") -> p.RecordPage:
        """Records after the cursor, of all deployments or of one; held up to ``wait`` seconds while there is none.

        Raises:
            NotFound: there is no such deployment.
        """
        with self._changed:
            if deployment and deployment not in self._here:
                raise e.NotFound(f"The run has no deployment {deployment!r}.")
            kept, found, looked = self._records[lane.value], list[p.RecordEntry](), after

            def news() -> bool:
                nonlocal found, looked
                found = kept.read(looked, deployment)
                looked = max(looked, len(kept))
                return bool(found)

            self._recorded.wait_for(lambda: news() or self._state.terminal, timeout=wait or 0)
            return p.RecordPage(records=tuple(found), cursor=found[-1].seq if found else after, state=self._state)

    def events(self, after: int, wait: float) -> p.EventPage:
        """Events numbered above ``after``; held likewise."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._events) > after or self._state.terminal, timeout=wait or 0)
            part = tuple(self._events[after : after + PAGE])
            return p.EventPage(events=part, cursor=after + len(part), state=self._state)

    def send(self, event: p.SendEvent) -> Event:
        """Number an event that a person sends."""
        with self._changed:
            if self._state.terminal:
                raise e.IllegalState(f"The run has ended ({self._state.value}); nobody is there to get the event.")
            made = self._add_event(Event(name=event.name, data=event.data, sent_at=self._clock(), key=event.key))
        self._woken()
        return made

    def artifacts(self) -> tuple[p.ArtifactInfo, ...]:
        """The artifacts announced so far."""
        with self._changed:
            return tuple(self._artifacts.values())

    def blob(self, digest: str, offset: int) -> Iterator[bytes]:
        """The bytes of a blob from ``offset`` on."""
        blobs = self._order.blobs
        if digest in blobs.data or digest in blobs.files:
            yield from blobs.chunks(digest, offset)
            return
        try:
            with self._path(digest).open("rb") as file:
                file.seek(offset)
                while chunk := file.read(1 << 20):
                    yield chunk
        except FileNotFoundError as error:
            raise e.NotFound(
                f"The blob {digest[:12]}… is not here.", advice="The folder of a run here is removed with its handle."
            ) from error

    # --- what an executor asks ----------------------------------------------------------------------------------------

    def answer(
        self, name: str, endpoint: str, path: Mapping[str, str], query: Mapping[str, Any], body: bytes
    ) -> Answered:
        """Answer one request of the executor of deployment ``name``; ``poll`` without waiting."""
        row = p.ENDPOINTS.get(endpoint)
        try:
            if row is None or p.Caller.EXECUTOR not in row.callers:
                raise e.NotFound(f"There is no {endpoint!r} here.")
            with self._changed:
                value = getattr(self, "_on_" + endpoint)(self._here[name], path, query, body)
            return Answered(row.status, value if isinstance(value, bytes) else wire.dumps(value))
        except e.FieldlabError as error:
            problem = p.Problem(
                title=error.code,
                status=error.status,
                code=error.code,
                detail=error.message,
                advice=error.advice,
                details=error.details,
            )
            return Answered(error.status, wire.dumps(problem))

    def news(self, name: str, after: int) -> bool:
        """Whether a poll of that deployment has something to say now."""
        with self._changed:
            here = self._here[name]
            return len(self._events) > after or (here.cancel is not None and not here.told)

    def _on_claim(self, here: _Here, path: Mapping[str, str], query: Mapping[str, Any], body: bytes) -> p.Claim:
        asked = wire.loads(p.ClaimRequest, body)
        if here.journal not in ("", asked.journal_id) or here.state.terminal:
            raise e.ClaimRefused(f"Deployment {here.spec.name!r} is claimed, or has ended.")
        if p.PROTOCOL not in asked.protocols:
            raise e.ProtocolMismatch(f"The executor speaks protocol {asked.protocols}, this client {p.PROTOCOL}.")
        if not here.journal:
            here.journal = asked.journal_id
            self._to(here, _D.RUNNING)
        return p.Claim(
            experiment_id=self._id,
            experiment=self._name,
            deployment=here.spec,
            node=here.node,
            members=self._members,
            settings=self._order.settings,
            protocol=p.PROTOCOL,
            server_time=self._clock(),
            control=here.acked["control"],
            bulk=here.acked["bulk"],
            secrets={name: self._secrets[name] for name in here.spec.secrets if name in self._secrets},
            start_at=self._started,
        )

    def _on_report(self, here: _Here, path: Mapping[str, str], query: Mapping[str, Any], body: bytes) -> p.Ack:
        self._hold_journal(here, query)
        lane = str(query.get("lane"))
        if lane not in self._records:
            raise e.InvalidRequest(f"{lane!r} is no lane.")
        late = here.state.terminal
        for number, record, _ in wire.unframe(body):
            if number <= here.acked[lane]:
                continue  # sent again because an answer was lost
            here.acked[lane] = number
            self._records[lane].add(here.spec.name, number, late, record)
            if not record.startswith(_PLAIN):
                self._take(here, number, wire.loads(p.Record, record))
        self._finish(here)
        self._recorded.notify_all()
        return p.Ack(acked=here.acked[lane], missing=tuple(here.announced))

    def _hold_journal(self, here: _Here, query: Mapping[str, Any]) -> None:
        if query.get("journal") != here.journal:
            raise e.ClaimRefused(f"Deployment {here.spec.name!r} is claimed by another journal.")

    def _on_poll(self, here: _Here, path: Mapping[str, str], query: Mapping[str, Any], body: bytes) -> p.Poll:
        self._hold_journal(here, query)
        after = int(query.get("after", 0))
        here.told = here.cancel is not None
        events = tuple(self._events[after : after + PAGE])
        return p.Poll(events=events, cursor=after + len(events), cancel=here.cancel, server_time=self._clock())

    def _on_get_blob(self, here: _Here, path: Mapping[str, str], query: Mapping[str, Any], body: bytes) -> bytes:
        """The blob, or with ``limit`` so many bytes of it: an executor asks for a large one in pieces."""
        limit = int(query.get("limit") or 0)
        parts, size = [], 0
        for chunk in self.blob(_digest(path), int(query.get("offset", 0))):
            parts.append(chunk)
            size += len(chunk)
            if limit and size >= limit:
                break
        return b"".join(parts)[: limit or None]

    def _on_blob_status(
        self, here: _Here, path: Mapping[str, str], query: Mapping[str, Any], body: bytes
    ) -> p.BlobStatus:
        digest = _digest(path)
        if self._path(digest).exists():
            return p.BlobStatus(digest=digest, offset=self._path(digest).stat().st_size, complete=True)
        part = self._part(digest)
        return p.BlobStatus(digest=digest, offset=part.stat().st_size if part.exists() else 0)

    def _on_put_blob(self, here: _Here, path: Mapping[str, str], query: Mapping[str, Any], body: bytes) -> p.BlobStatus:
        digest, offset, size = _digest(path), int(query.get("offset", 0)), int(query.get("size", len(body)))
        status = self._on_blob_status(here, path, query, b"")
        if not status.complete:
            if offset != status.offset:
                raise e.BlobMismatch(f"The next byte is {status.offset}, not {offset}.", details={"offset": offset})
            with self._part(digest).open("ab") as file:
                file.write(body)
            if offset + len(body) < size:
                return p.BlobStatus(digest=digest, offset=offset + len(body))
            self._complete(digest)
        self._arrived(digest)
        return p.BlobStatus(digest=digest, offset=size, complete=True)

    # --- inside, under the lock ---------------------------------------------------------------------------------------

    def _path(self, digest: str) -> Path:
        return self._folder / digest

    def _part(self, digest: str) -> Path:
        return self._folder / f"{digest}.part"

    def _complete(self, digest: str) -> None:
        part = self._part(digest)
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            part.unlink()
            raise e.BlobMismatch(f"The bytes that came have the SHA-256 {found}, not {digest}.")
        part.rename(self._path(digest))

    def _arrived(self, digest: str) -> None:
        for here in self._here.values():
            if here.announced.pop(digest, None) is not None:
                self._finish(here)
        for key, info in self._artifacts.items():
            if info.sha256 == digest and not info.stored:
                self._artifacts[key] = replace(info, stored=True)
        self._changed.notify_all()

    def _take(self, here: _Here, number: int, record: p.Record) -> None:
        if record.kind == "event":
            one = wire.decode(p.EventRecord, dict(record.body))
            self._add_event(
                Event(
                    name=one.name,
                    data=one.data,
                    sender=here.spec.name,
                    step=one.step,
                    iteration=one.iteration,
                    sent_at=record.at,
                    key=f"{here.journal}:{number}",
                )
            )
        elif record.kind == "artifact":
            self._announce(here, wire.decode(p.ArtifactRecord, dict(record.body)))
        elif record.kind == "artifact_lost":
            lost = wire.decode(p.ArtifactLost, dict(record.body))
            self._lose(here, lost.sha256 or "", lost.reason)
            here.announced.pop(lost.sha256 or "", None)
        elif record.kind == "ready" and here.ready is None:
            here.ready = wire.decode(p.Ready, dict(record.body)).bound
            self._settle()
        elif record.kind == "ended" and here.ended_as is None:
            here.ended_as = wire.decode(p.Ended, dict(record.body))

    def _announce(self, here: _Here, record: p.ArtifactRecord) -> None:
        there = self._path(_digest({"digest": record.sha256})).exists()
        if not there:
            here.announced[record.sha256] = record.size
        if record.value:
            return
        key = (here.spec.name, record.step, record.name, record.attempt, record.iteration)
        self._artifacts[key] = p.ArtifactInfo(
            deployment=here.spec.name,
            step=record.step,
            name=record.name,
            size=record.size,
            sha256=record.sha256,
            attempt=record.attempt,
            iteration=record.iteration,
            stored=there,
        )

    def _lose(self, here: _Here, digest: str, reason: str) -> None:
        for key, info in self._artifacts.items():
            if info.deployment == here.spec.name and info.sha256 == digest and not info.stored:
                self._artifacts[key] = replace(info, lost=reason)

    def _add_event(self, event: Event) -> Event:
        known = self._keys.get(event.key) if event.key else None
        if known is not None:
            return known
        made = replace(event, number=len(self._events) + 1)
        self._events.append(made)
        if event.key:
            self._keys[event.key] = made
        self._changed.notify_all()
        self._woken()
        return made

    def _finish(self, here: _Here) -> None:
        """End the deployment if its executor has said so and everything that it announced is here."""
        if here.ended_as is not None and not here.announced and not here.state.terminal:
            self._to(here, here.ended_as.state, here.ended_as.reason, here.ended_as.message)
            self._settle()

    def _to(self, here: _Here, state: DeploymentState, reason: Reason | None = None, message: str = "") -> None:
        here.state = advance(here.state, state)
        here.reason, here.message = reason, message
        if state is _D.RUNNING:
            here.started = self._clock()
        if state.terminal:
            here.ended = self._clock()
        data = {"deployment": here.spec.name, "state": state.value, "reason": reason.value if reason else None}
        self._add_event(Event(name=DEPLOYMENT, data=data, sent_at=self._clock()))

    def _settle(self) -> None:
        """Do what follows for the run from how its deployments stand."""
        states = [here.state for here in self._here.values()]
        action = decide_experiment(self._standing(states), self._clock())
        while isinstance(action, MoveExperiment):
            self._move_run(action.state)
            action = decide_experiment(self._standing(states), self._clock())
        if isinstance(action, Abandon):
            states = self._abandon(action.message)
        else:
            self._look_at = action.at
            self._begin_together()
        outcome = experiment_outcome(states, self._state is _E.CANCELLING)
        for state in way_to(self._state, outcome) if outcome and not self._state.terminal else ():
            self._move_run(state)
        self._changed.notify_all()
        self._recorded.notify_all()

    def _standing(self, states: Sequence[DeploymentState]) -> ExperimentStanding:
        return ExperimentStanding(
            state=self._state,
            deployments=Counter(states),
            min_nodes=self._order.settings.min_nodes,
            start_requested=self._start_requested,
            start_at=self._order.settings.start_at,
        )

    def _move_run(self, state: ExperimentState) -> None:
        self._state = advance(self._state, state)
        if state is _E.RUNNING and len(self.unfinished()) == 1:  # it has nobody to wait for
            self._started = max(self._clock(), self._order.settings.start_at or 0.0)
        if state.terminal:
            self._ended = self._clock()

    def _begin_together(self) -> None:
        """Order the executors to begin, all at one time, if none is to be waited for any more."""
        if self._state is not _E.RUNNING or self._started is not None:
            return
        counts = Counter((here.state, here.ready is not None) for here in self._here.values())
        action = decide_beginning(counts, self._order.settings.min_nodes)
        if isinstance(action, Abandon):
            for here in self._here.values():
                if not here.state.terminal and here.cancel is None:
                    here.cancel = p.CancelDeployment(reason=action.message)
            self._woken()
        elif action is not None:
            bound = max(here.ready for here in self._here.values() if here.ready is not None)
            self._started = begins_at(self._clock(), self._order.settings.start_at, bound)
            self._add_event(Event(name=START, data={"at": self._started}, sent_at=self._clock()))

    def _abandon(self, message: str) -> list[DeploymentState]:
        """Too few can be prepared: none is launched."""
        for here in self._here.values():
            if here.state in _TO_LAUNCH:
                self._to(here, _D.CANCELLED, Reason.CANCELLED, message)
        return [here.state for here in self._here.values()]


def _digest(path: Mapping[str, str]) -> str:
    digest = path.get("digest", "")
    if len(digest) != 64 or digest.strip("0123456789abcdef"):
        raise e.InvalidRequest(f"{digest[:80]!r} is no digest.")
    return digest


def _info(here: _Here) -> p.DeploymentInfo:
    return p.DeploymentInfo(
        name=here.spec.name,
        node=here.spec.node,
        state=here.state,
        role=here.spec.role,
        reason=here.reason,
        message=here.message,
        graph=here.spec.graph,
        epoch=1,
        steps=here.spec.steps,
        drained=here.gone or (here.ended_as is not None and here.acked["bulk"] >= here.ended_as.bulk),
        started=here.started,
        ended=here.ended,
    )

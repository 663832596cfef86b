"""The session with the director: what is spooled goes up, what is to be known comes down, whatever the line does.

Four threads: one for each lane of the journal, one for the long-poll (also the sign of life), one for artifacts. Each
asks one question at a time and tries again for as long as it takes, with growing, jittered pauses; one that gets
through wakes the others. Only the director's word ends it: it has everything, the claim is another's, the token is not
valid (any more), or the process at the other end of the pipe is gone.

What happens is handed to ``notify`` as items, from these threads; the supervisor's loop takes them up. Nothing is
shipped that is not synced, and nothing at all while shipping is held; journal and artifacts wait on disk meanwhile.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fieldlab_common import errors as e
from fieldlab_common.events import Event
from fieldlab_common.protocol import Ack, BlobStatus, Claim, ClaimRequest, Lane, Poll, Refusal
from fieldlab_common.wire import dumps

from fieldlab_executor.journal import Batch, Journal, JournalError
from fieldlab_executor.recall import Recall, Recalled
from fieldlab_executor.transport import (
    Answer,
    FileBody,
    FileFault,
    PipeClosed,
    Transport,
    interpret,
)

__all__ = [
    "Acked",
    "ArtifactFailed",
    "ArtifactStored",
    "CancelArrived",
    "ClockOffset",
    "EventsArrived",
    "Item",
    "Link",
    "LinkFailed",
    "Pace",
    "Traffic",
    "pause",
]

T = TypeVar("T")

_FATAL = (e.ClaimRefused, e.AuthenticationError, PipeClosed)
# What no second try changes, of the questions that a run begins with.
_FINAL = (*_FATAL, e.ProtocolMismatch, e.PermissionDenied, e.NotFound, e.InvalidRequest)
MISMATCHES = 3  # so often the bytes of an artifact may arrive as others; then the file was changed
SMALLEST_BATCH = 4096
LONG_RECORD = 64 * 1024  # bytes: one that is shorter gets through any proxy that is meant to let requests through
CLOSING = 2.0  # seconds for the threads to end
LONGEST_ASKED = 60.0  # seconds that a director may ask to be left alone


# --- what it tells ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EventsArrived:
    """Events of the experiment, in order; everything up to ``cursor`` is known now."""

    events: tuple[Event, ...]
    cursor: int


@dataclass(frozen=True, kw_only=True)
class CancelArrived:
    """The order to stop. It comes once."""

    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Acked:
    """The director has everything up to ``number`` of the lane, but the records that it refused."""

    lane: Lane
    number: int
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ArtifactStored:
    """The director has all bytes."""

    sha256: str


@dataclass(frozen=True, kw_only=True)
class ArtifactFailed:
    """It will never be stored. Journal an ``artifact_lost`` record, then call ``Link.forget``."""

    sha256: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class LinkFailed:
    """The link has ended for good."""

    error: e.FieldlabError


Item = EventsArrived | CancelArrived | Acked | ArtifactStored | ArtifactFailed | LinkFailed


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Times in seconds, sizes in bytes.

    A failed request is tried again after a random part of ``first`` times 2 for each failure, at most ``most``. A poll
    is held ``wait``; an answer has ``timeout`` to come. ``bulk_every``: between two uploads of few logs; ``heartbeat``:
    between two polls, answered at once, while shipping is held; ``idle``: between two polls that bring nothing at once.
    """

    first: float = 0.2
    most: float = 15.0
    wait: float = 25.0
    timeout: float = 30.0
    bulk_every: float = 0.5
    heartbeat: float = 30.0
    idle: float = 2.0
    batch: int = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What control cost so far: bytes on the line (both ways) and requests. Logs, blobs and artifacts are not in it."""

    bytes: int = 0
    requests: int = 0


@dataclass(frozen=True, kw_only=True)
class ClockOffset:
    """What to add to this node's clock to get the director's, right within ``bound`` seconds."""

    offset: float
    bound: float


class _Stopped(Exception):
    """The link was closed: whoever waits in it stops."""


@dataclass(eq=False)
class _Upload:
    sha256: str
    path: str
    size: int
    number: int  # of the control record that announced it
    mismatches: int = 0
    done: bool = False
    failed: bool = False


def _chance() -> float:
    return int.from_bytes(os.urandom(4), "big") / 2**32


def pause(pace: Pace, failures: int, chance: float, asked: object = None) -> float:
    """Seconds until the next try after so many failed ones, of a line that may be away for days.

    ``chance``, from 0 to 1, spreads those who lost the director at the same time; ``asked``: for so long, or longer,
    the director would be left alone (Retry-After).
    """
    delay = min(pace.most, pace.first * 2.0 ** min(failures, 30)) * chance
    return max(delay, min(float(asked), LONGEST_ASKED)) if isinstance(asked, int | float) else delay


class Link:
    """Speaks for one journal. ``notify`` is called from other threads; ``chance`` gives numbers from 0 to 1."""

    def __init__(
        self,
        transport: Transport,
        journal: Journal,
        notify: Callable[[Item], object],
        *,
        pace: Pace | None = None,
        chance: Callable[[], float] = _chance,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._transport = transport
        self._journal = journal
        self._notify = notify
        self._pace = pace or Pace()
        self._chance = chance
        self._clock = clock
        self._wall = wall
        lock = threading.RLock()
        self._cond = threading.Condition(lock)  # whatever changes
        self._news = {lane: threading.Condition(lock) for lane in Lane}  # a lane was synced: its thread alone is woken
        self._closed = False
        self._error: e.FieldlabError | None = None
        self._held = False
        self._silent = False
        self._draining = False
        self._recoveries = 0  # counted whenever a request got through again
        self._at = {lane: journal.acked(lane) for lane in Lane}  # what was acknowledged: where the next batch begins
        self._batch = dict.fromkeys(Lane, self._pace.batch)
        self._uploads: dict[str, _Upload] = {}
        self._cursor = 0
        self._recall = Recall()  # of the poll that is open, and of the upload that goes on
        self._cancelled = False
        self._control_bytes = 0
        self._requests = 0
        self._offset: ClockOffset | None = None
        self._threads: list[threading.Thread] = []
        journal.listen(self._synced)

    # --- at the start: calls that wait

    def claim(self, request: ClaimRequest, *, timeout: float) -> Claim:
        """Claim the deployment, trying for ``timeout`` seconds.

        Raises:
            ClaimRefused, AuthenticationError, ProtocolMismatch: at once. Any other DirectorError: after the time.
        """

        def ask() -> Claim:
            before = self._wall()
            claim: Claim = self._ask("claim", body=dumps(request))
            self._compare_clocks(before, self._wall(), claim.server_time)
            return claim

        claim = self._insist(ask, _FINAL, self._clock() + timeout)
        for lane, number in ((Lane.CONTROL, claim.control), (Lane.BULK, claim.bulk)):
            self._journal.acknowledge(lane, number)
            self._at[lane] = number
        return claim

    def fetch_blob(self, digest: str, to: str, *, timeout: float) -> None:
        """Have the blob in the file ``to``, verified; a cut download goes on where it was cut. No-op if it is there.

        Raises:
            BlobMismatch: the director's bytes have another SHA-256. NotFound: at once. OSError: the disk.
            Any other DirectorError: after the time.
        """
        if os.path.exists(to):
            return
        deadline = self._clock() + timeout
        part = f"{to}.{os.getpid()}.part"
        self._insist(lambda: self._download(digest, part), _FINAL, deadline)
        found = _sha256(part)
        if found != digest:
            os.unlink(part)
            raise e.BlobMismatch(f"The bytes that came for blob {digest} have the SHA-256 {found}.")
        os.replace(part, to)

    # --- while it runs

    def start(self, cursor: int = 0) -> None:
        """Begin to ship, and to listen for events after ``cursor``."""
        self._cursor = cursor
        jobs: dict[str, Callable[[], None]] = {
            "control": lambda: self._ship(Lane.CONTROL),
            "bulk": lambda: self._ship(Lane.BULK),
            "poll": self._listen,
            "artifacts": self._send_artifacts,
        }
        for name, job in jobs.items():
            thread = threading.Thread(target=self._run, args=(job,), name=f"link-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def hold(self, on: bool, *, silent: bool = False) -> None:
        """Stop shipping, or go on. Polls become a heartbeat meanwhile; with ``silent`` there are none."""
        with self._cond:
            self._held, self._silent = on, on and silent
            recall, self._recall = self._recall, Recall()
            self._wake_all()
        if on:
            recall.now()  # a poll that is open would be answered amid the measurement, an upload go on

    def upload(self, sha256: str, path: str, size: int, number: int) -> None:
        """Send the file once control record ``number``, which announces it, is acknowledged. Twice is once."""
        with self._cond:
            if sha256 not in self._uploads:
                self._uploads[sha256] = _Upload(sha256, path, size, number)
                self._cond.notify_all()

    def forget(self, sha256: str) -> None:
        """Stop waiting for an artifact: its loss is in the journal."""
        with self._cond:
            self._uploads.pop(sha256, None)
            self._cond.notify_all()

    @property
    def drained(self) -> bool:
        """Whether the director has all of the journal, and every artifact that was not forgotten."""
        with self._cond:
            # Not what was ever acknowledged: a director that was restored from a backup has less again.
            lanes = all(self._at[lane] >= self._journal.written(lane) for lane in Lane)
            return lanes and all(upload.done for upload in self._uploads.values())

    def release(self) -> None:
        """From now on nothing is held: the deployment has ended."""
        with self._cond:
            self._draining = True
            self._wake_all()

    def drain(self, timeout: float) -> bool:
        """Ship everything, held or not; False when that took longer than ``timeout`` seconds, or the link failed."""
        self.release()
        try:
            self._journal.sync(timeout)
        except JournalError as error:
            self._fail(error)
        with self._cond:
            self._cond.wait_for(lambda: self._closed or self._error is not None or self.drained, timeout)
        return self.drained

    def close(self) -> None:
        """End all threads and connections."""
        with self._cond:
            self._closed = True
            self._wake_all()
        self._transport.close()
        deadline = self._clock() + CLOSING
        for thread in self._threads:  # one that is just dialling cannot be woken; it ends with the process
            thread.join(max(0.0, deadline - self._clock()))

    @property
    def traffic(self) -> Traffic:
        """What control cost so far."""
        with self._cond:
            return Traffic(bytes=self._control_bytes, requests=self._requests)

    @property
    def clock_offset(self) -> ClockOffset | None:
        """The best comparison of clocks so far; None before the claim."""
        return self._offset

    # --- asking

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except _Stopped:
            return
        except e.Drained:
            self._everything_arrived()
        except e.FieldlabError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - the end of a thread: what nobody foresaw must reach the loop, not vanish
            self._fail(e.InternalError(f"The link failed: {type(error).__name__}: {error}."))

    def _everything_arrived(self) -> None:
        """The director has it all, and only its last answer got lost: the token ended with that."""
        for lane in Lane:
            self._journal.acknowledge(lane, self._journal.written(lane))
        with self._cond:
            self._at = {lane: self._journal.acked(lane) for lane in Lane}
            for upload in self._uploads.values():
                upload.done = True
            self._wake_all()

    def _fail(self, error: e.FieldlabError) -> None:
        with self._cond:
            first = self._error is None
            self._error = self._error or error
            self._wake_all()
        if first and not self._closed:
            self._notify(LinkFailed(error=error))

    def _ask(
        self,
        endpoint: str,
        *,
        path: dict[str, str] | None = None,
        query: dict[str, str | int | float] | None = None,
        body: bytes | FileBody | None = None,
        timeout: float | None = None,
        control: bool = True,
        recall: Recall | None = None,
    ) -> Any:
        answer = self._transport.request(
            endpoint, path=path, query=query, body=body, timeout=timeout or self._pace.timeout, recall=recall
        )
        if control:
            self._count(answer)
        return interpret(endpoint, answer)

    def _count(self, answer: Answer) -> None:
        with self._cond:
            self._control_bytes += answer.sent + answer.received
            self._requests += 1

    def _insist(
        self, ask: Callable[[], T], final: tuple[type[e.FieldlabError], ...], deadline: float | None = None
    ) -> T:
        """Ask until there is an answer, or one of the ``final`` errors, or the time is up."""
        failures = 0
        while True:
            try:
                value = ask()
            except final:
                raise
            except e.DirectorError as error:
                self._pause(failures, error, deadline)
                failures += 1
                continue
            if failures:
                with self._cond:
                    self._recoveries += 1
                    self._cond.notify_all()
            return value

    def _pause(self, failures: int, error: e.DirectorError, deadline: float | None) -> None:
        delay = pause(self._pace, failures, self._chance(), error.details.get("retry_after"))
        if deadline is not None and self._clock() + delay > deadline:
            raise error
        with self._cond:
            seen = self._recoveries
            self._cond.wait_for(lambda: self._stopping or self._recoveries != seen, delay)
            if self._stopping and deadline is not None:
                raise error
            if self._stopping:
                raise _Stopped

    @property
    def _stopping(self) -> bool:
        return self._closed or self._error is not None

    def _wait(self, ready: Callable[[], bool], timeout: float | None = None, lane: Lane | None = None) -> None:
        cond = self._cond if lane is None else self._news[lane]
        with cond:
            cond.wait_for(lambda: self._stopping or ready(), timeout)
            if self._stopping:
                raise _Stopped

    def _wake_all(self) -> None:
        for cond in (self._cond, *self._news.values()):
            cond.notify_all()

    def _synced(self, lane: Lane, number: int) -> None:
        with self._news[lane]:
            self._news[lane].notify_all()

    @property
    def _holding(self) -> bool:
        return self._held and not self._draining

    # --- up: records

    def _ship(self, lane: Lane) -> None:
        while True:
            self._wait(lambda: not self._holding and self._journal.synced(lane) > self._at[lane], lane=lane)
            self._insist(lambda: self._ship_batch(lane), _FATAL)
            if lane is Lane.BULK and not self._journal.behind(lane, self._at[lane]):
                self._wait(lambda: self._draining, self._pace.bulk_every)

    def _ship_batch(self, lane: Lane) -> None:
        if self._holding:  # since it was tried before
            return
        before = self._at[lane]
        batch = self._journal.read(lane, before, self._batch[lane])
        if batch is None:
            return
        query: dict[str, str | int | float] = {"lane": lane.value, "journal": self._journal.id}
        control = lane is Lane.CONTROL
        try:
            ack: Ack = self._ask("report", query=query, body=batch.body, control=control)
        except e.TooLarge:  # a proxy's limit, for the director's own is far above
            self._batch[lane] = max(SMALLEST_BATCH, len(batch.body) // 2)
            if batch.first != batch.last or len(batch.body) < LONG_RECORD:
                raise
            # Nothing that follows can pass it: it is given up, and the director says so to its step, or in the log.
            ack = self._ask("report", query=query, body=self._journal.instead(lane, batch.last).body, control=control)
        self._acknowledged(lane, batch, ack)
        if ack.acked < before:
            self._begin_again(lane)
        if ack.acked <= before:
            raise e.BadAnswer(f"The director acknowledged {ack.acked} of lane {lane.value} again, and nothing more.")

    def _acknowledged(self, lane: Lane, batch: Batch, ack: Ack) -> None:
        self._journal.acknowledge(lane, ack.acked)
        with self._cond:
            self._at[lane] = min(ack.acked, batch.last)
            for sha256 in ack.missing:
                if (upload := self._uploads.get(sha256)) is not None:
                    upload.done = False  # the director was restored from before it had it
            self._cond.notify_all()
        self._notify(Acked(lane=lane, number=ack.acked, refusals=ack.refusals))

    def _begin_again(self, found: Lane) -> None:
        """Send the other lane from where the disk has it: the director lacks what it once acknowledged of ``found``.

        It was restored from a backup. What it still has it passes over; what it lacks it would not ask for when nothing
        new is to come.
        """
        with self._cond:
            for lane in Lane:
                if lane is not found:
                    self._at[lane] = min(self._at[lane], self._journal.begins(lane))
            self._wake_all()

    # --- down: events, and the order to stop

    def _listen(self) -> None:
        while True:
            self._wait(lambda: not (self._silent and self._holding))
            began = self._clock()
            try:
                poll = self._insist(self._poll, _FATAL)
            except Recalled:
                continue
            news = bool(poll.events) or (poll.cancel is not None and not self._cancelled)
            if poll.events:
                self._notify(EventsArrived(events=poll.events, cursor=poll.cursor))
            if poll.cancel is not None and not self._cancelled:
                self._cancelled = True
                self._notify(CancelArrived(reason=poll.cancel.reason))
            if self._holding:
                self._wait(lambda: not self._holding, self._pace.heartbeat - (self._clock() - began))
            elif not news and self._clock() - began < self._pace.idle:
                self._wait(lambda: False, self._pace.idle)

    def _poll(self) -> Poll:
        with self._cond:
            recall = self._recall
            wait = 0.0 if self._holding else self._pace.wait  # no event comes in amid a measurement
        query: dict[str, str | int | float] = {"after": self._cursor, "wait": wait, "journal": self._journal.id}
        before = self._wall()
        poll: Poll = self._ask("poll", query=query, timeout=self._pace.wait + self._pace.timeout, recall=recall)
        self._compare_clocks(before, self._wall(), poll.server_time)
        self._cursor = max(self._cursor, poll.cursor)
        return poll

    def _compare_clocks(self, before: float, after: float, server: float) -> None:
        bound = (after - before) / 2
        if server and bound >= 0 and (self._offset is None or bound < self._offset.bound):
            self._offset = ClockOffset(offset=server - (before + after) / 2, bound=bound)

    # --- blobs

    def _download(self, digest: str, part: str) -> None:
        start = os.path.getsize(part) if os.path.exists(part) else 0
        with open(part, "r+b" if start else "wb") as file:
            answer = self._transport.request(
                "get_blob",
                path={"digest": digest},
                timeout=self._pace.timeout,
                start=start,
                sink=lambda offset, block: (file.seek(offset), file.write(block)),
            )
            if answer.status not in (200, 206):
                if answer.status == 416:  # it was whole already, or is not what it should be; its hash will tell
                    return
                interpret("get_blob", answer)

    def _send_artifacts(self) -> None:
        while True:
            self._wait(lambda: not self._holding and self._next_upload() is not None)
            with self._cond:
                upload = self._next_upload()
            if upload is None:
                continue
            self._send_artifact(upload)

    def _send_artifact(self, upload: _Upload) -> None:
        final = (*_FATAL, e.NotFound, e.TooLarge, e.BlobMismatch, FileFault, e.InvalidRequest)
        try:
            self._insist(lambda: self._send(upload), final)
        except _FATAL:
            raise
        except Recalled:  # it goes on from where it is when nothing is measured any more
            return
        except e.BlobMismatch as error:
            upload.mismatches += 1
            if upload.mismatches >= MISMATCHES:
                self._give_up(upload, error)
        except e.FieldlabError as error:
            self._give_up(upload, error)

    def _next_upload(self) -> _Upload | None:
        acked = self._at[Lane.CONTROL]
        wanted = (u for u in self._uploads.values() if not u.done and not u.failed and u.number <= acked)
        return next(wanted, None)

    def _send(self, upload: _Upload) -> None:
        with self._cond:
            if self._holding:
                return
            recall = self._recall
        path = {"digest": upload.sha256}
        status: BlobStatus = self._ask("blob_status", path=path, control=False, recall=recall)
        while not status.complete:
            if _size(upload.path) != upload.size:
                raise FileFault(f"{upload.path} is no longer the {upload.size} bytes that were announced.")
            body = FileBody(
                path=upload.path, offset=status.offset, size=min(self._transport.chunk, upload.size - status.offset)
            )
            query: dict[str, str | int | float] = {"offset": status.offset, "size": upload.size}
            status = self._ask("put_blob", path=path, query=query, body=body, control=False, recall=recall)
        with self._cond:
            upload.done = True
            self._cond.notify_all()
        self._notify(ArtifactStored(sha256=upload.sha256))

    def _give_up(self, upload: _Upload, error: e.FieldlabError) -> None:
        with self._cond:
            upload.failed = True
        self._notify(ArtifactFailed(sha256=upload.sha256, reason=str(error)))


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise FileFault(f"{path} cannot be read: {error}.") from error


def _sha256(path: str) -> str:
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

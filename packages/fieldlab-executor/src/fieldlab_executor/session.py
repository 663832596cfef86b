"""The executor's life: claim, fetch, prepare, run, report, drain. Here all parts are put together, and only here.

Its folder is its own for as long as it holds ``lock`` (flock): that lock is its sign of life for whoever looks at the
node. What takes time at the start is done in a thread, so that an order to stop is heard from the first moment.
The spawner is started before anything is known of the deployment, on this very interpreter: most often it is
the right one, and is then warm when the claim has come.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fieldlab_common.deployment import Graph
from fieldlab_common.environment import Host
from fieldlab_common.errors import AuthenticationError, ClaimRefused, FieldlabError
from fieldlab_common.events import START, Event
from fieldlab_common.lifecycle import DeploymentState, Reason
from fieldlab_common.protocol import (
    PROTOCOLS,
    ArtifactLost,
    Claim,
    ClaimRequest,
    Ended,
    Lane,
    Launch,
    Ready,
    environment_of,
)
from fieldlab_common.wire import loads

from fieldlab_executor import boot, processes
from fieldlab_executor.journal import Journal
from fieldlab_executor.link import (
    Acked,
    ArtifactFailed,
    ArtifactStored,
    CancelArrived,
    EventsArrived,
    Item,
    Link,
    LinkFailed,
)
from fieldlab_executor.loop import Loop
from fieldlab_executor.supervisor import Finished, Supervisor
from fieldlab_executor.transport import Transport
from fieldlab_executor.uploads import Upload, Uploads

if TYPE_CHECKING:
    from fieldlab_executor.environments import Made

__all__ = ["FAILED", "REFUSED", "UNSHIPPED", "Busy", "Session", "drain", "locked"]

FAILED, REFUSED, UNSHIPPED = 1, 3, 4  # exit codes; 0: everything is with the director, 2: bad usage
CLAIM_SECONDS = 600.0
FETCH_SECONDS = 3600.0
PREPARE_GRACE = 60.0  # for what makes an environment to end by itself, when its time is over
DRAIN_SECONDS = 6 * 3600.0
MOST_BOUND = 3600.0  # seconds: a clock that was never compared
SWITCH_SECONDS = 0.001  # that a thread keeps the interpreter at most while another wants it
HURRY_SECONDS = 10.0  # to ship what is left, once the executor was told to stop


class Busy(FieldlabError):
    """Another executor holds the folder."""

    code = "folder_in_use"


def locked(folder: Path) -> int:
    """Lock the folder for this process's life; the descriptor that holds the lock.

    Raises:
        Busy: another process holds it.
    """
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise Busy(f"An executor runs in {folder} already.") from None
    return fd


class _Ready:
    """What the first part of a run found: the claim, the graph, and the environment to run in; None: as this is."""

    def __init__(self, claim: Claim, graph: Graph, made: Made | None) -> None:
        self.claim, self.graph, self.made = claim, graph, made


class Session:
    """One run of the executor in ``folder``; ``site`` has the modules for its children."""

    def __init__(self, folder: Path, launch: Launch, transport: Callable[[], Transport], site: Path) -> None:
        self._folder = folder
        self._launch = launch
        self._site = str(site)
        self._loop = Loop()
        self._code = 0
        self._told_to_stop = False
        self._claimed = False
        self._ended = False
        self._waits = False  # for the order to begin
        self._order: float | None = None  # when to begin, by the director's clock
        self._made: Made | None = None
        self._builders_cpu = 0.0
        self._steps: dict[int, str] = {}  # control records that were not acknowledged: of which step
        self._watch_signals()
        processes.become_subreaper()
        env = {**os.environ, "FIELDLAB_DEPLOYMENT": f"{launch.experiment}/{launch.deployment}"}
        self._supervisor = Supervisor(
            folder,
            self._loop,
            env,
            append=self._append,
            announce=self._announce,
            hurry=lambda: self._journal.hurry(Lane.CONTROL),
            hold=self._hold,
            done=self._finished,
        )
        self._supervisor.warm_up(sys.executable, self._site)  # before there are threads: it forks
        self._journal = Journal(str(folder / "journal"))
        self._supervisor.journal_id = self._journal.id
        self._uploads = Uploads(folder / "uploads")
        self._link = Link(transport(), self._journal, lambda item: self._loop.call(lambda: self._heard(item)))

    def run(self) -> int:
        """Run the deployment; the exit code."""
        # An event has several threads on its way, and each may have to wait so long for one that handles output.
        sys.setswitchinterval(SWITCH_SECONDS)
        threading.Thread(target=self._set_out, name="start", daemon=True).start()
        try:
            self._loop.run()
        finally:
            self._supervisor.stop()
            self._link.close()
            self._journal.close()
            if self._made is not None:
                self._made.close()
        return self._code

    # --- the beginning, in its own thread

    def _set_out(self) -> None:
        try:
            claim = self._link.claim(
                ClaimRequest(
                    journal_id=self._journal.id,
                    epoch=self._launch.epoch,
                    protocols=PROTOCOLS,
                    python=_version(3),
                    pid=os.getpid(),
                ),
                timeout=CLAIM_SECONDS,
            )
        except FieldlabError as error:
            self._loop.call(lambda error=error: self._not_claimed(error))  # type: ignore[misc]
            return
        self._claimed = True
        self._link.start()
        try:
            ready = _Ready(claim, self._fetch(claim), self._prepare(claim))
        except (FieldlabError, OSError) as error:
            self._loop.call(lambda error=error: self._not_prepared(claim, error))  # type: ignore[misc]
            return
        self._loop.call(lambda: self._begin(ready))

    def _fetch(self, claim: Claim) -> Graph:
        blobs = self._folder / "blobs"
        blobs.mkdir(exist_ok=True)
        for digest in (claim.deployment.graph, *claim.deployment.blobs):
            self._link.fetch_blob(digest, str(blobs / digest), timeout=FETCH_SECONDS)
        return loads(Graph, (blobs / claim.deployment.graph).read_bytes())

    def _prepare(self, claim: Claim) -> Made | None:
        """The environment; one that is not there is made, and what its builders say stands in the deployment's log."""
        environment, python = environment_of(claim.deployment.environment), claim.deployment.python
        if environment == Host() and python in ("", _version(2)):
            return None  # most often; nothing has to be loaded for it
        from fieldlab_executor import environments

        found = environments.find(environment, python=python)
        if found is None:
            from fieldlab_executor import preparing

            command = boot.command(sys.executable, self._site)
            preparation = preparing.Preparation(command, environment, python, self._remark)
            preparation.wait(environments.BUILD_SECONDS + PREPARE_GRACE)
            found = environments.find(environment, python=python)
        if found is None:
            raise environments.PrepareFailed("The environment was made, and was gone when it was to be used.")
        return found

    def _remark(self, line: str) -> None:
        self._loop.call(lambda: self._supervisor.remark(line))

    def _not_claimed(self, error: FieldlabError) -> None:
        refused = isinstance(error, ClaimRefused | AuthenticationError)
        self._leave(REFUSED if refused else FAILED, "" if isinstance(error, ClaimRefused) else str(error))

    def _not_prepared(self, claim: Claim, error: FieldlabError | OSError) -> None:
        if self._ended:
            return
        message = str(error)
        self._supervisor.stop()
        self._finish(DeploymentState.FAILED, Reason.PREPARE_FAILED, message)

    def _begin(self, ready: _Ready) -> None:
        if self._ended:
            return
        made = self._made = ready.made
        self._builders_cpu = _cpu(resource.RUSAGE_CHILDREN)
        self._supervisor.warm_up(made.python if made else sys.executable, self._site, made.variables if made else None)
        offset = self._link.clock_offset
        clock = (offset.offset, offset.bound) if offset is not None else (0.0, float("inf"))
        self._supervisor.load(ready.claim, ready.graph, clock)
        if ready.claim.start_at is not None:
            self._begin_at(ready.claim.start_at)
        elif self._order is not None:  # it came before everything was here
            self._begin_at(self._order)
        else:
            self._waits = True
            self._supervisor.record("ready", Ready(bound=min(clock[1], MOST_BOUND)))

    def _ordered(self, event: Event) -> None:
        """All of the run begin together, at the time that the event says."""
        at = event.data.get("at") if isinstance(event.data, dict) else None
        self._order = float(at) if isinstance(at, int | float) else 0.0
        if self._waits:
            self._waits = False
            self._begin_at(self._order)

    def _begin_at(self, at: float) -> None:
        """Begin when the director's clock, as far as it is known here, shows ``at``; at once if that is past."""
        offset = self._link.clock_offset
        seconds = at - (time.time() + (offset.offset if offset is not None else 0.0))
        if seconds > 0:
            self._loop.after(seconds, self._begin_now)
        else:
            self._begin_now()

    def _begin_now(self) -> None:
        if not self._ended:
            self._supervisor.begin()

    # --- what the link says

    def _heard(self, item: Item) -> None:
        match item:
            case EventsArrived(events=events):
                self._supervisor.events(events)
                for event in events:
                    if event.name == START:
                        self._ordered(event)
            case CancelArrived(reason=reason):
                self._cancelled(reason)
            case Acked(lane=Lane.CONTROL, number=number, refusals=refusals):
                for refusal in refusals:
                    if step := self._steps.get(refusal.number):
                        self._supervisor.refused(step, refusal.message)
                for known in [n for n in self._steps if n <= number]:
                    del self._steps[known]
            case ArtifactStored(sha256=sha256):
                self._uploads.settle(sha256)
            case ArtifactFailed(sha256=sha256, reason=reason):
                self._lost(sha256, reason)
            case LinkFailed(error=error):
                self._link_failed(error)

    def _cancelled(self, reason: str) -> None:
        if self._supervisor.running:
            self._supervisor.cancel(reason)
        elif not self._ended:  # it was still preparing: what it had started goes down with it
            self._supervisor.stop()
            self._finish(DeploymentState.CANCELLED, Reason.CANCELLED, reason or "It was cancelled.")

    def _lost(self, sha256: str, reason: str) -> None:
        upload = self._uploads.settle(sha256)
        if upload is not None:
            lost = ArtifactLost(step=upload.step, name=upload.name, reason=reason, sha256=sha256)
            self._supervisor.record("artifact_lost", lost)
        self._link.forget(sha256)

    def _link_failed(self, error: FieldlabError) -> None:
        """Nobody will take our reports any more: end, and leave the journal where it is."""
        self._code = REFUSED if isinstance(error, ClaimRefused) else UNSHIPPED
        if self._supervisor.running:
            self._supervisor.terminate(f"The link to the director ended: {error.message}")
        else:
            self._leave(self._code, str(error))

    # --- what the supervisor asks

    def _append(self, lane: Lane, records: Sequence[bytes], steps: Sequence[str]) -> int:
        last = self._journal.append(lane, *records)
        if lane is Lane.CONTROL:
            first = last - len(records) + 1
            self._steps.update((number, step) for number, step in enumerate(steps, first) if step)
        return last

    def _announce(self, upload: Upload) -> None:
        self._uploads.add(upload)
        self._link.upload(upload.sha256, upload.path, upload.size, upload.number)

    def _hold(self, on: bool, silent: bool) -> None:
        self._link.hold(on, silent=silent)

    def _finished(self, finished: Finished) -> None:
        if finished.cancel is not None:
            self._supervisor.record("cancel", finished.cancel)
        self._finish(finished.finish.state, finished.finish.reason, finished.finish.message)

    # --- the end

    def _finish(self, state: DeploymentState, reason: Reason, message: str) -> None:
        self._ended = True
        traffic = self._link.traffic
        ended = Ended(
            state=state,
            reason=reason,
            message=message,
            bulk=self._journal.written(Lane.BULK),
            control_bytes=traffic.bytes,
            requests=traffic.requests,
            cpu=round(_own_cpu() - self._builders_cpu - self._supervisor.steps_cpu, 3),
        )
        self._supervisor.record("ended", ended)
        if self._code:
            self._leave(self._code, "")
            return
        seconds = HURRY_SECONDS if self._told_to_stop else DRAIN_SECONDS
        threading.Thread(target=self._drain, args=(seconds,), name="drain", daemon=True).start()

    def _drain(self, seconds: float) -> None:
        done = self._link.drain(seconds)
        self._loop.call(lambda: self._leave(0 if done else UNSHIPPED, ""))

    def _leave(self, code: int, message: str) -> None:
        if message:
            sys.stderr.write(message + "\n")
        self._ended = True
        self._code = self._code or code
        self._loop.stop()

    def _watch_signals(self) -> None:
        signal.set_wakeup_fd(self._loop.waker, warn_on_full_buffer=False)

        def stop(number: int, frame: Any) -> None:
            self._loop.call(lambda: self._stop(signal.Signals(number).name))

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, stop)

    def _stop(self, name: str) -> None:
        self._told_to_stop = True
        if self._supervisor.running:
            self._supervisor.terminate(f"The executor got {name}.")
        elif self._ended:  # it drains
            self._loop.after(HURRY_SECONDS, lambda: self._leave(UNSHIPPED, ""))
        elif not self._claimed:  # there is nothing to report, and nobody who would take it
            self._supervisor.stop()
            self._leave(FAILED, f"The executor got {name} before it had its deployment.")
        else:
            self._supervisor.stop()
            self._finish(DeploymentState.FAILED, Reason.TERMINATED, f"The executor got {name} before it began.")


def _version(parts: int) -> str:
    return ".".join(map(str, sys.version_info[:parts]))


def _own_cpu() -> float:
    """CPU seconds of this process, and of those that it waited for."""
    return _cpu(resource.RUSAGE_SELF) + _cpu(resource.RUSAGE_CHILDREN)


def _cpu(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def drain(folder: Path, transport: Callable[[], Transport], seconds: float = DRAIN_SECONDS) -> int:
    """Ship what a dead executor left in its folder; the exit code."""
    journal = Journal(str(folder / "journal"))
    uploads = Uploads(folder / "uploads")
    refused: list[FieldlabError] = []

    def heard(item: Item) -> None:
        if isinstance(item, ArtifactStored):
            uploads.settle(item.sha256)
        elif isinstance(item, ArtifactFailed):
            link.forget(item.sha256)  # it stays in the list: the director will say that it never came
        elif isinstance(item, LinkFailed):
            refused.append(item.error)

    link = Link(transport(), journal, heard)
    for upload in uploads:
        link.upload(upload.sha256, upload.path, upload.size, upload.number)
    link.start()
    try:
        done = link.drain(seconds)
    finally:
        link.close()
        journal.close()
    if refused:
        return REFUSED
    return 0 if done else UNSHIPPED

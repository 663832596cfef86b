"""What the director does next for a deployment: a function of its arguments.

``decide`` gets what is stored of a deployment (``Standing``), what was just seen of it (``Seen``) and the time, and
says one thing: move it, launch it under a new epoch, give the connector a job, or look again later. The reconcile loop
carries that out and asks again, until the answer is a job or a time. A move to ``launching`` goes under the next epoch,
committed with it. What becomes of the experiment is decided in ``fieldlab_common.course``.

Invariants: nothing here acts, waits or reads a clock. What was seen is a hint that may be forgotten at any moment
(the director may die): from what is stored alone, the same end is reached. A job is one that may be done twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fieldlab_common.course import CLAIM_SECONDS, LAUNCHES, NEVER, SILENCE_SECONDS, Look, Move, after_silence
from fieldlab_common.lifecycle import DeploymentState, Reason
from fieldlab_common.protocol import Ended

__all__ = [
    "NEVER",
    "Action",
    "Do",
    "Failure",
    "Job",
    "Look",
    "Move",
    "Patience",
    "Relaunch",
    "Seen",
    "Standing",
    "backoff",
    "decide",
]


class Job(StrEnum):
    """What a connector can be told to do for a deployment."""

    PREPARE = "prepare"  # make its environment
    LAUNCH = "launch"  # start the executor of the present epoch
    STOP = "stop"  # end the executor, by force if it must be
    DRAIN = "drain"  # ship what the journal of a dead executor still holds
    CLEAN_UP = "clean_up"  # remove all that is left of it on the node


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The job that was just tried failed. ``transient``: trying again can help. ``log``: what programs said."""

    job: Job
    message: str
    transient: bool = True
    log: str = ""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long what is waited for, in seconds, and how often what fails is tried."""

    silence: float = SILENCE_SECONDS  # an executor that was not heard of for so long is unreachable
    claim: float = CLAIM_SECONDS  # a launched executor claims its deployment within
    launches: int = LAUNCHES  # epochs that are tried before the launch has failed
    attempts: int = 6  # tries of a job that fails for a passing reason
    drains: int = 3  # tries to drain before the deployment ends without
    cancel: float = 20.0  # an executor that was told to cancel ends by itself within (a grace of 10, and 10 more)
    cancel_for: float = 300.0  # a node that cannot be reached is given up by a cancel after
    drain_for: float = 7 * 86400.0  # what is left on a node waits so long for its delivery
    settle: float = 300.0  # an ended deployment whose delivery is under way is looked at so often
    idle: float = 3600.0  # rows that only a change can move are looked at anyway


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What is stored of a deployment.

    ``granted``: its run has its nodes; until then nothing is done on them.
    ``launched``: when the connector confirmed the launch of the present epoch, or since when its executor does not
    wait for its turn any more; or None. ``claimed``: an executor of
    the present epoch has it. ``present``: something of it may be on the node. ``go``: its experiment runs.
    ``ending``: what the executor said last; ``awaited``: artifacts that it announced are still to come.
    """

    state: DeploymentState
    since: float = 0.0
    granted: bool = True
    epoch: int = 0
    prepared: bool = False
    launched: float | None = None
    claimed: bool = False
    present: bool = False
    attempts: int = 0
    cancelled: float | None = None
    cancel_reason: str = ""
    go: bool = False
    ending: Ended | None = None
    awaited: bool = False
    drained: bool = False
    lost_after: float = 6 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was seen just now. ``gone``: no executor of the present epoch runs; false also when that is not known.

    ``queued``: its executor waits for its turn with the engine, and for what; None if not, or not known.
    ``silent``: seconds without a word, of those in which the director served, which are ``served``. ``tail``: the last
    lines that the executor wrote for people.
    """

    gone: bool = False
    queued: str | None = None
    silent: float = 0.0
    served: float = NEVER
    failure: Failure | None = None
    tail: str = ""

    def failed(self, job: Job) -> Failure | None:
        """The failure, if it is one of ``job``."""
        return self.failure if self.failure is not None and self.failure.job is job else None


@dataclass(frozen=True, kw_only=True)
class Relaunch:
    """Commit the next epoch: the executor of the present one will not claim its deployment any more."""


@dataclass(frozen=True, kw_only=True)
class Do:
    """Give the connector a job."""

    job: Job


Action = Move | Relaunch | Do | Look


def backoff(attempts: int, jitter: float, *, first: float = 1.0, most: float = 60.0) -> float:
    """Seconds until the next try after ``attempts`` failed ones: doubled each time, and spread by ``jitter`` (0 to 1).

    Half of it is fixed and half random, so that a thousand deployments do not come back at once.
    """
    full = min(most, first * 2.0 ** min(max(attempts - 1, 0), 30))
    return full * (0.5 + 0.5 * jitter)


def decide(row: Standing, seen: Seen, now: float, *, jitter: float = 0.5, patience: Patience | None = None) -> Action:
    """The next thing to do for a deployment."""
    case = _Case(row, seen, now, jitter, patience or Patience())
    if row.state.terminal:
        return case.after_end()
    return {
        DeploymentState.PENDING: case.pending,
        DeploymentState.PREPARING: case.preparing,
        DeploymentState.READY: case.ready,
        DeploymentState.LAUNCHING: case.launching,
        DeploymentState.RUNNING: case.running,
        DeploymentState.UNREACHABLE: case.running,
    }[row.state]()


@dataclass(frozen=True)
class _Case:
    row: Standing
    seen: Seen
    now: float
    jitter: float
    patience: Patience

    def pending(self) -> Action:
        if self.row.cancelled is not None:
            return self._cancelled()
        if not self.row.granted:
            return Look(at=NEVER)
        return Move(state=DeploymentState.PREPARING)

    def preparing(self) -> Action:
        if self.row.cancelled is not None:
            return self._cancelled()
        if self.row.prepared:
            return Move(state=DeploymentState.READY)
        failure = self.seen.failed(Job.PREPARE)
        if failure is None:
            return Do(job=Job.PREPARE)
        if self._again(failure):
            return self._later()
        return Move(state=DeploymentState.FAILED, reason=Reason.PREPARE_FAILED, message=failure.message)

    def ready(self) -> Action:
        if self.row.cancelled is not None:
            return self._cancelled()
        if self.row.go:
            return Move(state=DeploymentState.LAUNCHING)
        return Look(at=self.now + self.patience.idle)

    def launching(self) -> Action:
        if self.row.cancelled is not None:
            return self._cancel_launch()
        if self.row.launched is None:
            return self._launch()
        # Whoever waits for its turn is not late; and nobody could claim while no director served.
        overdue = max(self.row.launched, self.now - self.seen.served) + self.patience.claim
        if self.seen.queued is not None:
            return Look(at=self.now + self.patience.silence)
        if self.now < overdue:
            if self.seen.gone:
                return self._launch_again("It ended before it claimed")
            return Look(at=min(overdue, self.now + self.patience.silence))
        if self.seen.gone or self.seen.failed(Job.STOP) is not None:
            return self._launch_again(f"Within {self.patience.claim:.0f} s it did not claim")
        return Do(job=Job.STOP)

    def running(self) -> Action:
        ending = self.row.ending
        if ending is not None and not self.row.awaited:
            return Move(state=ending.state, reason=ending.reason, message=ending.message)
        if self.seen.gone:
            return self._gone()
        patience, lost_after = self.patience.silence, self.row.lost_after
        quiet = after_silence(self.row.state, self.seen.silent, lost_after=lost_after, patience=patience)
        if quiet is not None:
            return quiet
        if self.row.cancelled is not None:
            return self._cancel_run(self.row.cancelled)
        return Look(at=self._next_silence())

    def after_end(self) -> Action:
        row = self.row
        if not row.present:
            return Look(at=NEVER)
        if self.seen.failure is not None and self.seen.failure.job in (Job.CLEAN_UP, Job.DRAIN):
            return self._later(most=3600.0)
        given_up = self.now >= row.since + self.patience.drain_for
        if row.drained or not row.claimed or given_up:
            return Do(job=Job.CLEAN_UP)
        if self.seen.gone:
            return Do(job=Job.DRAIN)
        return Look(at=self.now + self.patience.settle)

    # --- parts -------------------------------------------------------------------------------------------------------

    def _again(self, failure: Failure) -> bool:
        return failure.transient and self.row.attempts < self.patience.attempts

    def _later(self, most: float = 60.0) -> Look:
        return Look(at=self.now + backoff(self.row.attempts, self.jitter, most=most))

    def _cancelled(self, remark: str = "") -> Move:
        message = f"{self.row.cancel_reason} {remark}".strip()
        return Move(state=DeploymentState.CANCELLED, reason=Reason.CANCELLED, message=message)

    def _launch(self) -> Action:
        failure = self.seen.failed(Job.LAUNCH)
        if failure is None:
            return Do(job=Job.LAUNCH)
        if self._again(failure):
            return self._later()
        return Move(state=DeploymentState.FAILED, reason=Reason.LAUNCH_FAILED, message=failure.message)

    def _launch_again(self, what: str) -> Action:
        if self.row.epoch < self.patience.launches:
            return Relaunch()
        said = f" Its last lines were:\n{self.seen.tail}" if self.seen.tail else " It wrote nothing."
        message = f"The executor was started {self.row.epoch} times. {what} its deployment.{said}"
        return Move(state=DeploymentState.FAILED, reason=Reason.LAUNCH_FAILED, message=message)

    def _cancel_launch(self) -> Action:
        # A launch that was never confirmed may still have started an executor, so it is stopped in any case.
        assert self.row.cancelled is not None
        failure = self.seen.failed(Job.STOP)
        if self.seen.gone:
            return self._cancelled()
        if failure is None:
            return Do(job=Job.STOP)
        return self._stop_failed(failure, self.row.cancelled)

    def _cancel_run(self, cancelled: float) -> Action:
        failure = self.seen.failed(Job.STOP)
        if failure is not None:
            return self._stop_failed(failure, cancelled)
        if self.now < cancelled + self.patience.cancel:
            return Look(at=min(cancelled + self.patience.cancel, self._next_silence()))
        return Do(job=Job.STOP)

    def _stop_failed(self, failure: Failure, cancelled: float) -> Action:
        if self.now < cancelled + self.patience.cancel_for:
            return self._later()
        return self._cancelled(f"Whether its executor has stopped is not known: {failure.message}")

    def _gone(self) -> Action:
        failure = self.seen.failed(Job.DRAIN)
        if not self.row.drained:
            if failure is None:
                return Do(job=Job.DRAIN)
            if failure.transient and self.row.attempts < self.patience.drains:
                return self._later()
        ending = self.row.ending
        if ending is not None:  # it said how it ended; what its artifacts lack is given up with the move
            return Move(state=ending.state, reason=ending.reason, message=ending.message)
        if self.row.cancelled is not None:
            return self._cancelled()
        message = "The executor's process ended without a word; what it had journalled is kept."
        if self.seen.tail:
            message += f" Its last lines were:\n{self.seen.tail}"
        if failure is not None:
            message = f"The executor's process ended, and its journal could not be fetched: {failure.message}"
        return Move(state=DeploymentState.FAILED, reason=Reason.EXECUTOR_LOST, message=message)

    def _next_silence(self) -> float:
        # An unreachable executor may be heard of at any time, and fall silent again: it is looked at as often.
        left = [limit - self.seen.silent for limit in (self.patience.silence, self.row.lost_after)]
        return self.now + min(seconds for seconds in (*left, self.patience.silence) if seconds > 0)

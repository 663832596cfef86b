"""The transactions of the reconcile loop: what is decided, and what becomes of a row by it.

A row is leased while a job of it is under way, and what comes of the job is applied only by who still has the lease,
under the epoch for which the job was given. Decisions follow each other in the same transaction until one is a job or a
time, so that a chain of states costs one commit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fieldlab_common.course import Abandon, ExperimentStanding, decide_experiment
from fieldlab_common.lifecycle import DeploymentState, ExperimentState, Reason

from fieldlab_director import decide as d
from fieldlab_director.services.outcome import abandon, append_log, move, order
from fieldlab_director.store import queries
from fieldlab_director.store import reconcile_queries as rq
from fieldlab_director.store.base import LINE, WORK, Tx
from fieldlab_director.store.rows import DeploymentRow, ExperimentRow
from fieldlab_director.store.states import set_deployment_message, set_experiment_state

__all__ = [
    "LEASE_SECONDS",
    "Assignment",
    "Kept",
    "Outcome",
    "advance",
    "apply",
    "begin",
    "begin_many",
    "step_experiment",
]

LEASE_SECONDS = 30.0  # a worker that died is missed for so long at most
_MOST_DECISIONS = 20  # in one transaction; more would be decisions that undo each other
_ON_THE_WAY = (DeploymentState.PENDING, DeploymentState.PREPARING, DeploymentState.READY)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A job that was given: the row as it was leased, whose it is, and what is to be done."""

    job: d.Job
    row: DeploymentRow
    owner_id: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a job: ``value`` is the connector's answer. Neither failed nor done: it was interrupted."""

    done: bool = False
    value: Any = None
    failure: d.Failure | None = None


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a worker of the loop knows beside the row, for one transaction. ``lease`` is its name."""

    lease: str
    seen: d.Seen
    jitter: float
    patience: d.Patience


KeptOf = Callable[[DeploymentRow, float], Kept]  # what is known beside a row, at a time


def begin(tx: Tx, deployment_id: str, kept_of: KeptOf, *, news: bool = False) -> Assignment | None:
    """Decide for a row that is due, or of which there is ``news``: the job it was leased for, or None if none is."""
    row = tx.one(queries.DEPLOYMENT, DeploymentRow, id=deployment_id)
    if row is None or not _may_begin(row, kept := kept_of(row, tx.now), tx.now, news=news):
        return None
    return advance(tx, row, kept)


def begin_many(tx: Tx, deployment_ids: Sequence[str], kept_of: KeptOf) -> list[Assignment]:
    """The same for many that are due; the jobs that there are.

    After a restart, and on any quiet day, nearly all are only to be looked at again later: that takes three statements
    for all of them.
    """
    experiments = {row.id: row for row in tx.all(rq.EXPERIMENTS_OF, ExperimentRow, ids=deployment_ids)}
    later: list[dict[str, Any]] = []
    others: list[str] = []
    for row in tx.all(rq.SOME, DeploymentRow, ids=deployment_ids):
        kept = kept_of(row, tx.now)
        if _may_begin(row, kept, tx.now):
            standing = _standing(tx, row, experiments[row.experiment_id])
            action = d.decide(standing, kept.seen, tx.now, jitter=kept.jitter, patience=kept.patience)
            if isinstance(action, d.Look):
                later.append({"guard_id": row.id, "guard_now": tx.now, "look_at": action.at})
            else:
                others.append(row.id)
    tx.execute_many(rq.LOOK_LATER, later)  # first: what the others do may bring one of these back at once
    found = (begin(tx, deployment_id, kept_of) for deployment_id in others)
    return [given for given in found if given is not None]


def apply(tx: Tx, given: Assignment, outcome: Outcome, kept_of: KeptOf) -> Assignment | None:
    """Note what came of a job, and decide again. Nothing if the lease was lost, or the row went on without it."""
    row = tx.one(queries.DEPLOYMENT, DeploymentRow, id=given.row.id)
    if row is None or row.epoch != given.row.epoch or row.lease != (kept := kept_of(row, tx.now)).lease:
        return None
    seen = kept.seen
    if outcome.done:
        row = _done(row, given.job, outcome.value, tx.now)
        if given.job is d.Job.STOP:
            seen = replace(seen, gone=True, tail=outcome.value)
    elif outcome.failure is not None:
        row = replace(row, attempts=row.attempts + 1)
        seen = replace(seen, failure=outcome.failure)
    return advance(tx, row, replace(kept, seen=seen))


def advance(tx: Tx, row: DeploymentRow, kept: Kept) -> Assignment | None:
    """Decide, and decide again, until there is a job or a time; store the row."""
    seen = kept.seen
    for _ in range(_MOST_DECISIONS):
        experiment = tx.one(queries.EXPERIMENT, ExperimentRow, id=row.experiment_id)
        assert experiment is not None  # a foreign key holds that it is there
        row = _waiting(tx, row, seen.queued)
        standing = _standing(tx, row, experiment)
        action = d.decide(standing, seen, tx.now, jitter=kept.jitter, patience=kept.patience)
        if isinstance(action, d.Do):
            leased = replace(row, lease=kept.lease, lease_until=tx.now + LEASE_SECONDS)
            _store(tx, replace(leased, look_at=tx.now + LEASE_SECONDS), kept)
            return Assignment(job=action.job, row=leased, owner_id=experiment.owner_id)
        if isinstance(action, d.Look):
            _store(tx, replace(row, lease=None, lease_until=None, look_at=action.at), kept)
            return None
        # A drain that was given up is tried again later, by the ended deployment: not at once, as if it were new.
        seen = replace(seen, failure=seen.failed(d.Job.DRAIN))
        if isinstance(action, d.Relaunch):
            row = replace(row, epoch=row.epoch + 1, handle=None, attempts=0)
            seen = replace(seen, gone=False)
        else:
            if action.reason is Reason.PREPARE_FAILED and kept.seen.failure is not None:
                append_log(tx, row, kept.seen.failure.log)
            row = _moved(tx, row, action)
    raise RuntimeError(f"Deployment {row.name!r} does not come to rest; it is {row.state.value}.")


def step_experiment(tx: Tx, experiment_id: str) -> None:
    """Move an experiment as far as it goes on its way to running, and let its deployments follow."""
    for _ in range(_MOST_DECISIONS):
        row = tx.one(queries.EXPERIMENT, ExperimentRow, id=experiment_id)
        if row is None or row.state not in (ExperimentState.PREPARING, ExperimentState.READY):
            return
        action = decide_experiment(_experiment_standing(tx, row), tx.now)
        if isinstance(action, d.Look):
            return
        if isinstance(action, Abandon):
            abandon(tx, row, action.message)
            return
        set_experiment_state(tx, row, action.state)
        if action.state is ExperimentState.RUNNING:
            if len(tx.all(rq.WAITING, _id, experiment_id=row.id)) == 1:  # it has nobody to wait for
                order(tx, row, max(tx.now, row.settings.start_at or 0.0))
            tx.execute(queries.LOOK_AT_ALL, guard_experiment_id=row.id, look_at=tx.now)
            tx.notify(WORK)


# --- inside ----------------------------------------------------------------------------------------------------------


def _may_begin(row: DeploymentRow, kept: Kept, now: float, *, news: bool = False) -> bool:
    return not _leased_by_another(row, kept, now) and (row.look_at <= now or news)


def _leased_by_another(row: DeploymentRow, kept: Kept, now: float) -> bool:
    return row.lease not in (None, kept.lease) and (row.lease_until or 0.0) > now


def _done(row: DeploymentRow, job: d.Job, value: Any, now: float) -> DeploymentRow:
    row = replace(row, attempts=0)
    if job is d.Job.PREPARE:
        return replace(row, prepared={"made": True, "value": value})
    if job is d.Job.LAUNCH:
        return replace(row, handle={"epoch": row.epoch, "at": now, "value": value})
    if job is d.Job.DRAIN:
        return replace(row, drained=True)
    if job is d.Job.CLEAN_UP:
        return replace(row, prepared=None, handle=None)
    return row


def _waiting(tx: Tx, row: DeploymentRow, why: str | None) -> DeploymentRow:
    """The row of an executor that waits for its turn: its launch counts from the last time that it was seen to."""
    if row.state is not DeploymentState.LAUNCHING or row.handle is None:
        return row
    row = set_deployment_message(tx, row, why or "")
    return row if why is None else replace(row, handle={**row.handle, "at": tx.now})


def _moved(tx: Tx, row: DeploymentRow, action: d.Move) -> DeploymentRow:
    was = row.state
    row = move(tx, row, action.state, reason=action.reason, message=action.message)
    if action.state is DeploymentState.PREPARING:
        row = replace(row, prepared={"made": False, "value": None}, attempts=0)
    elif action.state is DeploymentState.LAUNCHING:
        row = replace(row, epoch=row.epoch + 1, handle=None, attempts=0)
    elif was in _ON_THE_WAY:
        step_experiment(tx, row.experiment_id)
        fresh = tx.one(queries.DEPLOYMENT, DeploymentRow, id=row.id)  # it may have been told to give up, with the rest
        assert fresh is not None
        cancel = {"cancel_requested": fresh.cancel_requested, "cancel_reason": fresh.cancel_reason}
        row = replace(row, attempts=0, **cancel)  # type: ignore[arg-type]
    return row


def _store(tx: Tx, row: DeploymentRow, kept: Kept) -> None:
    fields = ("lease", "lease_until", "look_at", "epoch", "prepared", "handle", "attempts", "drained")
    values = {name: getattr(row, name) for name in fields}
    if not tx.execute(rq.KEEP, guard_id=row.id, guard_lease=kept.lease, guard_now=tx.now, **values):
        raise RuntimeError(f"The lease of deployment {row.name!r} was lost within a transaction.")
    if row.state.terminal and row.prepared is None and row.handle is None:
        tx.notify(LINE)  # nothing of it is on its node any more


def _standing(tx: Tx, row: DeploymentRow, experiment: ExperimentRow) -> d.Standing:
    handle = row.handle if row.handle and row.handle["epoch"] == row.epoch else None
    return d.Standing(
        state=row.state,
        since=row.state_since,
        granted=experiment.granted is not None,
        epoch=row.epoch,
        prepared=bool(row.prepared and row.prepared["made"]),
        launched=handle["at"] if handle else None,
        claimed=row.journal_id is not None,
        present=row.prepared is not None or row.handle is not None,
        attempts=row.attempts,
        cancelled=row.cancel_requested,
        cancel_reason=row.cancel_reason,
        go=experiment.state is ExperimentState.RUNNING,
        ending=row.ending,
        awaited=row.ending is not None and tx.value(queries.AWAITED, deployment_id=row.id, limit=1) is not None,
        drained=row.drained,
        lost_after=experiment.settings.lost_after,
    )


def _experiment_standing(tx: Tx, row: ExperimentRow) -> ExperimentStanding:
    return ExperimentStanding(
        state=row.state,
        deployments=dict(tx.all(rq.COUNTS, _count, experiment_id=row.id)),
        min_nodes=row.settings.min_nodes,
        start_requested=row.start_requested is not None,
        start_at=row.settings.start_at,
    )


def _count(state: DeploymentState, count: int) -> tuple[DeploymentState, int]:
    return state, count


def _id(id: str) -> str:
    return id

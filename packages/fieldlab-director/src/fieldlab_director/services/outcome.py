"""Where a deployment changes its state, and what its experiment becomes by that.

Services and the reconcile loop call ``move``; nobody else sets a deployment's state. So a deployment cannot end without
its experiment being asked, in the same transaction, whether that was the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fieldlab_common.course import Abandon, begins_at, decide_beginning, experiment_outcome, way_to
from fieldlab_common.events import START, Event
from fieldlab_common.lifecycle import DeploymentState, ExperimentState, Reason
from fieldlab_common.protocol import Lane, LogRecord, Record
from fieldlab_common.wire import dumps, encode

from fieldlab_director.store import queries
from fieldlab_director.store import reconcile_queries as rq
from fieldlab_director.store.base import WORK, Tx, deployment_topic
from fieldlab_director.store.rows import DeploymentRow, ExperimentRow
from fieldlab_director.store.states import append_event, append_records, set_deployment_state, set_experiment_state

__all__ = ["abandon", "append_log", "begin_together", "give_up_artifacts", "move", "order", "ready", "settle"]

_OWN_JOURNAL = "director"  # no executor's: theirs are random
_CHUNK = 32 * 1024  # characters of a log record


@dataclass(frozen=True, kw_only=True)
class _Beginning:
    state: DeploymentState
    ready: bool
    count: int
    bound: float | None


def move(
    tx: Tx, row: DeploymentRow, new: DeploymentState, *, reason: Reason | None = None, message: str = ""
) -> DeploymentRow:
    """Move a deployment to ``new``, and its experiment to its end if this was the last one; the row as it is now.

    Artifacts that a deployment still owes when it ends are lost, and say so.

    Raises:
        IllegalTransition: the tables have no such way, or the row moved since it was read.
    """
    moved = set_deployment_state(tx, row, new, reason=reason, message=message)
    if new.terminal or new is DeploymentState.UNREACHABLE:  # the others may wait for it to begin
        begin_together(tx, row.experiment_id)
    if new.terminal:
        give_up_artifacts(tx, row.id, message or f"the deployment ended as {new.value}")
        settle(tx, row.experiment_id)
    return moved


def settle(tx: Tx, experiment_id: str) -> ExperimentRow | None:
    """End the experiment if its deployments say so; the row as it is now, or None if it does not exist."""
    row = tx.one(queries.EXPERIMENT, ExperimentRow, id=experiment_id)
    if row is None or row.state.terminal:
        return row
    states = tx.all(queries.DEPLOYMENT_STATES, _state, experiment_id=experiment_id)
    outcome = experiment_outcome(states, row.state is ExperimentState.CANCELLING)
    for state in way_to(row.state, outcome) if outcome else ():
        row = set_experiment_state(tx, row, state)
    return row


def ready(tx: Tx, row: DeploymentRow, bound: float) -> None:
    """Note that an executor could begin, its clock within ``bound`` seconds; the last of a run lets all begin."""
    if tx.execute(queries.SET_READY, guard_id=row.id, ready=bound):
        begin_together(tx, row.experiment_id)


def begin_together(tx: Tx, experiment_id: str) -> None:
    """Order the executors of an experiment to begin, all at one time, if none is to be waited for any more."""
    row = tx.one(queries.EXPERIMENT, ExperimentRow, id=experiment_id)
    if row is None or row.state is not ExperimentState.RUNNING or row.started is not None:
        return
    found = tx.all(queries.BEGINNING, _Beginning, experiment_id=experiment_id)
    counts = {(one.state, bool(one.ready)): one.count for one in found}
    action = decide_beginning(counts, row.settings.min_nodes)
    if isinstance(action, Abandon):
        abandon(tx, row, action.message)
    elif action is not None:
        bound = max((one.bound for one in found if one.bound is not None and not one.state.terminal), default=0.0)
        told = sum(one.count for one in found if not one.state.terminal)
        order(tx, row, begins_at(tx.now, row.settings.start_at, bound, told))


def order(tx: Tx, row: ExperimentRow, at: float) -> None:
    """Have all executors of an experiment begin at a time."""
    tx.execute(queries.BEGIN, guard_id=row.id, started=at)
    append_event(tx, row.id, Event(name=START, data={"at": at}, sent_at=tx.now, key="director:start"))


def abandon(tx: Tx, row: ExperimentRow, message: str) -> None:
    """Too few can take part: cancel all that have not ended, and say why."""
    tx.execute(rq.SET_MESSAGE, guard_id=row.id, message=message)
    values: dict[str, Any] = {"cancel_requested": tx.now, "cancel_reason": message, "look_at": tx.now}
    for deployment_id in tx.all(rq.WAITING, _id, experiment_id=row.id):
        tx.execute(queries.CANCEL_DEPLOYMENT, guard_id=deployment_id, **values)
        tx.notify(deployment_topic(deployment_id), WORK)


def give_up_artifacts(tx: Tx, deployment_id: str, why: str) -> None:
    """Mark every artifact whose bytes have not come as lost, for ``why``. Bytes that come later are still taken."""
    tx.execute(queries.ALL_ARTIFACTS_LOST, guard_deployment_id=deployment_id, lost=why)


def append_log(tx: Tx, row: DeploymentRow, text: str) -> None:
    """Put what was said about a deployment that has no executor into its log, as the executor's own remarks are."""
    common = {"deployment_id": row.id, "journal_id": _OWN_JOURNAL, "lane": Lane.BULK, "late": False}
    records = []
    for number, start in enumerate(range(0, len(text), _CHUNK), 1):
        log = LogRecord(step="", text=text[start : start + _CHUNK], stream="executor")
        data = dumps(Record(kind="log", at=tx.now, body=encode(log)))
        records.append({**common, "number": number, "data": data})
    append_records(tx, row.experiment_id, records)


def _id(id: str) -> str:
    return id


def _state(state: DeploymentState) -> DeploymentState:
    return state

"""The only statements that set the state of an experiment or a deployment.

Each asks ``lifecycle.advance`` first, writes under the guard that the row still has the state that was read, and wakes
those who wait. A deployment's change is appended to its experiment's event log in the same transaction, so that what
the log says and what the row says never differ. What an experiment becomes when its last deployment ends is decided in
``services.outcome``, which is what services and the reconcile loop call.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fieldlab_common.errors import IllegalTransition
from fieldlab_common.events import DEPLOYMENT, Event
from fieldlab_common.lifecycle import DeploymentState, ExperimentState, Reason, advance

from fieldlab_director.store import queries
from fieldlab_director.store.base import LINE, WORK, Tx, deployment_topic, events_topic, experiment_topic
from fieldlab_director.store.rows import DeploymentRow, ExperimentRow

__all__ = ["append_event", "append_records", "set_deployment_message", "set_deployment_state", "set_experiment_state"]


def append_event(tx: Tx, experiment_id: str, event: Event) -> Event:
    """Number ``event`` and store it; the stored one if an event of its key is there already.

    The counter on the experiment's row is taken first and stays locked until the commit: one order, without gaps.
    """
    if event.key:
        known = tx.one(queries.EVENT_BY_KEY, Event, experiment_id=experiment_id, key=event.key)
        if known is not None:
            return known
    number: int = tx.value(queries.NEXT_EVENT, experiment_id=experiment_id)
    stored = replace(event, number=number, key=event.key or f"director:{number}")
    values: dict[str, Any] = dict(vars(stored), experiment_id=experiment_id)
    tx.execute(queries.ADD_EVENT, **values)
    tx.notify(events_topic(experiment_id))
    return stored


def append_records(tx: Tx, experiment_id: str, rows: list[dict[str, Any]]) -> None:
    """Number records of an experiment and store them; ``rows`` have the columns but ``experiment_id`` and ``seq``.

    As with events, the counter stays locked until the commit: whoever reads after a cursor passes over none that is
    committed later.
    """
    if not rows:
        return
    last: int = tx.value(queries.TAKE_RECORDS, experiment_id=experiment_id, count=len(rows))
    first = last - len(rows) + 1
    stored = [{"experiment_id": experiment_id, "seq": seq, **row} for seq, row in enumerate(rows, first)]
    tx.execute_many(queries.ADD_RECORD, stored)
    tx.notify(experiment_topic(experiment_id))


def set_deployment_state(
    tx: Tx, row: DeploymentRow, new: DeploymentState, *, reason: Reason | None = None, message: str = ""
) -> DeploymentRow:
    """Move a deployment to ``new`` and say so in its experiment's event log; the row as it is now.

    ``started`` is stamped when it first runs, ``ended`` when it ends.

    Raises:
        IllegalTransition: the tables have no such way, or the row moved since it was read.
    """
    advance(row.state, new)
    started = tx.now if new is DeploymentState.RUNNING and row.started is None else row.started
    ended = tx.now if new.terminal else row.ended
    fields = {"state": new, "reason": reason, "message": message, "started": started, "ended": ended}
    if not tx.execute(queries.MOVE_DEPLOYMENT, guard_id=row.id, guard_state=row.state, state_since=tx.now, **fields):
        raise IllegalTransition(f"Deployment {row.name!r} is no longer {row.state.value}; read it again.")
    data = {"deployment": row.name, "state": new.value, "reason": reason and reason.value, "message": message}
    append_event(tx, row.experiment_id, Event(name=DEPLOYMENT, data=data, sent_at=tx.now))
    tx.notify(experiment_topic(row.experiment_id), deployment_topic(row.id), WORK)
    if new.terminal:  # where nothing of it was made, its node is free by that
        tx.notify(LINE)
    return replace(row, state=new, reason=reason, message=message, started=started, ended=ended, state_since=tx.now)


def set_deployment_message(tx: Tx, row: DeploymentRow, message: str) -> DeploymentRow:
    """Say something else of a deployment that stays in its state; the row as it is now."""
    if message == row.message:
        return row
    tx.execute(queries.TELL_DEPLOYMENT, guard_id=row.id, guard_state=row.state, message=message)
    tx.notify(experiment_topic(row.experiment_id))
    return replace(row, message=message)


def set_experiment_state(tx: Tx, row: ExperimentRow, new: ExperimentState, *, message: str = "") -> ExperimentRow:
    """Move an experiment to ``new``; the row as it is now.

    Raises:
        IllegalTransition: the tables have no such way, or the row moved since it was read.
    """
    advance(row.state, new)
    ended = tx.now if new.terminal else row.ended
    fields = {"state": new, "message": message or row.message, "ended": ended}
    if not tx.execute(queries.MOVE_EXPERIMENT, guard_id=row.id, guard_state=row.state, **fields):
        raise IllegalTransition(f"Experiment {row.name!r} is no longer {row.state.value}; read it again.")
    tx.notify(experiment_topic(row.id), events_topic(row.id), WORK)
    return replace(row, state=new, message=message or row.message, ended=ended)

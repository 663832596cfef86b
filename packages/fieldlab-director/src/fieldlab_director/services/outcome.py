"""Where a deployment changes its state, and what its experiment becomes by that.

Services and the reconcile loop call ``move``; nobody else sets a deployment's state. So a deployment cannot end without
its experiment being asked, in the same transaction, whether that was the last one.
"""

from __future__ import annotations

from fieldlab_common.course import experiment_outcome, way_to
from fieldlab_common.lifecycle import DeploymentState, ExperimentState, Reason

from fieldlab_director.store import queries
from fieldlab_director.store.base import Tx
from fieldlab_director.store.rows import DeploymentRow, ExperimentRow
from fieldlab_director.store.states import set_deployment_state, set_experiment_state

__all__ = ["give_up_artifacts", "move", "settle"]


def move(
    tx: Tx, row: DeploymentRow, new: DeploymentState, *, reason: Reason | None = None, message: str = ""
) -> DeploymentRow:
    """Move a deployment to ``new``, and its experiment to its end if this was the last one; the row as it is now.

    Artifacts that a deployment still owes when it ends are lost, and say so.

    Raises:
        IllegalTransition: the tables have no such way, or the row moved since it was read.
    """
    moved = set_deployment_state(tx, row, new, reason=reason, message=message)
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


def give_up_artifacts(tx: Tx, deployment_id: str, why: str) -> None:
    """Mark every artifact whose bytes have not come as lost, for ``why``. Bytes that come later are still taken."""
    tx.execute(queries.ALL_ARTIFACTS_LOST, guard_deployment_id=deployment_id, lost=why)


def _state(state: DeploymentState) -> DeploymentState:
    return state

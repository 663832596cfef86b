"""How an experiment goes: at once for its owner, and from the database when nothing of it is on a node any more.

Its rows go in bounded pieces, the experiment's own last, so that a crash in between leaves nothing that is not gone on
with. Blobs go when nobody refers to them. The key of its request stays known for as long as keys do: a request that is
repeated makes no second run.
"""

from __future__ import annotations

from fieldlab_common.errors import IllegalState
from fieldlab_common.protocol import CancelRequest

from fieldlab_director.services import experiments
from fieldlab_director.services.identity import UserCaller
from fieldlab_director.store import removal_queries as q
from fieldlab_director.store.base import LINE, Tx, experiment_topic

__all__ = ["delete", "removable", "remove_some"]

MOST = 5_000  # rows that are removed in one transaction


def delete(tx: Tx, caller: UserCaller, experiment: str, *, force: bool) -> None:
    """Let an experiment of the caller's go; with ``force`` it is cancelled first if it has not ended.

    Raises:
        NotFound. IllegalState: it has not ended.
    """
    row = experiments.find(tx, caller, experiment)
    if not row.state.terminal:
        if not force:
            raise IllegalState(
                f"Experiment {row.name!r} is {row.state.value}.",
                advice="Cancel it and wait for its end, or delete it with force, which cancels it first.",
            )
        experiments.cancel(tx, caller, row.id, CancelRequest(reason="It was deleted."))
    tx.execute(q.DELETE, guard_id=row.id, deleted=tx.now, name=f"deleted/{row.id}")
    tx.notify(LINE, experiment_topic(row.id))


def removable(tx: Tx) -> str | None:
    """An experiment whose rows can go: a question that changes nothing."""
    found: str | None = tx.value(q.REMOVABLE)
    return found


def remove_some(tx: Tx) -> bool:
    """Remove rows of one experiment that was let go; whether there may be more to remove."""
    experiment = removable(tx)
    if experiment is None:
        return False
    for part in (q.REMOVE_RECORDS, q.REMOVE_EVENTS):
        if tx.execute(part, experiment_id=experiment, limit=MOST) >= MOST:
            return True
    tx.execute(q.REMOVE, id=experiment)
    return True

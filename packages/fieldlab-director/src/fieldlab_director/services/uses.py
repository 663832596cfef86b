"""Which blobs an experiment uses: what it uses is kept for as long as it is there (see ``sweep``)."""

from __future__ import annotations

from fieldlab_director.store import queries
from fieldlab_director.store.base import Tx

__all__ = ["use"]


def use(tx: Tx, experiment_id: str, digest: str) -> None:
    """Note that an experiment uses a blob, which its owner has."""
    if tx.value(queries.BLOB_USE, experiment_id=experiment_id, digest=digest) is None:
        tx.execute(queries.ADD_BLOB_USE, experiment_id=experiment_id, digest=digest)

"""What a user reads of a run: the records of its journals, and its artifacts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import msgspec
from fieldlab_common.errors import NotFound
from fieldlab_common.protocol import ArtifactInfo, ArtifactList, Lane, Record, RecordEntry, RecordPage

from fieldlab_director.services.experiments import find
from fieldlab_director.services.identity import UserCaller
from fieldlab_director.store import queries
from fieldlab_director.store.base import Tx

__all__ = ["artifacts", "records"]


@dataclass(frozen=True, kw_only=True)
class _Stored:
    seq: int
    deployment: str
    number: int
    late: bool
    data: bytes


def records(
    tx: Tx, caller: UserCaller, experiment: str, lane: Lane, deployment: str, *, after: int, limit: int, most_bytes: int
) -> tuple[str, RecordPage, bool]:
    """The id of the experiment, its records after a cursor, and whether nothing more of that lane is to come.

    ``deployment``: of that one alone, unless it is empty.

    Raises:
        NotFound: the experiment, or the deployment.
    """
    row = find(tx, caller, experiment)
    part = {"lane": lane, "after": after, "limit": limit}
    if deployment:
        rows = tx.all(queries.RECORDS_OF, _Stored, deployment_id=_deployment(tx, row.id, deployment), **part)
    else:
        rows = tx.all(queries.RECORDS, _Stored, experiment_id=row.id, **part)
    entries: list[RecordEntry] = []
    size = 0
    for stored in rows:
        size += len(stored.data)
        if entries and size > most_bytes:
            break
        entries.append(_entry(stored))
    page = RecordPage(records=tuple(entries), cursor=entries[-1].seq if entries else after, state=row.state)
    whole = row.state.terminal and (lane is Lane.CONTROL or not tx.value(queries.UNDRAINED, experiment_id=row.id))
    return row.id, page, whole


def artifacts(tx: Tx, caller: UserCaller, experiment: str) -> ArtifactList:
    """Every artifact that was announced, spilled values left out.

    Raises:
        NotFound.
    """
    row = find(tx, caller, experiment)
    return ArtifactList(artifacts=tuple(tx.all(queries.ARTIFACTS, ArtifactInfo, experiment_id=row.id)))


def _deployment(tx: Tx, experiment_id: str, name: str) -> str:
    found: str | None = tx.value(queries.DEPLOYMENT_ID, experiment_id=experiment_id, name=name)
    if found is None:
        raise NotFound(f"The experiment has no deployment {name!r:.80}.", advice="run.info.deployments lists them.")
    return found


def _entry(stored: _Stored) -> RecordEntry:
    # The record goes into the answer as it came, which is JSON of a Record: it is not read again to be written again.
    record = cast(Record, msgspec.Raw(stored.data))
    return RecordEntry(
        seq=stored.seq, deployment=stored.deployment, number=stored.number, record=record, late=stored.late
    )

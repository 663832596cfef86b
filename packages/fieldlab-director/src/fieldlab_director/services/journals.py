"""Executors: the claim, what they report, and what they are told.

**Claim.** The first journal that claims the present epoch has it; every other claimant is refused and exits. The same
journal may claim again: its answer may have got lost.

**Report.** Records are numbered by lane and journal. Those that follow on what is stored are taken, in order, and
acknowledged once they are on disk; those that were taken before are passed over, and of those that lie ahead nothing is
taken: the executor goes back to where the director is, also to one that was restored from a backup. What arrives late
(after its deployment ended, or of another journal than the one that has it) is stored and marked, and changes nothing.

**End.** A deployment ends when its ``ended`` record is here and each artifact that it announced is stored or lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from fieldlab_common.errors import AuthenticationError, ClaimRefused, ProtocolMismatch
from fieldlab_common.events import Event, Member
from fieldlab_common.lifecycle import DeploymentState
from fieldlab_common.node import Node
from fieldlab_common.protocol import (
    PROTOCOLS,
    Ack,
    ArtifactLost,
    ArtifactRecord,
    CancelDeployment,
    Claim,
    ClaimRequest,
    Ended,
    EventRecord,
    Lane,
    Poll,
    Ready,
    Refusal,
    Started,
)

from fieldlab_director.services import gaps, secrets
from fieldlab_director.services.identity import ExecutorCaller
from fieldlab_director.services.intake import Entry, Upload
from fieldlab_director.services.outcome import move, ready
from fieldlab_director.services.quotas import within
from fieldlab_director.services.recent import Recent
from fieldlab_director.services.uses import use
from fieldlab_director.services.vault import Vault
from fieldlab_director.settings import Limits
from fieldlab_director.store import queries
from fieldlab_director.store.base import WORK, Tx, deployment_topic, experiment_topic
from fieldlab_director.store.rows import DeploymentRow, ExperimentRow
from fieldlab_director.store.states import append_event, append_records

__all__ = ["Members", "claim", "deployment_of", "finish", "poll", "report", "seen", "wants_sign"]

_D = DeploymentState
_HELD = (_D.LAUNCHING, _D.RUNNING, _D.UNREACHABLE)
MOST_MISSING = 1_000  # digests named in one acknowledgement
SEEN_EVERY = 5.0  # seconds: a sign of life that is so fresh is not written again


def deployment_of(tx: Tx, caller: ExecutorCaller) -> DeploymentRow:
    """The deployment in whose name an executor asks.

    Raises:
        AuthenticationError: it is gone.
    """
    row = tx.one(queries.DEPLOYMENT, DeploymentRow, id=caller.deployment_id)
    if row is None:
        raise AuthenticationError("The token is not valid.")
    return row


class Members:
    """Who takes part in an experiment, as every claim says it: read once, for it is frozen with the submit.

    Else a thousand executors that claim at the same time would have a million rows read. ``most``: experiments kept.
    """

    def __init__(self, most: int = 16) -> None:
        self._most = most
        self._known: dict[str, tuple[Member, ...]] = {}

    def of(self, tx: Tx, experiment_id: str) -> tuple[Member, ...]:
        """The members, in the order of the experiment."""
        found = self._known.get(experiment_id)
        if found is None:
            rows = tx.all(queries.DEPLOYMENTS, DeploymentRow, experiment_id=experiment_id)
            found = tuple(map(_member, rows))
            if len(self._known) >= self._most:
                self._known.clear()
            self._known[experiment_id] = found
        return found


def claim(tx: Tx, caller: ExecutorCaller, vault: Vault, members: Members, request: ClaimRequest) -> Claim:
    """Give the deployment to the journal that asks, and all that its executor needs to run alone.

    Raises:
        ClaimRefused: another journal has it, the launch is not the present one, or the deployment has ended.
        ProtocolMismatch: no version of the protocol in common.
    """
    row = deployment_of(tx, caller)
    common = set(request.protocols) & set(PROTOCOLS)
    if not common:
        theirs, ours = (", ".join(map(str, some)) or "none" for some in (request.protocols, PROTOCOLS))
        raise ProtocolMismatch(
            f"The executor speaks protocol {theirs}; this director speaks {ours}.",
            advice="Use the fieldlab.pyz that this director serves.",
            details={"protocols": list(PROTOCOLS)},
        )
    if request.epoch != row.epoch or caller.epoch != row.epoch:
        raise ClaimRefused(f"Launch {request.epoch} of deployment {row.name!r} is not the present one ({row.epoch}).")
    if row.state not in _HELD:
        raise ClaimRefused(f"Deployment {row.name!r} is {row.state.value}; nothing is to be run.")
    if row.journal_id not in (None, request.journal_id):
        raise ClaimRefused(f"Another executor holds deployment {row.name!r}.")
    if row.journal_id is None:
        tx.execute(queries.HOLD_CLAIM, guard_id=row.id, journal_id=request.journal_id)
        lanes = [{"deployment_id": row.id, "journal_id": request.journal_id, "lane": x, "acked": 0} for x in Lane]
        tx.execute_many(queries.ADD_JOURNAL, lanes)
    seen(tx, replace(row, journal_id=request.journal_id))
    return _claim(tx, row, request.journal_id, max(common), vault, members.of(tx, row.experiment_id))


def report(tx: Tx, caller: ExecutorCaller, journal: str, upload: Upload, limits: Limits) -> Ack:
    """Take what follows on what is stored, as far as the experiment has room for it, and say how far that is.

    Raises:
        ClaimRefused: this journal never held the deployment.
    """
    row = deployment_of(tx, caller)
    lane = {"guard_deployment_id": row.id, "guard_journal_id": journal, "guard_lane": upload.lane}
    known = tx.one(queries.JOURNAL, _Journal, **lane)
    if known is None:
        raise ClaimRefused(f"This journal never held deployment {row.name!r}.")
    acked = known.acked
    ours = journal == row.journal_id and caller.epoch == row.epoch
    taken = within(tx, row.experiment_id, list(upload.after(acked)), limits)
    if known.restored:
        taken, goes_on = gaps.after_restore(tx, row, upload.lane, taken)
        if goes_on:
            tx.execute(queries.GO_ON, **lane)
    if taken:
        last = taken[-1]
        acked = last.through if isinstance(last, Entry) else last.number
        row = _store(tx, row, journal, upload.lane, gaps.stored(upload.lane, taken, tx.now), ours=ours)
        tx.execute(queries.SET_ACKED, acked=acked, **lane)
    if ours:
        row = finish(tx, seen(tx, row))
    refusals = tuple(entry for entry in taken if isinstance(entry, Refusal))
    missing = _awaited(tx, row) if upload.lane is Lane.CONTROL else ()
    return Ack(acked=acked, refusals=refusals, missing=missing)


def finish(tx: Tx, row: DeploymentRow) -> DeploymentRow:
    """End the deployment if all that its end needs is here; the row as it is now."""
    ending = row.ending
    if ending is None:
        return row
    if row.state in (_D.RUNNING, _D.UNREACHABLE) and not _awaited(tx, row):
        row = move(tx, row, ending.state, reason=ending.reason, message=ending.message)
    lane = {"guard_deployment_id": row.id, "guard_journal_id": row.journal_id, "guard_lane": Lane.BULK}
    if row.state.terminal and not row.drained and (tx.value(queries.ACKED, **lane) or 0) >= ending.bulk:
        tx.execute(queries.SET_DRAINED, guard_id=row.id)
        tx.notify(experiment_topic(row.experiment_id), deployment_topic(row.id), WORK)
        row = replace(row, drained=True)
    return row


def seen(tx: Tx, row: DeploymentRow) -> DeploymentRow:
    """Note that the executor that holds the deployment was heard of; the row as it is now."""
    if wants_sign(row, tx.now):
        tx.execute(queries.SEEN, guard_id=row.id, last_seen=tx.now)
    if row.state in (_D.LAUNCHING, _D.UNREACHABLE):
        return move(tx, row, _D.RUNNING)
    return row


def wants_sign(row: DeploymentRow, now: float) -> bool:
    """Whether a sign of life now would change what is stored."""
    # The distance, not the age: when the clock was set back, the last sign is one of the future.
    return (
        row.last_seen is None or abs(now - row.last_seen) >= SEEN_EVERY or row.state in (_D.LAUNCHING, _D.UNREACHABLE)
    )


def poll(
    tx: Tx, caller: ExecutorCaller, recent: Recent, journal: str, after: int, *, limit: int, most_bytes: int
) -> tuple[DeploymentRow, Poll]:
    """What an executor that has everything up to event ``after`` is to be told.

    Raises:
        ClaimRefused: another journal, or a later launch, has the deployment.
    """
    row = deployment_of(tx, caller)
    if row.journal_id != journal or caller.epoch != row.epoch:
        raise ClaimRefused(f"This journal does not hold deployment {row.name!r}.")
    # What a deployment that has ended is told: nothing, but to stop if it goes on all the same.
    over = row.state.terminal
    events: tuple[Event, ...] = ()
    if not over:
        events, after = recent.after(tx, row.experiment_id, after, limit=limit, most_bytes=most_bytes)
    stop = row.cancel_requested is not None or (over and row.ending is None)
    return row, Poll(
        events=events,
        cursor=after,
        cancel=CancelDeployment(reason=row.cancel_reason or row.message) if stop else None,
        server_time=tx.now,
    )


# --- inside ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Journal:
    acked: int
    restored: bool


def _claim(tx: Tx, row: DeploymentRow, journal: str, protocol: int, vault: Vault, members: tuple[Member, ...]) -> Claim:
    experiment = tx.one(queries.EXPERIMENT, ExperimentRow, id=row.experiment_id)
    assert experiment is not None  # a foreign key holds that it is there
    acked = {
        lane: tx.value(queries.ACKED, guard_deployment_id=row.id, guard_journal_id=journal, guard_lane=lane) or 0
        for lane in Lane
    }
    return Claim(
        experiment_id=experiment.id,
        experiment=experiment.name,
        deployment=row.spec,
        node=row.node,
        members=members,
        settings=experiment.settings,
        protocol=protocol,
        server_time=tx.now,
        control=acked[Lane.CONTROL],
        bulk=acked[Lane.BULK],
        secrets=secrets.values(tx, vault, experiment.owner_id, row.spec.secrets),
        start_at=experiment.started,
    )


def _member(row: DeploymentRow) -> Member:
    return Member(deployment=row.name, role=row.spec.role, node=row.node.name, addresses=tuple(_addresses(row.node)))


def _addresses(node: Node) -> Iterable[str]:
    for name in ("ipv4", "ipv6"):
        value = node.properties.get(name)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list | tuple):
            yield from (address for address in value if isinstance(address, str))


def _awaited(tx: Tx, row: DeploymentRow) -> tuple[str, ...]:
    return tuple(tx.all(queries.AWAITED, _sha256, deployment_id=row.id, limit=MOST_MISSING))


def _sha256(sha256: str) -> str:
    return sha256


def _store(tx: Tx, row: DeploymentRow, journal: str, lane: Lane, entries: list[Entry], *, ours: bool) -> DeploymentRow:
    """Take the entries in; the row as it is now."""
    ended = not ours or row.state.terminal
    common = {"deployment_id": row.id, "journal_id": journal, "lane": lane}
    rows: list[dict[str, Any]] = []
    for entry in entries:
        # Logs may be under way when their deployment has ended: those that its end announced are not late.
        late = not ours or (row.state.terminal and not (lane is Lane.BULK and row.ending and not row.drained))
        rows.append({**common, "number": entry.number, "late": late, "data": entry.data})
        _apply(tx, row, journal, entry, late=ended)
    append_records(tx, row.experiment_id, rows)
    if ours and (ending := next((entry.body for entry in entries if isinstance(entry.body, Ended)), None)):
        tx.execute(queries.SET_ENDING, guard_id=row.id, ending=ending)
        row = replace(row, ending=ending)
    return row


def _apply(tx: Tx, row: DeploymentRow, journal: str, entry: Entry, *, late: bool) -> None:
    body = entry.body
    if isinstance(body, Ready | Started) and not late:  # an executor that knows of no order begins by itself
        ready(tx, row, body.bound if isinstance(body, Ready) else 0.0)
    elif isinstance(body, EventRecord) and not late:
        event = Event(
            name=body.name,
            data=body.data,
            sender=row.name,
            step=body.step,
            iteration=body.iteration,
            sent_at=entry.at,
            key=f"{journal}:{entry.number}",
        )
        append_event(tx, row.experiment_id, event)
    elif isinstance(body, ArtifactRecord):
        _announce(tx, row, body)
    elif isinstance(body, ArtifactLost) and body.sha256:
        tx.execute(queries.ARTIFACTS_LOST, guard_deployment_id=row.id, guard_sha256=body.sha256, lost=body.reason)


def _announce(tx: Tx, row: DeploymentRow, body: ArtifactRecord) -> None:
    owner: str = tx.value(queries.OWNER, id=row.experiment_id)
    stored = tx.value(queries.BLOB_OF_OWNER, owner_id=owner, digest=body.sha256) == body.size
    if stored:
        use(tx, row.experiment_id, body.sha256)
    tx.execute(
        queries.ADD_ARTIFACT,
        experiment_id=row.experiment_id,
        deployment_id=row.id,
        step=body.step,
        name=body.name,
        size=body.size,
        sha256=body.sha256,
        attempt=body.attempt,
        iteration=body.iteration,
        value=body.value,
        stored=stored,
        lost="",
    )

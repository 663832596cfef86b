"""Experiments: submit, start, cancel, look at.

Submit only stores what it is given; the reconcile loop makes it come true. All of these may be asked twice, because
an answer was lost, and do the same once. Every question carries the owner: what is not the caller's is not found.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from fieldlab_common.course import NEVER
from fieldlab_common.errors import (
    ExperimentExists,
    IllegalState,
    NotFound,
)
from fieldlab_common.lifecycle import DeploymentState, ExperimentState
from fieldlab_common.node import Node
from fieldlab_common.protocol import (
    CancelRequest,
    DeploymentInfo,
    DeploymentSpec,
    ExperimentInfo,
    ExperimentPage,
    RerunRequest,
    SubmitExperiment,
    WaitsFor,
)
from fieldlab_common.reservation import line_time
from fieldlab_common.step import check_name
from fieldlab_common.submission import at, hold

from fieldlab_director.services import reservation, secrets
from fieldlab_director.services.identity import UserCaller, new_id
from fieldlab_director.services.outcome import settle
from fieldlab_director.store import queries
from fieldlab_director.store.base import WORK, Tx, deployment_topic
from fieldlab_director.store.rows import DeploymentRow, ExperimentRow
from fieldlab_director.store.states import set_experiment_state

__all__ = [
    "cancel",
    "cancel_everything",
    "experiment",
    "experiments",
    "find",
    "rerun",
    "start",
    "submit",
]

KEY_SECONDS = 7 * 86_400.0  # so long the key of a request is known
_NUMBERED = re.compile(r"#\d+$")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class _Place:
    infrastructure_id: str
    owner_id: str
    node: Node


@dataclass(frozen=True, kw_only=True)
class _Repeated:
    digest: str
    experiment_id: str


def submit(tx: Tx, caller: UserCaller, request: SubmitExperiment, *, key: str = "", digest: str = "") -> ExperimentInfo:
    """Store an experiment whose form ``check_submit`` has held; the reconcile loop does the rest.

    ``key`` names this very request: repeated under the same key (and so the same ``digest``), it finds what the first
    made. An experiment of that name is an error, or the answer (``attach``), or makes this one ``name#2`` (``new``).

    Raises:
        ExperimentExists, NotFound (a node, a blob, a secret), InvalidRequest.
    """
    repeated = _repeated(tx, caller, key, digest)
    if repeated is not None:
        return _info(tx, caller, repeated)
    row = tx.one(queries.EXPERIMENT_BY_NAME, ExperimentRow, owner_id=caller.id, name=request.name)
    if row is not None and request.if_exists == "error":
        raise ExperimentExists(f"There is an experiment {request.name!r}; it is {row.state.value}.")
    if row is None or request.if_exists == "new":
        row = _store(tx, caller, request, _free_name(tx, caller, request.name) if row else request.name)
    _note(tx, caller, key, digest, row)
    return _info(tx, caller, row)


def rerun(
    tx: Tx, caller: UserCaller, experiment: str, request: RerunRequest, *, key: str = "", digest: str = ""
) -> ExperimentInfo:
    """Store an experiment once more, as ``name#2`` and so on: its deployments, its code and its settings as they were.

    Nothing is sent again. A ``start_at`` is left out: it is past. ``key`` and ``digest`` are those of ``submit``.

    Raises:
        NotFound: the experiment, or a node or secret that it takes. InvalidRequest.
    """
    repeated = _repeated(tx, caller, key, digest)
    if repeated is not None:
        return _info(tx, caller, repeated)
    old = find(tx, caller, experiment)
    specs = tuple(row.spec for row in tx.all(queries.DEPLOYMENTS, DeploymentRow, experiment_id=old.id))
    again = SubmitExperiment(
        name=old.name, deployments=specs, settings=replace(old.settings, start_at=None), start=request.start
    )
    row = _store(tx, caller, again, _free_name(tx, caller, _NUMBERED.sub("", old.name)))
    _note(tx, caller, key, digest, row)
    return _info(tx, caller, row)


def start(tx: Tx, caller: UserCaller, experiment: str) -> ExperimentInfo:
    """Ask for the start; it happens once the experiment is ready.

    Raises:
        NotFound. IllegalState: it is being cancelled, or has ended without ever being started.
    """
    row = find(tx, caller, experiment)
    if row.start_requested is None:
        if row.state.terminal or row.state is ExperimentState.CANCELLING:
            raise IllegalState(
                f"Experiment {row.name!r} is {row.state.value}: it cannot be started.",
                advice='Submit it again, with if_exists="new".',
            )
        tx.execute(queries.REQUEST_START, guard_id=row.id, start_requested=tx.now)
        tx.execute(queries.LOOK_AT_ALL, guard_experiment_id=row.id, look_at=tx.now)
        tx.notify(WORK)
    return _info(tx, caller, find(tx, caller, row.id))


def cancel(tx: Tx, caller: UserCaller, experiment: str, request: CancelRequest) -> ExperimentInfo:
    """Ask that the experiment, or only some of its deployments, stop. What has ended stays as it ended.

    Raises:
        NotFound: the experiment, or a deployment of the request.
    """
    row = find(tx, caller, experiment)
    deployments = tx.all(queries.DEPLOYMENTS, DeploymentRow, experiment_id=row.id)
    unknown = set(request.deployments) - {deployment.name for deployment in deployments}
    if unknown:
        raise NotFound(f"Experiment {row.name!r} has no deployment {', '.join(sorted(unknown))}.")
    if request.deployments:
        _cancel_deployments(tx, (one for one in deployments if one.name in request.deployments), request.reason)
    else:
        _cancel_all_of(tx, row, deployments, request.reason)
    return _info(tx, caller, _only(settle(tx, row.id)))


def cancel_everything(tx: Tx, reason: str) -> int:
    """Ask that every experiment of every user stop; how many have not ended."""
    rows = tx.all(queries.OPEN_EXPERIMENTS, ExperimentRow)
    for row in rows:
        _cancel_all_of(tx, row, tx.all(queries.DEPLOYMENTS, DeploymentRow, experiment_id=row.id), reason)
    return len(rows)


def experiment(tx: Tx, caller: UserCaller, experiment: str) -> ExperimentInfo:
    """How an experiment stands, with all its deployments.

    Raises:
        NotFound.
    """
    return _info(tx, caller, find(tx, caller, experiment))


def experiments(
    tx: Tx, caller: UserCaller, *, state: str, after: str, limit: int, name: str = "", since: float = 0.0
) -> ExperimentPage:
    """The caller's experiments, newest first; ``after`` is the ``next`` of the page before.

    ``state``: those in one state; ``name``: those whose name fits the pattern (``*`` stands for any characters, ``?``
    for one; upper and lower case are alike); ``since``: those that were submitted from that time on.

    Raises:
        InvalidRequest: no such state, or an ``after`` that no page gave.
    """
    states = {member.value for member in ExperimentState}
    hold(not state or state in states, "state", f"must be one of {', '.join(sorted(states))}")
    last = tx.one(queries.EXPERIMENT_OF_OWNER, ExperimentRow, owner_id=caller.id, id=after) if after else None
    hold(not after or last, "after", "must be the `next` of an earlier page")
    rows = tx.all(
        queries.EXPERIMENTS,
        ExperimentRow,
        owner_id=caller.id,
        states=[ExperimentState(state)] if state else list(ExperimentState),
        pattern=_like(name) if name else "%",
        since=since,
        before=last.created if last else tx.now + 86_400.0,
        before_id=last.id if last else "",
        limit=limit + 1,
    )
    page = tuple(_brief(caller, row) for row in rows[:limit])
    return ExperimentPage(experiments=page, next=page[-1].id if len(rows) > limit else None)


def find(tx: Tx, caller: UserCaller, experiment: str) -> ExperimentRow:
    """The caller's experiment of that id or, failing that, of that name.

    Raises:
        NotFound: the caller has none.
    """
    row = tx.one(queries.EXPERIMENT_OF_OWNER, ExperimentRow, owner_id=caller.id, id=experiment)
    row = row or tx.one(queries.EXPERIMENT_BY_NAME, ExperimentRow, owner_id=caller.id, name=experiment)
    if row is None:
        raise NotFound("There is no such experiment.", advice="client.experiments() lists yours.")
    return row


# --- inside ----------------------------------------------------------------------------------------------------------


def _repeated(tx: Tx, caller: UserCaller, key: str, digest: str) -> ExperimentRow | None:
    """What the first request under this key has made; None: this is the first (or the key is not known any more)."""
    found = tx.one(queries.IDEMPOTENT, _Repeated, owner_id=caller.id, key=key, after=tx.now - KEY_SECONDS)
    if not key or found is None:
        return None
    hold(found.digest == digest, "Idempotency-Key", "was used for another request")
    row = tx.one(queries.EXPERIMENT_OF_OWNER, ExperimentRow, owner_id=caller.id, id=found.experiment_id)
    if row is None:
        raise NotFound("The run that this request has made was deleted.", advice="Submit it again, by a new request.")
    return row


def _note(tx: Tx, caller: UserCaller, key: str, digest: str, row: ExperimentRow) -> None:
    if key:
        tx.execute(queries.FORGET_IDEMPOTENT, owner_id=caller.id, until=tx.now - KEY_SECONDS)
        values = {"digest": digest, "experiment_id": row.id, "created": tx.now}
        tx.execute(queries.ADD_IDEMPOTENT, owner_id=caller.id, key=key, **values)


def _like(pattern: str) -> str:
    """A pattern with ``*`` and ``?`` in SQL's words."""
    escaped = re.sub(r"([%_\\])", r"\\\1", pattern.lower())
    return escaped.replace("*", "%").replace("?", "_")


def _only(row: T | None) -> T:
    assert row is not None  # foreign keys hold that it is there
    return row


def _free_name(tx: Tx, caller: UserCaller, name: str) -> str:
    taken = set(tx.all(queries.EXPERIMENT_NAMES, _name, owner_id=caller.id, prefix=f"{name}#"))
    return next(free for number in range(2, len(taken) + 3) if (free := f"{name}#{number}") not in taken)


def _name(name: str) -> str:
    return name


def _store(tx: Tx, caller: UserCaller, request: SubmitExperiment, name: str) -> ExperimentRow:
    places = _places(tx, caller, request.deployments)
    secrets.hold_stored(tx, caller, (name for spec in request.deployments for name in spec.secrets))
    _hold_blobs(tx, caller, (digest for spec in request.deployments for digest in (spec.graph, *spec.blobs)))
    row = ExperimentRow(
        id=new_id(),
        owner_id=caller.id,
        name=name,
        state=ExperimentState.PREPARING,
        message="",
        settings=request.settings,
        start_requested=tx.now if request.start else None,
        queued=line_time(tx.now, request.settings.start_at),
        number=reservation.number(tx),
        granted=None,
        cancel_requested=None,
        cancel_reason="",
        deleted=None,
        last_event=0,
        last_record=0,
        created=tx.now,
        started=None,
        ended=None,
    )
    tx.execute(queries.ADD_EXPERIMENT, **vars(row))
    specs = zip(request.deployments, places, strict=True)
    deployments = [_deployment(tx, row, number, spec, place) for number, (spec, place) in enumerate(specs)]
    tx.execute_many(queries.ADD_DEPLOYMENT, [vars(deployment) for deployment in deployments])
    used = {digest for spec in request.deployments for digest in (spec.graph, *spec.blobs)}
    tx.execute_many(queries.ADD_BLOB_USE, [{"experiment_id": row.id, "digest": digest} for digest in sorted(used)])
    reservation.enter(tx, row)
    return row


def _deployment(tx: Tx, row: ExperimentRow, position: int, spec: DeploymentSpec, place: _Place) -> DeploymentRow:
    return DeploymentRow(
        id=new_id(),
        experiment_id=row.id,
        position=position,
        name=spec.name,
        infrastructure_id=place.infrastructure_id,
        place=place.node.template or place.node.name,
        node_name=place.node.name,
        node=place.node,
        spec=spec,
        state=DeploymentState.PENDING,
        reason=None,
        message="",
        epoch=0,
        journal_id=None,
        ending=None,
        ready=None,
        drained=False,
        cancel_requested=None,
        cancel_reason="",
        prepared=None,
        handle=None,
        attempts=0,
        look_at=NEVER,  # until it has its node
        lease=None,
        lease_until=None,
        state_since=tx.now,
        started=None,
        ended=None,
        last_seen=None,
    )


def _places(tx: Tx, caller: UserCaller, specs: Sequence[DeploymentSpec]) -> list[_Place]:
    by_name: dict[str, list[_Place]] = {}
    for place in tx.all(queries.NODES, _place, owner_id=caller.id):
        by_name.setdefault(place.node.name, []).append(place)
    found = [_fitting(by_name.get(spec.template or spec.node, []), spec, caller) for spec in specs]
    absent = sorted({spec.template or spec.node for spec, places in zip(specs, found, strict=True) if not places})
    if absent:
        there = ", ".join(sorted(by_name)[:20]) or "none"
        raise NotFound(f"There is no node {', '.join(absent[:20])}. There are: {there}.", details={"nodes": absent})
    for spec, places in zip(specs, found, strict=True):
        name = spec.template or spec.node
        hold(len(places) == 1, "$.deployments", f"use {name!r}, which several infrastructures have")
    return [_made(spec, places[0], by_name) for spec, places in zip(specs, found, strict=True)]


def _fitting(places: list[_Place], spec: DeploymentSpec, caller: UserCaller) -> list[_Place]:
    """Those that ``spec`` means: of its infrastructure, if it says which; the caller's own, if there are any."""
    named = [place for place in places if spec.infrastructure in ("", place.node.infrastructure)]
    return [place for place in named if place.owner_id == caller.id] or named


def _made(spec: DeploymentSpec, place: _Place, known: Mapping[str, object]) -> _Place:
    """The place of a deployment: its node, or the one that is made for it from a template."""
    elastic = place.node.elastic is not None
    if not spec.template:
        hold(not elastic, "$.deployments", f"use {spec.node!r}, which is a template: take nodes of it")
        return place
    hold(elastic, "$.deployments", f"take nodes of {spec.template!r}, which is not a template")
    hold(spec.node not in known, "$.deployments", f"make a node {spec.node!r}, and there is one of that name")
    at("$.deployments", lambda: check_name(spec.node, "a node"))
    return replace(place, node=replace(place.node, name=spec.node, elastic=None, template=spec.template))


def _place(infrastructure_id: str, owner_id: str, node: Node, **more: object) -> _Place:
    return _Place(infrastructure_id=infrastructure_id, owner_id=owner_id, node=node)


def _hold_blobs(tx: Tx, caller: UserCaller, digests: Iterable[str]) -> None:
    wanted = list(dict.fromkeys(digests))
    missing = set(wanted)
    for begin in range(0, len(wanted), 500):
        part = wanted[begin : begin + 500]
        missing -= set(tx.all(queries.OWNED_BLOBS, _digest, owner_id=caller.id, digests=part))
    if missing:
        raise NotFound(
            f"{len(missing)} blobs of the experiment are not here, the first is {min(missing)}.",
            advice="Upload them first (POST /v1/blobs/missing lists which).",
            details={"digests": sorted(missing)[:1000]},
        )


def _digest(digest: str) -> str:
    return digest


def _cancel_all_of(tx: Tx, row: ExperimentRow, deployments: Iterable[DeploymentRow], reason: str) -> None:
    if not row.state.terminal and row.state is not ExperimentState.CANCELLING:
        tx.execute(queries.REQUEST_CANCEL, guard_id=row.id, cancel_requested=tx.now, cancel_reason=reason)
        set_experiment_state(tx, row, ExperimentState.CANCELLING, message=reason)
    _cancel_deployments(tx, deployments, reason)


def _cancel_deployments(tx: Tx, deployments: Iterable[DeploymentRow], reason: str) -> None:
    for row in deployments:
        if not row.state.terminal:
            stamped = {"cancel_requested": tx.now, "cancel_reason": reason, "look_at": tx.now}
            tx.execute(queries.CANCEL_DEPLOYMENT, guard_id=row.id, **stamped)
            tx.notify(deployment_topic(row.id), WORK)


def _brief(
    caller: UserCaller,
    row: ExperimentRow,
    deployments: tuple[DeploymentInfo, ...] = (),
    waits_for: tuple[WaitsFor, ...] = (),
) -> ExperimentInfo:
    return ExperimentInfo(
        id=row.id,
        name=row.name,
        state=row.state,
        owner=caller.name,
        created=row.created,
        started=row.started,
        ended=row.ended,
        message=row.message,
        settings=row.settings,
        deployments=deployments,
        queued=row.queued,
        granted=row.granted,
        waits_for=waits_for,
    )


def _info(tx: Tx, caller: UserCaller, row: ExperimentRow) -> ExperimentInfo:
    rows = tx.all(queries.DEPLOYMENTS, DeploymentRow, experiment_id=row.id)
    return _brief(caller, row, tuple(map(_deployment_info, rows)), reservation.waits_for(tx, caller, row))


def _deployment_info(row: DeploymentRow) -> DeploymentInfo:
    return DeploymentInfo(
        name=row.name,
        node=row.node.name,
        state=row.state,
        role=row.spec.role,
        reason=row.reason,
        message=row.message,
        graph=row.spec.graph,
        epoch=row.epoch,
        steps=row.spec.steps,
        drained=row.drained,
        started=row.started,
        ended=row.ended,
        last_seen=row.last_seen,
    )

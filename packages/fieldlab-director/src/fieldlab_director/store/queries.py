"""Every statement that the director sends, by name. Core only, so that SQLite and PostgreSQL run the same.

A statement that answers a user carries the owner. Parameters are bound by name; an update's guards are called
``guard_…`` so that they never collide with the columns that it sets.
"""

from __future__ import annotations

import sqlalchemy as sa
from fieldlab_common.lifecycle import DeploymentState, ExperimentState

from fieldlab_director.store import schema as t

__all__: list[str] = []  # used as ``queries.NAME``


def _p(name: str) -> sa.BindParameter[object]:
    return sa.bindparam(name)


def _but(table: sa.Table, *names: str) -> list[sa.Column[object]]:
    return [column for column in table.c if column.name not in names]


_DEPLOYMENT_ENDS = [state for state in DeploymentState if state.terminal]
_EXPERIMENT_ENDS = [state for state in ExperimentState if state.terminal]

# --- meta, users, tokens ---------------------------------------------------------------------------------------------

META = sa.select(t.meta.c.value).where(t.meta.c.name == _p("name"))
ADD_META = sa.insert(t.meta)
USER = sa.select(t.users).where(t.users.c.id == _p("id"))
USER_BY_NAME = sa.select(t.users).where(t.users.c.name == _p("name"))
USERS = sa.select(t.users).order_by(t.users.c.name)
ADD_USER = sa.insert(t.users)
SET_USER = (
    sa.update(t.users)
    .where(t.users.c.id == _p("guard_id"))
    .values(role=_p("role"), disabled=_p("disabled"), password=_p("password"))
)
DELETE_USER = sa.delete(t.users).where(t.users.c.id == _p("guard_id"))
ADD_TOKEN = sa.insert(t.tokens)
TOKENS = (
    sa.select(t.tokens)
    .where(
        t.tokens.c.user_id == _p("user_id"),
        t.tokens.c.revoked.is_(None),
        sa.or_(t.tokens.c.expires.is_(None), t.tokens.c.expires > _p("now")),
    )
    .order_by(t.tokens.c.created.desc(), t.tokens.c.id)
)
REVOKE_TOKEN = (
    sa.update(t.tokens)
    .where(t.tokens.c.id == _p("guard_id"), t.tokens.c.user_id == _p("guard_user_id"), t.tokens.c.revoked.is_(None))
    .values(revoked=_p("revoked"))
)
REVOKE_LOGINS = (
    sa.update(t.tokens)
    .where(t.tokens.c.user_id == _p("guard_user_id"), t.tokens.c.login, t.tokens.c.revoked.is_(None))
    .values(revoked=_p("revoked"))
)
# Why a token is not good any more is told to who holds it for some time; then its row goes.
FORGET_TOKENS = sa.delete(t.tokens).where(
    t.tokens.c.user_id == _p("guard_user_id"),
    sa.or_(t.tokens.c.revoked < _p("before"), t.tokens.c.expires < _p("before")),
)
TOKEN = (
    sa.select(
        t.users.c.id.label("user_id"),
        t.users.c.name.label("user"),
        t.users.c.role,
        t.users.c.disabled,
        t.tokens.c.id.label("token_id"),
        t.tokens.c.scope,
        t.tokens.c.digest,
        t.tokens.c.expires,
        t.tokens.c.revoked,
    )
    .join_from(t.tokens, t.users)
    .where(t.tokens.c.id == _p("id"))
)

# --- infrastructures, nodes ------------------------------------------------------------------------------------------

EVERYBODY = "*"
_granted = (
    sa.select(t.grants.c.infrastructure_id)
    .where(t.grants.c.infrastructure_id == t.infrastructures.c.id)
    .where(t.grants.c.user_id.in_([_p("owner_id"), EVERYBODY]))
    .exists()
)
_THEIRS = sa.and_(
    t.infrastructures.c.detached.is_(None), sa.or_(t.infrastructures.c.owner_id == _p("owner_id"), _granted)
)
INFRASTRUCTURE = sa.select(t.infrastructures).where(t.infrastructures.c.id == _p("id"))
INFRASTRUCTURES = (
    sa.select(t.infrastructures)
    .where(t.infrastructures.c.owner_id == _p("owner_id"), t.infrastructures.c.detached.is_(None))
    .order_by(t.infrastructures.c.name)
)
COUNT_INFRASTRUCTURES = (
    sa.select(sa.func.count())
    .select_from(t.infrastructures)
    .where(t.infrastructures.c.owner_id == _p("owner_id"), t.infrastructures.c.detached.is_(None))
)
VISIBLE_INFRASTRUCTURES = (
    sa.select(t.infrastructures, t.users.c.name.label("owner"))
    .join_from(t.infrastructures, t.users)
    .where(_THEIRS)
    .order_by(t.infrastructures.c.name)
)
GRANTS = (
    sa.select(t.grants.c.user_id, t.users.c.name)
    .outerjoin_from(t.grants, t.users, t.grants.c.user_id == t.users.c.id)
    .where(t.grants.c.infrastructure_id == _p("infrastructure_id"))
    .order_by(t.users.c.name)
)
ADD_GRANT = sa.insert(t.grants)
DELETE_GRANTS = sa.delete(t.grants).where(t.grants.c.infrastructure_id == _p("guard_infrastructure_id"))
DELETE_GRANT = sa.delete(t.grants).where(
    t.grants.c.infrastructure_id == _p("guard_infrastructure_id"), t.grants.c.user_id == _p("guard_user_id")
)
LEAVE = sa.update(t.infrastructures).where(t.infrastructures.c.id == _p("guard_id")).values(leaving=_p("leaving"))
DETACH = (
    sa.update(t.infrastructures)
    .where(t.infrastructures.c.id == _p("guard_id"))
    .values(name=_p("name"), options=_p("options"), leaving=_p("detached"), detached=_p("detached"))
)
ALL_INFRASTRUCTURES = sa.select(t.infrastructures).order_by(t.infrastructures.c.created, t.infrastructures.c.id)
ADD_INFRASTRUCTURE = sa.insert(t.infrastructures)
SET_INFRASTRUCTURE = (
    sa.update(t.infrastructures)
    .where(t.infrastructures.c.id == _p("guard_id"))
    .values(state=_p("state"), message=_p("message"))
)
SECRETS = sa.select(t.secrets).where(t.secrets.c.owner_id == _p("owner_id")).order_by(t.secrets.c.name)
ADD_SECRET = sa.insert(t.secrets)
DELETE_SECRET = sa.delete(t.secrets).where(
    t.secrets.c.owner_id == _p("guard_owner_id"), t.secrets.c.name == _p("guard_name")
)
ADD_NODE = sa.insert(t.nodes)
NODES = (
    sa.select(
        t.nodes.c.infrastructure_id,
        t.infrastructures.c.name.label("infrastructure"),
        t.infrastructures.c.owner_id,
        t.nodes.c.node,
        t.nodes.c.slots,
        t.nodes.c.updated,
    )
    .join_from(t.nodes, t.infrastructures)
    .where(_THEIRS, t.infrastructures.c.leaving.is_(None))
    .order_by(t.infrastructures.c.created, t.infrastructures.c.id, t.nodes.c.position)
)
DELETE_NODES = sa.delete(t.nodes).where(t.nodes.c.infrastructure_id == _p("infrastructure_id"))
COUNT_NODES = sa.select(t.nodes.c.infrastructure_id, sa.func.count().label("count")).group_by(
    t.nodes.c.infrastructure_id
)

# --- experiments -----------------------------------------------------------------------------------------------------

_e = t.experiments
EXPERIMENT = sa.select(_e).where(_e.c.id == _p("id"))
OWNER = sa.select(_e.c.owner_id).where(_e.c.id == _p("id"))
_THERE = _e.c.deleted.is_(None)
EXPERIMENT_OF_OWNER = sa.select(_e).where(_e.c.owner_id == _p("owner_id"), _e.c.id == _p("id"), _THERE)
EXPERIMENT_BY_NAME = sa.select(_e).where(_e.c.owner_id == _p("owner_id"), _e.c.name == _p("name"), _THERE)
EXPERIMENT_NAMES = sa.select(_e.c.name).where(_e.c.owner_id == _p("owner_id"), _e.c.name.startswith(_p("prefix")))
EXPERIMENTS = (
    sa.select(_e)
    .where(
        _e.c.owner_id == _p("owner_id"),
        _THERE,
        _e.c.state.in_(sa.bindparam("states", expanding=True)),
        sa.func.lower(_e.c.name).like(_p("pattern"), escape="\\"),
        _e.c.created >= _p("since"),
        sa.or_(_e.c.created < _p("before"), sa.and_(_e.c.created == _p("before"), _e.c.id < _p("before_id"))),
    )
    .order_by(_e.c.created.desc(), _e.c.id.desc())
    .limit(_p("limit"))
)
COUNT_EXPERIMENTS = sa.select(sa.func.count()).select_from(_e).where(_e.c.owner_id == _p("owner_id"))
COUNT_EVENTS = sa.select(_e.c.last_event % t.LEAP).where(_e.c.id == _p("id"))  # as many as numbers, but for the leaps
OPEN_EXPERIMENTS = sa.select(_e).where(_e.c.state.not_in(_EXPERIMENT_ENDS)).order_by(_e.c.created, _e.c.id)
ADD_EXPERIMENT = sa.insert(_e)
MOVE_EXPERIMENT = (
    sa.update(_e)
    .where(_e.c.id == _p("guard_id"), _e.c.state == sa.bindparam("guard_state", type_=_e.c.state.type))
    .values(state=_p("state"), message=_p("message"), ended=_p("ended"))
)
BEGIN = sa.update(_e).where(_e.c.id == _p("guard_id"), _e.c.started.is_(None)).values(started=_p("started"))
REQUEST_START = (
    sa.update(_e)
    .where(_e.c.id == _p("guard_id"), _e.c.start_requested.is_(None))
    .values(start_requested=_p("start_requested"))
)
REQUEST_CANCEL = (
    sa.update(_e)
    .where(_e.c.id == _p("guard_id"), _e.c.cancel_requested.is_(None))
    .values(cancel_requested=_p("cancel_requested"), cancel_reason=_p("cancel_reason"))
)
NEXT_EVENT = (
    sa.update(_e)
    .where(_e.c.id == _p("experiment_id"))
    .values(last_event=_e.c.last_event + 1)
    .returning(_e.c.last_event)
)
TAKE_RECORDS = (
    sa.update(_e)
    .where(_e.c.id == _p("experiment_id"))
    .values(last_record=_e.c.last_record + _p("count"))
    .returning(_e.c.last_record)
)
IDEMPOTENT = sa.select(t.idempotency.c.digest, t.idempotency.c.experiment_id).where(
    t.idempotency.c.owner_id == _p("owner_id"), t.idempotency.c.key == _p("key"), t.idempotency.c.created > _p("after")
)
FORGET_IDEMPOTENT = sa.delete(t.idempotency).where(
    t.idempotency.c.owner_id == _p("owner_id"), t.idempotency.c.created <= _p("until")
)
ADD_IDEMPOTENT = sa.insert(t.idempotency)

# --- deployments -----------------------------------------------------------------------------------------------------

_d = t.deployments
DEPLOYMENT = sa.select(_d).where(_d.c.id == _p("id"))
UNFINISHED_OF_OWNER = (
    sa.select(_e.c.name)
    .join_from(_d, _e, _d.c.experiment_id == _e.c.id)
    .where(_e.c.owner_id == _p("owner_id"), sa.or_(_d.c.state.not_in(_DEPLOYMENT_ENDS), _d.c.look_at < _p("never")))
    .distinct()
    .order_by(_e.c.name)
)
GUESTS_OF_OWNER = (  # of whose infrastructures others have deployments
    sa.select(t.infrastructures.c.name)
    .join_from(_d, _e, _d.c.experiment_id == _e.c.id)
    .join(t.infrastructures, _d.c.infrastructure_id == t.infrastructures.c.id)
    .where(t.infrastructures.c.owner_id == _p("owner_id"), _e.c.owner_id != _p("owner_id"))
    .distinct()
    .order_by(t.infrastructures.c.name)
)
USING = (  # runs that have something on an infrastructure, or will have
    sa.select(_e.c.owner_id, _e.c.name)
    .join_from(_d, _e, _d.c.experiment_id == _e.c.id)
    .where(
        _d.c.infrastructure_id == _p("infrastructure_id"),
        sa.or_(_d.c.state.not_in(_DEPLOYMENT_ENDS), _d.c.look_at < _p("never")),
    )
    .distinct()
    .order_by(_e.c.name)
)
DEPLOYMENT_ID = sa.select(_d.c.id).where(_d.c.experiment_id == _p("experiment_id"), _d.c.name == _p("name"))
STANDING = sa.select(_d.c.epoch, _d.c.ended, _d.c.drained).where(_d.c.id == _p("id"))
DEPLOYMENTS = sa.select(_d).where(_d.c.experiment_id == _p("experiment_id")).order_by(_d.c.position)
DEPLOYMENT_STATES = sa.select(_d.c.state).where(_d.c.experiment_id == _p("experiment_id")).distinct()
UNDRAINED = (
    sa.select(sa.func.count())
    .select_from(_d)
    .where(_d.c.experiment_id == _p("experiment_id"), _d.c.drained.is_(False), _d.c.epoch > 0)
)
BEGINNING = (
    sa.select(
        _d.c.state,
        _d.c.ready.is_not(None).label("ready"),
        sa.func.count().label("count"),
        sa.func.max(_d.c.ready).label("bound"),
    )
    .where(_d.c.experiment_id == _p("experiment_id"))
    .group_by(_d.c.state, _d.c.ready.is_not(None))
)
SET_READY = sa.update(_d).where(_d.c.id == _p("guard_id"), _d.c.ready.is_(None)).values(ready=_p("ready"))
OPEN_DEPLOYMENTS = sa.select(_d).where(_d.c.state.not_in(_DEPLOYMENT_ENDS)).order_by(_d.c.look_at, _d.c.id)
ADD_DEPLOYMENT = sa.insert(_d)
MOVE_DEPLOYMENT = (
    sa.update(_d)
    .where(_d.c.id == _p("guard_id"), _d.c.state == sa.bindparam("guard_state", type_=_d.c.state.type))
    .values(
        state=_p("state"),
        reason=_p("reason"),
        message=_p("message"),
        started=_p("started"),
        ended=_p("ended"),
        state_since=_p("state_since"),
    )
)
TELL_DEPLOYMENT = (
    sa.update(_d)
    .where(_d.c.id == _p("guard_id"), _d.c.state == sa.bindparam("guard_state", type_=_d.c.state.type))
    .values(message=_p("message"))
)
CANCEL_DEPLOYMENT = (
    sa.update(_d)
    .where(_d.c.id == _p("guard_id"), _d.c.cancel_requested.is_(None))
    .values(cancel_requested=_p("cancel_requested"), cancel_reason=_p("cancel_reason"), look_at=_p("look_at"))
)
LOOK_AT_ALL = sa.update(_d).where(_d.c.experiment_id == _p("guard_experiment_id")).values(look_at=_p("look_at"))
LOOK_AT = sa.update(_d).where(_d.c.id == _p("guard_id")).values(look_at=_p("look_at"))
HOLD_CLAIM = sa.update(_d).where(_d.c.id == _p("guard_id")).values(journal_id=_p("journal_id"))
SEEN = sa.update(_d).where(_d.c.id == _p("guard_id")).values(last_seen=_p("last_seen"))
SET_ENDING = sa.update(_d).where(_d.c.id == _p("guard_id")).values(ending=_p("ending"))
SET_DRAINED = sa.update(_d).where(_d.c.id == _p("guard_id")).values(drained=True)

# --- records, events -------------------------------------------------------------------------------------------------

_r, _j, _v = t.records, t.journals, t.events
_JOURNAL = (
    _j.c.deployment_id == _p("guard_deployment_id"),
    _j.c.journal_id == _p("guard_journal_id"),
    _j.c.lane == sa.bindparam("guard_lane", type_=_j.c.lane.type),
)
ACKED = sa.select(_j.c.acked).where(*_JOURNAL)
ADD_JOURNAL = sa.insert(_j)
JOURNAL = sa.select(_j.c.acked, _j.c.restored).where(*_JOURNAL)
GO_ON = sa.update(_j).where(*_JOURNAL).values(restored=False)
SET_ACKED = sa.update(_j).where(*_JOURNAL).values(acked=_p("acked"))
ADD_RECORD = sa.insert(_r)
_RECORDS = (
    sa.select(_r.c.seq, _d.c.name.label("deployment"), _r.c.number, _r.c.late, _r.c.data)
    .join_from(_r, _d, _r.c.deployment_id == _d.c.id)
    .where(_r.c.lane == _p("lane"), _r.c.seq > _p("after"))
    .order_by(_r.c.seq)
    .limit(_p("limit"))
)
RECORDS = _RECORDS.where(_r.c.experiment_id == _p("experiment_id"))
RECORDS_OF = _RECORDS.where(_r.c.deployment_id == _p("deployment_id"))  # and no more: so its index is taken
_EVENT = _but(_v, "experiment_id")
EVENT_BY_KEY = sa.select(*_EVENT).where(_v.c.experiment_id == _p("experiment_id"), _v.c.key == _p("key"))
EVENTS = (
    sa.select(*_EVENT)
    .where(_v.c.experiment_id == _p("experiment_id"), _v.c.number > _p("after"))
    .order_by(_v.c.number)
    .limit(_p("limit"))
)
ADD_EVENT = sa.insert(_v)

# --- blobs, artifacts ------------------------------------------------------------------------------------------------

_a = t.artifacts
BLOB = sa.select(t.blobs.c.size, t.blobs.c.doomed).where(t.blobs.c.digest == _p("digest"))
ADD_BLOB = sa.insert(t.blobs)
BLOB_OF_OWNER = (
    sa.select(t.blobs.c.size)
    .join_from(t.blobs, t.blob_refs)
    .where(t.blob_refs.c.owner_id == _p("owner_id"), t.blobs.c.digest == _p("digest"))
)
OWNED_BLOBS = sa.select(t.blob_refs.c.digest).where(
    t.blob_refs.c.owner_id == _p("owner_id"), t.blob_refs.c.digest.in_(sa.bindparam("digests", expanding=True))
)
ADD_BLOB_REF = sa.insert(t.blob_refs)
TOUCH_BLOBS = (
    sa.update(t.blob_refs)
    .where(
        t.blob_refs.c.owner_id == _p("guard_owner_id"),
        t.blob_refs.c.digest.in_(sa.bindparam("digests", expanding=True)),
        t.blob_refs.c.created < _p("before"),
    )
    .values(created=_p("created"))
)
BLOB_USE = sa.select(t.blob_uses.c.digest).where(
    t.blob_uses.c.experiment_id == _p("experiment_id"), t.blob_uses.c.digest == _p("digest")
)
ADD_BLOB_USE = sa.insert(t.blob_uses)
ADD_ARTIFACT = sa.insert(_a)
COUNT_ARTIFACTS = sa.select(sa.func.count()).select_from(_a).where(_a.c.experiment_id == _p("id"))
BYTES_OF_OWNER = (
    sa.select(sa.func.sum(t.blobs.c.size))
    .join_from(t.blob_refs, t.blobs)
    .where(t.blob_refs.c.owner_id == _p("owner_id"))
)
ANNOUNCED = sa.select(_a.c.size).where(_a.c.deployment_id == _p("deployment_id"), _a.c.sha256 == _p("sha256"))
ARTIFACTS_STORED = (
    sa.update(_a)
    .where(_a.c.deployment_id == _p("guard_deployment_id"), _a.c.sha256 == _p("guard_sha256"))
    .values(stored=True, lost="")
)
ARTIFACTS_LOST = (
    sa.update(_a)
    .where(_a.c.deployment_id == _p("guard_deployment_id"), _a.c.sha256 == _p("guard_sha256"), _a.c.stored.is_(False))
    .values(lost=_p("lost"))
)
ALL_ARTIFACTS_LOST = (
    sa.update(_a)
    .where(_a.c.deployment_id == _p("guard_deployment_id"), _a.c.stored.is_(False), _a.c.lost == "")
    .values(lost=_p("lost"))
)
AWAITED = (
    sa.select(_a.c.sha256)
    .where(_a.c.deployment_id == _p("deployment_id"), _a.c.stored.is_(False), _a.c.lost == "")
    .distinct()
    .limit(_p("limit"))
)
ARTIFACTS = (
    sa.select(_d.c.name.label("deployment"), *_but(_a, "id", "experiment_id", "deployment_id", "value"))
    .join_from(_a, _d, _a.c.deployment_id == _d.c.id)
    .where(_a.c.experiment_id == _p("experiment_id"), _a.c.value.is_(False))
    .order_by(_a.c.id)
)

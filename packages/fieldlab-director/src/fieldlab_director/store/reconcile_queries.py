"""The statements of the reconcile loop, by name (see ``queries``).

A write that follows on what a connector did is guarded by the row's id and the lease: whoever lost the lease changes
nothing. Every question about deployments names states and a time, so that an index answers it however long the history.
"""

from __future__ import annotations

import sqlalchemy as sa
from fieldlab_common.lifecycle import DeploymentState, ExperimentState

from fieldlab_director.store import schema as t

__all__: list[str] = []  # used as ``reconcile_queries.NAME``


def _p(name: str) -> sa.BindParameter[object]:
    return sa.bindparam(name)


_d, _e, _i, _n = t.deployments, t.experiments, t.infrastructures, t.nodes
_ENDS = [state for state in DeploymentState if state.terminal]
_OPEN = [state for state in DeploymentState if not state.terminal]
_LAUNCHED = [DeploymentState.LAUNCHING, DeploymentState.RUNNING, DeploymentState.UNREACHABLE]

_HELD = _d.c.infrastructure_id.in_(sa.bindparam("held", expanding=True))
_due = (
    sa.select(
        _d.c.id,
        _d.c.cancel_requested,
        _d.c.look_at,
        sa.func.row_number().over(partition_by=_e.c.owner_id, order_by=_d.c.look_at).label("turn"),
    )
    .join_from(_d, _e, _d.c.experiment_id == _e.c.id)
    .where(_d.c.state.in_(list(DeploymentState)), _d.c.look_at <= _p("now"), _HELD)
    .subquery()
)
DUE = (  # one of each owner's by turns, so that nobody waits for another's thousands
    sa.select(_due.c.id, _due.c.cancel_requested).order_by(_due.c.turn, _due.c.look_at).limit(_p("limit"))
)
SOME = sa.select(_d).where(_d.c.id.in_(sa.bindparam("ids", expanding=True)))
EXPERIMENTS_OF = sa.select(_e).where(
    _e.c.id.in_(sa.select(_d.c.experiment_id).where(_d.c.id.in_(sa.bindparam("ids", expanding=True))))
)
LOOK_LATER = (
    sa.update(_d)
    .where(_d.c.id == _p("guard_id"), sa.or_(_d.c.lease.is_(None), _d.c.lease_until <= _p("guard_now")))
    .values(lease=None, lease_until=None, look_at=_p("look_at"))
)
NEXT = sa.union_all(  # one seek in the index for each state
    *(
        sa.select(sa.func.min(_d.c.look_at).label("look_at")).where(_d.c.state == state, _d.c.look_at > _p("now"))
        for state in DeploymentState
    )
)
STARTABLE = sa.select(_e).where(_e.c.state == ExperimentState.READY, _e.c.start_requested.is_not(None))
COUNTS = (
    sa.select(_d.c.state, sa.func.count().label("count"))
    .where(_d.c.experiment_id == _p("experiment_id"))
    .group_by(_d.c.state)
)
WAITING = sa.select(_d.c.id).where(_d.c.experiment_id == _p("experiment_id"), _d.c.state.in_(_OPEN))
SET_MESSAGE = sa.update(_e).where(_e.c.id == _p("guard_id")).values(message=_p("message"))

KEEP = (
    sa.update(_d)
    .where(
        _d.c.id == _p("guard_id"),
        sa.or_(_d.c.lease.is_(None), _d.c.lease == _p("guard_lease"), _d.c.lease_until <= _p("guard_now")),
    )
    .values(
        lease=_p("lease"),
        lease_until=_p("lease_until"),
        look_at=_p("look_at"),
        epoch=_p("epoch"),
        prepared=_p("prepared"),
        handle=_p("handle"),
        attempts=_p("attempts"),
        drained=_p("drained"),
    )
)
RENEW = (
    sa.update(_d)
    .where(_d.c.lease == _p("guard_lease"))
    .values(lease_until=_p("lease_until"), look_at=_p("lease_until"))
)
FREE = (
    sa.update(_d).where(_d.c.lease.like(_p("guard_lease"))).values(lease=None, lease_until=None, look_at=_p("look_at"))
)
_LEASED = _d.c.lease_until > _p("now")  # by somebody who may still be at work on it
LOOK_AT_OPEN = (
    sa.update(_d)
    .where(_d.c.state.in_(_OPEN), _HELD)
    .values(look_at=sa.case((_LEASED, _d.c.lease_until), else_=_p("now")))
)

_TARGET = (_d.c.id, _d.c.node, _d.c.epoch, _d.c.prepared, _d.c.handle)
WATCHED = sa.union_all(
    sa.select(*_TARGET).where(
        _d.c.state.in_(_LAUNCHED), _d.c.infrastructure_id == _p("infrastructure_id"), _d.c.handle.is_not(None)
    ),
    sa.select(*_TARGET).where(
        _d.c.state.in_(_ENDS),
        _d.c.look_at < _p("never"),
        _d.c.infrastructure_id == _p("infrastructure_id"),
        _d.c.handle.is_not(None),
    ),
)

_OURS = sa.and_(_i.c.detached.is_(None), sa.or_(_i.c.home.is_(None), _i.c.home == _p("guard_home")))
_FREE = sa.or_(_i.c.holder.is_(None), _i.c.held_until <= _p("guard_now"))
WITHOUT_CHARGE = sa.select(sa.func.count()).select_from(_i).where(_OURS, _FREE)
TAKE_CHARGE = (
    sa.update(_i)
    .where(_OURS, sa.or_(_FREE, _i.c.holder == _p("guard_holder")))
    .values(holder=_p("holder"), held_until=_p("until"))
)
IN_CHARGE = (
    sa.select(_i.c.id).where(_i.c.holder == _p("holder"), _i.c.detached.is_(None)).order_by(_i.c.created, _i.c.id)
)
DETACHED = sa.select(_i.c.id).where(_i.c.detached.is_not(None))
LEAVING = sa.select(_i.c.id).where(_i.c.leaving.is_not(None), _i.c.detached.is_(None))
LET_GO = sa.update(_i).where(_i.c.holder.like(_p("guard_holder"))).values(holder=None, held_until=None)
BRING_HOME = sa.update(_i).where(_i.c.home.is_not(None)).values(home=_p("home"))
NODES_OF = sa.select(_n.c.node).where(_n.c.infrastructure_id == _p("infrastructure_id")).order_by(_n.c.position)
LISTED = sa.update(_n).where(_n.c.infrastructure_id == _p("guard_infrastructure_id")).values(updated=_p("updated"))

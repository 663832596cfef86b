"""The statements of the line for nodes, by name (see ``queries``).

A run stands in the line while it prepares and has no nodes yet; what it wants is read from its deployments that wait.
A hold is there for as long as a deployment of its run on its node has not ended, or left something there.
"""

from __future__ import annotations

import sqlalchemy as sa
from fieldlab_common.lifecycle import DeploymentState, ExperimentState

from fieldlab_director.store import schema as t

__all__: list[str] = []  # used as ``reservation_queries.NAME``


def _p(name: str) -> sa.BindParameter[object]:
    return sa.bindparam(name)


_d, _e, _h, _n = t.deployments, t.experiments, t.holds, t.nodes
_ENDS = [state for state in DeploymentState if state.terminal]
_STANDS = (_e.c.state == ExperimentState.PREPARING, _e.c.granted.is_(None))
_WANTS = (_d.c.state == DeploymentState.PENDING, _d.c.cancel_requested.is_(None))
_ORDER = (_e.c.queued, _e.c.number)

# Locked until the commit: one at a time serves the line, and one order for all who come.
NUMBER = sa.update(t.line).values(number=t.line.c.number + 1).returning(t.line.c.number)
LINE = (
    sa.select(
        _e.c.id.label("run"),
        _d.c.infrastructure_id,
        _d.c.place,
        _d.c.node_name,
        sa.func.coalesce(_n.c.slots, 1).label("slots"),
    )
    .join_from(_e, _d, _d.c.experiment_id == _e.c.id)
    .outerjoin(_n, sa.and_(_n.c.infrastructure_id == _d.c.infrastructure_id, _n.c.name == _d.c.place))
    .where(*_STANDS, _e.c.queued <= _p("now"), *_WANTS)
    .order_by(*_ORDER)
)
NEXT_IN_LINE = sa.select(sa.func.min(_e.c.queued)).where(*_STANDS, _e.c.queued > _p("now"))
TAKEN = sa.select(_h.c.infrastructure_id, _h.c.place, sa.func.count().label("count")).group_by(
    _h.c.infrastructure_id, _h.c.place
)

# Of a run that stands in the line: the places that it wants, and who has them or stands before it for them.
_own = t.deployments.alias("own")
_mine = sa.and_(
    _own.c.experiment_id == _p("run"),
    _own.c.state == DeploymentState.PENDING,
    _own.c.cancel_requested.is_(None),
)
WANTED = (
    sa.select(_own.c.infrastructure_id, _own.c.place, _own.c.node_name, sa.func.coalesce(_n.c.slots, 1).label("slots"))
    .outerjoin(_n, sa.and_(_n.c.infrastructure_id == _own.c.infrastructure_id, _n.c.name == _own.c.place))
    .where(_mine)
    .order_by(_own.c.position)
)
_wanted_places = sa.select(_own.c.infrastructure_id, _own.c.place).where(_mine)
HOLDERS = (
    sa.select(_h.c.infrastructure_id, _h.c.place, _h.c.node_name, _h.c.since, _e.c.name.label("run"), _e.c.owner_id)
    .join_from(_h, _e, _h.c.experiment_id == _e.c.id)
    .where(sa.tuple_(_h.c.infrastructure_id, _h.c.place).in_(_wanted_places))
    .order_by(_h.c.infrastructure_id, _h.c.place, _h.c.since, _h.c.slot)
)
_before = (
    sa.select(_e.c.id.label("run"), _d.c.infrastructure_id, _d.c.place, _d.c.node_name)
    .distinct()
    .join_from(_d, _e, _d.c.experiment_id == _e.c.id)
    .where(
        sa.tuple_(_d.c.infrastructure_id, _d.c.place).in_(_wanted_places),
        *_STANDS,
        *_WANTS,
        sa.tuple_(*_ORDER) < sa.tuple_(_p("queued"), _p("number")),
    )
    .subquery()
)
BEFORE = sa.select(  # counted here: thousands may stand in the line
    _before.c.infrastructure_id,
    _before.c.place,
    sa.func.count().label("count"),
    sa.func.count(_before.c.run.distinct()).label("runs"),
).group_by(_before.c.infrastructure_id, _before.c.place)

SLOTS_TAKEN = (
    sa.select(_h.c.infrastructure_id, _h.c.place, _h.c.slot)
    .where(sa.tuple_(_h.c.infrastructure_id, _h.c.place).in_(_wanted_places))
    .order_by(_h.c.slot)
)
ADD_HOLD = sa.insert(_h)
GRANT = (
    sa.update(_e).where(_e.c.id == _p("guard_run"), _e.c.granted.is_(None), *_STANDS[:1]).values(granted=_p("granted"))
)
LOOK_AT_GRANTED = (
    sa.update(_d)
    .where(_d.c.experiment_id == _p("guard_run"), _d.c.state == DeploymentState.PENDING)
    .values(look_at=_p("look_at"))
)

_over = ~(
    sa.exists()
    .where(
        _d.c.experiment_id == _h.c.experiment_id,
        _d.c.infrastructure_id == _h.c.infrastructure_id,
        _d.c.node_name == _h.c.node_name,
        sa.or_(_d.c.state.not_in(_ENDS), _d.c.prepared.is_not(None), _d.c.handle.is_not(None)),
    )
    .correlate(_h)
)
OVER = sa.select(sa.func.count()).select_from(_h).where(_over)
RELEASE = sa.delete(_h).where(_over)

HOLDS = (  # of the nodes of some infrastructures
    sa.select(_h.c.infrastructure_id, _h.c.place, _h.c.node_name, _h.c.since, _e.c.name.label("run"), _e.c.owner_id)
    .join_from(_h, _e, _h.c.experiment_id == _e.c.id)
    .where(_h.c.infrastructure_id.in_(sa.bindparam("infrastructures", expanding=True)))
    .order_by(_h.c.since, _h.c.slot)
)
PLACES = sa.union(  # that runs have, or wait for
    sa.select(_h.c.place.label("name")).where(_h.c.infrastructure_id == _p("infrastructure_id")),
    sa.select(_d.c.place.label("name"))
    .join_from(_d, _e, _d.c.experiment_id == _e.c.id)
    .where(_d.c.infrastructure_id == _p("infrastructure_id"), *_STANDS, *_WANTS),
)

"""The statements by which an experiment goes, by name (see ``queries``)."""

from __future__ import annotations

import sqlalchemy as sa
from fieldlab_common.lifecycle import DeploymentState

from fieldlab_director.store import schema as t

__all__: list[str] = []  # used as ``removal_queries.NAME``


def _p(name: str) -> sa.BindParameter[object]:
    return sa.bindparam(name)


_d, _e, _r, _v = t.deployments, t.experiments, t.records, t.events
_ENDS = [state for state in DeploymentState if state.terminal]

DELETE = (  # its name is free from now on
    sa.update(_e).where(_e.c.id == _p("guard_id")).values(deleted=_p("deleted"), name=_p("name"))
)
_left = (
    sa.exists()
    .where(
        _d.c.experiment_id == _e.c.id,
        sa.or_(_d.c.state.not_in(_ENDS), _d.c.prepared.is_not(None), _d.c.handle.is_not(None)),
    )
    .correlate(_e)
)
REMOVABLE = sa.select(_e.c.id).where(_e.c.deleted.is_not(None), ~_left).order_by(_e.c.deleted).limit(1)
# A week of records is not removed in one transaction, behind which everybody would wait.
_some_records = (
    sa.select(_r.c.lane, _r.c.seq).where(_r.c.experiment_id == _p("experiment_id")).limit(_p("limit")).subquery()
)
REMOVE_RECORDS = sa.delete(_r).where(
    _r.c.experiment_id == _p("experiment_id"),
    sa.tuple_(_r.c.lane, _r.c.seq).in_(sa.select(_some_records.c.lane, _some_records.c.seq)),
)
_some_events = sa.select(_v.c.number).where(_v.c.experiment_id == _p("experiment_id")).limit(_p("limit")).subquery()
REMOVE_EVENTS = sa.delete(_v).where(
    _v.c.experiment_id == _p("experiment_id"), _v.c.number.in_(sa.select(_some_events.c.number))
)
REMOVE = sa.delete(_e).where(_e.c.id == _p("id"))

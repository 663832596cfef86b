"""The statements that find blobs which nothing refers to, by name (see ``queries``).

All go by pages in the order of a key, so that a round costs the same however much is stored.
"""

from __future__ import annotations

import sqlalchemy as sa

from fieldlab_director.store import schema as t

__all__: list[str] = []  # used as ``sweep_queries.NAME``


def _p(name: str) -> sa.BindParameter[object]:
    return sa.bindparam(name)


_b, _r, _u, _e = t.blobs, t.blob_refs, t.blob_uses, t.experiments
_digests: sa.BindParameter[object] = sa.bindparam("digests", expanding=True)

_used = sa.exists().where(_u.c.digest == _r.c.digest, _u.c.experiment_id == _e.c.id, _e.c.owner_id == _r.c.owner_id)
REFS = (
    sa.select(_r.c.owner_id, _r.c.digest, sa.and_(_r.c.created < _p("before"), ~_used).label("over"))
    .where(sa.tuple_(_r.c.owner_id, _r.c.digest) > sa.tuple_(_p("owner_id"), _p("after")))
    .order_by(_r.c.owner_id, _r.c.digest)
    .limit(_p("limit"))
)
DELETE_REF = sa.delete(_r).where(_r.c.owner_id == _p("guard_owner_id"), _r.c.digest == _p("guard_digest"))

_wanted = sa.exists().where(_r.c.digest == _b.c.digest)
BLOBS = (
    sa.select(_b.c.digest, sa.and_(_b.c.doomed.is_(None), _b.c.created < _p("before"), ~_wanted).label("over"))
    .where(_b.c.digest > _p("after"))
    .order_by(_b.c.digest)
    .limit(_p("limit"))
)
DOOM = sa.update(_b).where(_b.c.digest.in_(_digests)).values(doomed=_p("doomed"))
DOOMED = sa.select(_b.c.digest).where(_b.c.doomed.is_not(None)).limit(_p("limit"))
DELETE_BLOBS = sa.delete(_b).where(_b.c.digest.in_(_digests), _b.c.doomed.is_not(None))
KNOWN = sa.select(_b.c.digest).where(_b.c.digest.in_(_digests))

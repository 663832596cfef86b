"""The statements about agents: tokens to join with, who joined, and what they are asked."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from fieldlab_director.store import schema as t

_p = sa.bindparam
_tokens, _agents, _calls = t.join_tokens.c, t.agents.c, t.agent_calls.c


def _set(table: sa.Table, *where: Any, **values: Any) -> sa.Update:
    return sa.update(table).where(*where).values(**values)


ADD_JOIN_TOKEN = sa.insert(t.join_tokens)
JOIN_TOKEN = sa.select(t.join_tokens).where(_tokens.id == _p("id"))
USE_JOIN_TOKEN = _set(t.join_tokens, _tokens.id == _p("guard_id"), _tokens.uses > 0, uses=_tokens.uses - 1)
FORGET_JOIN_TOKENS = sa.delete(t.join_tokens).where((_tokens.expires <= _p("now")) | (_tokens.uses <= 0))

ADD_AGENT = sa.insert(t.agents)
AGENT = sa.select(t.agents).where(_agents.id == _p("id"))
AGENTS = (
    sa.select(t.agents).where(_agents.infrastructure_id == _p("infrastructure_id")).order_by(_agents.joined, _agents.id)
)
DELETE_AGENTS = sa.delete(t.agents).where(_agents.infrastructure_id == _p("guard_infrastructure_id"))
DELETE_JOIN_TOKENS = sa.delete(t.join_tokens).where(_tokens.infrastructure_id == _p("guard_infrastructure_id"))
DELETE_AGENT = sa.delete(t.agents).where(_agents.id == _p("guard_id"))
GIVE_CREDENTIAL = _set(t.agents, _agents.id == _p("guard_id"), next_digest=_p("next_digest"), expires=_p("expires"))
TAKE_CREDENTIAL = _set(
    t.agents,
    _agents.id == _p("guard_id"),
    _agents.next_digest == _p("guard_digest"),
    last_digest=_agents.digest,
    digest=_agents.next_digest,
    next_digest=None,
)
SEEN = _set(t.agents, _agents.id == _p("guard_id"), last_seen=_p("last_seen"))
STARTED = _set(
    t.agents,
    _agents.id == _p("guard_id"),
    last_instance=_agents.instance,
    instance=_p("instance"),
    last_seen=_p("last_seen"),
)
TOLD = _set(t.agents, _agents.id == _p("guard_id"), node=_p("node"))
DOUBLED = _set(t.agents, _agents.id == _p("guard_id"), doubled=_p("doubled"))

ADD_CALL = sa.insert(t.agent_calls).returning(_calls.number)
CALL = sa.select(t.agent_calls).where(_calls.number == _p("number"))
OPEN_CALLS = (
    sa.select(t.agent_calls)
    .where(
        _calls.agent_id == _p("agent_id"),
        _calls.answer.is_(None),
        _calls.deadline > _p("now"),
        (_calls.taken.is_(None) & _calls.cancelled.is_(False))
        | ((_calls.taken != _p("instance")) & _calls.cancelled.is_(False))
        | ((_calls.taken == _p("instance")) & _calls.cancelled.is_(True)),
    )
    .order_by(_calls.number)
    .limit(_p("limit"))
)
TAKE_CALL = _set(t.agent_calls, _calls.number == _p("guard_number"), taken=_p("taken"))
ANSWER_CALL = _set(
    t.agent_calls,
    _calls.number == _p("guard_number"),
    _calls.agent_id == _p("guard_agent_id"),
    _calls.answer.is_(None),
    answer=_p("answer"),
)
CANCEL_CALL = _set(t.agent_calls, _calls.number == _p("guard_number"), cancelled=True)
DELETE_CALL = sa.delete(t.agent_calls).where(_calls.number == _p("guard_number"))
FORGET_CALLS = sa.delete(t.agent_calls).where(_calls.agent_id == _p("guard_agent_id"), _calls.deadline <= _p("now"))

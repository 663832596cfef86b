"""Machines that dial out: how they join, who they are, and the calls that wait for them.

A token to join is ``flj_<id>_<secret>``, a credential ``fla_<agent>_<secret>``: 256 random bits each, of which the
database has the SHA-256. A credential that expired can be renewed for a while, so that a machine comes back after a
long partition; one that was removed is good for nothing at once. Two machines with one identity, a disk that was
copied, give themselves away: a start of the program that was replaced asks again, or a credential that was replaced
is used again. Then neither is trusted any more, and the node says why.

Calls are rows, so that whichever director an agent's poll comes to finds them. Whoever asks adds one and removes it;
the agent answers it, at most once.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fieldlab_common.errors import (
    AuthenticationError,
    DoubledIdentity,
    InvalidRequest,
    NotFound,
)
from fieldlab_common.joining import (
    CREDENTIAL,
    RENEWAL,
    AgentAnswers,
    AgentCall,
    AgentCalls,
    AgentInfo,
    AgentList,
    AgentPoll,
    Credential,
    Join,
    Joined,
    NewJoinToken,
)
from fieldlab_common.node import Availability, Node
from fieldlab_common.protocol import Caller
from fieldlab_common.step import check_name

from fieldlab_director.services import survey
from fieldlab_director.services.identity import UserCaller, new_id
from fieldlab_director.store import agent_queries as aq
from fieldlab_director.store import queries
from fieldlab_director.store.base import Tx
from fieldlab_director.store.rows import InfrastructureRow

__all__ = [
    "AWAY",
    "KIND",
    "AgentCaller",
    "AgentRow",
    "add_call",
    "agent_caller",
    "agent_topic",
    "agents",
    "answered",
    "answers_topic",
    "forget_call",
    "join",
    "join_token",
    "listed",
    "news_topic",
    "poll",
    "remove",
    "renew",
    "take_answers",
    "waiting",
]

KIND = "agents"
AWAY = 100.0  # seconds without a poll (which takes 60 at most) after which an agent is away
MOST_USES, LONGEST = 10_000, 30 * 86400.0  # of a token to join with
MOST_AGENTS = 10_000  # of an infrastructure
MOST_CALLS = 100  # in one answer to a poll
_JOIN = re.compile(r"flj_([0-9a-z]{20})_[A-Za-z0-9_-]{43}")
_CREDENTIAL = re.compile(r"fla_([0-9a-z]{20})_[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, kw_only=True)
class AgentRow:
    """A machine that joined; the columns are explained in ``schema``."""

    id: str
    infrastructure_id: str
    name: str
    node: Node
    digest: str
    next_digest: str | None
    last_digest: str | None
    expires: float
    instance: str | None
    last_instance: str | None
    doubled: float | None
    joined: float
    last_seen: float | None

    def connected(self, now: float) -> bool:
        """Whether it polls."""
        return self.doubled is None and self.last_seen is not None and now < self.last_seen + AWAY


@dataclass(frozen=True, kw_only=True)
class AgentCaller:
    """An agent that asks, with the credential of ``digest``. ``stale``: that expired, and can only be renewed."""

    agent_id: str
    digest: str
    stale: bool = False

    @property
    def may(self) -> frozenset[Caller]:
        """Which callers of the table of endpoints this agent is."""
        return frozenset({Caller.RENEWER} if self.stale else {Caller.AGENT, Caller.RENEWER})


@dataclass(frozen=True, kw_only=True)
class _TokenRow:
    id: str
    infrastructure_id: str
    digest: str
    uses: int
    expires: float


@dataclass(frozen=True, kw_only=True)
class CallRow:
    """A call that waits for its answer, or has it."""

    number: int
    agent_id: str
    method: str
    body: Any
    deadline: float
    taken: str | None
    cancelled: bool
    answer: Any


def agent_topic(agent_id: str) -> str:
    """The topic of what an agent waits for."""
    return f"agent:{agent_id}"


def answers_topic(infrastructure_id: str) -> str:
    """The topic of whoever asked an agent of an infrastructure."""
    return f"agents:{infrastructure_id}"


def news_topic(infrastructure_id: str) -> str:
    """The topic of what agents of an infrastructure tell unasked: that an executor may have ended."""
    return f"agents-news:{infrastructure_id}"


# --- joining ---------------------------------------------------------------------------------------------------------


def join_token(tx: Tx, caller: UserCaller, infrastructure: str, request: NewJoinToken) -> tuple[str, float, str]:
    """A new token to join the caller's infrastructure with, when it expires, and the URL if it has one of its own.

    Raises:
        NotFound: there is no such infrastructure of agents. InvalidRequest: so many uses, or so long, is not given.
    """
    row = _infrastructure(tx, caller, infrastructure)
    if not 1 <= request.uses <= MOST_USES:
        raise InvalidRequest(f"$.uses must be 1 to {MOST_USES}.", details={"path": "$.uses"})
    if not 0 < request.expires <= LONGEST:
        raise InvalidRequest(f"$.expires must be up to {LONGEST:.0f} seconds.", details={"path": "$.expires"})
    tx.execute(aq.FORGET_JOIN_TOKENS, now=tx.now)
    token_id, expires = new_id(), tx.now + request.expires
    token = f"flj_{token_id}_{secrets.token_urlsafe(32)}"
    values: dict[str, Any] = {"infrastructure_id": row.id, "digest": _digest(token), "uses": request.uses}
    tx.execute(aq.ADD_JOIN_TOKEN, id=token_id, expires=expires, **values)
    return token, expires, row.director_url or ""


def join(tx: Tx, request: Join) -> Joined:
    """Make a machine a node.

    Raises:
        AuthenticationError: the token is not valid, has expired or was used up. InvalidRequest: its name is none.
    """
    match = _JOIN.fullmatch(request.token)
    row = tx.one(aq.JOIN_TOKEN, _TokenRow, id=match[1]) if match else None
    if row is None or not hmac.compare_digest(row.digest, _digest(request.token)):
        raise AuthenticationError("The token to join with is not valid.", advice="Ask its owner for a join command.")
    if row.expires <= tx.now or not tx.execute(aq.USE_JOIN_TOKEN, guard_id=row.id):
        raise AuthenticationError(
            "The token to join with has expired, or was used up.", advice="Ask its owner for another join command."
        )
    others = {one.name for one in tx.all(aq.AGENTS, AgentRow, infrastructure_id=row.infrastructure_id)}
    if len(others) >= MOST_AGENTS:
        raise InvalidRequest(f"The infrastructure has {MOST_AGENTS} agents; it takes no more.")
    name = _free_name(check_name(request.node.name, "a node"), others)
    agent = _new_agent(tx, row.infrastructure_id, name, request.node)
    infrastructure = tx.one(queries.INFRASTRUCTURE, InfrastructureRow, id=row.infrastructure_id)
    assert infrastructure is not None  # a foreign key holds that it is there
    _relist(tx, row.infrastructure_id)
    return replace(agent, infrastructure=infrastructure.name)


def _new_agent(tx: Tx, infrastructure_id: str, name: str, node: Node) -> Joined:
    agent_id, expires = new_id(), tx.now + CREDENTIAL
    credential = f"fla_{agent_id}_{secrets.token_urlsafe(32)}"
    row = AgentRow(
        id=agent_id,
        infrastructure_id=infrastructure_id,
        name=name,
        node=node,
        digest=_digest(credential),
        next_digest=None,
        last_digest=None,
        expires=expires,
        instance=None,
        last_instance=None,
        doubled=None,
        joined=tx.now,
        last_seen=tx.now,
    )
    tx.execute(aq.ADD_AGENT, **vars(row))
    return Joined(agent=agent_id, name=name, infrastructure="", credential=credential, expires=expires)


def agent_caller(tx: Tx, credential: str) -> AgentCaller:
    """The agent whose credential this is. The first use of a new one ends the one before.

    Raises:
        AuthenticationError: nobody's, or too old. DoubledIdentity: there are two machines with it.
    """
    match = _CREDENTIAL.fullmatch(credential)
    row = tx.one(aq.AGENT, AgentRow, id=match[1]) if match else None
    digest = _digest(credential)
    if row is None or digest not in (row.digest, row.next_digest, row.last_digest):
        raise AuthenticationError(
            "The agent's credential is not valid: it was removed, or never was.", advice="Join again, with a new token."
        )
    if digest == row.last_digest or row.doubled is not None:
        raise _doubled(row.name)
    if tx.now >= row.expires + RENEWAL:
        raise AuthenticationError("The agent was away for too long.", advice="Join again, with a new token.")
    return AgentCaller(agent_id=row.id, digest=digest, stale=tx.now >= row.expires)


def renew(tx: Tx, caller: AgentCaller) -> Credential:
    """A new credential for an agent; the present one is good until that is first used."""
    credential, expires = f"fla_{caller.agent_id}_{secrets.token_urlsafe(32)}", tx.now + CREDENTIAL
    tx.execute(aq.GIVE_CREDENTIAL, guard_id=caller.agent_id, next_digest=_digest(credential), expires=expires)
    return Credential(credential=credential, expires=expires)


# --- what they are asked ---------------------------------------------------------------------------------------------


def poll(tx: Tx, caller: AgentCaller, request: AgentPoll) -> AgentCalls:
    """Note that an agent is there, and give it the calls that its program has not been given.

    Raises:
        DoubledIdentity: another machine has its identity.
    """
    tx.execute(aq.TAKE_CREDENTIAL, guard_id=caller.agent_id, guard_digest=caller.digest)
    row = _agent(tx, caller)
    _note_start(tx, row, request)
    found = tx.all(aq.OPEN_CALLS, CallRow, **_open(tx, row.id, request.instance))
    calls, cancelled = [], []
    for call in found:
        if call.cancelled:
            cancelled.append(call.number)
            tx.execute(aq.DELETE_CALL, guard_number=call.number)
        else:
            tx.execute(aq.TAKE_CALL, guard_number=call.number, taken=request.instance)
            calls.append(_call(call, tx.now))
    return AgentCalls(calls=tuple(calls), cancelled=tuple(cancelled))


def waiting(tx: Tx, caller: AgentCaller, instance: str) -> bool:
    """Whether a poll of an agent would find something now: calls, or that it was removed."""
    row = tx.one(aq.AGENT, AgentRow, id=caller.agent_id)
    return row is None or row.doubled is not None or bool(tx.all(aq.OPEN_CALLS, CallRow, **_open(tx, row.id, instance)))


def take_answers(tx: Tx, caller: AgentCaller, request: AgentAnswers) -> None:
    """Note the answers of an agent; what nobody waits for any more is forgotten."""
    row = _agent(tx, caller)
    for number, answer in request.answers.items():
        if number.isdigit():
            tx.execute(aq.ANSWER_CALL, guard_number=int(number), guard_agent_id=row.id, answer=dict(answer))
    tx.notify(answers_topic(row.infrastructure_id))
    if request.notices:
        tx.notify(news_topic(row.infrastructure_id))


def add_call(tx: Tx, agent_id: str, method: str, body: Any, deadline: float) -> int:
    """Ask an agent something, for ``deadline`` seconds; the call's number."""
    tx.execute(aq.FORGET_CALLS, guard_agent_id=agent_id, now=tx.now - AWAY)
    values: dict[str, Any] = {"agent_id": agent_id, "method": method, "body": body, "deadline": tx.now + deadline}
    number = tx.value(aq.ADD_CALL, taken=None, cancelled=False, answer=None, **values)
    tx.notify(agent_topic(agent_id))
    return int(number)


def answered(tx: Tx, number: int) -> Mapping[str, Any] | None:
    """The answer to a call, if it has come.

    Raises:
        NotFound: the agent was removed, and its calls with it.
    """
    row = tx.one(aq.CALL, CallRow, number=number)
    if row is None:
        raise NotFound("The agent was removed.")
    answer: Mapping[str, Any] | None = row.answer
    return answer


def forget_call(tx: Tx, number: int) -> None:
    """Nobody waits for a call any more: it is removed, or taken back if an agent has it."""
    row = tx.one(aq.CALL, CallRow, number=number)
    if row is not None and row.taken is not None and row.answer is None:
        tx.execute(aq.CANCEL_CALL, guard_number=number)
        tx.notify(agent_topic(row.agent_id))
    else:
        tx.execute(aq.DELETE_CALL, guard_number=number)


# --- who they are ----------------------------------------------------------------------------------------------------


def listed(tx: Tx, infrastructure_id: str) -> list[tuple[AgentRow, Node]]:
    """The agents of an infrastructure, each with its node as it is to be shown now."""
    name = ""
    infrastructure = tx.one(queries.INFRASTRUCTURE, InfrastructureRow, id=infrastructure_id)
    if infrastructure is not None:
        name = infrastructure.name
    rows = tx.all(aq.AGENTS, AgentRow, infrastructure_id=infrastructure_id)
    return [(row, _node(row, name, tx.now)) for row in rows]


def agents(tx: Tx, caller: UserCaller, infrastructure: str) -> AgentList:
    """The agents of the caller's infrastructure.

    Raises:
        NotFound.
    """
    rows = tx.all(aq.AGENTS, AgentRow, infrastructure_id=_infrastructure(tx, caller, infrastructure).id)
    return AgentList(
        agents=tuple(
            AgentInfo(
                name=row.name,
                state="doubled" if row.doubled else "connected" if row.connected(tx.now) else "away",
                joined=row.joined,
                last_seen=row.last_seen,
                expires=row.expires,
            )
            for row in rows
        )
    )


def remove(tx: Tx, caller: UserCaller, infrastructure: str, agent: str) -> None:
    """Remove an agent: its credential is good for nothing from now on, and its node is gone.

    Raises:
        NotFound.
    """
    place = _infrastructure(tx, caller, infrastructure)
    row = next((one for one in tx.all(aq.AGENTS, AgentRow, infrastructure_id=place.id) if one.name == agent), None)
    if row is None:
        raise NotFound(f"Infrastructure {infrastructure!r} has no agent {agent!r}.")
    tx.execute(aq.DELETE_AGENT, guard_id=row.id)
    _relist(tx, place.id)
    tx.notify(agent_topic(row.id), answers_topic(place.id))


# --- inside ----------------------------------------------------------------------------------------------------------


def _infrastructure(tx: Tx, caller: UserCaller, name: str) -> InfrastructureRow:
    rows = tx.all(queries.INFRASTRUCTURES, InfrastructureRow, owner_id=caller.id)
    row = next((one for one in rows if one.name == name and one.kind == KIND), None)
    if row is None:
        raise NotFound(
            f"There is no infrastructure of agents {name!r}.", advice="Attach one: attach(name, fl.Agents())."
        )
    return row


def _agent(tx: Tx, caller: AgentCaller) -> AgentRow:
    row = tx.one(aq.AGENT, AgentRow, id=caller.agent_id)
    if row is None:
        raise AuthenticationError("The agent was removed.", advice="Join again, with a new token.")
    if row.doubled is not None:
        raise _doubled(row.name)
    return row


def _note_start(tx: Tx, row: AgentRow, request: AgentPoll) -> None:
    if request.instance == row.last_instance:
        tx.execute(aq.DOUBLED, guard_id=row.id, doubled=tx.now)
        _relist(tx, row.infrastructure_id)
        tx.notify(agent_topic(row.id))
        return
    fresh = request.instance != row.instance
    was_away = not row.connected(tx.now)
    if fresh:
        tx.execute(aq.STARTED, guard_id=row.id, instance=request.instance, last_seen=tx.now)
    else:
        tx.execute(aq.SEEN, guard_id=row.id, last_seen=tx.now)
    if request.node is not None and request.node != row.node:
        tx.execute(aq.TOLD, guard_id=row.id, node=request.node)
    if fresh or was_away:
        _relist(tx, row.infrastructure_id)


def _relist(tx: Tx, infrastructure_id: str) -> None:
    survey.reached(tx, infrastructure_id, [node for _, node in listed(tx, infrastructure_id)])


def _node(row: AgentRow, infrastructure: str, now: float) -> Node:
    node = replace(row.node, name=row.name, infrastructure=infrastructure)
    if row.doubled is not None:
        reason = "Two machines have this agent's identity: was a disk copied? Remove the agent, and join each anew."
        return replace(node, availability=Availability.OFFLINE, reason=reason)
    if not row.connected(now):
        return replace(node, availability=Availability.OFFLINE, reason="Its agent is not connected.")
    return node


def _call(row: CallRow, now: float) -> AgentCall:
    return AgentCall(number=row.number, method=row.method, body=row.body, deadline=max(1.0, row.deadline - now))


def _open(tx: Tx, agent_id: str, instance: str) -> dict[str, Any]:
    return {"agent_id": agent_id, "instance": instance, "now": tx.now, "limit": MOST_CALLS}


def _free_name(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    return next(free for number in range(2, len(taken) + 3) if (free := f"{name}-{number}") not in taken)


def _doubled(name: str) -> DoubledIdentity:
    return DoubledIdentity(
        f"Two machines ask as agent {name!r}: was a disk copied?",
        advice="Remove the agent, and let each machine join anew (fieldlab.pyz join URL TOKEN).",
    )


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()

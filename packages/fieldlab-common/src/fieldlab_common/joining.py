"""How machines that dial out come to be nodes: they join with a token, and then ask what there is to do.

An *agent* is the program on such a machine (``fieldlab.pyz join``). It joins once, with a token that is good for some
uses and some time, and is given a credential of its own. With that it waits for calls (those of ``keeping.METHODS``)
in a long-poll, and posts the answers. A credential is renewed before it expires, and for ``RENEWAL`` after; the one
before is good until the new one is first used, so that an answer that was lost locks nobody out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fieldlab_common.node import Node

__all__ = [
    "CREDENTIAL",
    "RENEWAL",
    "AgentAnswers",
    "AgentCall",
    "AgentCalls",
    "AgentInfo",
    "AgentList",
    "AgentPoll",
    "Credential",
    "Join",
    "JoinToken",
    "Joined",
    "NewJoinToken",
]

CREDENTIAL = 24 * 3600.0  # seconds for which an agent's credential is good
RENEWAL = 30 * 86400.0  # seconds after that for which it can still be renewed, after a long partition


@dataclass(frozen=True, kw_only=True)
class NewJoinToken:
    """Ask for a token with which ``uses`` machines may join within ``expires`` seconds."""

    uses: int = 1
    expires: float = 3600.0


@dataclass(frozen=True, kw_only=True)
class JoinToken:
    """A token to join with; it is shown this once. ``url`` is where agents reach the director.

    ``pin`` is the SHA-256 of the certificate (PEM) that they are to trust, if the director has one of its own.
    """

    token: str
    url: str
    expires: float
    uses: int
    pin: str = ""


@dataclass(frozen=True, kw_only=True)
class Join:
    """A machine asks to be a node. ``node`` is what it says of itself; its name is taken if that is free."""

    token: str
    node: Node


@dataclass(frozen=True, kw_only=True)
class Credential:
    """What an agent asks with from now on, and until when it is good, in seconds since the epoch."""

    credential: str
    expires: float


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The machine is a node, called ``name``, of ``infrastructure``."""

    agent: str
    name: str
    infrastructure: str
    credential: str
    expires: float


@dataclass(frozen=True, kw_only=True)
class AgentPoll:
    """An agent is there, and waits for calls. ``instance`` is new at each start; ``node`` is sent with the first."""

    instance: str
    node: Node | None = None


@dataclass(frozen=True, kw_only=True)
class AgentCall:
    """One call of ``keeping.METHODS``. ``deadline`` in seconds, from when it is read."""

    number: int
    method: str
    body: Mapping[str, Any] = field(default_factory=dict)
    deadline: float = 60.0


@dataclass(frozen=True, kw_only=True)
class AgentCalls:
    """Calls to answer, and numbers of calls that nobody waits for any more."""

    calls: tuple[AgentCall, ...] = ()
    cancelled: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AgentAnswers:
    """Answers by the numbers of their calls, each with ``body`` or ``error``; and deployments that there is news of."""

    answers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AgentInfo:
    """An agent of an infrastructure. ``state``: ``connected``, ``away``, ``doubled`` or ``revoked``."""

    name: str
    state: str
    joined: float
    last_seen: float | None = None
    expires: float | None = None


@dataclass(frozen=True, kw_only=True)
class AgentList:
    """The agents of an infrastructure, by name."""

    agents: tuple[AgentInfo, ...] = ()

"""Infrastructures and their nodes, as they are known. What reaches a node is the reconcile loop's business."""

from __future__ import annotations

import ssl
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from urllib.parse import urlsplit

from fieldlab_common.accounts import Role
from fieldlab_common.course import NEVER
from fieldlab_common.errors import FieldlabError, IllegalState, InvalidRequest, NotFound, PermissionDenied
from fieldlab_common.node import Availability, Node
from fieldlab_common.protocol import (
    AttachInfrastructure,
    Hold,
    InfrastructureInfo,
    InfrastructureList,
    NodeList,
    Tagged,
)
from fieldlab_common.step import check_name

from fieldlab_director.connectors.base import Surveyed
from fieldlab_director.services import survey
from fieldlab_director.services.agents import KIND
from fieldlab_director.services.identity import UserCaller
from fieldlab_director.services.reservation import Holder
from fieldlab_director.services.vault import Vault
from fieldlab_director.store import agent_queries as aq
from fieldlab_director.store import queries, reconcile_queries, reservation_queries
from fieldlab_director.store.base import WORK, Tx
from fieldlab_director.store.rows import InfrastructureRow, UserRow

__all__ = [
    "Fleet",
    "attach",
    "check_attach",
    "check_director",
    "detach",
    "finish_detaching",
    "infrastructures",
    "nodes",
    "own",
    "share",
    "takes_an_admin",
    "unshare",
]

UNHEARD_SECONDS = 1200.0  # a node that was listed longer ago may be anything by now


class Fleet(Protocol):
    """What can ask a target infrastructure for its nodes; ``app`` knows which connectors there are."""

    async def survey(
        self, infrastructure_id: str, name: str, kind: str, options: Mapping[str, Any], *, trusted: bool = False
    ) -> Surveyed:
        """Try an infrastructure that is about to be attached, and list its nodes. ``trusted``: the owner is an admin.

        Raises:
            UnknownConnector: there is no connector of that kind. ConnectorError: it can never be used so.
        """
        ...

    async def check(
        self, infrastructure_id: str, name: str, kind: str, options: Mapping[str, Any], *, trusted: bool = False
    ) -> Surveyed:
        """Try an attached infrastructure and list its nodes.

        Raises:
            ConnectorError: its connector cannot be asked.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class _Visible(InfrastructureRow):
    owner: str = ""


@dataclass(frozen=True, kw_only=True)
class _Grant:
    user_id: str
    name: str | None


@dataclass(frozen=True, kw_only=True)
class _Using:
    owner_id: str
    name: str


@dataclass(frozen=True, kw_only=True)
class _Listed:
    infrastructure_id: str
    infrastructure: str
    owner_id: str
    node: Node
    slots: int
    updated: float


@dataclass(frozen=True, kw_only=True)
class _Count:
    infrastructure_id: str
    count: int


def takes_an_admin(spec: Tagged) -> bool:
    """Whether attaching it gives who runs there the director's own machine, or its user's rights elsewhere."""
    return spec.kind == "docker" or is_of_director(spec)


def is_of_director(spec: Tagged) -> bool:
    """Whether it is reached from the director's own machine alone: that itself, an engine's socket there, its Slurm."""
    body = spec.body or {}
    engine = str(body.get("engine") or "")
    if spec.kind == "slurm":
        return not body.get("login")
    return spec.kind == "local" or (spec.kind == "docker" and not engine.startswith("tcp://"))


def check_attach(tx: Tx, caller: UserCaller, name: str) -> None:
    """Hold that the caller can attach an infrastructure under ``name``.

    Raises:
        InvalidRequest: it cannot be a name. IllegalState: it is taken.
    """
    try:
        check_name(name, "an infrastructure")
    except FieldlabError as error:
        raise InvalidRequest(f"$.name: {error.message}", advice=error.advice, details={"path": "$.name"}) from error
    if any(row.name == name for row in tx.all(queries.INFRASTRUCTURES, InfrastructureRow, owner_id=caller.id)):
        raise IllegalState(f"There is an infrastructure {name!r} already.", advice="Choose another name.")


def attach(
    tx: Tx,
    caller: UserCaller,
    vault: Vault,
    infrastructure_id: str,
    request: AttachInfrastructure,
    found: Sequence[Node],
    home: str = "",
) -> InfrastructureInfo:
    """Store an infrastructure, under an id that was made for it, and the nodes that were ``found`` there.

    If it is the machine of this director, only the director at ``home`` will work on it.

    Raises:
        IllegalState: the name was taken meanwhile. InvalidRequest: two nodes of one name.
        NotFound: a user of ``access``. PermissionDenied: only an admin gives access to everybody.
    """
    name, spec, access = request.name, request.spec, request.access
    check_attach(tx, caller, name)
    if len({node.name for node in found}) != len(found):
        raise InvalidRequest("Two nodes have the same name.", details={"path": "$.spec.body"})
    state, message = survey.standing(found)
    row = InfrastructureRow(
        id=infrastructure_id,
        owner_id=caller.id,
        name=name,
        kind=spec.kind,
        options=vault.seal(dict(spec.body)),
        state=state,
        message=message,
        created=tx.now,
        home=home if is_of_director(spec) else None,
        director_url=request.director_url or None,
        director_ca=request.director_ca or None,
    )
    tx.execute(queries.ADD_INFRASTRUCTURE, **vars(row))
    survey.store(tx, row.id, found)
    if access is None:
        access = (queries.EVERYBODY,) if caller.role is Role.ADMIN else ()
    for user in access:
        _grant(tx, caller, row, user)
    tx.notify(WORK)
    return _told(tx, caller, row)


def check_director(request: AttachInfrastructure) -> None:
    """Hold that an infrastructure can reach the director as it is to.

    Raises:
        InvalidRequest: it cannot: the URL or the certificates are none, or it reaches the director in another way.
    """
    url, ca = request.director_url, request.director_ca
    if url and request.spec.body.get("link") == "tunnel":
        raise _wrong("director_url", "is for nodes that dial the director, and these have a tunnel")
    if url and not _is_url(url):
        raise _wrong("director_url", "must be like https://director.example:8420, up to 500 characters")
    if ca and not url:
        raise _wrong("director_ca", "is of a director_url, which is not given")
    if ca and request.spec.kind == KIND:
        raise _wrong("director_ca", "is not for agents, which are told the director's own when they join")
    try:
        ssl.create_default_context(cadata=ca or None)
    except (ssl.SSLError, ValueError) as error:
        raise _wrong("director_ca", f"must hold certificates in PEM ({error})") from error


def _wrong(field: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"$.{field} {what}.", details={"path": f"$.{field}"})


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    plain = text.isascii() and text.isprintable() and len(text) <= 500 and " " not in text
    extra = parts.query or parts.fragment or parts.username is not None
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and not extra


def infrastructures(tx: Tx, caller: UserCaller) -> InfrastructureList:
    """The caller's infrastructures, by name."""
    counts = {count.infrastructure_id: count.count for count in tx.all(queries.COUNT_NODES, _Count)}
    rows = tx.all(queries.VISIBLE_INFRASTRUCTURES, _Visible, owner_id=caller.id)
    return InfrastructureList(
        infrastructures=tuple(_info(tx, caller, row, row.owner, counts.get(row.id, 0)) for row in rows)
    )


def share(tx: Tx, caller: UserCaller, name: str, user: str) -> InfrastructureInfo:
    """Let a user use the caller's infrastructure, or everybody (``*``).

    Raises:
        NotFound: there is no such infrastructure of the caller's, or no such user.
        PermissionDenied: only an admin shares with everybody.
    """
    row = own(tx, caller, name)
    _grant(tx, caller, row, user)
    return _told(tx, caller, row)


def unshare(tx: Tx, caller: UserCaller, name: str, user: str) -> InfrastructureInfo:
    """Take that back. What runs there runs on.

    Raises:
        NotFound: there is no such infrastructure of the caller's, or no such user.
    """
    row = own(tx, caller, name)
    tx.execute(queries.DELETE_GRANT, guard_infrastructure_id=row.id, guard_user_id=_user_id(tx, user))
    return _told(tx, caller, row)


def detach(tx: Tx, caller: UserCaller, name: str, *, drain: bool) -> InfrastructureInfo:
    """Let an infrastructure go: at once, or with ``drain`` as soon as nothing of any run is left on it.

    Raises:
        NotFound: there is no such infrastructure of the caller's.
        IllegalState: runs use it, and it is not to be drained.
    """
    row = own(tx, caller, name)
    users = tx.all(queries.USING, _Using, infrastructure_id=row.id, never=NEVER)
    if users and not drain:
        known = [one.name for one in users if one.owner_id == caller.id]
        others = len(users) - len(known)
        said = ", ".join([*known[:10], *([f"{others} of others"] if others else [])])
        raise IllegalState(
            f"Infrastructure {name!r} is used by runs: {said}.",
            advice="Cancel them, wait for them, or detach with drain=True: it then goes when they have ended.",
        )
    if users:
        tx.execute(queries.LEAVE, guard_id=row.id, leaving=tx.now)
    else:
        _let_go(tx, row)
    tx.notify(WORK)
    return replace(_told(tx, caller, row), state="leaving" if users else "detached")


def finish_detaching(tx: Tx) -> bool:
    """Let go of infrastructures that were to be detached, and have nothing of any run left; whether there were any."""
    gone = False
    for infrastructure_id in tx.all(reconcile_queries.LEAVING, _id):
        row = tx.one(queries.INFRASTRUCTURE, InfrastructureRow, id=infrastructure_id)
        if row is not None and not tx.all(queries.USING, _Using, infrastructure_id=row.id, never=NEVER):
            _let_go(tx, row)
            gone = True
    return gone


def own(tx: Tx, caller: UserCaller, name: str) -> InfrastructureRow:
    """The caller's infrastructure of that name.

    Raises:
        NotFound: there is none.
    """
    for row in tx.all(queries.INFRASTRUCTURES, InfrastructureRow, owner_id=caller.id):
        if row.name == name:
            return row
    raise NotFound("There is no such infrastructure of yours.", advice="client.infrastructures.list() lists them.")


def nodes(tx: Tx, caller: UserCaller) -> NodeList:
    """The nodes of the caller's infrastructures, as they were last listed, and who has them: others are not named."""
    found = tx.all(queries.NODES, _Listed, owner_id=caller.id)
    names = {one.infrastructure_id: one.infrastructure for one in found}
    holders = tx.all(reservation_queries.HOLDS, Holder, infrastructures=sorted(names))
    taken = Counter((one.infrastructure_id, one.place) for one in holders)
    return NodeList(
        nodes=tuple(_now(one, taken[one.infrastructure_id, one.node.name], tx.now) for one in found),
        holds=tuple(
            Hold(
                node=one.node_name,
                infrastructure=names[one.infrastructure_id],
                since=one.since,
                run=one.run if one.owner_id == caller.id else None,
                template=one.place if one.place != one.node_name else "",
            )
            for one in holders
        ),
    )


def _now(listed: _Listed, taken: int, now: float) -> Node:
    """A node as it is now: it may have been given to runs since it was listed, or not been looked at for long."""
    node = listed.node
    if node.availability is not Availability.AVAILABLE:
        return node
    if now - listed.updated > UNHEARD_SECONDS:
        minutes = (now - listed.updated) / 60
        return replace(
            node, availability=Availability.UNKNOWN, reason=f"It was last looked at {minutes:.0f} minutes ago."
        )
    return replace(node, availability=Availability.HELD) if taken >= listed.slots else node


def _id(id: str) -> str:
    return id


def _user_id(tx: Tx, name: str) -> str:
    if name == queries.EVERYBODY:
        return name
    row = tx.one(queries.USER_BY_NAME, UserRow, name=name)
    if row is None:
        raise NotFound("There is no such user.", advice="Ask the director's admin for the name.")
    return row.id


def _grant(tx: Tx, caller: UserCaller, row: InfrastructureRow, user: str) -> None:
    if user == queries.EVERYBODY and caller.role is not Role.ADMIN:
        raise PermissionDenied("Only an admin shares with everybody.", advice="Share with users by their names.")
    granted = {one.user_id for one in tx.all(queries.GRANTS, _Grant, infrastructure_id=row.id)}
    user_id = _user_id(tx, user)
    if user_id not in granted and user_id != row.owner_id:
        tx.execute(queries.ADD_GRANT, infrastructure_id=row.id, user_id=user_id)


def _let_go(tx: Tx, row: InfrastructureRow) -> None:
    """The row stays, for the deployments that were on it, out of the way and without what opened its nodes."""
    tx.execute(queries.DELETE_NODES, infrastructure_id=row.id)
    for statement in (aq.DELETE_AGENTS, aq.DELETE_JOIN_TOKENS, queries.DELETE_GRANTS):
        tx.execute(statement, guard_infrastructure_id=row.id)
    name = f"{row.name[:150]}@{row.id}"
    tx.execute(queries.DETACH, guard_id=row.id, name=name, options=b"", detached=tx.now)


def _told(tx: Tx, caller: UserCaller, row: InfrastructureRow) -> InfrastructureInfo:
    """What its owner is told."""
    counts = {count.infrastructure_id: count.count for count in tx.all(queries.COUNT_NODES, _Count)}
    return _info(tx, caller, row, caller.name, counts.get(row.id, 0))


def _info(tx: Tx, caller: UserCaller, row: InfrastructureRow, owner: str, count: int) -> InfrastructureInfo:
    access: tuple[str, ...] = ()
    if row.owner_id == caller.id:
        grants = tx.all(queries.GRANTS, _Grant, infrastructure_id=row.id)
        access = tuple(one.name or one.user_id for one in grants)
    return InfrastructureInfo(
        name=row.name,
        kind=row.kind,
        state=row.state if row.leaving is None else "leaving",
        message=row.message,
        nodes=count,
        owner=owner,
        access=access,
        director_url=row.director_url or "",
    )

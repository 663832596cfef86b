"""Target infrastructure: the nouns that say how nodes are reached, and what the client does with them.

A specification is data: its ``kind`` names the director's connector, its fields are the connector's options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from fieldlab_common import protocol as p
from fieldlab_common import wire
from fieldlab_common.environment import parse_duration
from fieldlab_common.errors import ConfigurationError, DefinitionError, NotFound
from fieldlab_common.step import check_name

from fieldlab.text import html_table, instant, table
from fieldlab.transport import Session

__all__ = ["Agents", "Infrastructure", "InfrastructureSpec", "Infrastructures", "Local"]

MOST_LOCAL = 1000
TRIED_WITHIN = 120.0  # seconds, beside the usual ones: a director gives nodes so long to answer


@dataclass(frozen=True, kw_only=True)
class InfrastructureSpec:
    """Base of the specifications; ``kind`` is the connector's name."""

    kind: ClassVar[str] = ""

    def options(self) -> dict[str, Any]:
        """It, as the connector's options."""
        encoded: dict[str, Any] = wire.encode(self)
        return encoded

    def tagged(self) -> p.Tagged:
        """It, as it is sent."""
        if not self.kind:
            raise DefinitionError(f"{type(self).__name__} has no kind.", advice="Use fl.Local(...) or another one.")
        return p.Tagged(kind=self.kind, body=self.options())


@dataclass(frozen=True, kw_only=True)
class Local(InfrastructureSpec):
    """Nodes on the director's own machine, each with a working directory of its own.

    ``nodes`` is their number, and they are called ``<prefix>-1`` and so on; or a list of names, or of names and
    properties: ``[{"name": "a", "site": "x"}, "b"]``. ``properties`` are added to what is known of each. ``slots`` runs
    may have a node at the same time: by default one, so that nobody disturbs what it measures. ``elastic``: no fixed
    nodes, but a template called ``prefix``; ``client.nodes()["local"]`` then stands for as many at a time as are taken
    (``NodePool.take``). For trying things out, and for measurements of the machine itself.
    """

    kind: ClassVar[str] = "local"
    nodes: int | Sequence[str | Mapping[str, Any]] = 1
    prefix: str = "local"
    properties: Mapping[str, Any] = field(default_factory=dict)
    slots: int = 1
    elastic: int | None = None

    def __post_init__(self) -> None:
        count = self.nodes if isinstance(self.nodes, int) else len(self.nodes)
        if not 1 <= count <= MOST_LOCAL:
            raise DefinitionError(f"Local(nodes={self.nodes!r:.80}): there are 1 to {MOST_LOCAL} nodes.")
        if self.elastic is not None and not 1 <= self.elastic <= MOST_LOCAL:
            raise DefinitionError(f"Local(elastic={self.elastic!r}): there are 1 to {MOST_LOCAL} nodes at a time.")
        if self.slots < 1:
            raise DefinitionError(f"Local(slots={self.slots!r}): a node has at least one.")

    def options(self) -> dict[str, Any]:
        """It, as the connector's options."""
        common = {"prefix": self.prefix, "properties": dict(self.properties), "slots": self.slots}
        if self.elastic is not None:
            return {"elastic": self.elastic, **common}
        nodes = self.nodes if isinstance(self.nodes, int) else [_named(node) for node in self.nodes]
        return {"nodes": nodes, **common}


def _named(node: str | Mapping[str, Any]) -> dict[str, Any]:
    given = {"name": node} if isinstance(node, str) else dict(node)
    name = check_name(given.pop("name", None), "a node")
    return {"name": name, "properties": given}


@dataclass(frozen=True, kw_only=True)
class Agents(InfrastructureSpec):
    """Machines that dial out: they become nodes as they join, also from behind NAT.

    ``client.infrastructures.attach("field", fl.Agents()).join_command(uses=40)`` gives the line to paste on each.
    """

    kind: ClassVar[str] = "agents"


class _Joined(list[p.AgentInfo]):
    def _rows(self) -> list[list[object]]:
        return [[one.name, one.state, instant(one.joined), instant(one.last_seen)] for one in self]

    def __repr__(self) -> str:
        return table(_AGENTS, self._rows()) if self else "no agents"

    def _repr_html_(self) -> str:
        return html_table(_AGENTS, self._rows())


_AGENTS = ("name", "state", "joined", "last seen")


class Infrastructure:
    """An attached infrastructure, as it stood when it was asked for."""

    def __init__(self, session: Session, info: p.InfrastructureInfo) -> None:
        self._session, self.info = session, info

    @property
    def name(self) -> str:
        """What it was attached as."""
        return self.info.name

    @property
    def kind(self) -> str:
        """How its nodes are reached."""
        return self.info.kind

    def join_command(self, *, uses: int = 1, expires: float | str = "1h") -> str:
        """The line to paste on a machine, in a shell, so that it becomes a node: for ``uses`` machines, for a time.

        Each call makes a token of its own, which is in the line: whoever has that can join machines.

        Raises:
            NotFound: it is not an infrastructure of agents.
        """
        request = p.NewJoinToken(uses=uses, expires=parse_duration(expires))
        path = {"infrastructure": self.name}
        made = self._session.call("join_token", p.JoinToken, path=path, body=request)
        token = f"{made.token}.{made.pin}" if made.pin else made.token
        insecure = "-k " if made.pin else ""  # what is fetched is no secret; what it trusts is named in the token
        return (
            f"curl -fsS {insecure}{made.url}/v1/fieldlab.pyz -o fieldlab.pyz && "
            f"python3 fieldlab.pyz join {made.url} {token}"
        )

    def share(self, user: str) -> None:
        """Let a user use its nodes, or everybody (``"*"``, which takes an admin). Nobody else can change it.

        Raises:
            NotFound: it is not yours, or there is no such user. PermissionDenied: you are not an admin.
        """
        self._ask("share_infrastructure", user=user)

    def unshare(self, user: str) -> None:
        """Take that back. What runs there runs on.

        Raises:
            NotFound: it is not yours, or there is no such user.
        """
        self._ask("unshare_infrastructure", user=user)

    def detach(self, *, drain: bool = False) -> None:
        """Let it go; what is known of past runs stays. With ``drain``: as soon as the runs that use it have ended.

        Raises:
            NotFound: it is not yours. IllegalState: runs use it, and ``drain`` is not set; it names them.
        """
        query = {"drain": "true"} if drain else None
        path = {"infrastructure": self.name}
        self.info = self._session.call("detach_infrastructure", p.InfrastructureInfo, path=path, query=query)

    def check(self) -> list[p.CheckLine]:
        """Try it: see ``Infrastructures.check``."""
        return _checked(self._session, self.name)

    def _ask(self, endpoint: str, **path: str) -> None:
        path = {"infrastructure": self.name, **path}
        self.info = self._session.call(endpoint, p.InfrastructureInfo, path=path)

    def agents(self) -> list[p.AgentInfo]:
        """The machines that joined, and whether they are connected.

        Raises:
            NotFound: it is not an infrastructure of agents.
        """
        path = {"infrastructure": self.name}
        return _Joined(self._session.call("agents", p.AgentList, path=path).agents)

    def remove_agent(self, name: str) -> None:
        """Let a machine be a node no longer: what it asks with is good for nothing from now on.

        Raises:
            NotFound: there is none of that name.
        """
        self._session.call("remove_agent", p.Empty, path={"infrastructure": self.name, "agent": name})

    def __repr__(self) -> str:
        return f"<Infrastructure {self.name} ({self.kind}): {self.info.state}, {self.info.nodes} nodes>"


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The certificates in {path} cannot be read: {error}.") from error


class _Listed(list[p.InfrastructureInfo]):
    def _rows(self) -> list[list[object]]:
        return [[i.name, i.kind, i.state, i.nodes, i.owner, ", ".join(i.access), i.message] for i in self]

    def __repr__(self) -> str:
        return table(_HEADER, self._rows())

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows())


_HEADER = ("name", "kind", "state", "nodes", "owner", "shared with", "message")


class _Checks(list[p.CheckLine]):
    def _rows(self) -> list[list[object]]:
        return [[one.node or "all", one.what, "ok" if one.ok else "NOT OK", one.said, one.advice] for one in self]

    def __repr__(self) -> str:
        return table(_CHECKS, self._rows(), width=100) if self else "no nodes"

    def _repr_html_(self) -> str:
        return html_table(_CHECKS, self._rows())


_CHECKS = ("node", "tried", "", "what came back", "what to do")


def _checked(session: Session, name: str) -> _Checks:
    path = {"infrastructure": name}
    return _Checks(session.call("check_infrastructure", p.CheckList, path=path, slow=TRIED_WITHIN).lines)


class Infrastructures:
    """The infrastructures that this client may see, and the way to attach more."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def attach(
        self,
        name: str,
        spec: InfrastructureSpec,
        *,
        access: Sequence[str] | None = None,
        director_url: str = "",
        director_ca: str = "",
    ) -> Infrastructure:
        """Attach nodes under ``name``.

        ``access`` names the users who may use them beside this one; ``["*"]`` means everybody, and takes an admin.
        Without it, what an admin attaches is for everybody, and what anybody else attaches is for nobody else.

        ``director_url`` is where executors of its nodes reach the director, if not where the director itself says; and
        ``director_ca`` the path of a PEM file with the certificates that they trust there.

        Nodes that cannot be reached now are listed as offline; it is refused if all of them are. Only with SSH and
        the director's own key it then waits, unavailable: its message says which key the hosts must let in.

        Raises:
            UnknownConnector: the director has no connector of that kind.
            ConnectorError: the options are wrong, or none of the nodes can be used.
            PermissionDenied: only admins may.
            NotFound: there is no user of a name in ``access``. ConfigurationError: ``director_ca`` cannot be read.
        """
        body = p.AttachInfrastructure(
            name=check_name(name, "an infrastructure"),
            spec=spec.tagged(),
            access=None if access is None else tuple(access),
            director_url=director_url,
            director_ca=_read(director_ca) if director_ca else "",
        )
        made = self._session.call("attach_infrastructure", p.InfrastructureInfo, body=body, slow=TRIED_WITHIN)
        return Infrastructure(self._session, made)

    def check(self, name: str) -> list[p.CheckLine]:
        """Try one of yours, node by node; a table of what was tried, what came back, and what to do about it.

        Whether it can be reached and logged in to, whether the executor runs, the Pythons, folders, free space, rights
        and installers that there are, and how far the clock is off. What is listed of its nodes is renewed.

        Raises:
            NotFound: there is none of yours of that name. ConnectorError: its connector does not work at all.
        """
        return _checked(self._session, name)

    def get(self, name: str) -> Infrastructure:
        """The one of that name.

        Raises:
            NotFound: there is none.
        """
        for info in self.list():
            if info.name == name:
                return Infrastructure(self._session, info)
        raise NotFound(f"There is no infrastructure {name!r}.", advice="client.infrastructures.list() lists yours.")

    def list(self) -> list[p.InfrastructureInfo]:
        """All of them."""
        return _Listed(self._session.call("infrastructures", p.InfrastructureList).infrastructures)

    def __repr__(self) -> str:
        return repr(self.list())

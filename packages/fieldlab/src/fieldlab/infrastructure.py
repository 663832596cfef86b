"""Target infrastructure: the nouns that say how nodes are reached, and what the client does with them.

A specification is data: its ``kind`` names the director's connector, its fields are the connector's options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fieldlab_common import protocol as p
from fieldlab_common import wire
from fieldlab_common.errors import DefinitionError
from fieldlab_common.step import check_name

from fieldlab.text import html_table, table
from fieldlab.transport import Session

__all__ = ["InfrastructureSpec", "Infrastructures", "Local"]

MOST_LOCAL = 1000


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
    may have a node at the same time: by default one, so that nobody disturbs what it measures. For trying things out,
    and for measurements of the machine itself.
    """

    kind: ClassVar[str] = "local"
    nodes: int | Sequence[str | Mapping[str, Any]] = 1
    prefix: str = "local"
    properties: Mapping[str, Any] = field(default_factory=dict)
    slots: int = 1

    def __post_init__(self) -> None:
        count = self.nodes if isinstance(self.nodes, int) else len(self.nodes)
        if not 1 <= count <= MOST_LOCAL:
            raise DefinitionError(f"Local(nodes={self.nodes!r:.80}): there are 1 to {MOST_LOCAL} nodes.")
        if self.slots < 1:
            raise DefinitionError(f"Local(slots={self.slots!r}): a node has at least one.")

    def options(self) -> dict[str, Any]:
        """It, as the connector's options."""
        nodes = self.nodes if isinstance(self.nodes, int) else [_named(node) for node in self.nodes]
        return {"nodes": nodes, "prefix": self.prefix, "properties": dict(self.properties), "slots": self.slots}


def _named(node: str | Mapping[str, Any]) -> dict[str, Any]:
    given = {"name": node} if isinstance(node, str) else dict(node)
    name = check_name(given.pop("name", None), "a node")
    return {"name": name, "properties": given}


class _Listed(list[p.InfrastructureInfo]):
    def _rows(self) -> list[list[object]]:
        return [[i.name, i.kind, i.state, i.nodes, i.message] for i in self]

    def __repr__(self) -> str:
        return table(_HEADER, self._rows())

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows())


_HEADER = ("name", "kind", "state", "nodes", "message")


class Infrastructures:
    """The infrastructures that this client may see, and the way to attach more."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def attach(self, name: str, spec: InfrastructureSpec) -> p.InfrastructureInfo:
        """Attach nodes under ``name``.

        Raises:
            UnknownConnector: the director has no connector of that kind.
            ConnectorError: it could not reach them.
            PermissionDenied: only admins may.
        """
        body = p.AttachInfrastructure(name=check_name(name, "an infrastructure"), spec=spec.tagged())
        return self._session.call("attach_infrastructure", p.InfrastructureInfo, body=body)

    def list(self) -> list[p.InfrastructureInfo]:
        """All of them."""
        return _Listed(self._session.call("infrastructures", p.InfrastructureList).infrastructures)

    def __repr__(self) -> str:
        return repr(self.list())

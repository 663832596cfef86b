"""Infrastructures and their nodes, as they are known. What reaches a node is the reconcile loop's business."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fieldlab_common.errors import FieldlabError, IllegalState, InvalidRequest
from fieldlab_common.node import Node
from fieldlab_common.protocol import InfrastructureInfo, InfrastructureList, NodeList, Tagged
from fieldlab_common.step import check_name

from fieldlab_director.services.identity import UserCaller, new_id
from fieldlab_director.services.vault import Vault
from fieldlab_director.store import queries
from fieldlab_director.store.base import WORK, Tx
from fieldlab_director.store.rows import InfrastructureRow

__all__ = ["Fleet", "attach", "check_attach", "infrastructures", "nodes"]


class Fleet(Protocol):
    """What can ask a target infrastructure for its nodes; ``app`` knows which connectors there are."""

    async def survey(self, infrastructure_id: str, name: str, kind: str, options: Mapping[str, Any]) -> Sequence[Node]:
        """Check that an infrastructure that is about to be attached can be reached as ``options`` say; its nodes.

        Raises:
            UnknownConnector: there is no connector of that kind. ConnectorError: it cannot be reached so.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class _Count:
    infrastructure_id: str
    count: int


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
    name: str,
    spec: Tagged,
    found: Sequence[Node],
    home: str = "",
) -> InfrastructureInfo:
    """Store an infrastructure, under an id that was made for it, and the nodes that were ``found`` there.

    If it is the machine of this director, only the director at ``home`` will work on it.

    Raises:
        IllegalState: the name was taken meanwhile. InvalidRequest: two nodes of one name.
    """
    check_attach(tx, caller, name)
    if len({node.name for node in found}) != len(found):
        raise InvalidRequest("Two nodes have the same name.", details={"path": "$.spec.body"})
    row = InfrastructureRow(
        id=infrastructure_id,
        owner_id=caller.id,
        name=name,
        kind=spec.kind,
        options=vault.seal(dict(spec.body)),
        state="ready",
        message="",
        created=tx.now,
        home=home if spec.kind == "local" else None,
    )
    tx.execute(queries.ADD_INFRASTRUCTURE, **vars(row))
    rows = [
        {"infrastructure_id": row.id, "position": position, "name": node.name, "node": node, "slots": node.slots}
        for position, node in enumerate(found)
    ]
    tx.execute_many(queries.ADD_NODE, [{"id": new_id(), "updated": tx.now, **values} for values in rows])
    tx.notify(WORK)
    return _info(row, len(found))


def infrastructures(tx: Tx, caller: UserCaller) -> InfrastructureList:
    """The caller's infrastructures, by name."""
    counts = {count.infrastructure_id: count.count for count in tx.all(queries.COUNT_NODES, _Count)}
    rows = tx.all(queries.INFRASTRUCTURES, InfrastructureRow, owner_id=caller.id)
    return InfrastructureList(infrastructures=tuple(_info(row, counts.get(row.id, 0)) for row in rows))


def nodes(tx: Tx, caller: UserCaller) -> NodeList:
    """The nodes of the caller's infrastructures, as they were last listed."""
    return NodeList(nodes=tuple(tx.all(queries.NODES, _node, owner_id=caller.id)))


def _node(infrastructure_id: str, node: Node) -> Node:
    return node


def _info(row: InfrastructureRow, count: int) -> InfrastructureInfo:
    return InfrastructureInfo(name=row.name, kind=row.kind, state=row.state, message=row.message, nodes=count)

"""What the reconcile loop learns about an infrastructure as a whole: its nodes, or that it cannot be reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fieldlab_common.node import Availability, Node

from fieldlab_director.services.identity import new_id
from fieldlab_director.store import queries, reconcile_queries
from fieldlab_director.store.base import LINE, Tx
from fieldlab_director.store.rows import InfrastructureRow

__all__ = ["reached", "unreachable"]


def reached(tx: Tx, infrastructure_id: str, found: Sequence[Node]) -> None:
    """The infrastructure was reached, and has these nodes."""
    _note(tx, infrastructure_id, "ready", "")
    _replace(tx, infrastructure_id, list({node.name: node for node in found}.values()))


def unreachable(tx: Tx, infrastructure_id: str, why: str) -> None:
    """The infrastructure could not be reached: its nodes are offline, for the reason ``why``, and stay listed."""
    _note(tx, infrastructure_id, "unavailable", why)
    known = tx.all(reconcile_queries.NODES_OF, _node, infrastructure_id=infrastructure_id)
    _replace(tx, infrastructure_id, [replace(node, availability=Availability.OFFLINE, reason=why) for node in known])


def _note(tx: Tx, infrastructure_id: str, state: str, message: str) -> None:
    row = tx.one(queries.INFRASTRUCTURE, InfrastructureRow, id=infrastructure_id)
    if row is not None and (row.state, row.message) != (state, message):
        tx.execute(queries.SET_INFRASTRUCTURE, guard_id=infrastructure_id, state=state, message=message)


def _replace(tx: Tx, infrastructure_id: str, nodes: list[Node]) -> None:
    if tx.all(reconcile_queries.NODES_OF, _node, infrastructure_id=infrastructure_id) == nodes:
        return
    tx.execute(queries.DELETE_NODES, infrastructure_id=infrastructure_id)
    common = {"infrastructure_id": infrastructure_id, "updated": tx.now}
    rows = [
        {**common, "position": position, "name": node.name, "node": node, "slots": node.slots}
        for position, node in enumerate(nodes)
    ]
    tx.execute_many(queries.ADD_NODE, [{"id": new_id(), **row} for row in rows])
    tx.notify(LINE)  # a node may have more slots than it had


def _node(node: Node) -> Node:
    return node

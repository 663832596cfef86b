"""What the reconcile loop learns about an infrastructure as a whole: its nodes, or that it cannot be reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fieldlab_common.node import Availability, Node
from fieldlab_common.reservation import UNLIMITED

from fieldlab_director.connectors.base import Surveyed
from fieldlab_director.services.identity import new_id
from fieldlab_director.store import queries, reconcile_queries, reservation_queries
from fieldlab_director.store.base import LINE, Tx
from fieldlab_director.store.rows import InfrastructureRow

__all__ = ["note", "reached", "standing", "store", "unreachable"]

_VANISHED = "Its infrastructure does not list it any more."


def standing(found: Sequence[Node]) -> tuple[str, str]:
    """State and message of an infrastructure with these nodes: it is unavailable while all of them are offline."""
    offline = [node for node in found if node.availability is Availability.OFFLINE]
    return ("unavailable", offline[0].reason) if offline and len(offline) == len(found) else ("ready", "")


def reached(tx: Tx, infrastructure_id: str, found: Sequence[Node]) -> None:
    """The infrastructure was reached, and has these nodes. Those that runs have or wait for stay listed, as gone."""
    _note(tx, infrastructure_id, *standing(found))
    nodes = {node.name: node for node in found}
    wanted = set(tx.all(reservation_queries.PLACES, _name, infrastructure_id=infrastructure_id))
    for node in tx.all(reconcile_queries.NODES_OF, _node, infrastructure_id=infrastructure_id):
        if node.name in wanted and node.name not in nodes:
            nodes[node.name] = replace(node, availability=Availability.OFFLINE, reason=_VANISHED)
    _replace(tx, infrastructure_id, list(nodes.values()))
    tx.execute(reconcile_queries.LISTED, guard_infrastructure_id=infrastructure_id, updated=tx.now)


def note(tx: Tx, infrastructure_id: str, surveyed: Surveyed) -> None:
    """The infrastructure was tried: it was reached, or not."""
    if surveyed.unlisted:
        unreachable(tx, infrastructure_id, surveyed.unlisted)
    else:
        reached(tx, infrastructure_id, surveyed.nodes)


def unreachable(tx: Tx, infrastructure_id: str, why: str) -> None:
    """The infrastructure could not be reached: its nodes are offline, for the reason ``why``, and stay listed."""
    _note(tx, infrastructure_id, "unavailable", why)
    known = tx.all(reconcile_queries.NODES_OF, _node, infrastructure_id=infrastructure_id)
    _replace(tx, infrastructure_id, [replace(node, availability=Availability.OFFLINE, reason=why) for node in known])


def store(tx: Tx, infrastructure_id: str, nodes: Sequence[Node]) -> None:
    """Store the nodes of an infrastructure that has none stored."""
    common = {"infrastructure_id": infrastructure_id, "updated": tx.now}
    rows = [
        {**common, "position": position, "name": node.name, "node": node, "slots": _slots(node)}
        for position, node in enumerate(nodes)
    ]
    tx.execute_many(queries.ADD_NODE, [{"id": new_id(), **row} for row in rows])


def _slots(node: Node) -> int:
    """How many runs may hold it at a time; of a template, how many nodes of it there may be."""
    if node.elastic is not None:
        return UNLIMITED if node.elastic.most is None else max(1, node.elastic.most)
    return max(1, node.slots)


def _note(tx: Tx, infrastructure_id: str, state: str, message: str) -> None:
    row = tx.one(queries.INFRASTRUCTURE, InfrastructureRow, id=infrastructure_id)
    if row is not None and (row.state, row.message) != (state, message):
        tx.execute(queries.SET_INFRASTRUCTURE, guard_id=infrastructure_id, state=state, message=message)


def _replace(tx: Tx, infrastructure_id: str, nodes: list[Node]) -> None:
    if tx.all(reconcile_queries.NODES_OF, _node, infrastructure_id=infrastructure_id) == nodes:
        return
    tx.execute(queries.DELETE_NODES, infrastructure_id=infrastructure_id)
    store(tx, infrastructure_id, nodes)
    tx.notify(LINE)  # a node may have more slots than it had


def _node(node: Node) -> Node:
    return node


def _name(name: str) -> str:
    return name

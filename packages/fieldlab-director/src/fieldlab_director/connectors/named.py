"""Nodes that have a name and nothing else of their own: how many, what they are called, what is known of each.

Options: ``nodes`` is their number, or a list of ``{"name": …, "properties": {…}}``; ``prefix`` names numbered nodes;
``properties`` are added to all; ``slots`` is how many runs may have each at a time (1), as a node of the list may say
for itself. ``elastic`` lists one template instead, of the name ``prefix``, from which so many nodes can be made at a
time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fieldlab_common.errors import ConnectorError
from fieldlab_common.node import Elastic
from fieldlab_common.step import check_name

__all__ = ["NAMING", "named_nodes"]

MOST_NODES = 1000
MOST_SLOTS = 1000
NAMING = frozenset({"elastic", "nodes", "prefix", "properties", "slots"})  # the options that are about it


def named_nodes(kind: str, options: Mapping[str, Any], others: frozenset[str]) -> list[dict[str, Any]]:
    """What each node that the options ask for is given: its name, its properties, its slots, how elastic it is.

    Raises:
        ConnectorError: they cannot be understood, or there is one that is neither about nodes nor among ``others``.
    """

    def hold(true: object, what: str) -> None:
        if not true:
            raise ConnectorError(f"A {kind} infrastructure {what}.", transient=False)

    def node(entry: Any) -> dict[str, Any]:
        named = isinstance(entry, Mapping) and isinstance(entry.get("name"), str)
        hold(named, "takes each node as an object with a name")
        common, properties = options.get("properties", {}), entry.get("properties", {})
        hold(isinstance(common, Mapping), "takes properties as an object")
        hold(isinstance(properties, Mapping), "takes a node's properties as an object")
        slots = entry.get("slots", options.get("slots", 1))
        hold(type(slots) is int and 1 <= slots <= MOST_SLOTS, f"takes slots as a number from 1 to {MOST_SLOTS}")
        return {"name": entry["name"], "properties": {**common, **properties}, "slots": slots}

    known = NAMING | others
    unknown = sorted(set(options) - known)
    hold(not unknown, f"has no option {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    prefix = str(options.get("prefix", kind))
    if "elastic" in options:
        most = options["elastic"]
        hold(type(most) is int and 1 <= most <= MOST_NODES, f"can make 1 to {MOST_NODES} elastic nodes")
        hold("nodes" not in options, "has nodes or is elastic, not both")
        return [{**node({"name": prefix}), "elastic": Elastic(most=most)}]
    wanted = options.get("nodes", 1)
    if type(wanted) is int:
        hold(1 <= wanted <= MOST_NODES, f"can have 1 to {MOST_NODES} nodes")
        wanted = [{"name": f"{prefix}-{number}"} for number in range(1, wanted + 1)]
    hold(isinstance(wanted, list) and 1 <= len(wanted) <= MOST_NODES, "takes nodes as a number or a list")
    found = [node(entry) for entry in wanted]
    for one in found:
        check_name(one["name"], "a node")
    hold(len({one["name"] for one in found}) == len(found), "was given two nodes of one name")
    return found

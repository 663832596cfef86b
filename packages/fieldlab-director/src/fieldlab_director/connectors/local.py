"""Nodes on the director's own machine: for a first try, for tests, and for measurements of the machine itself.

Options: ``nodes`` is their number, or a list of ``{"name": …, "properties": {…}}``; ``prefix`` names numbered nodes
(``local-1`` …); ``properties`` are added to all; ``slots`` is how many runs may have each at a time (1), as a node of
the list may say for itself; ``python`` is the interpreter of the executors; ``executable`` another executor than the
director's. ``elastic`` lists one template instead, of the name ``prefix``, from which as many nodes can be made at a
time. One keeper serves them all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from fieldlab_common.errors import ConnectorError
from fieldlab_common.keeping import KeeperOpening
from fieldlab_common.node import Elastic
from fieldlab_common.step import check_name

from fieldlab_director.connectors.base import Checked, Listed, Nothing, Notice, Opening
from fieldlab_director.connectors.kept import Heard, KeptNodes
from fieldlab_director.connectors.remote import ProcessChannel, Remote

__all__ = ["LocalConnector"]

MOST_NODES = 1000
MOST_SLOTS = 1000
_OPTIONS = {"elastic", "nodes", "prefix", "properties", "slots", "python", "executable"}
_PRIVATE = ("FIELDLAB_TOKEN", "FIELDLAB_ENDPOINT")  # the director's user's, and no business of an executor


class LocalConnector(KeptNodes):
    """The connector of kind ``local`` (see ``base.Connector``)."""

    observe_every: ClassVar[float] = 15.0

    def __init__(self, opening: Opening, notice: Notice) -> None:
        options = dict(opening.options)
        self._name = opening.infrastructure
        self._wanted = _nodes(options)
        self._python = str(options.get("python") or sys.executable)
        self._executable = opening.executable
        keeping = KeeperOpening(
            root=os.path.abspath(opening.folder), executable=str(options.get("executable") or ""), python=self._python
        )

        def reach(key: str, name: str, heard: Heard) -> Remote:
            return Remote(name, self._start_keeper, keeping, notice=heard)

        super().__init__(lambda node: ("", "The keeper of this machine"), reach, notice)

    async def check(self, request: Nothing) -> Checked:
        """Try whether executors can be started here."""
        return Checked(lines=await self.check_node(""))

    async def nodes(self, request: Nothing) -> Listed:
        """The nodes: what is known of this machine, and what each was given."""
        facts = await self.facts("")
        return Listed(
            nodes=tuple(
                replace(
                    facts,
                    infrastructure=self._name,
                    **{**wanted, "properties": {**facts.properties, **wanted["properties"]}},
                )
                for wanted in self._wanted
            )
        )

    async def _start_keeper(self) -> ProcessChannel:
        environment = {name: value for name, value in os.environ.items() if name not in _PRIVATE}
        try:
            return await ProcessChannel.start([self._python, self._executable, "keep"], environment)
        except OSError as error:
            raise ConnectorError(f"{self._python} cannot be started: {error}.", transient=False) from error


# --- options ---------------------------------------------------------------------------------------------------------


def _nodes(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each node that the options ask for is given: its name, its properties, its slots."""
    unknown = sorted(set(options) - _OPTIONS)
    _hold(not unknown, f"has no option {', '.join(unknown)}; there are {', '.join(sorted(_OPTIONS))}")
    if "elastic" in options:
        most = options["elastic"]
        _hold(type(most) is int and 1 <= most <= MOST_NODES, f"can make 1 to {MOST_NODES} elastic nodes")
        _hold("nodes" not in options, "has nodes or is elastic, not both")
        return [{**_node({"name": str(options.get("prefix", "local"))}, options), "elastic": Elastic(most=most)}]
    wanted = options.get("nodes", 1)
    if type(wanted) is int:
        _hold(1 <= wanted <= MOST_NODES, f"can have 1 to {MOST_NODES} nodes")
        prefix = str(options.get("prefix", "local"))
        wanted = [{"name": f"{prefix}-{number}"} for number in range(1, wanted + 1)]
    _hold(isinstance(wanted, list) and 1 <= len(wanted) <= MOST_NODES, "takes nodes as a number or a list")
    found = [_node(entry, options) for entry in wanted]
    for node in found:
        check_name(node["name"], "a node")
    _hold(len({node["name"] for node in found}) == len(found), "was given two nodes of one name")
    return found


def _node(entry: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    _hold(isinstance(entry, Mapping) and isinstance(entry.get("name"), str), "takes each node as an object with a name")
    common, properties = options.get("properties", {}), entry.get("properties", {})
    _hold(isinstance(common, Mapping), "takes properties as an object")
    _hold(isinstance(properties, Mapping), "takes a node's properties as an object")
    slots = entry.get("slots", options.get("slots", 1))
    _hold(type(slots) is int and 1 <= slots <= MOST_SLOTS, f"takes slots as a number from 1 to {MOST_SLOTS}")
    return {"name": entry["name"], "properties": {**common, **properties}, "slots": slots}


def _hold(true: object, what: str) -> None:
    if not true:
        raise ConnectorError(f"A local infrastructure {what}.", transient=False)

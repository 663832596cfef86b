"""Nodes: the devices that can run an environment with an executor, and what is known about them.

A node is data. It never holds a connection, a credential or a reference to where it was listed from, so that it can
travel, be compared and be made up for a test (``Node.dummy``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["DUMMY", "Availability", "Elastic", "Node", "facts_of"]


class Availability(StrEnum):
    """Whether a node can take a deployment now."""

    AVAILABLE = "available"  # reachable and free
    HELD = "held"  # reachable, and held by runs up to its slots: who wants it waits in line
    OFFLINE = "offline"  # it cannot be reached, or is not there any more
    DISABLED = "disabled"  # taken out by its admin
    UNKNOWN = "unknown"  # it has not been looked at for long


DUMMY = "dummy"  # the infrastructure of nodes that are this machine, whatever they claim to be


@dataclass(frozen=True, kw_only=True)
class Elastic:
    """What makes a node a template, from which nodes are made on demand.

    ``most``: so many there should be at a time (None: the engine alone limits them). Runs wait in line for more; one
    that wants more than that has them when nobody else has any.
    """

    most: int | None = None


@dataclass(frozen=True, kw_only=True)
class Node:
    """One device; or with ``elastic`` a template, from which ``NodePool.take`` makes nodes that are gone after the run.

    ``architecture`` is OS and CPU as containers name them (``linux/arm64``); ``os`` is ``linux``, ``macos`` or
    ``windows``; ``python`` lists the interpreters as ``3.11``-like versions, the executor's own first;
    ``environments`` the kinds it can run (``host``, ``venv``, ``container``); ``properties`` everything else that is
    known (facts such as ``cpus``, ``memory`` in bytes, ``kernel``, ``ipv4``) or was added by its owner (``site``).
    ``slots``: so many runs may hold it at a time. ``template``: the name of the template that it was made from.
    """

    name: str
    infrastructure: str = ""
    architecture: str = ""
    os: str = ""
    python: tuple[str, ...] = ()
    environments: tuple[str, ...] = ("host", "venv")
    availability: Availability = Availability.AVAILABLE
    reason: str = ""
    slots: int = 1
    elastic: Elastic | None = None
    template: str = ""
    properties: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        """A field or property by name; KeyError if the node has neither."""
        return facts_of(self)[key]

    def get(self, key: str, default: Any = None) -> Any:
        """A field or property by name, or ``default``."""
        return facts_of(self).get(key, default)

    @classmethod
    def dummy(cls, name: str = "localhost", **facts: Any) -> Node:
        """A node of this machine that claims the given facts: for local runs, plans and tests.

        Known field names (``architecture``, ``os``, ``python`` …) set the field; every other name is a property.
        """
        known = {k: facts.pop(k) for k in list(facts) if k in _FIELDS}
        for key in ("python", "environments"):
            if key in known:
                known[key] = tuple(known[key])
        return cls(name=name, infrastructure=known.pop("infrastructure", DUMMY), properties=facts, **known)


_FIELDS = frozenset(Node.__dataclass_fields__) - {"name", "properties"}


def facts_of(node: Node) -> dict[str, Any]:
    """Everything a selector can ask about: the fields that are set, and the properties (fields win)."""
    facts: dict[str, Any] = dict(node.properties)
    asked = _FIELDS - {"elastic"}
    facts.update({name: getattr(node, name) for name in asked if getattr(node, name) not in ("", ())})
    facts["availability"] = node.availability.value
    facts["name"] = node.name
    return facts

"""Nodes as a list that can be filtered, taken from and looked at. It is immutable: every operation gives a new one."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import overload

from fieldlab_common.errors import DefinitionError, DuplicateNameError, NotEnoughNodes, UnknownNameError
from fieldlab_common.node import Availability, Node, facts_of
from fieldlab_common.protocol import Hold
from fieldlab_common.selector import Selector, as_selector

from fieldlab.text import clean, closest, counted, html_table, instant, listed, size, table

__all__ = ["NodePool"]


class NodePool(Sequence[Node]):
    """Some nodes. A table in a terminal and in a notebook; ``pool["name"]`` is one of them, ``pool[0]`` too.

    A node with ``elastic`` in it is a template: ``take`` makes nodes of it. ``holds``: who has which of the nodes.
    """

    def __init__(
        self,
        nodes: Iterable[Node] = (),
        *,
        chosen: str = "",
        holds: Iterable[Hold] = (),
        again: Callable[[], NodePool] | None = None,
    ) -> None:
        self._nodes = tuple(nodes)
        self._chosen = chosen  # in words, what they were filtered by: for the error that says why there are too few
        self._holds = tuple(holds)
        self._again = again
        self._whole = again is not None  # all that there is: what comes anew belongs to it
        self._rejected: tuple[str, ...] = ()

    def _of(self, nodes: Iterable[Node], *, chosen: str | None = None) -> NodePool:
        """A pool of some of its nodes."""
        pool = NodePool(nodes, chosen=self._chosen if chosen is None else chosen, holds=self._holds, again=self._again)
        pool._whole = False
        return pool

    @property
    def holds(self) -> tuple[Hold, ...]:
        """Who has nodes of this pool, and since when: runs of one's own by name, others without."""
        there = {(node.infrastructure, node.name) for node in self._nodes}
        return tuple(
            hold for hold in self._holds if there & {(hold.infrastructure, n) for n in (hold.node, hold.template)}
        )

    def refresh(self) -> NodePool:
        """The same nodes as they are known now; all that there are, if this is all of ``client.nodes()``.

        One that is not there any more is offline. Nodes that were made of a template are as they were taken.

        Raises:
            DefinitionError: the pool is not of a director.
        """
        if self._again is None:
            raise DefinitionError("These nodes are not of a director.", advice="Use client.nodes().")
        now = self._again()
        if self._whole:
            return now
        known = {(node.infrastructure, node.name): node for node in now}
        gone = {"availability": Availability.OFFLINE, "reason": "It is not there any more."}
        nodes = [
            node if node.template else known.get((node.infrastructure, node.name)) or replace(node, **gone)  # type: ignore[arg-type]
            for node in self._nodes
        ]
        pool = now._of(nodes, chosen=self._chosen)
        pool._rejected = self._rejected
        return pool

    def where(self, selector: Selector | Callable[[Node], bool]) -> NodePool:
        """Those for which ``selector`` holds: ``nodes.where(fl.node.os == "linux")``."""
        asked = as_selector(selector)
        self._check_fields(asked)
        kept: list[Node] = []
        rejected: list[str] = []
        for node in self._nodes:
            verdict = asked.explain(node)
            if verdict.holds:
                kept.append(node)
            else:
                rejected.append(f"{clean(node.name)}: {clean(verdict.because)}")
        pool = self._of(kept, chosen=f"({self._chosen}) and ({asked})" if self._chosen else str(asked))
        pool._rejected = (*self._rejected, *rejected)
        return pool

    def _check_fields(self, asked: Selector) -> None:
        """Refuse a property that no node has, if it looks like a misspelling of one that some have."""
        known = {name for node in self._nodes for name in facts_of(node)}
        for name in sorted(asked.fields() - known) if known else ():
            hint = closest(name, known, likeness=0.8)  # `site` is no misspelling of `hostname`
            if hint:
                raise UnknownNameError(
                    f"No node has a property {clean(name)!r}.{hint}", advice="Use .exists() to ask whether it is there."
                )

    def take(self, count: int) -> NodePool:
        """The first ``count`` of them, those that are available first; what is missing is made of templates.

        A node that is made has a name of its own, and is gone when its run has ended. Each call makes new ones, at most
        so many of a template as it says; whether others have some of them meanwhile decides only when they are to be
        had.

        Raises:
            NotEnoughNodes: there are fewer; the message says which, and why others do not fit.
        """
        if count < 0:
            raise DefinitionError(f"take({count}): the number cannot be negative.")
        fixed = [node for node in self._nodes if node.elastic is None]
        usable = [node for state in _USABLE for node in fixed if node.availability is state][:count]
        for template in self._nodes:
            usable += _made(template, count - len(usable))
        if len(usable) < count:
            raise self._too_few(count, usable)
        return self._of(usable)

    def _too_few(self, count: int, usable: list[Node]) -> NotEnoughNodes:
        rest = [node for node in self._nodes if node not in usable]
        unusable = [f"{clean(n.name)}: is {n.availability.value}" if n.elastic is None else _limit(n) for n in rest]
        others = [*unusable, *self._rejected]
        where = f" where {clean(self._chosen)}" if self._chosen else ""
        have = f"there are {len(usable)} ({listed(n.name for n in usable)})" if usable else "there is none"
        misses = "; ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
        asked = counted(count, "node") + (" was asked for" if count == 1 else " were asked for")
        return NotEnoughNodes(
            f"{asked}{where}, and {have}." + (f" The others: {misses}." if others else ""),
            advice="Ask for fewer, or loosen the condition.",
            details={"asked": count, "available": len(usable)},
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Their names, in order."""
        return tuple(node.name for node in self._nodes)

    @overload
    def __getitem__(self, index: int | str) -> Node: ...
    @overload
    def __getitem__(self, index: slice) -> NodePool: ...
    def __getitem__(self, index: int | str | slice) -> Node | NodePool:
        if isinstance(index, slice):
            return self._of(self._nodes[index])
        if isinstance(index, int):
            return self._nodes[index]
        for node in self._nodes:
            if node.name == index:
                return node
        raise UnknownNameError(
            f"There is no node {clean(index)!r} here.{closest(str(index), self.names)}",
            advice=f"There are: {listed(self.names)}.",
        )

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, item: object) -> bool:
        return item in self._nodes or item in self.names

    def __add__(self, other: Iterable[Node] | Node) -> NodePool:
        added = [other] if isinstance(other, Node) else list(other)
        for node in added:
            if node.name in self.names and node not in self._nodes:
                raise DuplicateNameError(
                    f"Two different nodes are called {clean(node.name)!r}.",
                    advice="Take them from one client, or give dummy nodes names of their own.",
                )
        new = {node.name: node for node in added if node.name not in self.names}
        pool = self._of((*self._nodes, *new.values()), chosen="")
        if isinstance(other, NodePool):
            pool._holds = tuple(dict.fromkeys((*self._holds, *other._holds)))
            pool._again = self._again or other._again
        return pool

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NodePool) and self._nodes == other._nodes

    def __hash__(self) -> int:
        return hash(self.names)

    def _rows(self) -> list[list[object]]:
        return [
            [
                node.name,
                node.architecture,
                node.os,
                ", ".join(node.python),
                node.get("cpus", ""),
                size(node.get("memory")) if isinstance(node.get("memory"), int | float) else "",
                node.infrastructure,
                node.availability.value + (f" ({node.reason})" if node.reason else ""),
                self._held_by(node),
            ]
            for node in self._nodes
        ]

    def _held_by(self, node: Node) -> str:
        """Who has it, in words."""
        mine = [h for h in self._holds if h.infrastructure == node.infrastructure]
        if node.elastic is not None:
            count, most = sum(h.template == node.name for h in mine), node.elastic.most
            return f"{count} in use" if most is None else f"{count} of {most} in use"
        holds = [h for h in mine if h.node == node.name]
        return ", ".join(f"{h.run or 'in use'} since {instant(h.since)}" for h in holds)

    def __repr__(self) -> str:
        return table(_HEADER, self._rows()) if self._nodes else "no nodes"

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows(), caption=counted(len(self), "node"))


_HEADER = ("name", "architecture", "os", "python", "cpus", "memory", "infrastructure", "availability", "held by")
_USABLE = (Availability.AVAILABLE, Availability.HELD, Availability.UNKNOWN)  # a held one is waited for


def _made(template: Node, count: int) -> list[Node]:
    """Nodes of a template, at most ``count``."""
    if template.elastic is None or template.availability not in _USABLE:
        return []
    most = template.elastic.most
    wanted = count if most is None else min(count, most)
    names = [f"{template.name}-{secrets.token_hex(4)}" for _ in range(wanted)]
    made = replace(template, elastic=None, template=template.name, availability=Availability.AVAILABLE, reason="")
    return [replace(made, name=name) for name in names]


def _limit(template: Node) -> str:
    if template.availability not in _USABLE:
        return f"{clean(template.name)}: is {template.availability.value}"
    most = template.elastic.most if template.elastic is not None else 0
    return f"{clean(template.name)}: makes at most {most} at a time"

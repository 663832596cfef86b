"""Nodes as a list that can be filtered, taken from and looked at. It is immutable: every operation gives a new one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import overload

from fieldlab_common.errors import DefinitionError, DuplicateNameError, NotEnoughNodes, UnknownNameError
from fieldlab_common.node import Availability, Node, facts_of
from fieldlab_common.selector import Selector, as_selector

from fieldlab.text import clean, closest, counted, html_table, listed, size, table

__all__ = ["NodePool"]


class NodePool(Sequence[Node]):
    """Some nodes. A table in a terminal and in a notebook; ``pool["name"]`` is one of them, ``pool[0]`` too."""

    def __init__(self, nodes: Iterable[Node] = (), *, chosen: str = "") -> None:
        self._nodes = tuple(nodes)
        self._chosen = chosen  # in words, what they were filtered by: for the error that says why there are too few
        self._rejected: tuple[str, ...] = ()

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
        pool = NodePool(kept, chosen=f"({self._chosen}) and ({asked})" if self._chosen else str(asked))
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
        """The first ``count`` of them, those that are available first.

        Raises:
            NotEnoughNodes: there are fewer; the message says which, and why others do not fit.
        """
        if count < 0:
            raise DefinitionError(f"take({count}): the number cannot be negative.")
        usable = [node for node in self._nodes if node.availability is Availability.AVAILABLE]
        usable += [node for node in self._nodes if node.availability is Availability.BUSY]
        if len(usable) < count:
            raise self._too_few(count, usable)
        return NodePool(usable[:count], chosen=self._chosen)

    def _too_few(self, count: int, usable: list[Node]) -> NotEnoughNodes:
        unusable = [f"{clean(n.name)}: is {n.availability.value}" for n in self._nodes if n not in usable]
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
            return NodePool(self._nodes[index], chosen=self._chosen)
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
        return NodePool((*self._nodes, *new.values()))

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
            ]
            for node in self._nodes
        ]

    def __repr__(self) -> str:
        return table(_HEADER, self._rows()) if self._nodes else "no nodes"

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows(), caption=counted(len(self), "node"))


_HEADER = ("name", "architecture", "os", "python", "cpus", "memory", "infrastructure", "availability")

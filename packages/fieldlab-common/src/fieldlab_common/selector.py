"""Selectors: conditions on what a node is, as data that can be compared, explained and drawn.

Only *fields* (``node.os``, ``node["site"]``) overload operators; the selectors they make compare structurally and
have no truth value, so that a forgotten parenthesis is an error and not a wrong selection. A comparison with a
property that the node lacks is false, and its explanation says so. Python callables are accepted where a selector
is, and explained as opaque.
"""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

from fieldlab_common.errors import DefinitionError, StepMisuseError
from fieldlab_common.node import Node, facts_of

__all__ = ["Always", "Clause", "Field", "NodeFields", "Selector", "Verdict", "as_selector", "node"]

MISSING: Any = object()


@dataclass(frozen=True)
class Verdict:
    """Whether a selector holds for a node, and the words that say why (or the part of it that failed)."""

    holds: bool
    because: str

    def __bool__(self) -> bool:
        return self.holds


@dataclass(frozen=True)
class Selector(ABC):
    """A condition on a node. Combine with ``&``, ``|`` and ``~``."""

    @abstractmethod
    def explain(self, node: Node) -> Verdict:
        """Whether it holds for ``node``, and why."""

    def holds(self, node: Node) -> bool:
        """Whether it holds for ``node``."""
        return self.explain(node).holds

    def fields(self) -> frozenset[str]:
        """The names of the properties that it asks about."""
        return frozenset()

    def __and__(self, other: Selector) -> Selector:
        return AllOf((self, _need_selector(other)))

    def __or__(self, other: Selector) -> Selector:
        return AnyOf((self, _need_selector(other)))

    def __invert__(self) -> Selector:
        return Not(self)

    def __bool__(self) -> NoReturn:
        raise StepMisuseError(
            f"The selector {self} has no truth value: it is asked of a node later.",
            advice="Combine selectors with & | ~, each comparison in parentheses; and, or, not do not work.",
        )


def _need_selector(other: object) -> Selector:
    if isinstance(other, Selector):
        return other
    raise DefinitionError(
        f"{other!r} cannot be combined with a selector.",
        advice="Put each comparison in parentheses: (a == 1) & (b == 2).",
    )


@dataclass(frozen=True)
class Always(Selector):
    """Holds for every node."""

    def explain(self, node: Node) -> Verdict:
        return Verdict(True, "holds for every node")

    def __str__(self) -> str:
        return "always"


@dataclass(frozen=True)
class Clause(Selector):
    """One question about one property: ``op`` is one of ``Clause.OPERATORS``."""

    OPERATORS: ClassVar[dict[str, tuple[str, Callable[[Any, Any], bool]]]] = {
        "==": ("==", lambda have, want: bool(have == want)),
        "!=": ("!=", lambda have, want: bool(have != want)),
        "<": ("<", lambda have, want: bool(have < want)),
        "<=": ("<=", lambda have, want: bool(have <= want)),
        ">": (">", lambda have, want: bool(have > want)),
        ">=": (">=", lambda have, want: bool(have >= want)),
        "isin": ("is in", lambda have, want: have in want),
        "contains": ("contains", lambda have, want: want in have),
        "matches": ("matches", lambda have, want: fnmatch.fnmatchcase(str(have), want)),
        "exists": ("exists", lambda have, want: True),
    }

    name: str
    op: str
    value: Any = None

    def explain(self, node: Node) -> Verdict:
        have = facts_of(node).get(self.name, MISSING)
        if have is MISSING:
            return Verdict(False, f"has no `{self.name}`")
        try:
            holds = self.OPERATORS[self.op][1](have, self.value)
        except TypeError:
            return Verdict(False, f"`{self.name}` is {have!r}, which does not compare with {self.value!r}")
        return Verdict(holds, str(self) if holds else f"`{self.name}` is {have!r}, not {self._wanted()}")

    def _wanted(self) -> str:
        words = self.OPERATORS[self.op][0]
        return repr(self.value) if self.op == "==" else f"{words} {self.value!r}"

    def fields(self) -> frozenset[str]:
        return frozenset({self.name})

    def __str__(self) -> str:
        return (
            f"{self.name} exists" if self.op == "exists" else f"{self.name} {self.OPERATORS[self.op][0]} {self.value!r}"
        )


@dataclass(frozen=True)
class AllOf(Selector):
    """Every part holds."""

    parts: tuple[Selector, ...]

    def explain(self, node: Node) -> Verdict:
        verdicts = [part.explain(node) for part in self.parts]
        failed = [v.because for v in verdicts if not v.holds]
        return Verdict(not failed, ", and ".join(failed or [v.because for v in verdicts]))

    def fields(self) -> frozenset[str]:
        return frozenset().union(*(p.fields() for p in self.parts))

    def __str__(self) -> str:
        return " and ".join(_grouped(p) for p in self.parts)


@dataclass(frozen=True)
class AnyOf(Selector):
    """At least one part holds."""

    parts: tuple[Selector, ...]

    def explain(self, node: Node) -> Verdict:
        verdicts = [part.explain(node) for part in self.parts]
        for verdict in verdicts:
            if verdict.holds:
                return verdict
        return Verdict(False, "; and ".join(v.because for v in verdicts))

    def fields(self) -> frozenset[str]:
        return frozenset().union(*(p.fields() for p in self.parts))

    def __str__(self) -> str:
        return " or ".join(_grouped(p) for p in self.parts)


@dataclass(frozen=True)
class Not(Selector):
    """The part does not hold."""

    part: Selector

    def explain(self, node: Node) -> Verdict:
        verdict = self.part.explain(node)
        return Verdict(
            not verdict.holds, f"not ({self.part})" if not verdict.holds else f"excluded by: {verdict.because}"
        )

    def fields(self) -> frozenset[str]:
        return self.part.fields()

    def __str__(self) -> str:
        return f"not ({self.part})"


@dataclass(frozen=True)
class Opaque(Selector):
    """A Python callable of the node: it is asked, and cannot be explained."""

    function: Callable[[Node], bool] = field(compare=True)

    def explain(self, node: Node) -> Verdict:
        holds = bool(self.function(node))
        return Verdict(holds, f"the function {self} says {'yes' if holds else 'no'}")

    def __str__(self) -> str:
        return f"{getattr(self.function, '__name__', 'function')}()"


def _grouped(part: Selector) -> str:
    return f"({part})" if isinstance(part, AllOf | AnyOf) else str(part)


def as_selector(when: Selector | Callable[[Node], bool] | None) -> Selector:
    """A selector from what users may give for ``when=``; None holds for every node."""
    if when is None:
        return Always()
    if isinstance(when, Selector):
        return when
    if isinstance(when, Field):
        raise DefinitionError(f"{when!r} alone is no condition.", advice=f"Compare it, or ask {when!r}.exists().")
    if callable(when):
        return Opaque(when)
    raise DefinitionError(
        f"{when!r} is no condition on a node.", advice="Give a selector such as fl.node.os == 'linux'."
    )


class Field:
    """A property of a node, by name: compared, it makes a selector; as an argument of a task, it is filled in."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __fieldlab_reference__(self) -> tuple[str, str]:
        return ("node", self._name)

    def __eq__(self, other: object) -> Selector:  # type: ignore[override]
        return Clause(self._name, "==", other)

    def __ne__(self, other: object) -> Selector:  # type: ignore[override]
        return Clause(self._name, "!=", other)

    def __lt__(self, other: Any) -> Selector:
        return Clause(self._name, "<", other)

    def __le__(self, other: Any) -> Selector:
        return Clause(self._name, "<=", other)

    def __gt__(self, other: Any) -> Selector:
        return Clause(self._name, ">", other)

    def __ge__(self, other: Any) -> Selector:
        return Clause(self._name, ">=", other)

    def __hash__(self) -> int:
        return hash(("node", self._name))

    def isin(self, values: Iterable[Any]) -> Selector:
        """It is one of ``values``."""
        return Clause(self._name, "isin", tuple(values))

    def contains(self, value: Any) -> Selector:
        """It is a list (or text) that has ``value``."""
        return Clause(self._name, "contains", value)

    def matches(self, pattern: str) -> Selector:
        """Its text matches a shell pattern: ``*``, ``?``, ``[ab]``; upper and lower case differ."""
        return Clause(self._name, "matches", pattern)

    def exists(self) -> Selector:
        """The node has it."""
        return Clause(self._name, "exists")

    def __bool__(self) -> NoReturn:
        raise StepMisuseError(
            f"{self!r} has no value yet: it is a node's property.", advice="Compare it, or use .exists()."
        )

    def __repr__(self) -> str:
        return f"fl.node[{self._name!r}]"


class NodeFields:
    """``node.os`` and ``node["site"]``: the properties of whatever node is asked."""

    def __getattr__(self, name: str) -> Field:
        if name.startswith("__"):
            raise AttributeError(name)
        return Field(name)

    def __getitem__(self, name: str) -> Field:
        return Field(name)

    def __repr__(self) -> str:
        return "fl.node"


node = NodeFields()

"""Selectors: conditions on what a node is, as data that can be compared, explained and drawn.

Only *fields* (``node.os``, ``node["site"]``) overload operators; the selectors they make compare structurally and
have no truth value, so that a forgotten parenthesis is an error and not a wrong selection. A comparison with a
property that the node lacks is false, and its explanation says so. Python callables are accepted where a selector
is, and explained as opaque.

``node["kernel"].version`` and ``node["ipv4"].address`` compare the property as a version or as an IP address. A
version is the first run of digits and dots in the text (``6.1.0`` of ``6.1.0-23-amd64``, ``9.6`` of ``OpenSSH_9.6p1``):
numbers compared one by one, those that are not there being 0. What follows is not looked at, so that a release
candidate counts as its release; this is no PEP 440. Of a property that is a list it is enough that one member
compares; ``!=`` holds if none is equal.
"""

from __future__ import annotations

import fnmatch
import ipaddress
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

from fieldlab_common.errors import DefinitionError, StepMisuseError
from fieldlab_common.node import Node, facts_of

__all__ = [
    "Address",
    "Always",
    "Clause",
    "Field",
    "NodeFields",
    "Selector",
    "Verdict",
    "Version",
    "as_selector",
    "node",
]

MISSING: Any = object()

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


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


# --- versions and addresses ---

_VERSION = re.compile(r"[0-9]+(?:\.[0-9]+)*")


def _members(have: Any) -> tuple[Any, ...]:
    return tuple(have) if isinstance(have, list | tuple | set | frozenset) else (have,)


def version_numbers(text: Any) -> tuple[int, ...]:
    """The numbers of the first version in ``text``, without zeros at the end; TypeError if there is none."""
    found = None if isinstance(text, bool) else _VERSION.search(str(text)[:1000])
    if found is None:
        raise TypeError(f"{text!r:.100} holds no version")
    numbers = [int(part) for part in found[0].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _version_compares(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda have, want: any(compare(version_numbers(one), version_numbers(want)) for one in _members(have))


def ip_address(text: Any) -> IPAddress:
    """The address in ``10.0.0.7``, ``10.0.0.7/24`` or ``fe80::1%eth0``; IPv4 written as IPv6 is IPv4.

    Raises:
        TypeError: it is no address.
    """
    if not isinstance(text, str):
        raise TypeError(f"{text!r:.100} is no address")
    try:
        address = ipaddress.ip_address(re.split("[%/]", text.strip(), maxsplit=1)[0])
    except ValueError as error:
        raise TypeError(f"{text!r:.100} is no address") from error
    return getattr(address, "ipv4_mapped", None) or address


def ip_network(text: Any) -> IPNetwork:
    """The network in ``10.0.0.0/8``; an address is a network of one.

    Raises:
        DefinitionError: it is neither, or bits are set that its prefix leaves out.
    """
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise DefinitionError(
            f"{text!r:.100} is no network: {error}.", advice='Write it like "10.0.0.0/8" or "2001:db8::/32".'
        ) from error


def _within(have: Any, networks: Iterable[str]) -> bool:
    """Whether one of the addresses is in one of the networks; what is no address among several is passed over."""
    wanted = [ip_network(network) for network in networks]
    members, found = _members(have), []
    for member in members:
        try:
            found.append(ip_address(member))
        except TypeError:
            if len(members) == 1:
                raise
    if members and not found:
        raise TypeError("none of them is an address")
    return any(address in network for address in found for network in wanted)


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
        "version ==": ("version ==", _version_compares(operator.eq)),
        "version !=": ("version !=", lambda have, want: not _version_compares(operator.eq)(have, want)),
        "version <": ("version <", _version_compares(operator.lt)),
        "version <=": ("version <=", _version_compares(operator.le)),
        "version >": ("version >", _version_compares(operator.gt)),
        "version >=": ("version >=", _version_compares(operator.ge)),
        "address ==": ("address ==", lambda have, want: _within(have, (want,))),
        "address !=": ("address !=", lambda have, want: not _within(have, (want,))),
        "address within": ("address within", _within),
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
        return repr(self.value) if self.op == "==" else self._asked()

    def _asked(self) -> str:
        words = self.OPERATORS[self.op][0]
        if self.op == "address within":
            return f"{words} {' or '.join(map(repr, self.value))}"
        return words if self.op == "exists" else f"{words} {self.value!r}"

    def fields(self) -> frozenset[str]:
        return frozenset({self.name})

    def __str__(self) -> str:
        return f"{self.name} {self._asked()}"


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
    """A Python callable of the node: it is asked, and cannot be explained.

    A property that it looks up and the node lacks makes it false, as it makes a comparison.
    """

    function: Callable[[Node], bool] = field(compare=True)

    def explain(self, node: Node) -> Verdict:
        try:
            holds = bool(self.function(node))
        except KeyError as error:
            return Verdict(False, f"the function {self} asks for {error}, which the node has not")
        except Exception as error:  # the user's function may raise anything: say whose it is, and of which node
            raise DefinitionError(
                f"The function {self} failed for node {node.name!r}: {type(error).__name__}: {error}.",
                advice="It takes a node, and says whether it fits; node.get(name) gives None for what it lacks.",
            ) from error
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
    if isinstance(when, Field | Version | Address):
        raise DefinitionError(f"{when!r} alone is no condition.", advice=f"Compare it, or ask {_asked(when)}.exists().")
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

    @property
    def version(self) -> Version:
        """It as a version, to be compared: ``node["kernel"].version >= "6.1"``."""
        return Version(self._name)

    @property
    def address(self) -> Address:
        """It as an IP address, or a list of them: ``node["ipv4"].address.within("10.0.0.0/8")``."""
        return Address(self._name)

    def exists(self) -> Selector:
        """The node has it."""
        return Clause(self._name, "exists")

    def __bool__(self) -> NoReturn:
        raise StepMisuseError(
            f"{self!r} has no value yet: it is a node's property.", advice="Compare it, or use .exists()."
        )

    def __repr__(self) -> str:
        return f"fl.node[{self._name!r}]"


class _View:
    """A property seen in another way: good for comparing, and for nothing else."""

    __slots__ = ("_name",)
    _kind = ""

    def __init__(self, name: str) -> None:
        self._name = name

    def _misused(self) -> StepMisuseError:
        return StepMisuseError(
            f"{self!r} is there to be compared: it has no value.", advice=f"As an argument, give {_asked(self)}."
        )

    def __bool__(self) -> NoReturn:
        raise self._misused()

    def __reduce__(self) -> NoReturn:  # as an argument of a task it would travel, and mean nothing there
        raise self._misused()

    def __repr__(self) -> str:
        return f"fl.node[{self._name!r}].{self._kind}"


def _asked(one: Field | _View) -> str:
    return f"fl.node[{one._name!r}]"


class Version(_View):
    """A property as a version: the first run of digits and dots in it; see the module for how it compares."""

    __slots__ = ()
    _kind = "version"
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> Selector:  # type: ignore[override]
        return self._clause("==", other)

    def __ne__(self, other: object) -> Selector:  # type: ignore[override]
        return self._clause("!=", other)

    def __lt__(self, other: str) -> Selector:
        return self._clause("<", other)

    def __le__(self, other: str) -> Selector:
        return self._clause("<=", other)

    def __gt__(self, other: str) -> Selector:
        return self._clause(">", other)

    def __ge__(self, other: str) -> Selector:
        return self._clause(">=", other)

    def _clause(self, op: str, other: object) -> Selector:
        if not isinstance(other, str) or not _VERSION.fullmatch(other):
            raise DefinitionError(
                f"{other!r:.100} is no version to compare with.", advice='Write it as text of numbers, like "6.1".'
            )
        return Clause(self._name, f"version {op}", other)


class Address(_View):
    """A property as an IP address (IPv4 or IPv6), or a list of them: then one that fits is enough."""

    __slots__ = ()
    _kind = "address"
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> Selector:  # type: ignore[override]
        return Clause(self._name, "address ==", _one_address(other))

    def __ne__(self, other: object) -> Selector:  # type: ignore[override]
        return Clause(self._name, "address !=", _one_address(other))

    def within(self, *networks: str) -> Selector:
        """It lies in one of these networks: ``within("10.0.0.0/8", "2001:db8::/32")``.

        Raises:
            DefinitionError: one of them is no network.
        """
        return Clause(self._name, "address within", tuple(str(ip_network(network)) for network in networks))

    def isin(self, networks: Iterable[str]) -> Selector:
        """It is one of these addresses, or lies in one of these networks."""
        return self.within(*((networks,) if isinstance(networks, str) else networks))


def _one_address(other: object) -> str:
    try:
        return str(ipaddress.ip_address(other))  # type: ignore[arg-type]  # whatever it is not, it says so
    except ValueError as error:
        raise DefinitionError(
            f"{other!r:.100} is no address to compare with.",
            advice='Write it like "10.0.0.7"; for a network use .within("10.0.0.0/8").',
        ) from error


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

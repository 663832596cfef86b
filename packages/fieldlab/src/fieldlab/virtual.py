"""Virtual time, and a network that is as bad as one asks for.

``VirtualTime`` calls what is due in the order of time, and of asking where times are equal: nothing else decides the
order, so a simulation repeats. ``Line`` carries messages with a delay; one may be dropped, and is then sent again
(every party repeats what was not acknowledged), or arrive twice. Whoever receives must bear both.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any, Protocol, TypedDict

from fieldlab_common.environment import parse_duration
from fieldlab_common.errors import DefinitionError

from fieldlab.standins import Duration, probability, span

__all__ = ["Line", "Network", "Party", "VirtualTime"]


class Network(TypedDict, total=False):
    """How messages between executors and director fare."""

    delay: Duration  # of a message, drawn between two bounds; by default 10 to 100 ms
    drop: float  # the probability that one is lost, below 1; by default 0
    double: float  # the probability that one comes twice; by default 0
    retry: float | str  # how long after a loss it is sent again; by default 5 s


class VirtualTime:
    """The clock of a simulation, in seconds from its start."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._asked = 0

    def at(self, when: float, call: Callable[..., None], *arguments: Any) -> None:
        """Call it with those arguments at ``when``, or now if that is past."""
        self._asked += 1
        heapq.heappush(self._due, (when if when > self.now else self.now, self._asked, call, arguments))

    def after(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        """Call it so many ``seconds`` from now."""
        self._asked += 1
        heapq.heappush(self._due, (self.now + seconds, self._asked, call, arguments))

    @property
    def next(self) -> float | None:
        """When the next thing is due; None: nothing is."""
        return self._due[0][0] if self._due else None

    def run(self, until: float, most: int) -> bool:
        """Let time pass until nothing is due; false if ``until``, or the bound of ``most`` calls, came first."""
        due, pop = self._due, heapq.heappop
        for _ in range(most):
            if not due:
                return True
            if due[0][0] > until:
                break
            self.now, _, call, arguments = pop(due)
            call(*arguments)
        return not due


class Party(Protocol):
    """An executor, as the network knows it."""

    lives: bool
    reachable: bool


class Line:
    """The network between executors and director."""

    def __init__(self, time: VirtualTime, network: Network, rng: random.Random) -> None:
        wrong = set(network) - Network.__annotations__.keys()
        if wrong:
            raise DefinitionError(
                f"network: {', '.join(sorted(wrong))} is unknown; known are {', '.join(Network.__annotations__)}."
            )
        self._time, self._rng = time, rng
        self._held: dict[int, list[tuple[Callable[..., None], tuple[Any, ...]]]] = {}  # by the party's id
        self._delay = span(network.get("delay", (0.01, 0.1)))
        self._drop = probability(network.get("drop", 0.0), "network: drop")
        self._double = probability(network.get("double", 0.0), "network: double")
        self._retry = parse_duration(network.get("retry", 5.0))
        if self._drop >= 1.0 or self._retry <= 0.0:
            raise DefinitionError("network: drop is below 1 and retry above 0; else nothing would ever arrive.")

    def carry(self, party: Party, deliver: Callable[..., None], *arguments: Any) -> None:
        """Have it delivered at least once, from or to ``party``, as long as that lives.

        What meets a party that cannot be reached is sent again when it can (``reached``).
        """
        if not party.lives:
            return
        if not party.reachable:
            self._held.setdefault(id(party), []).append((deliver, arguments))
        elif self._drop and self._rng.random() < self._drop:
            self._time.after(self._retry, self.carry, party, deliver, *arguments)
        else:
            self._time.after(self._rng.uniform(*self._delay), self._arrive, party, deliver, arguments)
            if self._double and self._rng.random() < self._double:
                self._time.after(self._rng.uniform(*self._delay), self._arrive, party, deliver, arguments)

    def reached(self, party: Party) -> None:
        """The party can be reached again: what was held is sent."""
        for deliver, arguments in self._held.pop(id(party), ()):
            self.carry(party, deliver, *arguments)

    def _arrive(self, party: Party, deliver: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if party.reachable:
            deliver(*arguments)
        else:  # it was lost on its way
            self.carry(party, deliver, *arguments)

"""Virtual time, and a network that is as bad as one asks for.

``VirtualTime`` calls what is due in the order of time, and of asking where times are equal: nothing else decides the
order, so a simulation repeats. ``Line`` carries messages with a delay; one may be dropped, and is then sent again
(every party repeats what was not acknowledged), or arrive twice. Whoever receives must bear both.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import TypedDict

from fieldlab_common.environment import parse_duration
from fieldlab_common.errors import DefinitionError

from fieldlab.standins import Duration, probability, span

__all__ = ["Line", "Network", "VirtualTime"]


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
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._asked = 0

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Call it at ``when``, or now if that is past."""
        self._asked += 1
        heapq.heappush(self._due, (max(when, self.now), self._asked, call))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call it ``seconds`` from now."""
        self.at(self.now + seconds, call)

    def run(self, until: float, most: int) -> bool:
        """Let time pass until nothing is due; false if ``until``, or the bound of ``most`` calls, came first."""
        for _ in range(most):
            if not self._due:
                return True
            if self._due[0][0] > until:
                break
            self.now, _, call = heapq.heappop(self._due)
            call()
        return not self._due


class Line:
    """The network between executors and director."""

    def __init__(self, time: VirtualTime, network: Network, rng: random.Random) -> None:
        wrong = set(network) - Network.__annotations__.keys()
        if wrong:
            raise DefinitionError(
                f"network: {', '.join(sorted(wrong))} is unknown; known are {', '.join(Network.__annotations__)}."
            )
        self._time, self._rng = time, rng
        self._delay = span(network.get("delay", (0.01, 0.1)))
        self._drop = probability(network.get("drop", 0.0), "network: drop")
        self._double = probability(network.get("double", 0.0), "network: double")
        self._retry = parse_duration(network.get("retry", 5.0))
        if self._drop >= 1.0 or self._retry <= 0.0:
            raise DefinitionError("network: drop is below 1 and retry above 0; else nothing would ever arrive.")

    def carry(self, deliver: Callable[[], None], alive: Callable[[], bool]) -> None:
        """Have it delivered at least once, as long as its sender is ``alive`` to send it again."""
        if not alive():
            return
        if self._drop and self._rng.random() < self._drop:
            self._time.after(self._retry, lambda: self.carry(deliver, alive))
            return
        self._time.after(self._rng.uniform(*self._delay), deliver)
        if self._double and self._rng.random() < self._double:
            self._time.after(self._rng.uniform(*self._delay), deliver)

"""The line in which runs wait for their nodes, and who may have them next.

A run takes all its nodes at once or none, so that no two runs ever wait for each other. Runs stand in line by the time
from which they want their nodes (``line_time``), and then by when they were submitted. The one rule: *a run gets its
nodes as soon as each of them has a slot that no run holds and that no run before it in the line wants.*

What follows from it: runs that want the same nodes are served in order; a run passes others only where it takes nothing
that they wait for, so that it cannot delay them; what a run waits for gets less with every run that ends, so that a
wide one is served after at most those that hold its nodes, or stood before it, when it came. One that wants more slots
of a place than there are (an elastic place has a soft limit, and a node may lose slots) has it when it is alone there.

Functions of what is stored, without a clock and without effects: the same rows give the same answer, after any crash.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["PREPARE_AHEAD", "UNLIMITED", "Claims", "Wish", "grants", "line_time"]

PREPARE_AHEAD = 900.0  # seconds before its start_at from which a run wants its nodes
UNLIMITED = 1_000_000  # slots of a place that has no limit of its own

Place = Hashable
Slots = Callable[[Place], int]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a run in the line wants: so many slots of each place. A place is a node, or the template of elastic ones."""

    run: str
    needs: Mapping[Place, int]


@dataclass
class Claims:
    """How many slots of each place are held, or wanted by those who stand before in the line."""

    slots: Slots
    taken: Counter[Place] = field(default_factory=Counter)

    def lacks(self, wish: Wish) -> tuple[Place, ...]:
        """The places that have no room for ``wish``; none: it can have its nodes."""
        return tuple(place for place, count in wish.needs.items() if not self._fits(place, count))

    def add(self, wish: Wish) -> None:
        """Count ``wish``, whether it has its nodes or stands in the line for them."""
        self.taken.update(wish.needs)

    def _fits(self, place: Place, count: int) -> bool:
        taken = self.taken[place]
        return taken == 0 or taken + count <= self.slots(place)


def grants(line: Iterable[Wish], held: Mapping[Place, int], slots: Slots) -> list[str]:
    """The runs of ``line`` that get their nodes now, in order. ``held``: slots that runs hold, by place."""
    claims = Claims(slots, Counter(held))
    granted = []
    for wish in line:
        if not claims.lacks(wish):
            granted.append(wish.run)
        claims.add(wish)
    return granted


def line_time(created: float, start_at: float | None) -> float:
    """The time from which a run wants its nodes: when it was submitted, or shortly before the start it asks for."""
    return created if start_at is None else max(created, start_at - PREPARE_AHEAD)

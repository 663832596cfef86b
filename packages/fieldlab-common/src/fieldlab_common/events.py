"""Events, and the rules of barriers, as pure functions of an experiment's ordered log.

An event is a named JSON message with a number that the director gave it: one order for the whole experiment. Executor,
director, local runs and simulation all use the rules here, so that there is one truth about when a barrier opens.

Names that begin with ``fieldlab.`` are made by fieldlab itself; users cannot send them.

In a step or a DAG that is repeated, a barrier and a gate are new in each *round* (``paths.place``): a barrier is known
by its name and its round, and a gate opens with the next event of its name, not again with the last round's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fieldlab_common import paths
from fieldlab_common.lifecycle import DeploymentState
from fieldlab_common.paths import Round

__all__ = [
    "BARRIER",
    "DEPLOYMENT",
    "MAX_EVENT_BYTES",
    "RESERVED_PREFIX",
    "START",
    "Arrivals",
    "BarrierView",
    "Event",
    "Gates",
    "Member",
    "arrival",
    "barrier_view",
]

RESERVED_PREFIX = "fieldlab."
BARRIER = "fieldlab.barrier"  # data: {"barrier": name}, and "round" from the second on; its sender has arrived
DEPLOYMENT = "fieldlab.deployment"  # data: {"deployment": name, "state": ..., "reason": ...}
START = "fieldlab.start"  # data: {"at": seconds since the epoch, by the director's clock}: all executors begin then
MAX_EVENT_BYTES = 64 * 1024
MAX_ARRIVALS = 100_000  # that are remembered: of the oldest rounds nobody asks any more
MAX_ROUNDS = 10_000  # of one gate, likewise
_TERMINAL = frozenset(state.value for state in DeploymentState if state.terminal)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One message of an experiment's log.

    ``number`` is its place in the experiment's order, counted from 1; None while it is provisional, that is seen on
    the node that sent it and not yet numbered by the director. ``sent_at`` is in seconds since the epoch, by the
    sender's clock. ``sender`` is the deployment's name, or None when a person (or the director) sent it.
    """

    name: str
    data: Any = None
    number: int | None = None
    sender: str | None = None
    step: str | None = None
    iteration: int = 0
    sent_at: float = 0.0
    key: str = ""  # unique in the experiment: the sender's journal and record number; doubles are recognised by it


@dataclass(frozen=True, kw_only=True)
class Member:
    """One deployment of an experiment as its peers see it: name, role, and the node's name and addresses."""

    deployment: str
    role: str | None = None
    node: str = ""
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True)
class BarrierView:
    """What is known about a barrier: who came, whether it is open, and who is missing for good."""

    arrived: tuple[str, ...]
    open: bool
    missing_for_good: tuple[str, ...] = ()
    needed: int = 0

    @property
    def broken(self) -> bool:
        """Whether it can never open."""
        return not self.open and bool(self.missing_for_good)


def arrival(name: str, round: Round) -> dict[str, Any]:
    """The data of the event by which a step says that it has come to a barrier."""
    return {"barrier": name, "round": list(round)} if round else {"barrier": name}


def _arrived_at(data: Any) -> tuple[str, Round] | None:
    """The barrier, by name and round, that the data of an event names."""
    if not isinstance(data, Mapping) or not isinstance(data.get("barrier"), str):
        return None
    numbers = data.get("round", ())
    if not isinstance(numbers, list | tuple) or not all(type(number) is int for number in numbers):
        return None
    return data["barrier"], tuple(numbers)


class Arrivals:
    """Who has come to which barrier, and which deployments have ended: all that barriers are judged by.

    A party is (deployment, step, iteration), counted once whatever its retries, and those of the DAGs around it.
    """

    def __init__(self, log: Iterable[Event] = (), *, most: int = MAX_ARRIVALS) -> None:
        self._most = most
        self._count = 0
        self._parties: dict[tuple[str, Round], dict[tuple[str, str, int], None]] = {}
        self._ended: dict[str, str] = {}
        for event in log:
            self.add(event)

    def add(self, event: Event) -> None:
        """Take in an event of the log; one that says nothing of barriers, or is known, changes nothing."""
        if event.name == BARRIER and (barrier := _arrived_at(event.data)) is not None:
            came = self._parties.setdefault(barrier, {})
            before = len(came)
            came.setdefault((event.sender or "", paths.untried(event.step or ""), event.iteration))
            self._count += len(came) - before
            while self._count > self._most and len(self._parties) > 1:
                self._count -= len(self._parties.pop(next(iter(self._parties))))
        elif event.name == DEPLOYMENT and isinstance(event.data, Mapping):
            state = str(event.data.get("state"))
            if state in _TERMINAL:
                self._ended[str(event.data.get("deployment"))] = state

    def has(self, name: str, round: Round, deployment: str, step: str, iteration: int) -> bool:
        """Whether that party has come."""
        return (deployment, paths.untried(step), iteration) in self._parties.get((name, round), ())

    def view(self, name: str, parties: int | str, members: Sequence[Member], round: Round = ()) -> BarrierView:
        """Tell how a barrier stands.

        ``parties`` is a number of parties, ``"all"`` deployments of the experiment, or a role; for ``"all"`` and a
        role each deployment counts once. The barrier is broken when those that have not ended are too few to fill it.
        """
        came, ended = self._parties.get((name, round), {}), self._ended
        names = dict.fromkeys(deployment for deployment, _, _ in came)
        if isinstance(parties, int):
            open_ = len(came) >= parties
            # A deployment may send several parties, so only an empty field says that no more can come.
            alive = open_ or any(m.deployment not in ended for m in members)
            gone = () if alive else tuple(f"{d} ({s})" for d, s in ended.items())
            return BarrierView(tuple(names), open_, gone, parties)
        wanted = [m.deployment for m in members if parties == "all" or m.role == parties]
        open_ = bool(wanted) and all(d in names for d in wanted)
        missing = tuple(f"{d} ({ended[d]})" for d in wanted if d not in names and d in ended)
        if not wanted:
            missing = (f"no deployment has the role {parties!r}",)
        return BarrierView(tuple(d for d in wanted if d in names), open_, () if open_ else missing, len(wanted))


def barrier_view(
    name: str, parties: int | str, log: Iterable[Event], members: Sequence[Member], round: Round = ()
) -> BarrierView:
    """Tell how a barrier stands after ``log`` (see ``Arrivals.view``)."""
    return Arrivals(log).view(name, parties, members, round)


class Gates:
    """From where in its log a deployment's gates look for the event that opens them; a *mark* is a place in that log.

    A gate (where it stands, and the event's name) that is tried again looks from the same mark; in a new round it
    looks from behind the event that opened it in the round before.
    """

    def __init__(self) -> None:
        self._marks: dict[tuple[str, str], dict[Round, int]] = {}
        self._opened: dict[tuple[str, str], int] = {}

    def mark(self, place: str, name: str, round: Round) -> int:
        """From where the gate looks; 0: from the beginning."""
        marks = self._marks.setdefault((place, name), {})
        if len(marks) >= MAX_ROUNDS and round not in marks:
            del marks[next(iter(marks))]
        return marks.setdefault(round, self._opened.get((place, name), 0))

    def opened(self, place: str, name: str, mark: int) -> None:
        """An event opened the gate; ``mark`` is the place behind that event."""
        self._opened[place, name] = mark

"""Events, and the rules of barriers, as pure functions of an experiment's ordered log.

An event is a named JSON message with a number that the director gave it: one order for the whole experiment. Executor,
director, local runs and simulation all use the rules here, so that there is one truth about when a barrier opens.

Names that begin with ``fieldlab.`` are made by fieldlab itself; users cannot send them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fieldlab_common.lifecycle import DeploymentState

__all__ = [
    "BARRIER",
    "DEPLOYMENT",
    "MAX_EVENT_BYTES",
    "RESERVED_PREFIX",
    "BarrierView",
    "Event",
    "Member",
    "barrier_view",
]

RESERVED_PREFIX = "fieldlab."
BARRIER = "fieldlab.barrier"  # data: {"barrier": name}; its sender has arrived
DEPLOYMENT = "fieldlab.deployment"  # data: {"deployment": name, "state": ..., "reason": ...}
MAX_EVENT_BYTES = 64 * 1024


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


@dataclass
class _Seen:
    parties: dict[tuple[str, str, int], None] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)


def _read(name: str, log: Iterable[Event]) -> _Seen:
    seen = _Seen()
    for event in log:
        if event.name == BARRIER and isinstance(event.data, Mapping) and event.data.get("barrier") == name:
            seen.parties.setdefault((event.sender or "", event.step or "", event.iteration))
        elif event.name == DEPLOYMENT and isinstance(event.data, Mapping):
            state = str(event.data.get("state"))
            if state in {s.value for s in DeploymentState if s.terminal}:
                seen.ended[str(event.data.get("deployment"))] = state
    return seen


def barrier_view(name: str, parties: int | str, log: Iterable[Event], members: Sequence[Member]) -> BarrierView:
    """Tell how a barrier stands after ``log``.

    ``parties`` is a number of parties, ``"all"`` deployments of the experiment, or a role. A party is (deployment,
    step, iteration), counted once whatever its retries; for ``"all"`` and a role each deployment counts once. The
    barrier is broken when those that have not ended are too few to fill it.
    """
    seen = _read(name, log)
    arrived_names = dict.fromkeys(deployment for deployment, _, _ in seen.parties)
    if isinstance(parties, int):
        alive = [m.deployment for m in members if m.deployment not in seen.ended]
        open_ = len(seen.parties) >= parties
        gone = [f"{d} ({s})" for d, s in seen.ended.items()]
        # A deployment may send several parties, so only an empty field says that no more can come.
        missing = tuple(gone) if not open_ and not alive else ()
        return BarrierView(tuple(arrived_names), open_, missing, parties)
    wanted = [m.deployment for m in members if parties == "all" or m.role == parties]
    open_ = bool(wanted) and all(d in arrived_names for d in wanted)
    missing = tuple(f"{d} ({seen.ended[d]})" for d in wanted if d not in arrived_names and d in seen.ended)
    if not wanted:
        missing = (f"no deployment has the role {parties!r}",)
    return BarrierView(tuple(d for d in wanted if d in arrived_names), open_, () if open_ else missing, len(wanted))

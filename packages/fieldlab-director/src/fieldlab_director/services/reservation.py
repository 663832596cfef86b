"""Who has which node, and who waits for it: the line (``fieldlab_common.reservation``) over what is stored.

A hold is a row of a run, a place and a slot, whose key no two runs can have. It is made when the run is granted all its
nodes, in one transaction, and it is over when no deployment of the run on that node is left to end or to be cleaned
up: that is asked of the rows each time (``serve``), so that no crash can leave a hold behind, or lose one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field

from fieldlab_common.course import NEVER
from fieldlab_common.lifecycle import ExperimentState
from fieldlab_common.protocol import WaitsFor
from fieldlab_common.reservation import Claims, Wish, grants

from fieldlab_director.services.identity import UserCaller
from fieldlab_director.store import reservation_queries as q
from fieldlab_director.store.base import LINE, WORK, Tx
from fieldlab_director.store.rows import ExperimentRow

__all__ = ["Holder", "Standing", "enter", "look", "number", "serve", "waits_for"]

MOST_SHOWN = 100  # places that a run waits for, of which its owner is told

Place = tuple[str, str]  # an infrastructure's id, and a node's name or a template's


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How the line stands. ``due``: something is to be done now; ``following``: when the next run joins it."""

    due: bool
    following: float


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    infrastructure_id: str
    place: str
    node_name: str
    slots: int = 1
    run: str = ""


@dataclass(frozen=True, kw_only=True)
class _Taken:
    infrastructure_id: str
    place: str
    count: int  # of slots
    runs: int = 0


@dataclass(frozen=True, kw_only=True)
class _Slot:
    infrastructure_id: str
    place: str
    slot: int


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A run that has a slot of a place, since a time; ``node_name`` is the node that it has there."""

    infrastructure_id: str
    place: str
    node_name: str
    since: float
    run: str
    owner_id: str


@dataclass
class _Line:
    """Those who wait, in order, with the slots of what they want."""

    wishes: list[Wish] = field(default_factory=list)
    slots: dict[Place, int] = field(default_factory=dict)

    def of(self, place: Hashable) -> int:
        return self.slots.get(place, 1)  # type: ignore[call-overload, no-any-return]


def number(tx: Tx) -> int:
    """The number of a run that is being submitted. Whoever has it is alone with the line until the commit."""
    following: int = tx.value(q.NUMBER)
    return following


def enter(tx: Tx, row: ExperimentRow) -> None:
    """Give a run that was just stored its nodes, if nobody has them or stands before it for one of them."""
    if row.queued <= tx.now and not _lacking(tx, row, _holders(tx, row), _before(tx, row)):
        _grant(tx, row.id)
    else:
        tx.notify(LINE)


def look(tx: Tx) -> Standing:
    """Whether ``serve`` would do something now: a question that changes nothing."""
    following = tx.value(q.NEXT_IN_LINE, now=tx.now)
    due = bool(tx.value(q.OVER)) or bool(_granted(tx))
    return Standing(due=due, following=NEVER if following is None else following)


def serve(tx: Tx) -> None:
    """Take back what is over, and give the next in the line their nodes."""
    number(tx)
    tx.execute(q.RELEASE)
    for run in _granted(tx):
        _grant(tx, run)


def waits_for(tx: Tx, caller: UserCaller, row: ExperimentRow) -> tuple[WaitsFor, ...]:
    """The nodes that a run of the caller's waits for, and what is known of why: others' runs are not named."""
    if row.state is not ExperimentState.PREPARING or row.granted is not None or row.queued > tx.now:
        return ()
    having, wanting = _holders(tx, row), _before(tx, row)
    lacking = _lacking(tx, row, having, wanting)
    holders: dict[Place, list[Holder]] = {}
    for holder in having:
        holders.setdefault((holder.infrastructure_id, holder.place), []).append(holder)
    before = {(one.infrastructure_id, one.place): one.runs for one in wanting}
    return tuple(_waits(caller, place, holders.get(place, []), before.get(place, 0)) for place in lacking[:MOST_SHOWN])


# --- inside ----------------------------------------------------------------------------------------------------------


def _waits(caller: UserCaller, place: Place, holders: list[Holder], before: int) -> WaitsFor:
    own = sorted({holder.run for holder in holders if holder.owner_id == caller.id})
    return WaitsFor(
        node=place[1],
        since=min((holder.since for holder in holders), default=None),
        runs=tuple(own),
        others=len({(h.owner_id, h.run) for h in holders if h.owner_id != caller.id}),
        before=before,
    )


def _lacking(tx: Tx, row: ExperimentRow, holders: list[Holder], before: list[_Taken]) -> list[Place]:
    """The places that a run lacks, when all that are before it have what they want."""
    wanted = tx.all(q.WANTED, _Wanted, run=row.id)
    line = _Line(slots={(one.infrastructure_id, one.place): one.slots for one in wanted})
    claims = Claims(line.of, Counter((one.infrastructure_id, one.place) for one in holders))
    for one in before:
        claims.taken[one.infrastructure_id, one.place] += one.count
    (wish,) = _wishes((row.id, one) for one in wanted) or [Wish(run=row.id, needs={})]
    return [place for place in claims.lacks(wish) if isinstance(place, tuple)]


def _holders(tx: Tx, row: ExperimentRow) -> list[Holder]:
    """Who has places that a run wants."""
    return tx.all(q.HOLDERS, Holder, run=row.id)


def _before(tx: Tx, row: ExperimentRow) -> list[_Taken]:
    """What those who stand before a run want of its places."""
    return tx.all(q.BEFORE, _Taken, run=row.id, queued=row.queued, number=row.number)


def _granted(tx: Tx) -> list[str]:
    found = tx.all(q.LINE, _Wanted, now=tx.now)
    if not found:
        return []
    line = _Line(_wishes((one.run, one) for one in found))
    line.slots = {(one.infrastructure_id, one.place): one.slots for one in found}
    held = Counter[Hashable]()
    for one in tx.all(q.TAKEN, _Taken):
        held[one.infrastructure_id, one.place] = one.count
    return grants(line.wishes, held, line.of)


def _wishes(found: Iterable[tuple[str, _Wanted]]) -> list[Wish]:
    """One for each run: deployments on one node share it."""
    nodes: dict[str, dict[tuple[str, str, str], Place]] = {}
    for run, one in found:
        node = (one.infrastructure_id, one.place, one.node_name)
        nodes.setdefault(run, {})[node] = (one.infrastructure_id, one.place)
    return [Wish(run=run, needs=Counter(places.values())) for run, places in nodes.items()]


def _grant(tx: Tx, run: str) -> None:
    wanted = {(one.infrastructure_id, one.place, one.node_name): one for one in tx.all(q.WANTED, _Wanted, run=run)}
    taken: dict[Place, set[int]] = {}
    for slot in tx.all(q.SLOTS_TAKEN, _Slot, run=run):
        taken.setdefault((slot.infrastructure_id, slot.place), set()).add(slot.slot)
    rows = []
    for infrastructure_id, place, node_name in wanted:
        slot_number = next(_free(taken.setdefault((infrastructure_id, place), set())))
        taken[infrastructure_id, place].add(slot_number)
        key = {"infrastructure_id": infrastructure_id, "place": place, "slot": slot_number}
        rows.append({**key, "experiment_id": run, "node_name": node_name, "since": tx.now})
    tx.execute(q.GRANT, guard_run=run, granted=tx.now)
    tx.execute_many(q.ADD_HOLD, rows)
    tx.execute(q.LOOK_AT_GRANTED, guard_run=run, look_at=tx.now)
    tx.notify(WORK)


def _free(taken: set[int]) -> Iterator[int]:
    return (number for number in range(len(taken) + 1) if number not in taken)

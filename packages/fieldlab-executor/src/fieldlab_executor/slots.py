"""Who may start: shares out ``max_parallel`` and the exclusive resources, of a DAG and of all DAGs inside of it.

An item takes all that it needs at once or nothing, so two can never wait for each other. What it needs is a list of
resources, each of which has room for so many: a slot of every DAG around it that has a ``max_parallel``, a place in a
shared worker, and each exclusive resource. A step that is a DAG takes no slot (the steps inside of it do) but holds its
exclusive resources while it runs; the steps inside of it share such a resource among themselves.

Who came first goes first. What a step inside of a DAG came for, it came for when that DAG was offered: with few slots,
a fan-out of DAGs ends its first items before it begins its last ones.

Invariant: when a resource has room and items are parked for it, as many of them as there is room for are in the queue
with ``woken`` naming it. So none is forgotten, and a release wakes one item, not all.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fieldlab_executor.steps import Item

__all__ = ["Order", "Resource", "Slots", "places"]

Order = tuple[int, ...]  # when it was offered, and before that, each DAG around it


def places(cpus: float | None, of_node: float | None) -> int:
    """How many shared workers work at a time: as many as the deployment has CPUs, or else its node; one if unknown."""
    return max(1, math.ceil(cpus or of_node or 1))


class Resource:
    """Something that ``room`` more items can hold; below zero, one has taken back what it had lent."""

    __slots__ = ("parked", "room")

    def __init__(self, room: float = math.inf) -> None:
        self.room = room
        self.parked: list[tuple[Order, Item]] = []


class Slots:
    """The queue of what wants to start. ``workers``: how many may run in shared workers at a time."""

    def __init__(self, workers: float = math.inf) -> None:
        self.workers = Resource(workers)
        self._queue: list[tuple[Order, Item]] = []
        self._offered = 0

    def offer(self, item: Item, around: Order) -> None:
        """Queue an item that wants to start; ``around`` is the order of the DAG that it is in."""
        self._offered += 1
        item.order = (*around, self._offered)
        heapq.heappush(self._queue, (item.order, item))

    def take(self) -> Item | None:
        """The next item that may start; it now holds what it needs. None: nothing can start for the time being."""
        while self._queue:
            _, item = heapq.heappop(self._queue)
            woken, item.woken = item.woken, None
            if item.live:
                needed = item.step.resources
                busy = next((one for one in needed if one.room < 1), None) if needed else None
                if busy is None:
                    for resource in needed:
                        resource.room -= 1
                    item.lent = False
                    return item
                heapq.heappush(busy.parked, (item.order, item))
                if busy is woken:
                    continue
            if woken is not None:
                self._wake(woken)
        return None

    def release(self, item: Item) -> None:
        """Give back what the item holds."""
        for resource in item.step.resources:
            if resource is not self.workers or not item.lent:
                self._give_back(resource)

    def lend(self, item: Item, lent: bool) -> None:
        """Let others have the item's place in a shared worker while it waits; it takes it back even if none is free."""
        if self.workers not in item.step.resources or item.lent is lent:
            return
        item.lent = lent
        if lent:
            self._give_back(self.workers)
        else:
            self.workers.room -= 1

    def _give_back(self, resource: Resource) -> None:
        resource.room += 1
        if resource.room >= 1:
            self._wake(resource)

    def _wake(self, resource: Resource) -> None:
        if resource.parked:
            order, item = heapq.heappop(resource.parked)
            item.woken = resource
            heapq.heappush(self._queue, (order, item))

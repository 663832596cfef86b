"""What all traversals of one machine have in common: everything that the rest of the world knows of."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fieldlab_executor.agenda import Agenda
from fieldlab_executor.instructions import Effect, Key
from fieldlab_executor.slots import Resource, Slots
from fieldlab_executor.steps import Item, Step

if TYPE_CHECKING:
    from fieldlab_executor.traversal import Traversal

__all__ = ["Shared"]


@dataclass(eq=False)
class Shared:
    """``grace``: seconds from asking an attempt to stop to its end.

    ``running``: the attempts that the supervisor runs. ``settled``: steps that ended, and what follows is not yet
    drawn. ``still``: traversals of which nothing is under way any more, to be looked at.
    """

    now: float
    grace: float
    slots: Slots
    effects: list[Effect] = field(default_factory=list)
    running: dict[Key, Item] = field(default_factory=dict)
    settled: deque[tuple[Traversal, Step]] = field(default_factory=deque)
    still: dict[Traversal, None] = field(default_factory=dict)
    opening: dict[int, Resource] = field(default_factory=dict)  # by depth: how many DAGs may still be opened
    measured: int = 0
    agenda: Agenda = field(init=False)

    def __post_init__(self) -> None:
        self.agenda = Agenda(self.effects.append, lambda mover: self.still.setdefault(mover))

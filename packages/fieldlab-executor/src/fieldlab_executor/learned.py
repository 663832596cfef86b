"""Modules that steps have imported, to be imported once in the parent of those that follow.

Only the standard library's and fieldlab's own: to import one of these runs no user code, and finds the same in every
process. To import ``json`` takes a step longer than all else that it costs; but a larger parent takes longer to fork,
for every step. So a module is learned when several steps have imported it, and not only a few among many.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Learned"]

ENOUGH, SHARE = 2, 1 / 16  # so many steps have imported it, and so many of all
MAX_NAMES, MAX_LENGTH = 500, 100


class Learned:
    """Counts what the steps of one spawner say that they have imported."""

    def __init__(self) -> None:
        self._steps = 0
        self._counts: dict[str, int] = {}
        self._told: set[str] = set()

    def heard(self, names: Any) -> list[str]:
        """A step has ended, and says that it imported ``names``; those that are to be imported ahead now."""
        self._steps += 1
        if not isinstance(names, list):
            return []
        found = []
        for name in names[:MAX_NAMES]:
            if not isinstance(name, str) or len(name) > MAX_LENGTH or name in self._told:
                continue
            self._counts[name] = self._counts.get(name, 0) + 1
            if self._counts[name] >= max(ENOUGH, self._steps * SHARE):
                self._told.add(name)
                found.append(name)
        return found

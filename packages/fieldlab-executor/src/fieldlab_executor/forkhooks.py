"""Keeps what libraries want to have run at every fork out of the spawner's forks, and gives it to the children.

``threading`` and ``logging`` register functions that repair their locks in a forked child. In a child of the spawner,
which has a single thread and holds no lock, there is nothing to repair, and running them would copy some 150 pages
of memory: more than all else that a fork costs. So registrations are collected while the spawner imports its modules;
each child registers them (which costs nothing) before user code runs, because user code may fork from threads.

Invariant: only hooks that are known to be needless here are left out; every other is registered in the spawner.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["collect", "collected", "register"]

_NEEDLESS = frozenset({"threading", "logging"})
collected: list[dict[str, Callable[[], object]]] = []


def collect(load: Callable[[], object]) -> None:
    """Call ``load``, which imports modules, and keep the hooks that they register."""
    register_at_fork: Any = os.register_at_fork

    def keep(**hooks: Callable[[], object]) -> None:
        if all(getattr(hook, "__module__", "") in _NEEDLESS for hook in hooks.values()):
            collected.append(hooks)
        else:
            register_at_fork(**hooks)

    os.register_at_fork = keep  # type: ignore[assignment]
    try:
        load()
    finally:
        os.register_at_fork = register_at_fork


def register() -> None:
    """In a child: register what was collected, for the forks that user code may make."""
    for hooks in collected:
        os.register_at_fork(**hooks)
    collected.clear()

"""Executors whose token was just found good: a second is long for who reports five hundred times in it.

To identify an executor takes a question to the store, in a thread: half a millisecond, a quarter of what a small report
costs. What is remembered is forgotten as soon as the deployment's state changes (its topic is woken, by other directors
too), and after a second in any case: no token is good for longer than that after its end.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable

from fieldlab_director.services.identity import ExecutorCaller
from fieldlab_director.store.base import deployment_topic

__all__ = ["Familiar"]

SECONDS = 1.0
MOST = 10_000  # deployments; beyond that all are asked for anew


class Familiar:
    """The callers of the last second, by token. Everything happens on the thread of one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, dict[bytes, tuple[float, ExecutorCaller]]] = {}

    def of(self, token: str) -> ExecutorCaller | None:
        """Who had this token within the last second; None: it is to be asked for."""
        deployment = token[4:].partition(".")[0]
        until, caller = self._known.get(deployment_topic(deployment), {}).get(_digest(token), (0.0, None))
        return caller if self._clock() < until else None

    def keep(self, token: str, caller: ExecutorCaller) -> None:
        """Remember whose token it is."""
        if len(self._known) >= MOST:
            self._known.clear()
        of_deployment = self._known.setdefault(deployment_topic(caller.deployment_id), {})
        of_deployment[_digest(token)] = (self._clock() + SECONDS, caller)

    def forget(self, topics: Iterable[str]) -> None:
        """These deployments changed."""
        for topic in topics:
            self._known.pop(topic, None)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()

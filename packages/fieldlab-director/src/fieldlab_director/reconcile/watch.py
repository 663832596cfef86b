"""One infrastructure, watched: how its executors are, and which nodes it has.

Executors are looked at in one question for all, at the rhythm that the connector wants, and at once when it gives
notice; what is found dead is told to the loop. Nodes are listed now and then. When the connector fails, its own
back-off is all that happens: every infrastructure has a watch of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import structlog
from fieldlab_common.errors import FieldlabError
from fieldlab_common.node import Node

from fieldlab_director import decide as d
from fieldlab_director.connectors.base import Listed, Nothing, Observation, Observations, ObserveRequest, Target
from fieldlab_director.connectors.fleet import Asked
from fieldlab_director.services import survey
from fieldlab_director.store import reconcile_queries as rq
from fieldlab_director.store.base import Store

__all__ = ["REFRESH_SECONDS", "InfrastructureWatch", "target_of"]

log = structlog.get_logger("fieldlab.reconcile")

REFRESH_SECONDS = 300.0  # between two listings of nodes that went well
IDLE_SECONDS = 600.0  # without an executor to look at, and without notice


def target_of(id: str, node: Node, epoch: int, prepared: Any, handle: Any) -> Target:
    """A deployment as its connector knows it."""
    return Target(
        deployment=id,
        node=node.name,
        epoch=epoch,
        prepared=prepared["value"] if prepared else None,
        handle=handle["value"] if handle else None,
    )


@dataclass(eq=False)
class InfrastructureWatch:
    """Watches one infrastructure. ``found`` is told of each executor that was looked at, with its epoch."""

    infrastructure_id: str
    store: Store
    connector: Callable[[str], Awaitable[Asked]]
    found: Callable[[int, Observation], None]
    jitter: Callable[[], float]

    def __post_init__(self) -> None:
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Look at the executors now."""
        self._wake.set()

    async def observe(self) -> None:
        """Look at the executors, for ever."""
        failures = 0
        while True:
            self._wake.clear()
            try:
                pause = await self._look()
                failures = 0
            except FieldlabError as error:
                failures += 1
                pause = d.backoff(failures, self.jitter())
                log.warning("observe failed", infrastructure=self.infrastructure_id, error=str(error), again_in=pause)
                await asyncio.sleep(pause)  # a connector that gives notice and fails is not asked the more often for it
                continue
            await self._wait(pause)

    async def refresh(self, first: float) -> None:
        """List the nodes, for ever; ``first`` seconds from now for the first time."""
        failures, pause = 0, first
        while True:
            await asyncio.sleep(pause)
            try:
                await self._list()
                failures, pause = 0, REFRESH_SECONDS
            except FieldlabError as error:
                failures += 1
                pause = d.backoff(failures, self.jitter(), first=5.0, most=REFRESH_SECONDS)
                log.warning("listing failed", infrastructure=self.infrastructure_id, error=str(error), again_in=pause)

    async def _look(self) -> float:
        """Ask for all executors; the seconds until they are looked at again."""
        targets = await self.store.read(
            lambda tx: tx.all(rq.WATCHED, target_of, infrastructure_id=self.infrastructure_id, never=d.NEVER)
        )
        if not targets:
            return IDLE_SECONDS
        connector = await self.connector(self.infrastructure_id)
        answer: Observations = await connector.call("observe", ObserveRequest(targets=tuple(targets)))
        epochs = {target.deployment: target.epoch for target in targets}
        for observation in answer.observations:
            if observation.deployment in epochs:
                self.found(epochs[observation.deployment], observation)
        return await connector.observe_every()

    async def _list(self) -> None:
        try:
            connector = await self.connector(self.infrastructure_id)
            listed: Listed = await connector.call("nodes", Nothing())
        except FieldlabError as error:
            why = str(error)
            await self.store.write(lambda tx: survey.unreachable(tx, self.infrastructure_id, why))
            raise
        await self.store.write(lambda tx: survey.reached(tx, self.infrastructure_id, listed.nodes))

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return

"""Asks the agents of an infrastructure, as ``connectors.remote`` asks a connector: through the rows of their calls.

There is no process and no connection here: whichever director an agent's poll comes to hands it its calls, and takes
its answers. So this needs nobody to be alone, and what was asked when a director died is asked again by the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

from fieldlab_common import wire
from fieldlab_common.errors import ConnectorError, InvalidMessage, NotFound
from fieldlab_common.keeping import DEADLINES, METHODS, Nothing, error_of
from fieldlab_common.messages import CheckLine
from fieldlab_common.node import Availability, Node

from fieldlab_director.connectors.base import Checked, Done, Listed, Target
from fieldlab_director.connectors.kept import Heard, KeptNodes
from fieldlab_director.services import agents
from fieldlab_director.services.agents import AgentRow
from fieldlab_director.store.base import Store, Tx

__all__ = ["AgentInfrastructure"]

_LISTEN = 3600.0  # seconds; a wait has an end, and begins anew


class _Agent:
    """One agent, asked as a keeper is."""

    def __init__(self, store: Store, infrastructure_id: str, node: str) -> None:
        self._store, self._infrastructure_id, self._node = store, infrastructure_id, node

    async def call(self, method: str, request: Any) -> Any:
        """Ask for ``method`` of ``METHODS``.

        Raises:
            ConnectorError: it is not connected, does not answer in time, or says that it cannot.
        """
        row = await self._store.read(self._row)
        deadline, body = DEADLINES[method], wire.encode(request)
        number = await self._store.write(lambda tx: agents.add_call(tx, row.id, method, body, deadline))
        try:
            answer = await self._answer(number, deadline)
        finally:
            await asyncio.shield(self._store.write(lambda tx: agents.forget_call(tx, number)))
        if answer is None:
            raise ConnectorError(f"The agent of node {self._node!r} did not answer {method} within {deadline:.0f} s.")
        if "error" in answer:
            raise error_of(answer["error"])
        try:
            return wire.decode(METHODS[method][1], answer.get("body"))
        except InvalidMessage as error:
            raise ConnectorError(f"The agent of node {self._node!r} answered {method} with something else.") from error

    async def close(self) -> None:
        """Nothing is held."""

    def _row(self, tx: Tx) -> AgentRow:
        for row, _ in agents.listed(tx, self._infrastructure_id):
            if row.name == self._node:
                if not row.connected(tx.now):
                    raise ConnectorError(f"The agent of node {self._node!r} is not connected.")
                return row
        raise ConnectorError(f"The agent of node {self._node!r} was removed.", transient=False)

    async def _answer(self, number: int, seconds: float) -> Any:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        with self._store.notifier.watch(agents.answers_topic(self._infrastructure_id)) as watch:
            while True:
                try:
                    found = await self._store.read(lambda tx: agents.answered(tx, number))
                except NotFound as error:
                    raise ConnectorError(f"The agent of node {self._node!r} was removed.", transient=False) from error
                if found is not None or not await watch.wait(deadline - loop.time()):
                    return found


class AgentInfrastructure(KeptNodes):
    """An infrastructure whose nodes are agents: what the reconcile loop asks as it asks a connector's process.

    ``notice`` is called with None when an agent has told of something.
    """

    def __init__(self, store: Store, infrastructure_id: str, notice: Callable[[str | None], None]) -> None:
        self._store, self._infrastructure_id, self._hear = store, infrastructure_id, notice
        self._listening: asyncio.Task[None] | None = None

        def reach(key: str, name: str, heard: Heard) -> _Agent:
            return _Agent(store, infrastructure_id, key)

        super().__init__(lambda node: (node, node), reach, notice)

    async def call(self, method: str, request: Any) -> Any:
        """Ask for ``method`` of ``METHODS``.

        Raises:
            ConnectorError: as ``connectors.remote.Remote.call``.
        """
        if self._listening is None:
            self._listening = asyncio.create_task(self._listen())
        return await getattr(self, method)(request)

    async def close(self) -> None:
        """Listen no more."""
        await super().close()
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)

    async def _listen(self) -> None:
        with self._store.notifier.watch(agents.news_topic(self._infrastructure_id)) as watch:
            while not self._store.notifier.closed:
                if await watch.wait(_LISTEN):
                    self._hear(None)

    async def clean_up(self, target: Target) -> Done:
        """See ``base.Connector``. What a machine has that was removed is nobody's any more."""
        found = await self._store.read(lambda tx: agents.listed(tx, self._infrastructure_id))
        if target.node not in {row.name for row, _ in found}:
            return Done()
        return await super().clean_up(target)

    async def observe_every(self) -> float:
        """Seconds between two looks: agents tell at once what ends."""
        return 30.0

    async def check(self, request: Nothing) -> Checked:
        """Try what a deployment needs on each machine that joined."""
        listed = await self.nodes(request)
        found = await asyncio.gather(*map(self._checked, listed.nodes))
        return Checked(lines=tuple(chain.from_iterable(found)))

    async def _checked(self, node: Node) -> tuple[CheckLine, ...]:
        reached = CheckLine(node=node.name, what="reachable", said="Its agent is connected.", needed=True)
        if node.availability is Availability.OFFLINE:
            advice = "Is the machine on, and `fieldlab.pyz agent` at work there?"
            return (replace(reached, ok=False, said=node.reason, advice=advice),)
        return reached, *await self.check_node(node.name)

    async def nodes(self, request: Nothing) -> Listed:
        """The machines that joined, each as it said it is, or offline."""
        found = await self._store.read(lambda tx: agents.listed(tx, self._infrastructure_id))
        return Listed(nodes=tuple(node for _, node in found))

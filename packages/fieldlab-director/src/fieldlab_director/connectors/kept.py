"""Nodes that run a keeper: whatever is asked of the connector for one of them, its keeper is asked.

The keeper (``fieldlab.pyz keep``) does all that happens on its node: environments, executors, their folders and ends. A
connector of such nodes says how a keeper is reached (``reach``), and which nodes there are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from fieldlab_common.errors import ConnectorError
from fieldlab_common.messages import CheckLine
from fieldlab_common.node import Node

from fieldlab_director.connectors.base import (
    Checked,
    Done,
    DrainRequest,
    Launched,
    LaunchRequest,
    Listed,
    Nothing,
    Notice,
    Observation,
    Observations,
    ObserveRequest,
    Prepared,
    PrepareRequest,
    Stopped,
    Target,
)

__all__ = ["Heard", "Keeper", "KeptNodes", "clock_line"]

CLOCK_OFF = 1.0  # seconds: a clock that is off by more misleads who reads its times


Heard = Callable[[str | None], None]


class Keeper(Protocol):
    """What can be asked as a keeper is: ``remote.Remote``, or a stand-in for one."""

    async def call(self, method: str, request: Any) -> Any:
        """Ask for ``method`` of ``METHODS``."""
        ...

    async def close(self) -> None:
        """Let go of it."""
        ...


class KeptNodes:
    """The part of a connector that asks keepers.

    ``place`` gives the key of a node's keeper (several nodes may have one) and the name to speak of it by; ``reach``
    makes what asks the keeper of that key and name, and tells of news. ``notice`` is the connector's.
    """

    def __init__(
        self,
        place: Callable[[str], tuple[str, str]],
        reach: Callable[[str, str, Heard], Keeper],
        notice: Notice,
    ) -> None:
        self._place, self._reach, self._notice = place, reach, notice
        self._keepers: dict[str, Keeper] = {}
        self._watched: dict[str, set[str]] = {}  # key → deployments that its keeper was asked about

    def keeper(self, node: str) -> Keeper:
        """The keeper of a node."""
        key, name = self._place(node)
        if key not in self._keepers:

            def heard(deployment: str | None) -> None:
                for one in [deployment] if deployment is not None else sorted(self._watched.get(key, ())):
                    self._notice(one)

            self._keepers[key] = self._reach(key, name, heard)
        return self._keepers[key]

    async def facts(self, node: str) -> Node:
        """What the machine of a node says about itself.

        Raises:
            ConnectorError: it cannot be asked.
        """
        listed: Listed = await self.keeper(node).call("nodes", Nothing())
        return listed.nodes[0]

    async def check_node(self, node: str) -> tuple[CheckLine, ...]:
        """What a node's keeper finds when it tries what a deployment needs, and how its clock is."""
        keeper = self.keeper(node)
        try:
            await keeper.call("observe", ObserveRequest())  # it may have to be started, which tells nothing of a clock
            asked = time.time()
            checked: Checked = await keeper.call("check", Nothing())
            clock = clock_line(asked, checked.received, checked.sent, time.time())
        except ConnectorError as error:
            clock = CheckLine(what="executor", ok=False, said=error.message, advice=error.advice, needed=True)
            checked = Checked()
        return tuple(replace(line, node=node) for line in (*checked.lines, clock))

    async def prepare(self, request: PrepareRequest) -> Prepared:
        """See ``base.Connector``."""
        prepared: Prepared = await self.keeper(request.target.node).call("prepare", request)
        return prepared

    async def launch(self, request: LaunchRequest) -> Launched:
        """See ``base.Connector``."""
        self._watch(request.target)
        launched: Launched = await self.keeper(request.target.node).call("launch", request)
        return launched

    async def observe(self, request: ObserveRequest) -> Observations:
        """Ask each keeper about its own; those of a keeper that does not answer are unknown."""
        by_key: dict[str, list[Target]] = {}
        for target in request.targets:
            by_key.setdefault(self._watch(target), []).append(target)
        found = await asyncio.gather(*map(self._observe, by_key.values()), return_exceptions=True)
        known = [one for part in found if not isinstance(part, BaseException) for one in part]
        if not known and (errors := [part for part in found if isinstance(part, BaseException)]):
            raise errors[0]
        return Observations(observations=tuple(known))

    async def stop(self, target: Target) -> Stopped:
        """See ``base.Connector``."""
        stopped: Stopped = await self.keeper(target.node).call("stop", target)
        return stopped

    async def drain(self, request: DrainRequest) -> Done:
        """See ``base.Connector``."""
        done: Done = await self.keeper(request.target.node).call("drain", request)
        return done

    async def clean_up(self, target: Target) -> Done:
        """See ``base.Connector``."""
        done: Done = await self.keeper(target.node).call("clean_up", target)
        self._watched.get(self._place(target.node)[0], set()).discard(target.deployment)
        return done

    async def forget(self, node: str) -> None:
        """Let go of the keeper of a node that is no more."""
        key = self._place(node)[0]
        self._watched.pop(key, None)
        if keeper := self._keepers.pop(key, None):
            await keeper.close()

    async def close(self) -> None:
        """Let go of the keepers. What they started goes on."""
        await asyncio.gather(*(keeper.close() for keeper in self._keepers.values()))

    def _watch(self, target: Target) -> str:
        key = self._place(target.node)[0]
        self._watched.setdefault(key, set()).add(target.deployment)
        return key

    async def _observe(self, targets: list[Target]) -> tuple[Observation, ...]:
        answer: Observations = await self.keeper(targets[0].node).call("observe", _bare(targets))
        return answer.observations


def clock_line(asked: float, received: float | None, sent: float | None, heard: float) -> CheckLine:
    """How far a node's clock is ahead of the one here, from when a question left, came, was answered, and was heard.

    ``received`` and ``sent`` are by the node's clock. Offset and bound: RFC 5905, section 8.
    """
    if received is None or sent is None:
        return CheckLine(what="clock", said="The executor there is too old to tell.")
    offset = ((received - asked) + (sent - heard)) / 2
    bound = ((heard - asked) - (sent - received)) / 2
    ok = abs(offset) - abs(bound) <= CLOCK_OFF
    said = (
        f"{abs(offset):.2f} s {'ahead of' if offset > 0 else 'behind'} the director's, give or take {abs(bound):.2f} s."
    )
    return CheckLine(what="clock", ok=ok, said=said, advice="" if ok else "Let NTP set it (chrony, systemd-timesyncd).")


def _bare(targets: list[Target]) -> ObserveRequest:
    """The question for a keeper, which needs nothing of what the connector gave back."""
    return ObserveRequest(targets=tuple(replace(target, prepared=None, handle=None) for target in targets))

"""The connector of kind ``simulated``: its executors are played by the program that attached it.

A launch goes, as JSON, to the Unix datagram socket that the options name, and counts as an executor from then on. So a
director can have a thousand executors that speak its real protocol, and none of their processes on the same machine.
The folder of this file, on ``PYTHONPATH``, is a distribution as anybody may publish one.
"""

from __future__ import annotations

import asyncio
import socket
from typing import ClassVar

from fieldlab_common import wire
from fieldlab_common.node import Node
from fieldlab_director.connectors.base import (
    Checked,
    Done,
    DrainRequest,
    Launched,
    LaunchRequest,
    Listed,
    Liveness,
    Nothing,
    Notice,
    Observation,
    Observations,
    ObserveRequest,
    Opening,
    Prepared,
    PrepareRequest,
    Stopped,
    Target,
)


class SimulatedConnector:
    """Options: ``nodes``, their number; ``python``, the versions they have; ``socket``, where launches go."""

    observe_every: ClassVar[float] = 15.0

    def __init__(self, opening: Opening, notice: Notice) -> None:
        python = tuple(opening.options["python"])
        self._nodes = tuple(
            Node(name=f"n-{number}", infrastructure=opening.infrastructure, os="linux", python=python)
            for number in range(int(opening.options["nodes"]))
        )
        self._to = str(opening.options["socket"])
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    async def check(self, request: Nothing) -> Checked:
        """Nothing can be wrong."""
        return Checked()

    async def nodes(self, request: Nothing) -> Listed:
        """All of them, always."""
        return Listed(nodes=self._nodes)

    async def prepare(self, request: PrepareRequest) -> Prepared:
        """Nothing is to be made."""
        return Prepared()

    async def launch(self, request: LaunchRequest) -> Launched:
        """Tell who plays the executors."""
        await asyncio.to_thread(self._socket.sendto, wire.dumps(request.launch), self._to)
        return Launched(handle={"epoch": request.launch.epoch})

    async def observe(self, request: ObserveRequest) -> Observations:
        """All live."""
        found = (Observation(deployment=target.deployment, executor=Liveness.ALIVE) for target in request.targets)
        return Observations(observations=tuple(found))

    async def stop(self, target: Target) -> Stopped:
        """They are not processes."""
        return Stopped()

    async def drain(self, request: DrainRequest) -> Done:
        """Their journals are in the memory of who plays them."""
        return Done()

    async def clean_up(self, target: Target) -> Done:
        """Nothing is left."""
        return Done()

    async def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()

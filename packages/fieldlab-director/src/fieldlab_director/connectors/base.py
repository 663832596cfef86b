"""What a connector is. What it is asked and what it answers stands in ``fieldlab_common.keeping``, with the rules.

A connector is made once for each attached infrastructure, in a process of its own (``host``), and is then asked to list
nodes, check, prepare, launch, observe, stop, drain and clean up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from fieldlab_common.keeping import (
    DEADLINES,
    METHODS,
    Checked,
    Done,
    DrainRequest,
    Launched,
    LaunchRequest,
    Listed,
    Liveness,
    Nothing,
    Observation,
    Observations,
    ObserveRequest,
    Prepared,
    PrepareRequest,
    Stopped,
    Target,
)
from fieldlab_common.node import Node

from fieldlab_director.addresses import AddressPolicy

__all__ = [
    "DEADLINES",
    "METHODS",
    "Checked",
    "Connector",
    "Done",
    "DrainRequest",
    "LaunchRequest",
    "Launched",
    "Listed",
    "Liveness",
    "Nothing",
    "Notice",
    "Observation",
    "Observations",
    "ObserveRequest",
    "Opening",
    "PrepareRequest",
    "Prepared",
    "Stopped",
    "Surveyed",
    "Target",
]


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What a connector is made with. ``infrastructure`` is its name, ``options`` are the user's.

    ``folder`` is the connector's own on the director's machine (it may not exist yet); ``executable`` the path of
    ``fieldlab.pyz`` there. ``addresses`` says what may be dialled: a connector that dials what options name asks
    ``addresses.resolved`` first.
    """

    infrastructure: str
    folder: str
    executable: str
    options: Mapping[str, Any] = field(default_factory=dict)
    addresses: AddressPolicy = field(default_factory=AddressPolicy)


@dataclass(frozen=True, kw_only=True)
class Surveyed:
    """An infrastructure that was tried, and its nodes; ``unlisted``: why they could not be listed."""

    checked: Checked
    nodes: tuple[Node, ...] = ()
    unlisted: str = ""


Notice = Callable[[str], None]


class Connector(Protocol):
    """The code for one way to reach nodes. The class is made as ``cls(opening, notice)``.

    ``notice`` may be called with a deployment's id, from the event loop, when its executor may have ended: it saves the
    wait for the next look. ``observe_every``: seconds between two looks at executors that are thought to run.
    """

    observe_every: ClassVar[float] = 2.0

    def __init__(self, opening: Opening, notice: Notice) -> None: ...

    async def check(self, request: Nothing) -> Checked:
        """Try, node by node, whether it can be used: what is wrong with one is a line, which says what to do.

        Options that are wrong are an error.
        """
        ...

    async def nodes(self, request: Nothing) -> Listed:
        """The nodes, each with its availability, and the reason if it has none."""
        ...

    async def prepare(self, request: PrepareRequest) -> Prepared:
        """Make the environment of a deployment."""
        ...

    async def launch(self, request: LaunchRequest) -> Launched:
        """Start the executor of an epoch, detached."""
        ...

    async def observe(self, request: ObserveRequest) -> Observations:
        """Tell how executors are, without asking the executors."""
        ...

    async def stop(self, target: Target) -> Stopped:
        """End the executor, by force after a grace; nothing if none runs."""
        ...

    async def drain(self, request: DrainRequest) -> Done:
        """Ship what a dead executor's journal holds; nothing if there is no journal."""
        ...

    async def clean_up(self, target: Target) -> Done:
        """Remove everything of a deployment, of all epochs; nothing if there is nothing."""
        ...

    async def close(self) -> None:
        """Let go of connections. What runs on nodes is left alone."""
        ...

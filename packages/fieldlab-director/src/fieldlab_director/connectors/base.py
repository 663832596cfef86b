"""What a connector is, what it is asked and what it answers.

A connector is made once for each attached infrastructure, in a process of its own (``host``), and is then asked to list
nodes, check, prepare, launch, observe, stop, drain and clean up. Its contract:

- every method may be called again, after any crash of either side, and does its work once;
- every method ends within its deadline (``DEADLINES``), and when it is cancelled;
- what it needs comes as arguments, what it learns it returns; ``prepared`` and ``handle`` are JSON of its own making,
  which the director stores unread and hands back;
- what it cannot do it says with a ``ConnectorError``, which is transient or not;
- what it starts on a node outlives it, and the director.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Protocol

from fieldlab_common.node import Node
from fieldlab_common.protocol import Launch, Tagged

__all__ = [
    "DEADLINES",
    "METHODS",
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
    "Target",
]


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What a connector is made with. ``infrastructure`` is its name, ``options`` are the user's.

    ``folder`` is the connector's own on the director's machine (it may not exist yet); ``executable`` the path of
    ``fieldlab.pyz`` there.
    """

    infrastructure: str
    folder: str
    executable: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A deployment as a connector knows it: its id, its node, the present epoch, and what the connector gave back."""

    deployment: str
    node: str
    epoch: int = 0
    prepared: Any = None
    handle: Any = None


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """No argument."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """No answer but that it is done."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """The nodes of the infrastructure, in an order that stays."""

    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PrepareRequest:
    """Make the environment of a deployment. ``python`` like ``3.11``: the version its code needs, or empty."""

    target: Target
    environment: Tagged
    python: str = ""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The environment is there. ``prepared`` is the connector's own."""

    prepared: Any = None


@dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """Start an executor; ``launch`` is what it finds beside it. Asked again for an epoch, it starts no second one."""

    target: Target
    launch: Launch


@dataclass(frozen=True, kw_only=True)
class Launched:
    """An executor of the epoch was started. ``handle`` is the connector's own."""

    handle: Any = None


@dataclass(frozen=True, kw_only=True)
class ObserveRequest:
    """How are the executors of these deployments? Many at once, so that one look is cheap."""

    targets: tuple[Target, ...] = ()


class Liveness(StrEnum):
    """How the executor of an epoch is."""

    UNKNOWN = "unknown"  # the node could not be asked
    ALIVE = "alive"  # its process runs
    DEAD = "dead"  # it was started, and its process has ended
    ABSENT = "absent"  # nothing on the node says that it was ever started

    @property
    def gone(self) -> bool:
        """Whether it certainly does not run."""
        return self in (Liveness.DEAD, Liveness.ABSENT)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """How the executor of a deployment's present epoch is; ``tail``: the last lines it wrote, if it is dead."""

    deployment: str
    executor: Liveness = Liveness.UNKNOWN
    tail: str = ""


@dataclass(frozen=True, kw_only=True)
class Observations:
    """One for each target that could be observed."""

    observations: tuple[Observation, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """No executor of the epoch runs any more; ``tail``: the last lines that it wrote."""

    tail: str = ""


@dataclass(frozen=True, kw_only=True)
class DrainRequest:
    """Ship what the journal of a dead executor holds. ``launch`` is the one it was launched with, made anew."""

    target: Target
    launch: Launch


class Connector(Protocol):
    """The code for one way to reach nodes. The class is made as ``cls(opening, notice)``.

    ``notice`` may be called with a deployment's id, from the event loop, when its executor may have ended: it saves the
    wait for the next look. ``observe_every``: seconds between two looks at executors that are thought to run.
    """

    observe_every: ClassVar[float] = 2.0

    def __init__(self, opening: Opening, notice: Notice) -> None: ...

    async def check(self, request: Nothing) -> Done:
        """Hold that the options are right and the infrastructure can be reached; the error says what to do."""
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


Notice = Callable[[str], None]

METHODS: Mapping[str, tuple[type, type]] = {
    "check": (Nothing, Done),
    "nodes": (Nothing, Listed),
    "prepare": (PrepareRequest, Prepared),
    "launch": (LaunchRequest, Launched),
    "observe": (ObserveRequest, Observations),
    "stop": (Target, Stopped),
    "drain": (DrainRequest, Done),
    "clean_up": (Target, Done),
}

DEADLINES: Mapping[str, float] = {  # seconds
    "check": 60.0,
    "nodes": 60.0,
    "prepare": 1800.0,
    "launch": 60.0,
    "observe": 20.0,
    "stop": 45.0,
    "drain": 600.0,
    "clean_up": 60.0,
}

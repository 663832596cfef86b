"""What is asked of whoever keeps executors on nodes, and what it answers: a connector, and a keeper on one node.

A connector (of the director) and a keeper (``fieldlab.pyz keep``, on a node) are asked the same things, so that a
connector whose nodes can run a keeper only has to carry the question there. ``METHODS`` is the table of them. Its
rules:

- every method may be called again, after any crash of either side, and does its work once;
- every method ends within its deadline (``DEADLINES``, seconds), and when it is cancelled;
- what it needs comes as arguments, what it learns it returns; ``prepared`` and ``handle`` are JSON of its own making,
  which the director stores unread and hands back;
- what it cannot do it says with a ``ConnectorError``, which is transient or not;
- what it starts on a node outlives it, and the director.

Questions travel in frames: a length (4 bytes, big-endian) and JSON. ``calls`` has the side that answers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fieldlab_common.environment import Resources
from fieldlab_common.errors import ConnectorError, FieldlabError, InvalidMessage
from fieldlab_common.messages import CheckLine, Launch, Tagged
from fieldlab_common.node import Node

__all__ = [
    "DEADLINES",
    "MAX_FRAME",
    "METHODS",
    "Checked",
    "Done",
    "DrainRequest",
    "Frames",
    "KeeperOpening",
    "LaunchRequest",
    "Launched",
    "Listed",
    "Liveness",
    "Nothing",
    "Observation",
    "Observations",
    "ObserveRequest",
    "PrepareRequest",
    "Prepared",
    "SlurmOpening",
    "Stopped",
    "Target",
    "error_of",
    "frame",
    "problem_of",
]

MAX_FRAME = 64 * 1024 * 1024
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True, kw_only=True)
class SlurmOpening:
    """That a keeper starts its executors as jobs of the Slurm cluster whose submit host it is on, and how.

    ``nodes``: what is a node, the cluster's ``hosts`` or its ``partitions``. The rest is what sbatch(1) calls it; what
    is empty is left to the cluster. ``pythons`` are the interpreters to try on a node, before the keeper's own and the
    usual ones; ``programs`` is the folder of sbatch(1) and its like, if they are not on ``PATH``.
    """

    nodes: str = "hosts"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    reservation: str = ""
    pythons: tuple[str, ...] = ()
    programs: str = ""


@dataclass(frozen=True, kw_only=True)
class KeeperOpening:
    """What a keeper is opened with: ``root`` is the folder of its deployments, made if it is not there.

    Without ``/`` at its beginning it is below the node's own folder for what must survive (``keeper.state_folder``).
    ``executable`` is the executor to start, if it is not the keeper's own; ``python`` the interpreter for it. With
    ``slurm`` the node is the door to a cluster: executors run on that, and ``root`` is a folder that all of it shares.
    """

    root: str
    executable: str = ""
    python: str = ""
    slurm: SlurmOpening | None = None


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
class Checked:
    """What was tried, and what came of it; what is wrong with a node is a line, not an error.

    ``pending``: no node can be used before somebody has done what the lines say, but then they can: it may be attached
    as it is. Of a keeper: when the question was ``received`` and its answer ``sent``, by the node's clock.
    """

    lines: tuple[CheckLine, ...] = ()
    pending: bool = False
    received: float | None = None
    sent: float | None = None

    def hopeless(self) -> CheckLine | None:
        """The first line that says why no node can be used; None: one can, or there is none yet."""
        broken = [line for line in self.lines if line.needed and not line.ok]
        usable = {line.node for line in self.lines} - {line.node for line in broken}
        return broken[0] if broken and not usable else None


@dataclass(frozen=True, kw_only=True)
class Listed:
    """The nodes, in an order that stays; of a keeper, its own, as it sees itself."""

    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PrepareRequest:
    """Make the environment of a deployment. ``python`` like ``3.11``: the version its code needs, or empty.

    ``resources`` are for a connector whose engine holds a deployment to them; elsewhere its executor does.
    """

    target: Target
    environment: Tagged
    python: str = ""
    resources: Resources = field(default_factory=Resources)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The environment is there. ``prepared`` is the connector's own."""

    prepared: Any = None


@dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """Start an executor; ``launch`` is what it finds beside it. Asked again for an epoch, it starts no second one.

    ``resources``: what the deployment may use, for who has to ask an engine for it. The executor holds them itself.
    """

    target: Target
    launch: Launch
    resources: Resources = field(default_factory=Resources)


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
    QUEUED = "queued"  # the engine has it, and has not started it yet: it waits for its turn there
    ALIVE = "alive"  # its process runs
    DEAD = "dead"  # it was started, and its process has ended
    ABSENT = "absent"  # nothing on the node says that it was ever started

    @property
    def gone(self) -> bool:
        """Whether it certainly does not run."""
        return self in (Liveness.DEAD, Liveness.ABSENT)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """How the executor of a deployment's present epoch is.

    ``tail``: the last lines it wrote, if it is dead. ``message``: what it waits for, if it is queued.
    """

    deployment: str
    executor: Liveness = Liveness.UNKNOWN
    tail: str = ""
    message: str = ""


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


METHODS: Mapping[str, tuple[type, type]] = {
    "check": (Nothing, Checked),
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


# --- frames ----------------------------------------------------------------------------------------------------------


def frame(message: Mapping[str, Any]) -> bytes:
    """A message as it travels."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Takes in bytes as they come, gives messages as they are whole."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that ``data`` completes.

        Raises:
            InvalidMessage: what came is no frame; nothing after it can be understood.
        """
        self._held += data
        found = []
        while len(self._held) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._held)
            if length > MAX_FRAME:
                raise InvalidMessage(f"A frame of {length} bytes is over the limit of {MAX_FRAME}.")
            if len(self._held) < _LENGTH.size + length:
                break
            found.append(_message(self._held[_LENGTH.size : _LENGTH.size + length]))
            del self._held[: _LENGTH.size + length]
        return found


def _message(body: bytes | bytearray) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidMessage(f"A frame is not JSON: {error}.") from error
    if not isinstance(message, dict):
        raise InvalidMessage("A frame holds no object.")
    return message


def problem_of(error: FieldlabError) -> dict[str, Any]:
    """What an answer says of a failure."""
    if isinstance(error, ConnectorError):
        return {"message": error.message, "advice": error.advice, "transient": error.transient, "log": error.log}
    return {"message": str(error), "transient": False}


def error_of(data: Any) -> ConnectorError:
    """The failure that an answer tells of, whatever it holds."""
    fields = data if isinstance(data, Mapping) else {}
    return ConnectorError(
        str(fields.get("message", "The connector failed.")),
        advice=str(fields.get("advice", "")),
        transient=bool(fields.get("transient", True)),
        log=str(fields.get("log", "")),
    )

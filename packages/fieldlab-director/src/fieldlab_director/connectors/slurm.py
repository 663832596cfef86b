"""The nodes of a Slurm cluster: a keeper on its submit host, whose executors are jobs (``fieldlab_executor.slurm``).

Options: ``folder`` is one that the whole cluster sees under the same path; ``login`` the submit host, as a host of an
SSH infrastructure is given, with its ``key``, ``passphrase``, ``password`` and ``host_keys``; without it, that is the
director's own machine. ``nodes`` is ``hosts`` or ``partitions``; ``partition``, ``account``, ``qos``, ``constraint``
and ``reservation`` are handed to sbatch; ``programs`` is the folder of Slurm's programs there, and ``config`` the path
of the cluster's slurm.conf, where they are not the usual ones. ``properties`` are added to all nodes, ``slots`` is how
many runs may have a host at a time. ``python`` names interpreters to try before the usual ones, ``executable`` another
executor than the director's, by its path on the cluster.

What must hold: whatever a job needs is below ``folder``, the environments and the executor itself among it.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from fieldlab_common.errors import ConnectorError
from fieldlab_common.keeping import KeeperOpening, SlurmOpening
from fieldlab_common.node import Node

from fieldlab_director.connectors.base import Checked, Listed, Nothing, Notice, Opening
from fieldlab_director.connectors.kept import Heard, KeptNodes
from fieldlab_director.connectors.local import start_keeper
from fieldlab_director.connectors.remote import Channel, Remote

__all__ = ["SlurmConnector"]

_ASKED = ("partition", "account", "qos", "constraint", "reservation")
_TEXTS = (*_ASKED, "programs", "config", "executable")
_LOGIN = ("login", "key", "passphrase", "password", "host_keys")
_OPTIONS = {"folder", "nodes", "properties", "slots", "python", *_TEXTS, *_LOGIN}
MOST_SLOTS = 1000


class SlurmConnector(KeptNodes):
    """The connector of kind ``slurm`` (see ``base.Connector``)."""

    observe_every: ClassVar[float] = 5.0

    def __init__(self, opening: Opening, notice: Notice) -> None:
        options = dict(opening.options)
        _check(options)
        self._name = opening.infrastructure
        self._properties, self._slots = options.get("properties", {}), options.get("slots", 1)
        self._partitions = options.get("nodes", "hosts") == "partitions"
        shared, own = Path(options["folder"]), Path(opening.folder)
        self._door: Any = None
        start = self._door_of(opening, options, own)
        opened = KeeperOpening(
            root=str(shared / "nodes" / own.name), executable=options.get("executable", ""), slurm=_slurm(options)
        )

        def reach(key: str, name: str, heard: Heard) -> Remote:
            return Remote(name, start, opened, notice=heard)

        super().__init__(lambda node: ("", "The keeper of the submit host"), reach, notice)

    async def check(self, request: Nothing) -> Checked:
        """Try whether executors can be submitted; that is the same for all nodes."""
        return Checked(lines=await self.check_node(""))

    async def nodes(self, request: Nothing) -> Listed:
        """The cluster's nodes or partitions, as Slurm has them."""
        listed: Listed = await self.keeper("").call("nodes", request)
        return Listed(nodes=tuple(map(self._given, listed.nodes)))

    async def close(self) -> None:
        """Let go of the submit host. Jobs go on."""
        await super().close()
        if self._door is not None:
            await self._door.close()

    def _given(self, node: Node) -> Node:
        slots = node.slots if self._partitions else self._slots
        properties = {**node.properties, **self._properties}
        return replace(node, infrastructure=self._name, slots=slots, properties=properties)

    def _door_of(self, opening: Opening, options: Mapping[str, Any], own: Path) -> Callable[[], Awaitable[Channel]]:
        """What starts a keeper on the submit host."""
        executable, variables = Path(opening.executable), _variables(options)
        if not options.get("login"):
            return lambda: start_keeper(sys.executable, str(executable), **variables)
        from fieldlab_director.connectors import ssh  # whose library is not there unless it is used

        pythons = (*_several(options.get("python", ())), *ssh.PYTHONS)
        login = replace(ssh.login_of(options, own), addresses=opening.addresses)
        line = self._door = ssh.Line(ssh.host_of(options["login"], {}), login, None, pythons)
        return lambda: line.keeper(executable, **variables)


# --- options ---------------------------------------------------------------------------------------------------------


def _check(options: Mapping[str, Any]) -> None:
    unknown = sorted(set(options) - _OPTIONS)
    _hold(not unknown, f"has no option {', '.join(unknown)}; there are {', '.join(sorted(_OPTIONS))}")
    folder = options.get("folder")
    _hold(isinstance(folder, str) and folder.startswith("/"), "takes folder as a path that begins with /")
    _hold("\\" not in str(folder), "takes a folder without a backslash, which Slurm reads as a sign of its own")
    for name in _TEXTS:
        value = options.get(name, "")
        _hold(isinstance(value, str) and not value.startswith("-"), f"takes {name} as a text")
    _hold(options.get("nodes", "hosts") in ("hosts", "partitions"), "takes nodes as hosts or partitions")
    _hold(isinstance(options.get("properties", {}), Mapping), "takes properties as an object")
    slots = options.get("slots", 1)
    _hold(type(slots) is int and 1 <= slots <= MOST_SLOTS, f"takes slots as a number from 1 to {MOST_SLOTS}")


def _variables(options: Mapping[str, Any]) -> dict[str, str]:
    """What the keeper has in its environment, and by that Slurm's programs and the executor's."""
    given = {"FIELDLAB_CACHE": str(Path(options["folder"]) / "cache"), "SLURM_CONF": options.get("config", "")}
    return {name: value for name, value in given.items() if value}


def _slurm(options: Mapping[str, Any]) -> SlurmOpening:
    return SlurmOpening(
        nodes=options.get("nodes", "hosts"),
        pythons=_several(options.get("python", ())),
        programs=options.get("programs", ""),
        **{name: options.get(name, "") for name in _ASKED},
    )


def _several(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(map(str, value))


def _hold(true: object, what: str) -> None:
    if not true:
        raise ConnectorError(f"A Slurm infrastructure {what}.", transient=False)

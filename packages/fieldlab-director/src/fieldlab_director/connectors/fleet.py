"""The connectors of all attached infrastructures, each in its process, which starts when it is first asked.

Kinds that the director itself can ask without a process, machines that dial out, are given to it as ``builtin``.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fieldlab_common.errors import ConnectorError, UnknownConnector

from fieldlab_director.addresses import AddressPolicy
from fieldlab_director.connectors.base import Checked, Listed, Nothing, Opening, Surveyed
from fieldlab_director.connectors.host import ConnectorProcess, kinds

__all__ = ["Asked", "Builtin", "ConnectorFleet"]

Hear = Callable[[str, str | None], None]


class Asked(Protocol):
    """What can be asked for the ``METHODS`` of a connector."""

    async def call(self, method: str, request: Any) -> Any:
        """Ask for one of them."""
        ...

    async def observe_every(self) -> float:
        """Seconds between two looks at executors."""
        ...

    async def close(self) -> None:
        """Let go of it."""
        ...


Builtin = Callable[[str, Callable[[str | None], None]], Asked]  # of an infrastructure's id, and what is told of news


class ConnectorFleet:
    """What to ask for each infrastructure, by its id. ``folder`` is where connectors keep things.

    ``allowed``: networks that are dialled for everybody. ``trusted``: the owner is an admin, for whom all are.
    """

    def __init__(
        self,
        folder: Path,
        executable: Path,
        *,
        deadlines: Mapping[str, float] | None = None,
        builtin: Mapping[str, Builtin] | None = None,
        allowed: tuple[str, ...] = (),
        open_files: int | None = None,
    ) -> None:
        self._folder = folder
        self._builtin = dict(builtin or {})
        self._executable = executable
        self._deadlines = deadlines
        self._allowed = allowed
        self._open_files = open_files
        self._processes: dict[str, Asked] = {}
        self._hear: Hear = lambda infrastructure_id, deployment_id: None

    def listen(self, hear: Hear) -> None:
        """Call ``hear`` with an infrastructure's id, and a deployment's, when the connector says that it may be news.

        None instead of a deployment's id: the connector was lost, and anything may be.
        """
        self._hear = hear

    def connector(
        self, infrastructure_id: str, name: str, kind: str, options: Mapping[str, Any], *, trusted: bool = False
    ) -> Asked:
        """The connector of an infrastructure; the same one each time."""
        if infrastructure_id not in self._processes:
            self._processes[infrastructure_id] = self._made(infrastructure_id, name, kind, options, trusted)
        return self._processes[infrastructure_id]

    def _made(self, infrastructure_id: str, name: str, kind: str, options: Mapping[str, Any], trusted: bool) -> Asked:
        opening = Opening(
            infrastructure=name,
            folder=str(self._folder / infrastructure_id),
            executable=str(self._executable),
            options=options,
            addresses=AddressPolicy(guarded=not trusted, allowed=self._allowed),
        )

        def notice(deployment_id: str | None) -> None:
            self._hear(infrastructure_id, deployment_id)

        if kind in self._builtin:
            return self._builtin[kind](infrastructure_id, notice)
        return ConnectorProcess(kind, opening, notice=notice, deadlines=self._deadlines, open_files=self._open_files)

    async def check(
        self, infrastructure_id: str, name: str, kind: str, options: Mapping[str, Any], *, trusted: bool = False
    ) -> Surveyed:
        """Try an attached infrastructure and list its nodes, whoever is in charge of it.

        Raises:
            ConnectorError: its connector cannot be asked.
        """
        if infrastructure_id in self._processes:
            return await _try(self._processes[infrastructure_id])
        asked = self._made(infrastructure_id, name, kind, options, trusted)
        try:
            return await _try(asked)
        finally:
            await asked.close()

    async def survey(
        self, infrastructure_id: str, name: str, kind: str, options: Mapping[str, Any], *, trusted: bool = False
    ) -> Surveyed:
        """Try an infrastructure that is about to be attached, and list its nodes.

        Raises:
            UnknownConnector: there is no connector of that kind. ConnectorError: it can never be used so.
        """
        known = sorted({*kinds(), *self._builtin})
        if kind not in known:
            raise UnknownConnector(
                f"There is no connector {kind!r}; there are {', '.join(known) or 'none'}.",
                advice="Install the distribution that has it beside the director, and start the director again.",
            )
        process = self.connector(infrastructure_id, name, kind, options, trusted=trusted)
        attached = False
        try:
            checked: Checked = await process.call("check", Nothing())
            why = checked.hopeless()
            if why is not None and not checked.pending:
                raise ConnectorError(why.said, advice=why.advice, transient=False)
            listed: Listed = await process.call("nodes", Nothing())
            attached = True
            return Surveyed(checked=checked, nodes=listed.nodes)
        finally:
            if not attached:
                await self._processes.pop(infrastructure_id).close()
                await asyncio.to_thread(shutil.rmtree, self._folder / infrastructure_id, ignore_errors=True)

    async def drop(self, infrastructure_id: str, *, forget: bool = False) -> None:
        """Let go of an infrastructure: its connector's process ends. What it started on nodes goes on.

        ``forget``: for good; what its connector kept here goes, too, keys of the director's own among it.
        """
        process = self._processes.pop(infrastructure_id, None)
        if process is not None:
            await process.close()
        if forget:
            await asyncio.to_thread(shutil.rmtree, self._folder / infrastructure_id, ignore_errors=True)

    async def close(self) -> None:
        """End every process. What they started on nodes goes on."""
        await asyncio.gather(*(process.close() for process in self._processes.values()))
        self._processes.clear()


async def _try(asked: Asked) -> Surveyed:
    checked: Checked = await asked.call("check", Nothing())
    try:
        listed: Listed = await asked.call("nodes", Nothing())
    except ConnectorError as error:
        return Surveyed(checked=checked, unlisted=str(error))
    return Surveyed(checked=checked, nodes=listed.nodes)

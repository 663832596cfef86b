"""Nodes on the director's own machine: for a first try, for tests, and for measurements of the machine itself.

Options: those that name nodes (``named``, ``local-1`` …); ``python`` is the interpreter of the executors;
``executable`` another executor than the director's. One keeper serves them all.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import ClassVar

from fieldlab_common.errors import ConnectorError
from fieldlab_common.keeping import KeeperOpening

from fieldlab_director.connectors.base import Checked, Listed, Nothing, Notice, Opening
from fieldlab_director.connectors.kept import Heard, KeptNodes
from fieldlab_director.connectors.named import named_nodes
from fieldlab_director.connectors.remote import ProcessChannel, Remote

__all__ = ["LocalConnector", "start_keeper"]

_OPTIONS = frozenset({"python", "executable"})
_PRIVATE = ("FIELDLAB_TOKEN", "FIELDLAB_ENDPOINT")  # the director's user's, and no business of an executor


class LocalConnector(KeptNodes):
    """The connector of kind ``local`` (see ``base.Connector``)."""

    observe_every: ClassVar[float] = 15.0

    def __init__(self, opening: Opening, notice: Notice) -> None:
        options = dict(opening.options)
        self._name = opening.infrastructure
        self._wanted = named_nodes("local", options, _OPTIONS)
        self._python = str(options.get("python") or sys.executable)
        self._executable = opening.executable
        keeping = KeeperOpening(
            root=os.path.abspath(opening.folder), executable=str(options.get("executable") or ""), python=self._python
        )

        def reach(key: str, name: str, heard: Heard) -> Remote:
            return Remote(name, self._start_keeper, keeping, notice=heard)

        super().__init__(lambda node: ("", "The keeper of this machine"), reach, notice)

    async def check(self, request: Nothing) -> Checked:
        """Try whether executors can be started here."""
        return Checked(lines=await self.check_node(""))

    async def nodes(self, request: Nothing) -> Listed:
        """The nodes: what is known of this machine, and what each was given."""
        facts = await self.facts("")
        return Listed(
            nodes=tuple(
                replace(
                    facts,
                    infrastructure=self._name,
                    **{**wanted, "properties": {**facts.properties, **wanted["properties"]}},
                )
                for wanted in self._wanted
            )
        )

    async def _start_keeper(self) -> ProcessChannel:
        return await start_keeper(self._python, self._executable)


async def start_keeper(python: str, executable: str, **variables: str) -> ProcessChannel:
    """A keeper on this machine, with ``variables`` in its environment.

    Raises:
        ConnectorError: the interpreter cannot be started.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _PRIVATE}
    try:
        return await ProcessChannel.start([python, executable, "keep"], {**environment, **variables})
    except OSError as error:
        raise ConnectorError(f"{python} cannot be started: {error}.", transient=False) from error

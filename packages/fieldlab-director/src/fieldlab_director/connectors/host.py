"""A connector in a process of its own: the side that runs it, and ``ConnectorProcess``, which asks it.

    python -m fieldlab_director.connectors.host KIND [--open-files N]

It reads frames (``fieldlab_common.keeping``) from its standard input and writes frames to its standard output. A
connector is somebody's code: it cannot see the store, nor the director's memory; what it prints goes to its standard
error; it ends at end-of-file, so it never outlives the director. What it started on nodes does. ``remote`` says what
becomes of calls to one that is not well-behaved.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, cast

from fieldlab_common import wire
from fieldlab_common.calls import Answerer
from fieldlab_common.errors import ConnectorError

from fieldlab_director.connectors.base import Connector, Notice, Opening
from fieldlab_director.connectors.remote import PING_WITHIN, ProcessChannel, Remote
from fieldlab_director.descriptors import set_limit

__all__ = ["GROUP", "ConnectorProcess", "kinds", "main"]

GROUP = "fieldlab.connectors"


def kinds() -> tuple[str, ...]:
    """The kinds of infrastructure for which a connector is installed."""
    return tuple(sorted(point.name for point in entry_points(group=GROUP)))


class ConnectorProcess(Remote):
    """Asks the connector of one infrastructure, and restarts its process when it must."""

    def __init__(
        self,
        kind: str,
        opening: Opening,
        *,
        notice: Callable[[str | None], None],
        deadlines: Mapping[str, float] | None = None,
        ping_within: float = PING_WITHIN,
        open_files: int | None = None,
    ) -> None:
        name = f"The connector of infrastructure {opening.infrastructure!r} ({kind})"

        command = [sys.executable, "-m", "fieldlab_director.connectors.host", kind]
        if open_files is not None:
            command += ["--open-files", str(open_files)]

        async def start() -> ProcessChannel:
            return await ProcessChannel.start(command)

        super().__init__(name, start, opening, notice=notice, deadlines=deadlines, ping_within=ping_within)


async def _serve(kind: str) -> None:
    # Standard output belongs to the frames: whatever the connector prints goes where people read.
    frames = os.dup(1)
    os.dup2(2, 1)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    transport, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(frames, "wb", buffering=0))

    def make(body: Any, notice: Notice) -> Connector:
        found = entry_points(group=GROUP, name=kind)
        if not found:
            raise ConnectorError(f"There is no connector {kind!r}.", transient=False)
        connector = cast("Callable[[Opening, Notice], Connector]", next(iter(found)).load())
        return connector(wire.decode(Opening, body), notice)

    await Answerer(kind, make, transport.write).serve(lambda: reader.read(65536))


def main() -> None:
    """Run the connector that the command line names, until standard input ends."""
    parser = argparse.ArgumentParser(description="Run a connector; it is spoken to in frames on stdin and stdout.")
    parser.add_argument("kind")
    parser.add_argument("--open-files", type=int, help="the limit of open files that it, and what it starts, has")
    options = parser.parse_args()
    if options.open_files is not None:
        set_limit(options.open_files)
    asyncio.run(_serve(options.kind))


if __name__ == "__main__":
    main()

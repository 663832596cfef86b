"""Serves the line for nodes: whenever one may have become free, and when the time of a run comes.

Then, too, what was deleted may have left its last node, and is removed. What is to be done is read from the rows each
time (``services.reservation``, ``services.removal``), so a wake-up that was missed costs a wait and nothing else; the
line is looked at every ``HORIZON`` seconds anyway.
"""

from __future__ import annotations

import asyncio

import structlog
from fieldlab_common.errors import FieldlabError

from fieldlab_director.services import removal, reservation
from fieldlab_director.store.base import LINE, Store

__all__ = ["serve_line"]

log = structlog.get_logger("fieldlab.reconcile")

HORIZON = 60.0  # seconds: the line is looked at at least so often
PAUSE = 1.0  # seconds after the database could not be used


async def serve_line(store: Store) -> None:
    """Serve the line until the director stops."""
    with store.notifier.watch(LINE) as watch:
        while not store.notifier.closed:
            pause = HORIZON
            try:
                now, standing = await store.read(lambda tx: (tx.now, reservation.look(tx)))
                if standing.due:
                    await store.write(reservation.serve)
                if await store.read(removal.removable) is not None:
                    while await store.write(removal.remove_some):
                        pass
                pause = min(pause, standing.following - now)
            except FieldlabError as error:
                log.warning("the line could not be served", error=str(error))
                await asyncio.sleep(PAUSE)
                continue
            await watch.wait(max(0.0, pause))

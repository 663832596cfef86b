"""Executors whose part the tests play: real journals and links, a real director, and no process in between.

The director starts nothing: its connector is stopped before the run begins. What the launches would have started,
``Played`` is: it has the token of the present epoch, and claims, appends and ships as an executor does.
"""

from __future__ import annotations

import os
import queue
import signal
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fieldlab as fl
from fieldlab_common.protocol import PROTOCOLS, ClaimRequest, Lane, LogRecord, Record
from fieldlab_common.wire import dumps, encode
from fieldlab_director import Embedded
from fieldlab_director.services.identity import executor_token
from fieldlab_director.services.vault import open_vault
from fieldlab_executor.journal import Journal
from fieldlab_executor.link import EventsArrived, Item, Link, Pace
from fieldlab_executor.transport import HttpTransport

DEADLINE = 30.0
QUICK = Pace(first=0.01, most=0.1, wait=2.0, timeout=1.5, bulk_every=0.01, heartbeat=1.0, idle=0.1, batch=4096)


@dataclass(frozen=True)
class Part:
    """A deployment that waits for its executor."""

    name: str
    token: str
    epoch: int


@fl.task
def nothing() -> None:
    """What is played is not run."""


def parts(director: Embedded, client: fl.Client, name: str) -> tuple[fl.Run, list[Part]]:
    """A run on every node whose executors are to be played."""
    with fl.DAG("played") as dag:
        nothing()
    run = client.prepare(fl.Experiment(name, lost_after="7d").map(dag, client.nodes()))
    run.events.wait("fieldlab.deployment", where=_is("ready"), count=len(client.nodes()), timeout=DEADLINE)
    os.kill(connector_of(director), signal.SIGSTOP)
    run.start()
    run.events.wait("fieldlab.deployment", where=_is("launching"), count=len(client.nodes()), timeout=DEADLINE)
    key = open_vault(director.folder / "secret.key").executor_key
    with sqlite3.connect(f"file:{director.folder / 'director.db'}?mode=ro", uri=True) as database:
        rows = database.execute("SELECT id, name, epoch FROM deployments ORDER BY position").fetchall()
    return run, [Part(name, executor_token(key, id, epoch), epoch) for id, name, epoch in rows]


def connector_of(director: Embedded) -> int:
    """The process of the director's connector."""
    children = Path(f"/proc/{director.pid}/task/{director.pid}/children").read_text().split()
    return next(int(pid) for pid in children if b"connectors.host" in Path(f"/proc/{pid}/cmdline").read_bytes())


def end(director: Embedded) -> None:
    """End a director whose connector was stopped, and that one with it: it goes on, and finds that nobody is there."""
    connector = connector_of(director)
    director.kill()
    os.kill(connector, signal.SIGCONT)


def _is(state: str) -> Any:
    return lambda event: event.data["state"] == state


@dataclass(eq=False)
class Played:
    """One executor: its journal in ``folder``, and its link to ``url``."""

    part: Part
    url: str
    folder: Path
    pace: Pace = QUICK
    journal_options: dict[str, Any] = field(default_factory=dict)
    items: queue.Queue[Item] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        self.journal = Journal(str(self.folder), **self.journal_options)
        self.transport = HttpTransport(self.url, self.part.token)
        self.link = Link(self.transport, self.journal, self.items.put, pace=self.pace)

    def begin(self) -> Played:
        """Claim, and ship from now on."""
        request = ClaimRequest(journal_id=self.journal.id, epoch=self.part.epoch, protocols=PROTOCOLS)
        self.link.claim(request, timeout=DEADLINE)
        self.link.start()
        return self

    def say(self, lane: Lane, number: int) -> int:
        """Append a record that has ``number`` in it: an event, or a line of the log."""
        if lane is Lane.CONTROL:
            record = Record(kind="event", at=1.0, body={"name": "said", "data": number, "step": "nothing"})
        else:
            record = Record(kind="log", at=1.0, body=encode(LogRecord(step="nothing", text=f"{number}\n")))
        return self.journal.append(lane, dumps(record))

    def hear(self, sender: str, count: int) -> list[Any]:
        """What a sender said, until there was so much of it, in the order in which it came."""
        found: list[Any] = []
        while len(found) < count:
            item = self.items.get(timeout=DEADLINE)
            if isinstance(item, EventsArrived):
                found += [e.data for e in item.events if (e.name, e.sender) == ("said", sender)]
        return found

    def close(self) -> None:
        """End the link; the journal stays."""
        self.link.close()
        self.journal.close()


def numbers(entries: Iterable[Any], name: str) -> list[int]:
    """The numbers of a deployment's records."""
    return [entry.number for entry in entries if entry.deployment == name]

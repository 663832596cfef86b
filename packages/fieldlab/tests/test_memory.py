"""A client that follows a long run keeps a page of it: what it needs does not grow with what it has read.

The director is a transport that makes pages as they are asked for: of a day with a million records, the same as of an
hour. What is compared is the memory that is needed for the first pages, and for many more.
"""

from __future__ import annotations

import io
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from urllib.parse import parse_qs, urlsplit

import fieldlab as fl
import pytest
from fieldlab.transport import Answer, Request, Stream
from fieldlab_common import protocol as p
from fieldlab_common import wire

PAGE = 1000  # records
PAGES = int(os.environ.get("FIELDLAB_TEST_PAGES", "12"))  # 1000: a million records
JSON = {"content-type": "application/json"}
LOG = json.dumps({"kind": "log", "at": 1.0, "body": {"step": "probe", "text": "x" * 60 + "\n"}})
ENTRIES = ",".join(f'{{"seq":{n},"deployment":"pi-1","number":{n},"record":{LOG}}}' for n in range(1, PAGE + 1))
EVENTS = ",".join(f'{{"name":"tick","number":{n},"data":{{"n":{n}}}}}' for n in range(1, PAGE + 1))


class Endless:
    """A run that has ``pages`` full pages of logs and of events, and has then ended."""

    def __init__(self, pages: int) -> None:
        self.pages, self.asked = pages, 0

    def send(self, request: Request) -> Answer:
        """A page, or how the run stands."""
        where = urlsplit(request.url)
        after = int(parse_qs(where.query).get("after", ["0"])[0])
        done = after >= self.pages * PAGE
        state = fl.ExperimentState.SUCCEEDED if done else fl.ExperimentState.RUNNING
        if where.path.endswith("/records") and "lane=bulk" in where.query:
            return self._page("records", ENTRIES, after, state)
        if where.path.endswith("/events"):
            return self._page("events", EVENTS, after, state)
        if where.path.endswith("/records"):
            return Answer(status=200, headers=JSON, body=wire.dumps(p.RecordPage(state=state)))
        over = self.asked >= self.pages
        info = p.ExperimentInfo(id="e", name="e", state=fl.ExperimentState.SUCCEEDED if over else state)
        return Answer(status=200, headers=JSON, body=wire.dumps(info))

    def _page(self, what: str, entries: str, after: int, state: fl.ExperimentState) -> Answer:
        self.asked += 1
        if state.terminal:
            return Answer(status=200, headers=JSON, body=f'{{"cursor":{after},"state":"succeeded"}}'.encode())
        body = f'{{"{what}":[{entries}],"cursor":{after + PAGE},"state":"running"}}'
        return Answer(status=200, headers=JSON, body=body.encode())

    def stream(self, request: Request) -> AbstractContextManager[Stream]:
        """There are no files."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is open."""


class Nowhere(io.TextIOBase):
    """A file that counts lines, and keeps none."""

    lines = 0

    def write(self, text: str) -> int:
        """Count it."""
        self.lines += 1
        return len(text)


def followed(run: fl.Run) -> int:
    return sum(1 for _ in run.logs(follow=True))


def looked_at(run: fl.Run) -> int:
    logs = run.logs()
    assert logs[-1].text == "x" * 60
    return len(logs)


def watched(run: fl.Run) -> int:
    out = Nowhere()
    run.watch(file=out)
    return out.lines


def events(run: fl.Run) -> int:
    return run.events.count("tick")


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def peak(read: Callable[[fl.Run], int], pages: int) -> int:
    run = fl.Client("http://d.test", "t", transport=Endless(pages)).run("e")
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    assert read(run) >= pages * PAGE
    return tracemalloc.get_traced_memory()[1] - before


@pytest.mark.parametrize("read", [followed, looked_at, watched, events])
def test_what_is_needed_does_not_grow_with_what_was_read(read: Callable[[fl.Run], int]) -> None:
    pages = max(6, PAGES // 4) if read is looked_at else PAGES
    few = peak(read, 3)
    assert peak(read, pages) < few + 500_000
    assert few < 20_000_000

"""Between every two parties a line that is cut, stalls, loses ends and doubles: everything arrives once, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import fieldlab as fl
import pytest
from fieldlab_common.errors import ClaimRefused
from fieldlab_common.protocol import Lane, RecordEntry
from fieldlab_director import Embedded, embedded

from .played import DEADLINE, Part, Played, end, numbers, parts
from .proxy import Fault, Kind, Line, Plan, seeded

NODES = [f"n{number}" for number in range(12)]
COUNT = 150  # records of each lane
Lines = Callable[..., Line]
Records = Callable[[fl.Run, Lane], list[RecordEntry]]


class Cast:
    """A director, and the parts that are still to be played."""

    def __init__(self, director: Embedded) -> None:
        self.token = director.token
        self.client = fl.Client(director.url, token=director.token)
        self.port = urlsplit(director.url).port or 0
        self.run, self.parts = parts(director, self.client, "played")

    def part(self) -> Part:
        return self.parts.pop()


@pytest.fixture(scope="module")
def cast(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cast]:
    with embedded(tmp_path_factory.mktemp("faults") / "director", nodes=NODES) as director:
        yield Cast(director)
        end(director)


PLANS: dict[str, Plan] = {
    "cut": seeded(1, Kind.CUT, Kind.REFUSE),
    "truncated": seeded(2, Kind.TRUNCATE, most_bytes=1200),
    "stalled": seeded(3, Kind.STALL, good_every=2),
    "doubled": lambda number: Fault(Kind.DOUBLE),
    "all of it": seeded(4, *Kind),
}


@pytest.mark.parametrize("plan", PLANS)
def test_what_an_executor_reports_arrives_once_and_in_order_whatever_the_line_does(
    cast: Cast, line: Lines, records: Records, tmp_path: Path, plan: str
) -> None:
    bad = line(cast.port, PLANS[plan])
    part = cast.part()
    played = Played(part, bad.url, tmp_path / "journal").begin()
    for number in range(1, COUNT + 1):
        played.say(Lane.CONTROL, number)
        played.say(Lane.BULK, number)
        if number % 10 == 0 and plan != "doubled":
            bad.cut()
    assert played.link.drain(DEADLINE)
    played.close()
    assert set(bad.met) > {Kind.NONE} or plan == "doubled"
    for lane in Lane:
        assert numbers(records(cast.run, lane), part.name) == list(range(1, COUNT + 1))
    said = [e.data for e in cast.run.events.stream(timeout=0) if e.name == "said" and e.sender == part.name]
    assert said == list(range(1, COUNT + 1))


@pytest.mark.parametrize("plan", ["cut", "truncated", "all of it"])
def test_events_reach_an_executor_once_and_in_order_whatever_the_line_does(
    cast: Cast, line: Lines, tmp_path: Path, plan: str
) -> None:
    bad = line(cast.port, PLANS[plan])
    sender, hearer = cast.part(), cast.part()
    speaks = Played(sender, f"http://127.0.0.1:{cast.port}", tmp_path / "speaks").begin()
    hears = Played(hearer, bad.url, tmp_path / "hears").begin()
    for number in range(1, 51):
        speaks.say(Lane.CONTROL, number)
        if number % 10 == 0:
            assert speaks.journal.sync(DEADLINE)
            bad.cut()
    assert hears.hear(sender.name, 50) == list(range(1, 51))
    for played in (speaks, hears):
        played.close()


@pytest.mark.parametrize("plan", ["cut", "truncated", "doubled"])
def test_what_a_client_sends_and_reads_is_there_once_and_in_order_whatever_the_line_does(
    cast: Cast, line: Lines, plan: str
) -> None:
    bad = line(cast.port, PLANS[plan])
    with fl.Client(bad.url, token=cast.token) as client:
        run = client.run("played")
        for number in range(20):
            run.events.send(f"from a client, {plan}", number)
            if number % 3 == 0 and plan != "doubled":
                bad.cut()
        mine = [event.data for event in run.events.stream(timeout=0) if event.name == f"from a client, {plan}"]
        assert run.status is fl.ExperimentState.RUNNING
    assert mine == list(range(20))


def test_a_second_executor_of_the_same_launch_is_refused_and_nothing_of_it_is_taken(
    cast: Cast, records: Records, tmp_path: Path
) -> None:
    part, url = cast.part(), f"http://127.0.0.1:{cast.port}"
    first = Played(part, url, tmp_path / "first").begin()
    first.say(Lane.CONTROL, 1)
    second = Played(part, url, tmp_path / "second")
    with pytest.raises(ClaimRefused):
        second.begin()
    second.link.start()
    second.say(Lane.CONTROL, 2)
    assert not second.link.drain(DEADLINE)
    assert first.link.drain(DEADLINE)
    for played in (first, second):
        played.close()
    found = [entry for entry in records(cast.run, Lane.CONTROL) if entry.deployment == part.name]
    assert [entry.record.body["data"] for entry in found] == [1]

"""Events for many: kept encoded, and told in turns."""

import asyncio
import contextlib

import msgspec
import pytest
import sqlalchemy as sa
from fieldlab_director.services.recent import Recent
from fieldlab_director.store import base, schema
from fieldlab_director.store.base import Notifier


def numbers(lab, recent, experiment, after, *, limit=100, most_bytes=1 << 20):
    def page(tx):
        return recent.after(tx, experiment, after, limit=limit, most_bytes=most_bytes)

    events, cursor = lab.write(page)
    found = [event["number"] for event in msgspec.json.decode(msgspec.json.encode(events))]
    assert cursor == (found[-1] if found else after)
    return found


@pytest.fixture
def experiment(ada):
    def send(count):
        for _ in range(count):
            assert ada.http.post(f"/v1/experiments/{made}/events", json={"name": "e", "data": "x" * 50}).is_success

    made = ada.experiment()
    send(5)
    return made, send


@pytest.mark.parametrize("most_kept", [1 << 20, 1])  # all is kept, and nothing for long
def test_pages_are_the_same_whatever_was_asked_for_before(lab, experiment, most_kept):
    made, send = experiment
    recent = Recent(most_kept)
    for after in (3, 0, 5, 2):
        assert numbers(lab, recent, made, after) == list(range(after + 1, 6))
    send(3)
    for after in (5, 0, 8, 7):
        assert numbers(lab, recent, made, after) == list(range(after + 1, 9))


def test_numbers_that_leapt_are_told_once(lab, experiment):
    made, send = experiment
    recent = Recent()
    assert numbers(lab, recent, made, 3) == [4, 5]
    leap = sa.update(schema.experiments).where(schema.experiments.c.id == made)
    lab.write(lambda tx: tx.execute(leap.values(last_event=schema.experiments.c.last_event + schema.LEAP)))
    send(2)
    fresh = [schema.LEAP + 6, schema.LEAP + 7]
    for after, told in ((0, [1, 2, 3, 4, 5]), (3, [4, 5]), (5, []), (9, []), (fresh[0], fresh[1:]), (fresh[1], [])):
        assert numbers(lab, recent, made, after) == told + (fresh if after < fresh[0] else [])


def test_a_page_ends_at_its_limit_and_its_size_with_at_least_one_event(lab, experiment):
    made, _ = experiment
    recent = Recent()
    for _ in range(2):  # read, and kept
        assert numbers(lab, recent, made, 1, limit=2) == [2, 3]
        assert numbers(lab, recent, made, 1, most_bytes=1) == [2]
        assert numbers(lab, recent, made, 0) == [1, 2, 3, 4, 5]


@contextlib.contextmanager
def watching(notifier, count):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(notifier.watch("wide")) for _ in range(count)]


def woken(watches):
    return [watch._event.is_set() for watch in watches]


@pytest.mark.parametrize(("count", "at_once"), [(base.NARROW, True), (base.NARROW + 1, False)])
def test_those_of_a_wide_topic_are_woken_in_turns(count, at_once):
    async def run():
        notifier = Notifier()
        with watching(notifier, count) as watches:
            notifier.wake(["wide"])  # after a silence, at once
            assert all([await watch.wait(30) for watch in watches])
            notifier.wake(["wide"])
            assert woken(watches) == [at_once] * count
            assert (notifier.pause("wide") > 0) is not at_once
            assert all([await watch.wait(30) for watch in watches])  # and then when the turn comes

    asyncio.run(run())


def test_a_director_that_stops_waits_for_no_turn():
    async def run():
        notifier = Notifier()
        with watching(notifier, base.NARROW + 1) as watches:
            notifier.wake(["wide"])
            for watch in watches:
                await watch.wait(30)
            notifier.wake(["wide"])
            notifier.close()
            assert all(woken(watches))

    asyncio.run(run())


def test_an_executor_of_many_gets_each_event_once_and_in_order(lab, ada, monkeypatch):
    monkeypatch.setattr(base, "NARROW", 0)
    experiment = ada.experiment()
    executor = lab.launch(experiment)
    executor.claim()
    seen, cursor = [], 0
    for n in range(4):
        assert ada.http.post(f"/v1/experiments/{experiment}/events", json={"name": f"e{n}"}).is_success
        poll = executor.poll(after=cursor, wait=10).json()
        seen += [event["number"] for event in poll["events"]]
        cursor = poll["cursor"]
    assert seen == list(range(1, cursor + 1))
    assert cursor >= 4

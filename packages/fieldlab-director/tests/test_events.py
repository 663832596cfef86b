"""Events that people send and read."""

import asyncio
import json
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import sqlalchemy as sa
from fieldlab_common.events import Event
from fieldlab_common.lifecycle import DeploymentState
from fieldlab_common.protocol import EventPage
from fieldlab_director.services.streams import fitting, follow
from fieldlab_director.store import schema
from fieldlab_director.store.base import Notifier, events_topic

LABS = ("sqlite", "postgres")


def send(user, experiment, **event):
    return user.http.post(f"/v1/experiments/{experiment}/events", json=event)


def read(user, experiment, **query):
    return user.http.get(f"/v1/experiments/{experiment}/events", params=query).json()


def test_events_are_numbered_in_order_from_one(ada):
    experiment = ada.experiment()
    assert [send(ada, experiment, name=f"e{n}", data=n).json()["number"] for n in range(3)] == [1, 2, 3]
    page = read(ada, experiment, after=1)
    assert [(e["number"], e["name"], e["data"]) for e in page["events"]] == [(2, "e1", 1), (3, "e2", 2)]
    assert page["cursor"] == 3


def test_a_page_ends_at_its_limit_and_the_cursor_goes_on(ada):
    experiment = ada.experiment()
    for n in range(5):
        send(ada, experiment, name="e", data=n)
    page = read(ada, experiment, limit=2)
    assert [e["data"] for e in page["events"] + read(ada, experiment, after=page["cursor"])["events"]] == list(range(5))


def test_an_event_repeated_under_its_key_is_sent_once(ada):
    experiment = ada.experiment()
    first, second = (send(ada, experiment, name="e", data=n, key="k").json() for n in (1, 2))
    assert first == second
    assert len(read(ada, experiment)["events"]) == 1


def test_senders_at_the_same_time_leave_no_gap_and_no_double(ada):
    experiment = ada.experiment()
    clients = [ada.lab.client(ada.http.headers["authorization"].removeprefix("Bearer ")) for _ in range(4)]

    def work(client, name):
        for n in range(25):
            client.post(f"/v1/experiments/{experiment}/events", json={"name": name, "data": n})

    threads = [threading.Thread(target=work, args=(c, f"t{i}")) for i, c in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    events = read(ada, experiment)["events"]
    assert [e["number"] for e in events] == list(range(1, 101))
    for i in range(4):
        assert [e["data"] for e in events if e["name"] == f"t{i}"] == list(range(25))


def test_a_reader_that_waits_is_woken(ada):
    experiment = ada.experiment()
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(read(ada, experiment, wait=30)))
    waiting.start()
    send(ada, experiment, name="go")
    waiting.join(20)
    assert [e["name"] for e in answers[0]["events"]] == ["go"]


def test_names_of_fieldlabs_own_and_data_that_is_too_much_are_refused(ada):
    experiment = ada.experiment()
    assert send(ada, experiment, name="fieldlab.deployment").json()["code"] == "invalid_request"
    assert send(ada, experiment, name="").json()["code"] == "invalid_request"
    answer = send(ada, experiment, name="e", data="x" * 70_000)
    assert (answer.status_code, answer.json()["code"]) == (413, "event_too_large")
    assert read(ada, experiment)["events"] == []


# --- as a stream -----------------------------------------------------------------------------------------------------


@contextmanager
def streamed(user, experiment, *, last=None, **query):
    """The messages of a stream: dicts of their fields; a comment is an empty one."""
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": str(last)} if last is not None else {})
    with user.http.stream("GET", f"/v1/experiments/{experiment}/events", params=query, headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield _messages(answer)


def _messages(answer):
    fields = {}
    for line in answer.iter_lines():
        if line:
            name, _, value = line.partition(":")
            fields |= {name: value.removeprefix(" ")} if name else {}
        else:
            if "retry" not in fields:
                yield fields
            fields = {}


def data(message):
    return json.loads(message["data"])["data"]


def test_a_stream_has_what_was_sent_and_then_what_is_sent(ada):
    experiment = ada.experiment()
    send(ada, experiment, name="e", data="one\nline")
    with streamed(ada, experiment) as messages:
        assert data(next(messages)) == "one\nline"
        for n in (2, 3):
            send(ada, experiment, name="e", data=n)
            message = next(messages)
            assert (message["id"], data(message)) == (str(n), n)


def test_a_stream_longer_than_a_page_has_everything_in_order(ada):
    experiment = ada.experiment()
    for n in range(1, 6):
        send(ada, experiment, name="e", data=n)
    with streamed(ada, experiment, limit=2) as messages:
        assert [next(messages)["id"] for _ in range(5)] == ["1", "2", "3", "4", "5"]


def test_a_stream_that_was_cut_goes_on_after_the_last_id_whatever_its_query_says(ada):
    experiment = ada.experiment()
    for n in range(1, 5):
        send(ada, experiment, name="e", data=n)
    with streamed(ada, experiment, last=2, after=0) as messages:
        assert data(next(messages)) == 3
    with streamed(ada, experiment, after=3) as messages:
        assert data(next(messages)) == 4


def test_a_stream_ends_with_the_run_and_is_not_begun_again(ada):
    experiment = ada.experiment()
    send(ada, experiment, name="e")
    with streamed(ada, experiment) as messages:
        assert next(messages)["id"] == "1"
        ada.http.post(f"/v1/experiments/{experiment}/cancel", json={})
        ada.lab.move(ada.lab.row(experiment), DeploymentState.CANCELLED)
        *told, end = messages
    assert json.loads(told[-1]["data"])["data"]["state"] == "cancelled"
    assert end == {"event": "end", "data": '{"state":"cancelled"}'}
    headers = {"Accept": "text/event-stream", "Last-Event-ID": told[-1]["id"]}
    answer = ada.http.get(f"/v1/experiments/{experiment}/events", headers=headers)
    assert (answer.status_code, answer.content) == (204, b"")


def short(lab, monkeypatch):
    limits = replace(lab.settings.limits, keep_alive=0.01)
    monkeypatch.setattr(lab.desk, "settings", replace(lab.settings, limits=limits))


def test_a_silent_stream_shows_that_it_lives(ada, lab, monkeypatch):
    experiment = ada.experiment()
    short(lab, monkeypatch)
    with streamed(ada, experiment) as messages:
        assert [next(messages) for _ in range(3)] == [{}, {}, {}]
        send(ada, experiment, name="e", data=1)
        assert data(next(message for message in messages if message)) == 1


def test_a_stream_ends_when_its_token_does(ada, lab, monkeypatch):
    experiment = ada.experiment()
    short(lab, monkeypatch)
    with streamed(ada, experiment) as messages:
        next(messages)
        token = ada.http.headers["authorization"].partition("_")[2].partition("_")[0]
        lab.write(lambda tx: tx.execute(sa.update(schema.tokens).where(schema.tokens.c.id == token).values(revoked=1)))
        assert [message for message in messages if message] == []


@pytest.mark.parametrize("last", ["x", "-1", "99999999999999999999"])
def test_a_last_id_that_is_none_is_refused(ada, last):
    headers = {"Accept": "text/event-stream", "Last-Event-ID": last}
    answer = ada.http.get(f"/v1/experiments/{ada.experiment()}/events", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_a_stream_of_what_is_not_ones_own_does_not_exist(ada, bob):
    headers = {"Accept": "text/event-stream"}
    answer = bob.http.get(f"/v1/experiments/{ada.experiment()}/events", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_a_slow_subscriber_costs_a_page_whatever_is_sent_meanwhile():
    """Nothing is read ahead of what was taken, and a thousand wake-ups are one."""

    async def run():
        notifier, reads, sent = Notifier(), [], 1

        async def read(after):
            reads.append(after)
            return EventPage(events=tuple(Event(name="e", number=n) for n in range(after + 1, sent + 1)), cursor=sent)

        async def allowed():
            return None

        stream = follow(notifier, "x", 0, read=read, allowed=allowed, alive_every=60)
        assert await anext(stream) == b"retry: 1000\n\n"
        assert (await anext(stream)).count(b"id: ") == 1
        for _ in range(1000):
            sent += 1
            notifier.wake([events_topic("x")])
        assert reads == [0]
        assert (await anext(stream)).count(b"id: ") == 1000
        assert reads == [0, 1]
        await stream.aclose()

    asyncio.run(run())


def test_a_page_has_no_more_bytes_than_it_may_and_at_least_one_event():
    events = tuple(Event(name="e", data="x" * 60_000, number=n) for n in range(1, 11))
    assert [len(fitting(events, most)) for most in (1, 100_000, 200_000, 10**9)] == [1, 1, 3, 10]

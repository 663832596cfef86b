"""Events that people send and read."""

import threading


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

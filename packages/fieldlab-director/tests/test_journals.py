"""Claims, reports and polls: what executors say and are told, over HTTP."""

import hashlib
import threading

import pytest
from fieldlab_common.lifecycle import DeploymentState as D
from fieldlab_common.protocol import Poll, Record
from fieldlab_common.wire import dumps, frame, loads
from fieldlab_director.services.journals import Members

LABS = ("sqlite", "postgres")

STEP = {"step": "s", "state": "running"}
ENDED = {"state": "succeeded", "reason": "completed"}


def code(answer):
    return answer.status_code, answer.json()["code"]


def records(user, experiment, lane="control", **query):
    answer = user.http.get(f"/v1/experiments/{experiment}/records", params={"lane": lane, **query})
    assert answer.status_code == 200, answer.text
    return answer.json()


def deployment(user, experiment, name="a"):
    info = user.http.get(f"/v1/experiments/{experiment}").json()
    return next(d for d in info["deployments"] if d["name"] == name)


@pytest.fixture
def run(ada, lab):
    """An experiment of one deployment, and its executor, which has claimed it."""
    experiment = ada.experiment()
    executor = lab.launch(experiment)
    assert executor.claim().status_code == 200
    return experiment, executor


# --- claims ----------------------------------------------------------------------------------------------------------


def test_members_are_kept_for_some_experiments_and_always_those_of_the_one_that_is_asked_for(ada, lab):
    first, second = (ada.experiment(name, deployments=names) for name, names in (("one", "ab"), ("two", "cde")))
    members = Members(most=1)
    for experiment, names in ((first, "ab"), (second, "cde"), (first, "ab"), (first, "ab")):
        found = lab.write(lambda tx, experiment=experiment: members.of(tx, experiment))
        assert [member.deployment for member in found] == list(names)


def test_the_first_journal_claims_the_deployment_and_gets_all_it_needs(ada, lab):
    experiment = ada.experiment(deployments=("a", "b"))
    claim = lab.launch(experiment).claim().json()
    assert (claim["experiment"], claim["deployment"]["name"], claim["node"]["name"]) == ("exp", "a", "n1")
    assert [m["deployment"] for m in claim["members"]] == ["a", "b"]
    assert (claim["protocol"], claim["control"], claim["bulk"]) == (1, 0, 0)
    assert deployment(ada, experiment)["state"] == "running"


def test_a_second_journal_is_refused_and_the_first_may_ask_again(run):
    _, executor = run
    assert code(executor.claim(journal_id="j2")) == (409, "claim_refused")
    executor.report((1, "step", STEP))
    assert executor.claim().json()["control"] == 1


def test_an_older_launch_is_refused(ada, lab):
    experiment = ada.experiment()
    old = lab.launch(experiment, epoch=1)
    new = lab.launch(experiment, epoch=2)
    assert code(old.claim()) == (409, "claim_refused")
    assert code(old.claim(epoch=2)) == (409, "claim_refused")
    assert new.claim().status_code == 200


def test_an_ended_deployment_is_not_given_away(ada, lab):
    experiment = ada.experiment()
    executor = lab.launch(experiment)
    lab.move(lab.row(experiment), D.FAILED)
    assert code(executor.claim()) == (409, "claim_refused")


def test_executor_and_director_must_share_a_version(ada, lab):
    executor = lab.launch(ada.experiment())
    assert code(executor.claim(protocols=(99,))) == (426, "protocol_mismatch")


# --- reports ---------------------------------------------------------------------------------------------------------


def test_records_are_acknowledged_and_read_back_as_they_came(ada, run):
    experiment, executor = run
    assert executor.report((1, "started", {"pid": 3}), (2, "step", STEP)).json()["acked"] == 2
    page = records(ada, experiment)
    assert [(r["number"], r["deployment"], r["record"]["kind"], r["late"]) for r in page["records"]] == [
        (1, "a", "started", False),
        (2, "a", "step", False),
    ]
    assert page["records"][1]["record"]["body"] == STEP
    assert records(ada, experiment, after=page["cursor"])["records"] == []


def test_what_was_taken_before_is_passed_over(ada, run):
    experiment, executor = run
    executor.report((1, "step", STEP), (2, "step", STEP))
    assert executor.report((1, "step", STEP), (2, "step", STEP), (3, "step", STEP)).json()["acked"] == 3
    assert [r["number"] for r in records(ada, experiment)["records"]] == [1, 2, 3]


def test_what_comes_after_a_gap_is_not_taken(ada, run):
    experiment, executor = run
    assert executor.report((1, "step", STEP), (3, "step", STEP)).json()["acked"] == 1
    assert executor.report((5, "step", STEP)).json()["acked"] == 1
    assert [r["number"] for r in records(ada, experiment)["records"]] == [1]


def test_a_record_that_was_cut_is_left_for_the_next_upload(run):
    _, executor = run
    whole = frame(1, dumps(Record(kind="step", at=0, body=STEP)))
    assert executor.send(whole + whole[:-3]).json()["acked"] == 1


def test_lanes_are_numbered_apart(ada, run):
    experiment, executor = run
    executor.report((1, "step", STEP))
    assert executor.report((1, "log", {"step": "s", "text": "hello"}), lane="bulk").json()["acked"] == 1
    assert [r["record"]["body"]["text"] for r in records(ada, experiment, "bulk")["records"]] == ["hello"]


def test_an_unknown_kind_is_kept_as_it_came(ada, run):
    experiment, executor = run
    answer = executor.report((1, "telepathy", {"of": ["the", "future"]})).json()
    assert (answer["acked"], answer["refusals"]) == (1, [])
    assert records(ada, experiment)["records"][0]["record"]["body"] == {"of": ["the", "future"]}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("step", {"step": "s"}),
        ("step", {"step": "s", "state": "napping"}),
        ("step", {"step": "s", "state": "running", "attempt": 2**70}),
        ("step", {"step": "s" * 500, "state": "running"}),
        ("event", {"name": "fieldlab.deployment", "data": {"deployment": "a", "state": "succeeded"}}),
        ("event", {"name": "x", "data": "y" * 70_000}),
        ("event", {"name": ""}),
        ("artifact", {"step": "s", "name": "../up", "size": 1, "sha256": "0" * 64}),
        ("artifact", {"step": "s", "name": "/etc/passwd", "size": 1, "sha256": "0" * 64}),
        ("artifact", {"step": "s", "name": "a", "size": -1, "sha256": "0" * 64}),
        ("artifact", {"step": "s", "name": "a", "size": 1, "sha256": "../../x"}),
        ("ended", {"state": "lost", "reason": "silent"}),
        ("log", {"step": "s", "text": "in the wrong lane"}),
    ],
)
def test_a_record_that_cannot_be_taken_is_refused_kept_out_and_holds_up_nothing(ada, run, kind, body):
    experiment, executor = run
    answer = executor.report((1, kind, body), (2, "step", STEP)).json()
    assert answer["acked"] == 2
    assert [r["number"] for r in answer["refusals"]] == [1]
    assert [r["number"] for r in records(ada, experiment)["records"]] == [2]


def test_a_log_record_that_is_refused_is_a_gap_that_says_why(ada, run):
    experiment, executor = run
    line = {"step": "s", "text": "a line\n"}
    answer = executor.report((1, "log", line), (2, "log", {"step": 5}), (3, "log", line), lane="bulk").json()
    assert (answer["acked"], [r["number"] for r in answer["refusals"]]) == (3, [2])
    found = records(ada, experiment, lane="bulk")["records"]
    assert [(r["number"], r["record"]["kind"]) for r in found] == [(1, "log"), (2, "gap"), (3, "log")]
    gap = found[1]["record"]["body"]
    assert (gap["first"], gap["last"]) == (2, 2)
    assert "refused" in gap["reason"]


NAMES = [
    "../up",
    "a/../../b",
    "/etc/passwd",
    "a\\b",
    "..\\up",
    "C:x",
    "a\0b",
    "x" * 5_000,
    "x/" * 2_500,
    "",
    ".",
    "a//b",
    "a\nb",
    "\x1b[2J",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_an_artifact_with_a_name_that_leads_elsewhere_is_refused_and_listed_nowhere(ada, run, name):
    experiment, executor = run
    announced = {"step": "s", "name": name, "size": 1, "sha256": "0" * 64}
    answer = executor.report((1, "artifact", announced), (2, "step", STEP)).json()
    assert (answer["acked"], [r["number"] for r in answer["refusals"]], answer["missing"]) == (2, [1], [])
    assert ada.http.get(f"/v1/experiments/{experiment}/artifacts").json()["artifacts"] == []


def test_logs_with_whatever_in_them_are_kept_as_they_are(ada, run):
    experiment, executor = run
    texts = [
        "\x1b]0;title\x07\x1b[2J",
        "\0\0",
        "\u202e\u2066",
        "</script><img onerror=x>",
        "😀",
        "x" * 1_000_000,
    ]
    said = [(n, "log", {"step": "s", "text": text}) for n, text in enumerate(texts, 1)]
    assert executor.report(*said, lane="bulk").json()["acked"] == len(texts)
    assert [r["record"]["body"]["text"] for r in records(ada, experiment, "bulk")["records"]] == texts


def test_half_a_character_is_refused_and_holds_up_nothing(ada, run):
    experiment, executor = run
    half = b'{"kind":"log","at":1,"body":{"step":"s","text":"\\ud800"}}'
    whole = dumps(Record(kind="log", at=2, body={"step": "s", "text": "x"}))
    answer = executor.send(frame(1, half) + frame(2, whole), "bulk").json()
    assert answer["acked"] == 2
    assert records(ada, experiment, "bulk")["records"][-1]["number"] == 2


@pytest.mark.parametrize("depth", [200, 600, 900, 100_000])
def test_deeply_nested_records_are_kept_or_refused_and_the_page_can_be_read(ada, run, depth):
    experiment, executor = run
    deep = b'{"kind":"event","at":1,"body":{"name":"x","data":' + b"[" * depth + b"]" * depth + b"}}"
    odd = b'{"kind":"odd","at":1,"body":{"x":' + b'{"x":' * depth + b"1" + b"}" * depth + b"}}"
    answer = executor.send(
        frame(1, deep) + frame(2, odd) + frame(3, dumps(Record(kind="step", at=0, body=STEP)))
    ).json()
    assert answer["acked"] == 3
    assert [r["number"] for r in answer["refusals"]] == ([] if depth == 200 else [1, 2])
    assert records(ada, experiment)["records"][-1]["number"] == 3
    assert loads(Poll, executor.poll().content).events  # as the pure Python codec of nodes reads it


def test_an_event_that_is_nested_too_deeply_for_others_to_read_is_refused(ada, run):
    experiment, _ = run
    body = b'{"name":"x","data":' + b"[" * 900 + b"]" * 900 + b"}"
    answer = ada.http.post(f"/v1/experiments/{experiment}/events", content=body)
    assert code(answer) == (422, "invalid_request")


def test_numbers_that_no_counter_reaches_end_the_reading_and_nothing_else(ada, run):
    experiment, executor = run
    step = dumps(Record(kind="step", at=0, body=STEP))
    for number in (0, 2**63, 2**64 - 1):
        assert executor.send(frame(number, step)).json()["acked"] == 0
    gap = {"first": 1, "last": 2**62}
    assert executor.report((1, "gap", gap), lane="bulk").json()["acked"] == 1
    assert executor.report((1, "step", STEP), (1, "step", STEP), (2, "step", STEP)).json()["acked"] == 2
    assert [r["number"] for r in records(ada, experiment)["records"]] == [1, 2]


def test_records_replayed_out_of_order_and_in_the_wrong_lane_change_nothing(ada, run):
    experiment, executor = run
    event = ("event", {"name": "x", "data": 1})
    assert executor.report((1, *event), (2, *event)).json()["acked"] == 2
    assert executor.report((2, *event), (1, *event)).json() == {"acked": 2, "refusals": [], "missing": []}
    assert [r["number"] for r in executor.report((1, *event), lane="bulk").json()["refusals"]] == [1]
    events = ada.http.get(f"/v1/experiments/{experiment}/events").json()["events"]
    assert [e["name"] for e in events].count("x") == 2


@pytest.mark.parametrize("journal", ["j2", "", "../../x", "\0", "x" * 5_000])
def test_a_journal_that_is_anothers_gets_nothing_in(ada, run, journal):
    experiment, executor = run
    executor.journal = journal
    assert executor.report((1, "step", STEP)).status_code in (409, 422)
    assert records(ada, experiment)["records"] == []


@pytest.mark.parametrize("body", [b"not json", b"\xff\xfe", b"[" * 5000, b'{"kind":"x","at":0,"z":"\xff"}'])
def test_bytes_that_are_no_record_are_refused_like_any_other(ada, run, body):
    experiment, executor = run
    answer = executor.send(frame(1, body) + frame(2, dumps(Record(kind="step", at=0, body=STEP)))).json()
    assert (answer["acked"], [r["number"] for r in answer["refusals"]]) == (2, [1])
    assert len(records(ada, experiment)["records"]) == 1


def test_a_damaged_record_is_refused_and_the_next_is_taken(run):
    _, executor = run
    damaged = bytearray(frame(1, dumps(Record(kind="step", at=0, body=STEP))))
    damaged[-2] ^= 1
    answer = executor.send(bytes(damaged) + frame(2, dumps(Record(kind="step", at=0, body=STEP)))).json()
    assert (answer["acked"], [r["number"] for r in answer["refusals"]]) == (2, [1])


def test_a_gap_record_stands_for_what_was_dropped(ada, run):
    experiment, executor = run
    executor.report((1, "log", {"step": "s", "text": "x"}), lane="bulk")
    assert executor.report((6, "gap", {"first": 2, "last": 6}), lane="bulk").json()["acked"] == 6
    assert executor.report((7, "log", {"step": "s", "text": "y"}), lane="bulk").json()["acked"] == 7
    assert [r["record"]["kind"] for r in records(ada, experiment, "bulk")["records"]] == ["log", "gap", "log"]


def test_a_gap_that_does_not_follow_is_not_taken(run):
    _, executor = run
    assert executor.report((9, "gap", {"first": 5, "last": 9}), lane="bulk").json()["acked"] == 0


def test_a_journal_that_never_claimed_cannot_report(run):
    _, executor = run
    executor.journal = "other"
    assert code(executor.report((1, "step", STEP))) == (409, "claim_refused")


# --- the end ---------------------------------------------------------------------------------------------------------


def test_ended_ends_the_deployment_and_its_experiment(ada, lab, run):
    experiment, executor = run
    executor.report((1, "log", {"step": "s", "text": "x"}), lane="bulk")
    executor.report((1, "ended", {**ENDED, "message": "all well", "bulk": 1}))
    info = ada.http.get(f"/v1/experiments/{experiment}").json()
    assert info["state"] == "succeeded"
    ended = info["deployments"][0]
    assert (ended["state"], ended["reason"], ended["message"], ended["drained"]) == (
        "succeeded",
        "completed",
        "all well",
        True,
    )


def test_logs_that_follow_the_end_are_not_late_and_drain_it(ada, run):
    experiment, executor = run
    executor.report((1, "ended", {**ENDED, "bulk": 2}))
    assert deployment(ada, experiment)["drained"] is False
    executor.report((1, "log", {"step": "s", "text": "x"}), (2, "log", {"step": "s", "text": "y"}), lane="bulk")
    assert deployment(ada, experiment)["drained"] is True
    assert [r["late"] for r in records(ada, experiment, "bulk")["records"]] == [False, False]


def test_a_deployment_waits_for_the_bytes_of_its_artifacts(ada, run):
    experiment, executor = run
    data = b"trace"
    digest = hashlib.sha256(data).hexdigest()
    announced = {"step": "s", "name": "out/t.csv", "size": 5, "sha256": digest}
    assert executor.report((1, "artifact", announced)).json()["missing"] == [digest]
    executor.report((2, "ended", ENDED))
    assert deployment(ada, experiment)["state"] == "running"
    answer = executor.http.put(f"/v1/blobs/{digest}", params={"offset": 0, "size": 5}, content=data)
    assert answer.json() == {"digest": digest, "offset": 5, "complete": True}
    assert deployment(ada, experiment)["state"] == "succeeded"
    [artifact] = ada.http.get(f"/v1/experiments/{experiment}/artifacts").json()["artifacts"]
    assert (artifact["deployment"], artifact["name"], artifact["stored"]) == ("a", "out/t.csv", True)
    assert ada.http.get(f"/v1/blobs/{digest}").content == data


def test_bytes_that_somebody_else_sent_meanwhile_need_not_be_sent_again(ada, run):
    experiment, executor = run
    digest = hashlib.sha256(b"trace").hexdigest()
    announced = {"step": "s", "name": "t", "size": 5, "sha256": digest}
    assert executor.report((1, "artifact", announced), (2, "ended", ENDED)).json()["missing"] == [digest]
    ada.http.put(f"/v1/blobs/{digest}", params={"offset": 0, "size": 5}, content=b"trace")
    assert executor.http.get(f"/v1/blobs/{digest}/status").json()["complete"] is True
    assert deployment(ada, experiment)["state"] == "succeeded"
    [artifact] = ada.http.get(f"/v1/experiments/{experiment}/artifacts").json()["artifacts"]
    assert (artifact["stored"], artifact["lost"]) == (True, "")


def test_an_artifact_that_is_lost_is_not_waited_for(ada, run):
    experiment, executor = run
    executor.report((1, "artifact", {"step": "s", "name": "t", "size": 5, "sha256": "1" * 64}))
    lost = {"step": "s", "name": "t", "reason": "no space left", "sha256": "1" * 64}
    executor.report((2, "artifact_lost", lost), (3, "ended", ENDED))
    assert deployment(ada, experiment)["state"] == "succeeded"
    [artifact] = ada.http.get(f"/v1/experiments/{experiment}/artifacts").json()["artifacts"]
    assert (artifact["stored"], artifact["lost"]) == (False, "no space left")


def test_a_spilled_value_is_waited_for_and_not_listed(ada, run):
    experiment, executor = run
    spilled = {"step": "s", "name": "value", "size": 5, "sha256": "2" * 64, "value": True}
    assert executor.report((1, "artifact", spilled)).json()["missing"] == ["2" * 64]
    assert ada.http.get(f"/v1/experiments/{experiment}/artifacts").json()["artifacts"] == []


def test_what_comes_after_the_end_is_stored_as_late_and_changes_nothing(ada, lab, run):
    experiment, executor = run
    lab.move(lab.row(experiment), D.LOST)
    assert executor.report((1, "event", {"name": "x"}), (2, "step", STEP), (3, "ended", ENDED)).json()["acked"] == 3
    assert deployment(ada, experiment)["state"] == "lost"
    assert [r["late"] for r in records(ada, experiment)["records"]] == [True, True, True]
    events = ada.http.get(f"/v1/experiments/{experiment}/events").json()["events"]
    assert "x" not in [e["name"] for e in events]


def test_an_older_epochs_records_are_late_too(ada, lab, run):
    experiment, old = run
    new = lab.launch(experiment, epoch=2)
    new.journal = "j2"
    assert new.claim().status_code == 200
    assert old.report((1, "ended", ENDED)).json()["acked"] == 1
    assert deployment(ada, experiment)["state"] == "running"
    assert [r["late"] for r in records(ada, experiment)["records"]] == [True]


# --- polls -----------------------------------------------------------------------------------------------------------


def test_events_of_executors_are_numbered_without_gaps_and_told_to_all(ada, lab):
    experiment = ada.experiment(deployments=("a", "b"))
    first, second = lab.launch(experiment, "a"), lab.launch(experiment, "b")
    second.journal = "j2"
    assert [e.claim().status_code for e in (first, second)] == [200, 200]
    first.report((1, "event", {"name": "up", "data": {"n": 2**70}, "step": "s"}))
    second.report((1, "event", {"name": "up"}), (2, "event", {"name": "down"}))
    told = second.poll().json()
    assert [e["number"] for e in told["events"]] == list(range(1, told["cursor"] + 1))
    own = [(e["name"], e["sender"], e["key"]) for e in told["events"] if not e["name"].startswith("fieldlab.")]
    assert own == [("up", "a", "j1:1"), ("up", "b", "j2:1"), ("down", "b", "j2:2")]
    assert ada.http.get(f"/v1/experiments/{experiment}/events").json()["events"] == told["events"]


def test_a_repeated_report_does_not_double_its_event(ada, run):
    experiment, executor = run
    for _ in range(2):
        executor.report((1, "event", {"name": "once"}))
    events = ada.http.get(f"/v1/experiments/{experiment}/events").json()["events"]
    assert [e["name"] for e in events].count("once") == 1


def test_every_state_of_a_deployment_is_an_event(ada, run):
    experiment, _ = run
    events = ada.http.get(f"/v1/experiments/{experiment}/events").json()["events"]
    assert [e["data"]["state"] for e in events] == ["preparing", "ready", "launching", "running"]


def test_a_waiting_poll_is_woken_by_an_event(ada, run):
    experiment, executor = run
    cursor = executor.poll().json()["cursor"]
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(executor.poll(after=cursor, wait=30)))
    waiting.start()
    ada.http.post(f"/v1/experiments/{experiment}/events", json={"name": "go", "data": 1})
    waiting.join(20)
    assert [e["name"] for e in answers[0].json()["events"]] == ["go"]


def test_a_waiting_poll_is_woken_by_the_order_to_stop(ada, run):
    experiment, executor = run
    cursor = executor.poll().json()["cursor"]
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(executor.poll(after=cursor, wait=30)))
    waiting.start()
    ada.http.post(f"/v1/experiments/{experiment}/cancel", json={"reason": "wrong site"})
    waiting.join(20)
    assert answers[0].json()["cancel"] == {"reason": "wrong site"}


def test_a_poll_is_a_sign_of_life(ada, lab, run):
    experiment, executor = run
    lab.move(lab.row(experiment), D.UNREACHABLE)
    executor.poll()
    assert deployment(ada, experiment)["state"] == "running"


def test_a_heartbeat_has_no_more_than_300_bytes(run):
    _, executor = run
    cursor = executor.poll().json()["cursor"]
    answer = executor.poll(after=cursor, wait=0)
    assert answer.request.content == b""
    assert len(answer.content) <= 300


def test_a_control_record_that_its_node_cannot_give_is_refused_in_words(run):
    _, executor = run
    [refusal] = executor.report((1, "gap", {"first": 1, "last": 1})).json()["refusals"]
    assert "its node cannot give it" in refusal["message"]


def test_another_journal_is_told_nothing(run):
    _, executor = run
    executor.journal = "other"
    assert code(executor.poll()) == (409, "claim_refused")

"""How much one user, one experiment and one deployment may have: at the bound, over it, and who is told how."""

import dataclasses
import hashlib
import re
from pathlib import Path

import pytest
from fieldlab_common.errors import ConfigurationError
from fieldlab_director.settings import Limits, limits_of

LIMITS = Limits(
    page=100,
    experiments=2,
    infrastructures=2,
    user_bytes=20,
    events=8,
    artifacts=2,
    deployments=3,
    log_pace=1000.0,
    log_burst=1000.0,
)
STEP = {"step": "s", "state": "running"}


@pytest.fixture(scope="module")
def small(make_lab):
    return make_lab(LIMITS)


@pytest.fixture
def ada(small):
    return small.member("ada")


def code(answer):
    return answer.status_code, answer.json().get("code")


def test_a_user_has_so_many_experiments_and_a_repeated_request_is_answered_all_the_same(ada):
    assert [ada.submit("one", key="k1").status_code, ada.submit("two").status_code] == [202, 202]
    refused = ada.submit("three")
    assert code(refused) == (413, "too_large")
    assert "2 experiments" in refused.json()["detail"]
    assert ada.submit("one", key="k1").status_code == 202
    assert code(ada.http.post("/v1/experiments/one/rerun", json={})) == (413, "too_large")
    assert len(ada.http.get("/v1/experiments").json()["experiments"]) == 2


def test_an_experiment_has_so_many_deployments(ada):
    assert ada.submit(deployments=("a", "b", "c")).status_code == 202
    assert code(ada.submit("more", deployments=("a", "b", "c", "d"))) == (413, "too_large")


def test_a_user_has_so_many_infrastructures(ada):
    body = {"name": "second", "spec": {"kind": "fleet", "body": {"nodes": []}}}
    assert ada.http.post("/v1/infrastructures", json=body).status_code == 201
    assert code(ada.http.post("/v1/infrastructures", json={**body, "name": "third"})) == (413, "too_large")
    assert len(ada.http.get("/v1/infrastructures").json()["infrastructures"]) == 2


def test_a_users_blobs_have_so_many_bytes_together_and_what_is_there_counts_once(ada):
    ada.put(b"x" * 15)
    ada.put(b"x" * 15)
    ada.put(b"y" * 5)
    digest = hashlib.sha256(b"z").hexdigest()
    answer = ada.http.put(f"/v1/blobs/{digest}", params={"offset": 0, "size": 1}, content=b"z")
    assert code(answer) == (413, "too_large")


def test_an_artifact_that_has_no_room_is_refused_to_its_executor_too(small, ada):
    experiment = ada.experiment()
    executor = small.launch(experiment)
    executor.claim()
    digest = hashlib.sha256(b"t" * 30).hexdigest()
    executor.report((1, "artifact", {"step": "s", "name": "t", "size": 30, "sha256": digest}))
    answer = executor.http.put(f"/v1/blobs/{digest}", params={"offset": 0, "size": 30}, content=b"t" * 30)
    assert code(answer) == (413, "too_large")


def test_events_over_the_quota_are_refused_to_people_and_one_by_one_to_executors(small, ada):
    experiment = ada.experiment()
    executor = small.launch(experiment)
    executor.claim()
    path = f"/v1/experiments/{experiment}/events"
    room = LIMITS.events - len(ada.http.get(path).json()["events"])
    assert [ada.http.post(path, json={"name": "go"}).status_code for _ in range(room - 1)] == [201] * (room - 1)
    answer = executor.report((1, "event", {"name": "a"}), (2, "event", {"name": "b"}), (3, "step", STEP)).json()
    assert (answer["acked"], [refusal["number"] for refusal in answer["refusals"]]) == (3, [2])
    assert "8 events" in answer["refusals"][0]["message"]
    assert code(ada.http.post(path, json={"name": "go"})) == (413, "too_large")
    assert len(ada.http.get(path).json()["events"]) == LIMITS.events


def test_artifacts_over_the_quota_are_refused_one_by_one(small, ada):
    experiment = ada.experiment()
    executor = small.launch(experiment)
    executor.claim()
    announced = [(n, "artifact", {"step": "s", "name": f"t{n}", "size": 1, "sha256": f"{n}" * 64}) for n in range(1, 5)]
    answer = executor.report(*announced[:1]).json()
    assert not answer.get("refusals")
    answer = executor.report(*announced[1:]).json()
    assert [refusal["number"] for refusal in answer["refusals"]] == [3, 4]
    assert len(ada.http.get(f"/v1/experiments/{experiment}/artifacts").json()["artifacts"]) == 2


def test_logs_that_come_too_fast_wait_and_nothing_else_waits_for_them(small, ada):
    experiment = ada.experiment()
    executor = small.launch(experiment)
    executor.claim()
    line = {"step": "s", "text": "x" * 900}
    first, second = (executor.report((n, "log", line), lane="bulk") for n in (1, 2))
    assert first.json()["acked"] == 1
    assert code(second) == (429, "rate_limited")
    assert int(second.headers["retry-after"]) >= 1
    assert executor.report((1, "step", STEP)).json()["acked"] == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/experiments", {"name": "x" * 300, "deployments": []}),
        ("/v1/infrastructures", {"name": "x" * 300, "spec": {"kind": "fleet", "body": {"nodes": []}}}),
        ("/v1/tokens", {"label": "x" * 300}),
        ("/v1/users", {"name": "x" * 300}),
    ],
)
def test_a_name_that_is_too_long_is_refused(ada, path, body):
    assert code(ada.http.post(path, json=body)) == (422, "invalid_request")


def test_a_secrets_name_that_is_too_long_is_refused(ada):
    assert code(ada.http.put(f"/v1/secrets/{'x' * 300}", json={"value": "v"})) == (422, "invalid_request")


def test_every_limit_is_documented_with_its_default():
    page = (Path(__file__).parents[3] / "docs" / "limits.md").read_text()
    named = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert named == [field.name for field in dataclasses.fields(Limits)]


def test_an_admin_changes_limits_by_name():
    assert limits_of(["experiments=5", "wait=0.5"]) == Limits(experiments=5, wait=0.5)
    for word in ("nonsense=1", "experiments=many", "experiments=0", "experiments"):
        with pytest.raises(ConfigurationError):
            limits_of([word])

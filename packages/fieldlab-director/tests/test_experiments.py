"""Submit, start, cancel, list: over HTTP."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from fieldlab_common.lifecycle import DeploymentState
from fieldlab_common.wire import dumps
from fieldlab_director.services import removal

LABS = ("sqlite", "postgres")


def code(answer):
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["code"]


def test_a_submitted_experiment_is_prepared_with_its_deployments_pending(ada):
    answer = ada.submit("exp", deployments=("a", "b"))
    assert answer.status_code == 202
    told = answer.json()
    assert (told["name"], told["state"], told["owner"][:4]) == ("exp", "preparing", "ada-")
    assert [(d["name"], d["node"], d["state"]) for d in told["deployments"]] == [
        ("a", "n1", "pending"),
        ("b", "n1", "pending"),
    ]


def test_a_taken_name_is_refused_attached_or_counted_up(ada):
    first = ada.experiment("exp")
    assert code(ada.submit("exp")) == (409, "experiment_exists")
    assert ada.submit("exp", if_exists="attach").json()["id"] == first
    assert [ada.submit("exp", if_exists="new").json()["name"] for _ in range(2)] == ["exp#2", "exp#3"]


def test_a_request_repeated_under_its_key_makes_one_experiment(ada):
    first = ada.submit("exp", if_exists="new", key="k").json()["id"]
    assert ada.submit("exp", if_exists="new", key="k").json()["id"] == first
    assert ada.submit("exp", if_exists="new", key="other").json()["id"] != first


def test_a_key_of_another_request_is_refused(ada):
    ada.submit("exp", key="k")
    assert code(ada.submit("other", key="k")) == (422, "invalid_request")


def test_a_key_is_its_owners_own(ada, bob):
    assert ada.submit("exp", key="k").json()["id"] != bob.submit("exp", key="k").json()["id"]


def test_a_node_that_is_not_there_is_named_with_those_that_are(ada):
    request = ada.request()
    specs = [{"name": "a", "node": "n9", "environment": {"kind": "host"}, "graph": request.deployments[0].graph}]
    answer = ada.http.post("/v1/experiments", json={"name": "exp", "deployments": specs})
    assert code(answer) == (404, "not_found")
    assert "n9" in answer.json()["detail"]
    assert "n1, n2" in answer.json()["detail"]


def test_a_blob_that_was_not_sent_is_named(ada):
    specs = [{"name": "a", "node": "n1", "environment": {"kind": "host"}, "graph": "0" * 64}]
    answer = ada.http.post("/v1/experiments", json={"name": "exp", "deployments": specs})
    assert code(answer) == (404, "not_found")
    assert answer.json()["details"]["digests"] == ["0" * 64]


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"name": "../x"}, "$.name"),
        ({"name": 5}, "$.name"),
        ({"deployments": []}, "$.deployments"),
        ({"if_exists": "perhaps"}, "$.if_exists"),
        ({"deployments": [{"name": "a"}]}, "$.deployments[0]"),
        ({"settings": {"lost_after": "soon"}}, "$.settings.lost_after"),
        ({"settings": {"reporting": "loud"}}, "$.settings.reporting"),
        ({"deployments": [{"name": "a", "node": "n1", "environment": {"kind": "moon"}, "graph": "0" * 64}]}, None),
    ],
)
def test_a_malformed_request_is_refused_with_the_path_of_what_is_wrong(ada, change, path):
    specs = [{"name": "a", "node": "n1", "environment": {"kind": "host"}, "graph": "0" * 64}]
    answer = ada.http.post("/v1/experiments", json={"name": "exp", "deployments": specs, **change})
    assert code(answer) == (422, "invalid_request")
    assert answer.json()["details"]["path"] == (path or "$.deployments[0].environment")


def test_two_deployments_of_one_name_are_refused(ada):
    assert code(ada.submit("exp", deployments=("a", "a"))) == (422, "invalid_request")


def test_an_experiment_is_found_by_its_id_and_by_its_name(ada):
    ada.experiment("exp")
    second = ada.experiment("exp", if_exists="new")
    assert ada.http.get(f"/v1/experiments/{second}").json()["name"] == "exp#2"
    assert ada.http.get("/v1/experiments/exp%232").json()["id"] == second


def test_the_list_is_newest_first_and_continues_where_a_page_ended(ada):
    ids = [ada.experiment(f"e{i}") for i in range(5)]
    seen, after = [], ""
    while after is not None:
        query = {"limit": 2, **({"after": after} if after else {})}
        page = ada.http.get("/v1/experiments", params=query).json()
        seen += [e["id"] for e in page["experiments"]]
        after = page["next"]
    assert seen == ids[::-1]


def test_the_list_can_be_of_one_state(ada):
    ada.experiment("e1")
    stopped = ada.experiment("e2")
    ada.http.post(f"/v1/experiments/{stopped}/cancel", json={})
    page = ada.http.get("/v1/experiments", params={"state": "cancelling"}).json()
    assert [e["id"] for e in page["experiments"]] == [stopped]
    assert code(ada.http.get("/v1/experiments", params={"state": "fine"})) == (422, "invalid_request")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"name": "dns-*"}, ["dns-two", "dns-1"]),
        ({"name": "DNS-?"}, ["dns-1"]),
        ({"name": "*_x"}, ["a_x"]),  # an underscore stands for itself
        ({"name": "dns-*", "state": "cancelling"}, []),
        ({"since": 4e9}, []),
        ({"since": 0.5, "name": "abx"}, ["abx"]),
    ],
)
def test_the_list_can_be_of_names_that_fit_a_pattern_and_of_a_time(ada, query, expected):
    for name in ("dns-1", "dns-two", "a_x", "abx"):
        ada.experiment(name)
    page = ada.http.get("/v1/experiments", params=query).json()
    assert [e["name"] for e in page["experiments"]] == expected


def test_of_two_that_submit_one_name_at_once_one_is_refused_and_with_new_both_have_their_own(ada):
    request = {name: ada.request("exp", if_exists=name) for name in ("error", "new")}
    with ThreadPoolExecutor(8) as pool:

        def post(kind):
            return ada.http.post("/v1/experiments", content=dumps(request[kind]))

        refused = [answer.status_code for answer in pool.map(post, ["error"] * 8)]
        names = sorted(answer.json()["name"] for answer in pool.map(post, ["new"] * 8))
    assert sorted(refused) == [202] + [409] * 7
    assert names == [f"exp#{number}" for number in range(2, 10)]


def test_a_request_repeated_at_once_under_its_key_makes_one_experiment(ada):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ada.submit("exp", if_exists="new", key="k"), range(8)))
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_a_rerun_has_the_same_deployments_and_code_under_a_name_of_its_own(ada, lab):
    experiment = ada.experiment("exp", deployments=("a", "b"), settings={"min_nodes": 1, "start_at": 1.0})
    answer = ada.http.post(f"/v1/experiments/{experiment}/rerun", json={})
    assert answer.status_code == 202
    again = answer.json()
    assert (again["name"], again["settings"]["min_nodes"], again["settings"]["start_at"]) == ("exp#2", 1, None)
    assert [lab.row(again["id"], name).spec for name in "ab"] == [lab.row(experiment, name).spec for name in "ab"]
    third = ada.http.post(f"/v1/experiments/{again['id']}/rerun", json={"start": False}).json()
    assert third["name"] == "exp#3"


def test_a_rerun_repeated_under_its_key_makes_one_run_and_the_key_is_of_that_experiment(ada):
    first, other = ada.experiment("exp"), ada.experiment("other")
    ask = {"json": {}, "headers": {"Idempotency-Key": "k"}}
    names = [ada.http.post(f"/v1/experiments/{first}/rerun", **ask).json()["name"] for _ in range(2)]
    assert names == ["exp#2", "exp#2"]
    assert code(ada.http.post(f"/v1/experiments/{other}/rerun", **ask)) == (422, "invalid_request")


def test_only_what_has_ended_is_deleted_unless_it_is_forced(ada, lab):
    experiment = ada.experiment("exp")
    assert code(ada.http.delete(f"/v1/experiments/{experiment}")) == (409, "illegal_state")
    assert ada.http.delete(f"/v1/experiments/{experiment}", params={"force": "true"}).status_code == 200
    assert lab.row(experiment).cancel_requested is not None


def test_what_was_deleted_does_not_exist_and_its_name_is_free(ada, lab):
    experiment = ada.experiment("exp")
    lab.move(lab.row(experiment), DeploymentState.CANCELLED)
    assert ada.http.delete("/v1/experiments/exp").status_code == 200
    for path in ("", "/records?lane=control", "/events", "/artifacts"):
        assert code(ada.http.get(f"/v1/experiments/{experiment}{path}")) == (404, "not_found")
    assert code(ada.http.delete(f"/v1/experiments/{experiment}")) == (404, "not_found")
    assert ada.http.get("/v1/experiments").json()["experiments"] == []
    assert ada.submit("exp").json()["name"] == "exp"


def test_a_request_that_is_repeated_when_its_run_was_deleted_makes_no_second_one(ada, lab):
    experiment = ada.submit("exp", key="k").json()["id"]
    lab.move(lab.row(experiment), DeploymentState.CANCELLED)
    ada.http.delete(f"/v1/experiments/{experiment}")
    for _ in range(100):
        if not lab.write(removal.remove_some):
            break
    assert code(ada.submit("exp", key="k")) == (404, "not_found")
    assert ada.http.get("/v1/experiments").json()["experiments"] == []


def test_the_start_is_asked_for_once(ada, lab):
    experiment = ada.experiment()
    answers = [ada.http.post(f"/v1/experiments/{experiment}/start") for _ in range(2)]
    assert [a.status_code for a in answers] == [202, 202]


def test_what_is_cancelled_is_not_started(ada):
    experiment = ada.experiment()
    assert ada.http.post(f"/v1/experiments/{experiment}/cancel", json={"reason": "no"}).json()["state"] == "cancelling"
    assert code(ada.http.post(f"/v1/experiments/{experiment}/start")) == (409, "illegal_state")


def test_a_cancel_is_asked_of_every_deployment_that_runs(ada, lab):
    experiment = ada.experiment(deployments=("a", "b"))
    ada.http.post(f"/v1/experiments/{experiment}/cancel", json={"reason": "wrong site"})
    assert {lab.row(experiment, name).cancel_reason for name in "ab"} == {"wrong site"}


def test_one_deployment_can_be_cancelled_alone(ada, lab):
    experiment = ada.experiment(deployments=("a", "b"))
    answer = ada.http.post(f"/v1/experiments/{experiment}/cancel", json={"deployments": ["b"]})
    assert answer.json()["state"] == "preparing"
    assert [lab.row(experiment, name).cancel_requested is not None for name in "ab"] == [False, True]
    answer = ada.http.post(f"/v1/experiments/{experiment}/cancel", json={"deployments": ["c"]})
    assert code(answer) == (404, "not_found")


def test_an_experiment_ends_also_when_its_deployments_go_one_by_one_before_it_ran(ada, lab):
    experiment = ada.experiment(deployments=("a", "b"))
    for name in "ab":
        lab.move(lab.row(experiment, name), DeploymentState.FAILED)
    assert ada.http.get(f"/v1/experiments/{experiment}").json()["state"] == "failed"

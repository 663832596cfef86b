"""What every endpoint shares: problems, ids, limits, forms."""

import pytest
from fieldlab_common.protocol import ENDPOINTS


def test_health_and_the_executor_are_for_anyone(lab):
    client = lab.client()
    assert client.get("/v1/health").json()["status"] == "ok"
    assert client.get("/v1/fieldlab.pyz").content == b"an executor, packed"


def test_every_answer_has_an_id_and_a_problem_repeats_it(lab):
    first, second = (lab.client().get("/v1/me") for _ in range(2))
    assert first.json()["request_id"] == first.headers["x-request-id"] != second.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nowhere", 404, "not_found"),
        ("GET", "/", 404, "not_found"),
        ("DELETE", "/v1/experiments", 405, "invalid_request"),
    ],
)
def test_a_path_that_is_none_is_a_problem_too(lab, method, path, status, code):
    answer = lab.client().request(method, path)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"name": 3, "deployments": []}'])
def test_a_body_that_is_not_of_the_form_is_refused(ada, body):
    answer = ada.http.post("/v1/experiments", content=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert answer.json()["details"]["path"].startswith("$")


def test_a_body_over_the_limit_is_refused_and_the_connection_goes_on(ada):
    answer = ada.http.post("/v1/experiments", content=b" " * (2 * 1024 * 1024))
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert ada.http.get("/v1/me").status_code == 200


@pytest.mark.parametrize(
    "query", [{"limit": 0}, {"limit": "many"}, {"after": -1}, {"after": 2**60}, {"wait": "nan"}, {"wait": -1}]
)
def test_a_query_that_is_not_of_the_form_is_refused(ada, query):
    experiment = ada.experiment()
    answer = ada.http.get(f"/v1/experiments/{experiment}/events", params=query)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_what_nobody_foresaw_is_a_problem_without_a_traceback(lab, ada, monkeypatch):
    async def fail(self):
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(lab.store, "read", lambda fn: fail(lab))
    answer = ada.http.get("/v1/me")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "secret" not in answer.text


def test_the_openapi_document_has_every_endpoint_and_its_errors(lab):
    document = lab.client().get("/openapi.json").json()
    told = {
        operation["operationId"]: (path, method.upper(), operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert {name: (row.path, row.method) for name, row in ENDPOINTS.items()} == {
        name: (path, method) for name, (path, method, _) in told.items()
    }
    assert "experiment_exists" in told["submit"][2]["responses"]["409"]["description"]
    assert "ExperimentInfo" in document["components"]["schemas"]


def test_an_infrastructure_name_is_taken_once(ada):
    body = {"name": "lab", "spec": {"kind": "local", "body": {"nodes": []}}}
    answer = ada.http.post("/v1/infrastructures", json=body)
    assert (answer.status_code, answer.json()["code"]) == (409, "illegal_state")

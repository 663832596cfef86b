"""What every endpoint shares: problems, ids, limits, forms."""

import gzip
import tracemalloc
import zlib

import pytest
from fieldlab_common.errors import TooLarge
from fieldlab_common.protocol import ENDPOINTS
from fieldlab_director.encoding import opener


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
    assert (answer.status_code, answer.json()["status"], answer.json()["code"]) == (status, status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"] == answer.json()["request_id"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"name": 3, "deployments": []}'])
def test_a_body_that_is_not_of_the_form_is_refused(ada, body):
    answer = ada.http.post("/v1/experiments", content=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert answer.json()["details"]["path"].startswith("$")


def test_a_body_over_the_limit_is_refused_and_the_connection_goes_on(ada):
    answer = ada.http.post("/v1/experiments", content=b" " * (2 * 1024 * 1024))
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert ada.http.get("/v1/me").status_code == 200


def test_a_body_may_come_compressed(ada):
    for encoding, packed in (("gzip", gzip.compress), ("deflate", zlib.compress), ("GZIP", gzip.compress)):
        body = packed(b'{"digests": ["' + b"0" * 64 + b'"]}')
        answer = ada.http.post("/v1/blobs/missing", content=body, headers={"Content-Encoding": encoding})
        assert answer.json() == {"digests": ["0" * 64]}, answer.text


def test_a_body_that_grows_a_thousandfold_is_refused_at_its_limit(ada):
    bomb = gzip.compress(bytes(50_000_000), 9)  # fifty kilobytes on the line
    answer = ada.http.post("/v1/blobs/missing", content=bomb, headers={"Content-Encoding": "gzip"})
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert ada.http.get("/v1/me").status_code == 200


def test_opening_a_body_takes_no_more_memory_than_its_limit():
    bomb = gzip.compress(bytes(100_000_000), 9)
    tracemalloc.start()
    with pytest.raises(TooLarge):
        opener("gzip", 1_000_000)(bomb)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


_SMALL = gzip.compress(b"{}", mtime=0)


@pytest.mark.parametrize(
    ("body", "encoding", "status", "code"),
    [
        (b"{}", "br", 415, "unsupported_encoding"),
        (gzip.compress(_SMALL, mtime=0), "gzip, gzip", 415, "unsupported_encoding"),
        (b"{}", "gzip", 422, "invalid_request"),
        (_SMALL[:-3], "gzip", 422, "invalid_request"),
        (_SMALL + b"more", "gzip", 422, "invalid_request"),
        (b"", "gzip", 422, "invalid_request"),
    ],
)
def test_a_body_that_is_not_what_its_encoding_says_is_refused(ada, body, encoding, status, code):
    answer = ada.http.post("/v1/blobs/missing", content=body, headers={"Content-Encoding": encoding})
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_the_bytes_of_a_blob_come_as_they_are(ada):
    path = "/v1/blobs/" + "0" * 64
    headers = {"Content-Encoding": "gzip"}
    answer = ada.http.put(path, params={"offset": 0, "size": 2}, content=gzip.compress(b"{}"), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_encoding")


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

"""Secrets: who may store and forget them, who gets them, and what a reader of the database sees."""

import sqlalchemy as sa
from fieldlab_common.protocol import MAX_SECRET
from fieldlab_director.store import schema


def put(user, name="key", value="hush hush"):
    return user.http.put(f"/v1/secrets/{name}", json={"value": value})


def names(user):
    return [one["name"] for one in user.http.get("/v1/secrets").json()["secrets"]]


def test_a_secret_is_listed_by_name_replaced_and_forgotten_and_never_told(ada):
    assert put(ada).status_code == 200
    assert put(ada, value="another").json()["name"] == "key"
    answer = ada.http.get("/v1/secrets")
    assert names(ada) == ["key"]
    assert "another" not in answer.text
    assert ada.http.delete("/v1/secrets/key").status_code == 200
    assert names(ada) == []
    gone = ada.http.delete("/v1/secrets/key")
    assert (gone.status_code, gone.json()["code"]) == (404, "not_found")


def test_what_cannot_be_a_secret_is_refused(ada):
    for name, value in (("key", ""), ("key", "x" * (MAX_SECRET + 1)), (" ", "x")):
        assert put(ada, name, value).json()["code"] == "invalid_request"
    assert names(ada) == []


def test_another_users_secret_does_not_exist(ada, bob):
    put(ada)
    assert names(bob) == []
    assert bob.http.delete("/v1/secrets/key").status_code == 404
    assert bob.submit(deployments=("a",), secrets=("key",)).status_code == 404
    assert names(ada) == ["key"]


def test_an_experiment_that_needs_a_secret_that_is_not_stored_is_refused_by_its_name(ada):
    answer = ada.submit(deployments=("a",), secrets=("key",))
    assert answer.status_code == 404
    assert "'key'" in answer.json()["detail"]
    assert "client.secrets.set" in answer.json()["advice"]


def test_the_executor_of_the_deployment_gets_what_it_names_and_no_more(lab, ada):
    put(ada)
    put(ada, "other", "not for it")
    executor = lab.launch(ada.experiment(deployments=("a",), secrets=("key",)))
    assert executor.claim().json()["secrets"] == {"key": "hush hush"}
    plain = lab.launch(ada.experiment("second", deployments=("a",)))
    assert not plain.claim().json().get("secrets")


def test_a_reader_of_the_database_learns_nothing(lab, ada):
    put(ada, value="hush hush")
    stored = lab.write(lambda tx: tx.all(sa.select(schema.secrets.c.value), lambda value: value))
    assert stored
    assert not any(b"hush" in value for value in stored)

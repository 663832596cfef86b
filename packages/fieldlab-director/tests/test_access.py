"""Tokens, and what of others can be seen through blobs, nodes and names. ``test_authorisation`` has the endpoints."""

import re

import pytest
from fieldlab_common.errors import BY_CODE, AuthenticationError
from fieldlab_common.lifecycle import DeploymentState as D
from fieldlab_common.protocol import ENDPOINTS, Caller
from fieldlab_director.services.desk import Desk
from fieldlab_director.services.identity import executor_caller, executor_token
from fieldlab_director.store import schema

from .world import play

LABS = ("sqlite", "postgres")

GUARDED = [row for row in ENDPOINTS.values() if Caller.ANYONE not in row.callers]
QUERY = {"lane": "control", "journal": "j", "offset": 0, "size": 0}


def ask(client, row, **path):
    filled = re.sub(r"{(\w+)}", lambda m: path.get(m[1], "0" * 64), row.path)
    content = None if row.request is None else b"" if row.request is bytes else b"{}"
    query = {name: QUERY[name] for name in row.query if name in QUERY}
    return client.request(row.method, filled, params=query, content=content)


def test_the_desk_serves_every_endpoint_of_the_table():
    assert all(callable(getattr(Desk, name, None)) for name in ENDPOINTS)


@pytest.mark.parametrize("row", GUARDED, ids=lambda row: row.name)
def test_a_wrong_token_is_refused_everywhere_with_the_same_words(lab, row):
    client = lab.client()
    assert ask(client, row).json()["code"] == "unauthenticated"
    for token in ("flu_x", f"flu_{'0' * 20}_{'A' * 43}", f"fle_{'0' * 20}.1.{'0' * 64}", "é", "a b"):
        client.headers["Authorization"] = f"Bearer {token}"
        answer = ask(client, row)
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["detail"] == "The token is not valid."


def test_a_blob_of_another_does_not_exist_and_can_be_sent_again(ada, bob):
    digest = ada.put(b"secret weights")
    assert bob.http.get(f"/v1/blobs/{digest}").status_code == 404
    assert bob.http.get(f"/v1/blobs/{digest}/status").json() == {"digest": digest, "offset": 0, "complete": False}
    assert bob.http.post("/v1/blobs/missing", json={"digests": [digest]}).json() == {"digests": [digest]}
    bob.put(b"secret weights")
    assert bob.http.get(f"/v1/blobs/{digest}").content == b"secret weights"


def test_nodes_and_infrastructures_of_another_are_not_listed(ada, bob, lab):
    carol = lab.user("carol")
    assert carol.get("/v1/nodes").json() == {"nodes": [], "holds": []}
    assert carol.get("/v1/infrastructures").json() == {"infrastructures": []}
    assert [n["name"] for n in bob.http.get("/v1/nodes").json()["nodes"]] == ["n1", "n2"]


def test_an_executor_reads_only_what_its_deployment_was_submitted_with(lab, ada):
    other = ada.put(b"not for this deployment")
    graph = ada.put(b"graph")
    executor = lab.launch(ada.experiment())
    assert executor.http.get(f"/v1/blobs/{graph}").content == b"graph"
    assert executor.http.get(f"/v1/blobs/{other}").status_code == 404


def test_an_executor_sends_only_what_it_announced(lab, ada):
    executor = lab.launch(ada.experiment())
    answer = executor.http.put(f"/v1/blobs/{'1' * 64}", params={"offset": 0, "size": 1}, content=b"x")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_the_token_of_one_deployment_reports_for_no_other(lab, ada):
    experiment = ada.experiment(deployments=("a", "b"))
    first, second = lab.launch(experiment, "a"), lab.launch(experiment, "b")
    first.claim()
    second.journal = first.journal
    assert second.report((1, "step", {"step": "s", "state": "running"})).status_code == 409


def test_a_token_for_another_epoch_or_deployment_cannot_be_made_without_the_key(lab, ada):
    executor = lab.launch(ada.experiment())
    head, epoch, signature = executor.token.split(".")
    forged = lab.client(f"{head}.{int(epoch) + 1}.{signature}")
    assert forged.post("/v1/executor/claim", json={"journal_id": "j", "epoch": 2}).status_code == 401
    assert executor_token(b"another key", "x", 1) != executor_token(b"a key", "x", 1)


def test_the_machine_of_the_director_is_for_admins(lab):
    body = {"name": "mine", "spec": {"kind": "local", "body": {"nodes": ["n1"]}}}
    answer = lab.user("dave").post("/v1/infrastructures", json=body)
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


def test_tokens_are_stored_hashed_and_options_sealed(lab, ada):
    token = ada.http.headers["authorization"].removeprefix("Bearer ")
    ada.http.post(
        "/v1/infrastructures", json={"name": "x", "spec": {"kind": "y", "body": {"nodes": [], "k": "hunter2"}}}
    )
    for file in lab.settings.data.glob("director.db*"):
        assert token.encode() not in file.read_bytes()
        assert b"hunter2" not in file.read_bytes()


def test_the_secret_and_the_folder_are_the_directors_alone(lab):
    assert lab.settings.key_file.stat().st_mode & 0o777 == 0o600
    assert lab.settings.data.stat().st_mode & 0o777 == 0o700


def test_every_documented_error_has_a_code_that_clients_know():
    assert all(error.code in BY_CODE for row in ENDPOINTS.values() for error in row.errors)


def test_an_executors_token_lives_as_its_deployment_does_on_the_directors_clock(tmp_path):
    week = 7 * 86_400.0

    async def scenario(world):
        experiment, row = await world.running("n1")
        key = world.vault.executor_key
        token = executor_token(key, row.id, row.epoch)

        async def caller():
            return await world.store.read(lambda tx: executor_caller(tx, key, token, drain_for=week))

        assert not (await caller()).over
        await world.cancel(experiment)
        world.die(row)
        await world.reached(experiment, D.CANCELLED)
        ended = (await world.row(experiment)).ended
        again = schema.deployments.update().values(drained=False)  # as if its connector could not drain it
        await world.store.write(lambda tx: tx.execute(again))
        for passed in (0.0, week - 1):
            world.clock.now = ended + passed
            assert (await caller()).over
        world.clock.now = ended + week
        with pytest.raises(AuthenticationError, match="more than 7 days ago"):
            await caller()

    play(tmp_path, scenario)

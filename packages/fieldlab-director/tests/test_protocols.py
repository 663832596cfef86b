"""What parties of every protocol version that is still spoken said to each other, recorded, and held to be understood.

``protocols/N.json`` has requests and answers of real parties as they stood on the wire, when N was the newest version.
A change that these tests refuse is one that parties of that version would not understand: give it a new version.
"""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fieldlab_common import wire
from fieldlab_common.protocol import ENDPOINTS, PROBLEM, PROTOCOLS, RECORDS, Problem, Record
from fieldlab_common.wire import dumps, frame, unframe

RECORDED = [json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "protocols").glob("*.json"))]
EXCHANGES = [
    pytest.param(exchange, id=f"{recorded['protocol']}-{exchange['endpoint']}-{number}")
    for recorded in RECORDED
    for number, exchange in enumerate(recorded["exchanges"])
]


def missing(recorded: Any, now: Any, path: str = "$") -> list[str]:
    """Where ``now`` lacks what was recorded, or says it differently; what it says besides is no harm."""
    if isinstance(recorded, dict) and isinstance(now, dict):
        return [m for key, value in recorded.items() for m in missing(value, now.get(key, "absent"), f"{path}.{key}")]
    if isinstance(recorded, list) and isinstance(now, list) and len(recorded) == len(now):
        return [m for i, value in enumerate(recorded) for m in missing(value, now[i], f"{path}[{i}]")]
    return [] if recorded == now else [f"{path}: {recorded!r} is now {now!r}"]


def said_again(cls: Any, document: Any) -> Any:
    """The document as both codecs read it, written again in full."""
    data = json.dumps(document).encode()
    value = msgspec.json.decode(data, type=cls)
    assert wire.loads(cls, data) == value
    return msgspec.json.decode(msgspec.json.encode(value))


def test_every_version_that_is_spoken_has_its_recordings() -> None:
    assert tuple(recorded["protocol"] for recorded in RECORDED) == PROTOCOLS


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_what_was_asked_is_still_understood(exchange: dict[str, Any]) -> None:
    row = ENDPOINTS[exchange["endpoint"]]
    assert row.method == exchange["method"]
    assert re.fullmatch(re.sub(r"{\w+}", "[^/]+", row.path), exchange["path"])
    for name, text in exchange["query"].items():
        msgspec.convert(text, row.query[name], strict=False)
    if "request" in exchange:
        assert row.request is not None
        assert missing(exchange["request"], said_again(row.request, exchange["request"])) == []
    for _, record in exchange.get("records", ()):
        assert missing(record, said_again(Record, record)) == []
        assert missing(record["body"], said_again(RECORDS[record["kind"]], record["body"])) == []


@pytest.mark.parametrize("exchange", [e for e in EXCHANGES if "answer" in e.values[0]])
def test_what_was_answered_is_still_said(exchange: dict[str, Any]) -> None:
    row = ENDPOINTS[exchange["endpoint"]]
    cls = row.response if exchange["status"] < 400 else Problem
    assert exchange["status"] == row.status or exchange["status"] in {error.status for error in row.errors}
    assert missing(exchange["answer"], said_again(cls, exchange["answer"])) == []


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: str(recorded["protocol"]))
def test_an_executor_of_that_version_is_served(ada, lab, recorded: dict[str, Any]) -> None:
    experiment = ada.experiment()
    executor = lab.launch(experiment)
    executor.http.headers["Fieldlab-Protocol"] = str(recorded["protocol"])
    asked = next(e["request"] for e in recorded["exchanges"] if e["endpoint"] == "claim")
    executor.journal = asked["journal_id"]
    claim = executor.http.post("/v1/executor/claim", content=json.dumps(asked)).json()
    assert (claim["protocol"], claim["deployment"]["name"]) == (recorded["protocol"], "a")
    upload = bytes.fromhex(recorded["upload"])
    number = [n for n, _, _ in unframe(upload)][-1]
    assert executor.send(upload).json() == {"acked": number, "refusals": [], "missing": []}
    for lane in ("control", "bulk"):
        said = [e["records"] for e in recorded["exchanges"] if e["endpoint"] == "report" and e["query"]["lane"] == lane]
        kept = [record for records in said for _, record in records if record["kind"] != "gap"]
        first = number + 1 if lane == "control" else 1
        body = b"".join(frame(n, json.dumps(record).encode()) for n, record in enumerate(kept, first))
        answer = executor.send(body, lane).json()
        assert (answer["acked"], answer["refusals"]) == (first + len(kept) - 1, [])
    assert {"events", "cursor", "cancel", "server_time"} <= executor.poll().json().keys()


def test_an_executor_that_does_not_say_what_it_speaks_speaks_the_first_version(ada, lab) -> None:
    executor = lab.launch(ada.experiment())
    claim = executor.http.post("/v1/executor/claim", json={"journal_id": "j1", "epoch": 1}).json()
    assert claim["protocol"] == 1


def test_of_several_versions_the_newest_that_both_speak_is_taken(ada, lab) -> None:
    executor = lab.launch(ada.experiment())
    assert executor.claim(protocols=(1, 99)).json()["protocol"] == max(PROTOCOLS)


@pytest.mark.parametrize("path", ["/v1/me", "/v1/executor/poll?journal=j"])
def test_a_version_that_the_director_does_not_speak_is_refused_with_both(ada, path: str) -> None:
    answer = ada.http.get(path, headers={"Fieldlab-Protocol": "99"})
    assert (answer.status_code, answer.headers["content-type"]) == (426, PROBLEM)
    problem = wire.loads(Problem, answer.content)
    assert problem.code == "protocol_mismatch"
    assert problem.details["protocols"] == list(PROTOCOLS)
    assert "'99'" in problem.detail
    assert "director speaks 1." in problem.detail


def test_whoever_speaks_another_version_can_still_learn_which_are_spoken(lab, ada) -> None:
    newer = {"Fieldlab-Protocol": "99"}
    assert lab.client().get("/v1/health", headers=newer).json()["protocols"] == list(PROTOCOLS)
    executor = lab.launch(ada.experiment())
    executor.http.headers.update(newer)
    refused = executor.claim(protocols=(98, 99)).json()
    assert refused["code"] == "protocol_mismatch"
    assert "98, 99" in refused["detail"]
    assert executor.claim(protocols=(1, 99)).json()["protocol"] == 1


def test_the_default_of_what_is_said_in_a_claim_never_changes() -> None:
    claim = ENDPOINTS["claim"].request
    assert claim is not None
    assert wire.loads(claim, dumps({"journal_id": "j", "epoch": 1})).protocols == (1,)

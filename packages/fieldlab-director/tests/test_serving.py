"""The edge to the network: slow senders, long heads, headers that browsers heed, proxies, and who looks at health."""

import socket
import threading
from urllib.parse import urlsplit

import pytest
from fieldlab_common.errors import Unavailable
from fieldlab_director.services import accounts
from fieldlab_director.services.passwords import hash_password
from fieldlab_director.settings import Limits

WITHIN = 20.0


@pytest.fixture(scope="module")
def strict(make_lab):
    """A director with little patience, behind a proxy."""
    limits = Limits(head_seconds=0.3, head_bytes=4096, body_silence=0.3, body_pace=1e9)
    return make_lab(limits, behind_proxy=True)


def dial(lab):
    where = urlsplit(lab.url)
    return socket.create_connection((where.hostname, where.port), timeout=WITHIN)


def heard(line):
    """All that comes until the director hangs up."""
    return b"".join(iter(lambda: line.recv(65536), b""))


@pytest.mark.parametrize("begun", [b"", b"GET /v1/health HTTP/1.1\r\nHost: x\r\n"])
def test_who_does_not_send_a_whole_head_in_time_is_cut_off(strict, begun):
    with dial(strict) as line:
        line.sendall(begun)
        assert heard(line) == b""


def test_a_head_that_trickles_in_is_cut_off_too_also_after_a_good_request(strict):
    with dial(strict) as line:
        line.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in line.recv(65536)
        line.sendall(b"GET /healthz HTTP/1.1\r\n")
        ended = threading.Event()
        threading.Thread(target=trickle, args=(line, ended), daemon=True).start()
        try:
            while line.recv(65536):
                pass
        except ConnectionResetError:
            pass
        ended.set()


def trickle(line, ended):
    try:
        while not ended.wait(0.05):
            line.sendall(b"X-Slow: y\r\n")
    except OSError:
        pass


@pytest.mark.parametrize("head", [b"rubbish\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 8192])
def test_what_is_no_request_or_has_too_long_a_head_is_a_problem(strict, head):
    with dial(strict) as line:
        line.sendall(head)
        said = heard(line)
    assert said.startswith(b"HTTP/1.1 400")
    assert b"application/problem+json" in said
    assert b'"code":"invalid_request"' in said


def test_a_body_that_comes_too_slowly_is_refused(strict):
    made = strict.user("slow").headers["authorization"]
    with dial(strict) as line:
        line.sendall(
            f"PUT /v1/secrets/k HTTP/1.1\r\nHost: x\r\nAuthorization: {made}\r\nContent-Length: 9999\r\n\r\n".encode()
        )
        ended = threading.Event()
        threading.Thread(target=trickle, args=(line, ended), daemon=True).start()
        assert line.recv(65536).startswith(b"HTTP/1.1 503")
        ended.set()


@pytest.mark.parametrize("path", ["/v1/health", "/v1/me", "/nowhere", "/openapi.json", "/healthz", "/v1/fieldlab.pyz"])
def test_every_answer_has_the_headers_that_browsers_heed(lab, path):
    headers = lab.client().get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-frame-options"] == "DENY"
    assert "server" not in headers


@pytest.mark.parametrize(
    ("forwarded", "told"),
    [("203.0.113.7", "203.0.113.7"), ("198.51.100.1, 203.0.113.7", "203.0.113.7"), ("", "127.0.0.1")],
)
def test_behind_a_proxy_the_address_is_the_one_that_the_proxy_saw(strict, forwarded, told):
    assert address(strict, forwarded) == told


def test_without_a_proxy_nobody_chooses_the_address_that_is_seen(lab):
    assert address(lab, "203.0.113.7") == "127.0.0.1"


def address(lab, forwarded):
    name = f"prox-{forwarded.replace(', ', '-') or 'y'}"
    lab.write(lambda tx: accounts.add_user(tx, name, password=hash_password("correct horse")))
    headers = {"X-Forwarded-For": forwarded} if forwarded else {}
    answer = lab.client().post("/v1/login", json={"user": name, "password": "correct horse"}, headers=headers)
    return answer.json()["label"].removeprefix("login from ")


# --- health ----------------------------------------------------------------------------------------------------------


def test_who_looks_at_health_needs_no_token(lab):
    assert lab.client().get("/healthz").json() == {"status": "ok"}
    assert lab.client().get("/readyz").json() == {"status": "ok"}


def test_without_a_database_it_lives_and_is_not_ready(lab, monkeypatch):
    async def fail(fn):
        raise Unavailable("gone")

    monkeypatch.setattr(lab.store, "read", fail)
    assert lab.client().get("/healthz").status_code == 200
    answer = lab.client().get("/readyz")
    assert (answer.status_code, answer.json()["why"]) == (503, "the database does not answer")

"""The director as a process: started, embedded, stopped, killed and started again. Each test starts its own."""

import asyncio
import hashlib
import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from fieldlab_common.errors import ConfigurationError, ConnectorError
from fieldlab_director import embedded
from fieldlab_director.__main__ import main
from fieldlab_director.app import listening, serve
from fieldlab_director.settings import Settings

PATHS = {"data", "certificate", "key", "ca"}


def client(director, token=None):
    headers = {"Authorization": f"Bearer {token or director.token}"}
    return httpx2.Client(base_url=director.url, headers=headers, timeout=30, trust_env=False)


def ends(pid, within=30):
    """Whether a process, which may be nobody's child here, ends in time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], within)[0])
    finally:
        os.close(descriptor)


def submit(http, name="exp"):
    """An experiment that waits for a start that nobody asks for."""
    graph = "b5bb9d8014a0f9b1d61e21e796d78dccdf1352f23cd32812f4850b878ae4944c"
    assert http.put(f"/v1/blobs/{graph}", params={"offset": 0, "size": 4}, content=b"foo\n").status_code == 200
    spec = {"name": "a", "node": "a", "environment": {"kind": "host"}, "graph": graph}
    answer = http.post("/v1/experiments", json={"name": name, "deployments": [spec]})
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def open_files(pid):
    """The limit of a process."""
    limits = Path(f"/proc/{pid}/limits").read_text()
    return int(re.search(r"Max open files +(\d+)", limits)[1])


def test_it_raises_its_limit_of_open_files_says_so_and_gives_what_it_starts_the_one_that_it_was_started_with():
    found, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (700, most))
    try:
        with embedded(nodes=["a"]) as director:
            children = Path(f"/proc/{director.pid}/task/{director.pid}/children").read_text().split()
            assert {open_files(pid) for pid in children} == {700}
            said = (director.folder / "director.log").read_text()
            assert open_files(director.pid) > 700
            assert f'"open_files":{open_files(director.pid)}' in said.replace(" ", "")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (found, most))


def test_it_answers_with_a_token_and_the_nodes_that_were_asked_for():
    with embedded(nodes=[{"name": "a", "site": "x"}, "b"]) as director, client(director) as http:
        nodes = http.get("/v1/nodes").json()["nodes"]
        assert [n["name"] for n in nodes] == ["a", "b"]
        assert nodes[0]["properties"]["site"] == "x"
        assert http.get("/v1/me").json()["role"] == "admin"
        assert http.get("/v1/fieldlab.pyz").content == (director.folder / "fieldlab.pyz").read_bytes()
        pid, folder = director.pid, director.folder
    assert ends(pid)
    assert not folder.exists()


def test_nodes_that_cannot_be_are_refused_and_nothing_stays_behind():
    with pytest.raises(ConnectorError):
        embedded(nodes=["two words"]).start()


def test_a_second_start_on_the_folder_goes_on_with_the_same_token(tmp_path):
    with embedded(tmp_path / "d", nodes=2) as first, client(first) as http:
        submit_nodes = http.get("/v1/nodes").json()["nodes"]
        token = first.token
    with embedded(tmp_path / "d", nodes=2) as second, client(second, token) as http:
        assert second.token == token
        assert http.get("/v1/nodes").json()["nodes"] == submit_nodes


def test_two_directors_never_share_a_folder(tmp_path):
    with embedded(tmp_path / "d") as first:
        with pytest.raises(ConfigurationError, match=f"process {first.pid}"):
            embedded(tmp_path / "d").start()
        with client(first) as http:
            assert http.get("/v1/health").status_code == 200


def test_a_port_that_is_taken_is_named(tmp_path):
    with embedded(tmp_path / "d") as first:
        port = int(first.url.rsplit(":", 1)[1])
        with pytest.raises(ConfigurationError, match=f"Port {port}"):
            embedded(tmp_path / "e", port=port).start()


def test_small_answers_do_not_wait_for_the_acknowledgement_of_what_went_before(tmp_path):
    async def of_a_connection():
        found = asyncio.get_running_loop().create_future()

        def met(reader, writer):
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with listening(Settings(data=tmp_path, port=0)) as listener:
            server = await asyncio.start_server(met, sock=listener)
            _, writer = await asyncio.open_connection(*listener.getsockname())
            async with asyncio.timeout(30):
                no_delay = await found
            writer.close()
            server.close()
        return no_delay

    assert asyncio.run(of_a_connection())


def test_everything_that_was_acknowledged_survives_kill_9(tmp_path):
    acknowledged = {}
    with embedded(tmp_path / "d", nodes=["a"]) as director:
        with client(director) as http:
            experiment = submit(http)
        path = f"/v1/experiments/{experiment}/events"
        enough = threading.Barrier(5)

        def work(worker):
            with client(director) as http:
                for n in range(100_000):
                    try:
                        answer = http.post(path, json={"name": f"w{worker}", "data": n, "key": f"{worker}-{n}"})
                    except httpx2.TransportError:
                        return
                    acknowledged[(f"w{worker}", n)] = answer.json()["number"]
                    if n == 20:
                        enough.wait(60)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        enough.wait(60)
        director.kill()
        for worker in workers:
            worker.join(60)
        before = director.url
        director.restart()
        assert director.url == before
        with client(director) as http:
            events, after = [], 0
            while page := http.get(path, params={"after": after}).json()["events"]:
                events += page
                after = page[-1]["number"]
    stored = {(e["name"], e["data"]): e["number"] for e in events if e["sender"] is None and e["name"][0] == "w"}
    assert len(acknowledged) >= 80
    assert acknowledged.items() <= stored.items()
    assert [e["number"] for e in events] == list(range(1, len(events) + 1))


def test_a_long_poll_is_answered_when_the_director_stops(tmp_path):
    with embedded(tmp_path / "d", nodes=["a"]) as director, client(director) as http:
        experiment = submit(http)
        path = f"/v1/experiments/{experiment}/records?lane=control"
        while http.get(path).json()["state"] != "ready":
            http.get(f"{path}&wait=10")  # it returns when the state has changed
        with socket.create_connection(("127.0.0.1", http.base_url.port)) as line:
            head = f"GET {path}&wait=60 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {director.token}\r\n\r\n"
            line.sendall(head.encode())
            http.get("/v1/health")  # answered after the request above was read
            os.kill(director.pid, signal.SIGTERM)
            line.settimeout(30)
            assert line.recv(100).startswith(b"HTTP/1.1 200")
        assert ends(director.pid)


PARENT = """
import sys
from fieldlab_director import embedded
director = embedded(sys.argv[1] or None, nodes=1).start()
print(director.pid, director.folder, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kept", [True, False])
def test_no_director_outlives_the_program_that_embedded_it(tmp_path, kept):
    folder = str(tmp_path / "d") if kept else ""
    command = [sys.executable, "-c", PARENT, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        pid, folder = parent.stdout.readline().split()
        parent.kill()
    assert ends(int(pid))
    assert Path(folder).exists() is kept


def test_an_ephemeral_director_ends_its_runs_before_it_ends():
    with embedded(nodes=["a"]) as director, client(director) as http:
        submit(http)
        pid = director.pid
    assert ends(pid)


def test_it_does_not_listen_beyond_loopback_in_the_clear(tmp_path):
    with pytest.raises(ConfigurationError, match="in the clear"):
        asyncio.run(serve(Settings(data=tmp_path, host="0.0.0.0", port=0)))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"port": 99_999}, "no port 99999"),
        ({"certificate": "absent", "key": "absent"}, "absent cannot be read: No such file"),
        ({"certificate": "text", "key": "text"}, "certificate .*text and the key .*text cannot be used"),
        ({"ca": "text"}, "text has no certificate"),
        ({"data": "text"}, "data folder .*text cannot be used: File exists"),
        ({"database_url": "mysql://lab"}, "no URL of a PostgreSQL database"),
    ],
)
def test_what_it_cannot_serve_with_is_said_before_it_makes_a_user_whose_password_nobody_would_see(
    tmp_path, wrong, said
):
    (tmp_path / "text").write_text("not what is wanted")
    paths = {name: tmp_path / word if name in PATHS else word for name, word in wrong.items()}
    with pytest.raises(ConfigurationError, match=said):
        asyncio.run(serve(Settings(**{"data": tmp_path / "d", "port": 0} | paths)))
    assert not (tmp_path / "d" / "director.db").exists()


def test_a_folder_that_cannot_be_used_is_said_in_a_sentence(tmp_path, capsys):
    (tmp_path / "text").write_text("a file")
    assert main(["serve", "--data", str(tmp_path / "text")]) == 1
    assert capsys.readouterr().err.endswith("text cannot be used: File exists.\n")


def test_users_and_tokens_are_made_beside_a_running_director(tmp_path, capsys, monkeypatch):
    data = ["--data", str(tmp_path / "d")]
    with embedded(tmp_path / "d") as director:
        assert main(["user", "add", "ada", "--no-password", *data]) == 0
        capsys.readouterr()
        assert main(["token", "create", "ada", "--expires", "1h", *data]) == 0
        token = capsys.readouterr().out.strip()
        with client(director, token) as http:
            assert http.get("/v1/me").json()["user"] == "ada"
    assert main(["user", "add", "ada", "--no-password", *data]) == 1
    assert "There is a user 'ada' already" in capsys.readouterr().err
    assert main(["token", "create", "nobody", *data]) == 1


def test_the_log_has_request_ids_and_no_token(tmp_path):
    with embedded(tmp_path / "d") as director, client(director) as http:
        request_id = http.get("/v1/me").headers["x-request-id"]
        token = director.token
    log = (tmp_path / "d" / "director.log").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["endpoint"] for line in lines if line.get("request_id") == request_id] == ["whoami"]
    assert token not in log


# --- the first start -------------------------------------------------------------------------------------------------


class Served:
    """``fieldlab-director serve`` as anybody runs it, and what it says."""

    def __init__(self, folder, *words):
        command = [sys.executable, "-m", "fieldlab_director", "serve", "--data", str(folder), "--port", "0", *words]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.said = ""
        deadline = time.monotonic() + 60
        while "answers at" not in self.said:
            assert time.monotonic() < deadline, self.said
            line = self.process.stdout.readline()
            assert line, self.said
            self.said += line
        self.url = self.said.split("answers at ")[1].split()[0]

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.said += self.process.stdout.read()
        assert self.process.wait(60) == 0


def test_the_first_start_says_once_how_to_log_in_and_writes_it_nowhere(tmp_path):
    folder = tmp_path / "d"
    first = Served(folder)
    first.stop()
    user, password = re.search(r"fl\.Client\.login\('http://[^']*', '([^']*)', '([^']*)'\)", first.said).groups()
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert password.encode() not in written
    again = Served(folder)
    try:
        answer = httpx2.post(f"{again.url}/v1/login", json={"user": user, "password": password}, trust_env=False)
        assert (answer.status_code, answer.json()["role"]) == (201, "admin")
        headers = {"Authorization": f"Bearer {answer.json()['token']}"}
        asked = httpx2.get(f"{again.url}/v1/experiments/none", headers=headers, trust_env=False)
    finally:
        again.stop()
    assert "password" not in again.said
    lines = [json.loads(line) for line in (folder / "director.log").read_text().splitlines()]
    [line] = [one for one in lines if one.get("request_id") == asked.headers["x-request-id"]]
    assert (line["user"], line["experiment"], line["endpoint"], line["status"]) == ("admin", "none", "experiment", 404)
    assert not any(secret in str(lines) for secret in (password, answer.json()["token"]))


def test_when_it_stops_readiness_goes_first_and_what_was_begun_ends_well(tmp_path):
    served = Served(tmp_path / "d", "--bootstrap", "me", "--stop-delay", "4")
    token = (tmp_path / "d" / "token").read_text().strip()
    blob = b"half" * 2
    digest = hashlib.sha256(blob).hexdigest()
    where = urlsplit(served.url)
    with (
        socket.create_connection((where.hostname, where.port), timeout=60) as line,
        httpx2.Client(trust_env=False) as http,
    ):
        line.sendall(
            f"PUT /v1/blobs/{digest}?offset=0&size=8 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
            "Content-Length: 8\r\n\r\nhalf".encode()
        )
        served.process.send_signal(signal.SIGTERM)
        while http.get(f"{served.url}/readyz").status_code != 503:
            pass
        assert http.get(f"{served.url}/healthz").status_code == 200
        line.sendall(b"half")
        assert b" 200 OK" in line.recv(65536)
    served.stop()

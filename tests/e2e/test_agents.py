"""A machine that dials out, as its owner sees it: one line to paste, and whatever happens to it, nothing is lost."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fieldlab as fl
import netlab
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from greeting import greet

PATIENCE = 60.0


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[netlab.Netlab]:
    if why := netlab.missing():
        pytest.skip(why)
    with contextlib.closing(netlab.Netlab(tmp_path / "lab")) as made:
        yield made


def certificate(folder: Path, address: str) -> Path:
    """A certificate that nobody has signed but itself, and its key beside it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a lab's director")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "director.key").write_bytes(private)
    (folder / "director.pem").write_bytes(made.public_bytes(pem))
    return folder / "director.pem"


@pytest.fixture
def client(lab: netlab.Netlab, tmp_path: Path) -> Iterator[fl.Client]:
    """Of a director on the lab's network, with TLS that only itself vouches for."""
    trusted = certificate(tmp_path, lab.here)
    heard, said = os.pipe()
    serving = subprocess.Popen(
        [
            *(sys.executable, "-m", "fieldlab_director", "serve", "--data", str(tmp_path / "director")),
            *("--host", lab.here, "--port", "0", "--bootstrap", "owner", "--ready-fd", str(said)),
            *("--certificate", str(trusted), "--key", str(tmp_path / "director.key")),
        ],
        pass_fds=(said,),
        stderr=subprocess.DEVNULL,
    )
    os.close(said)
    try:
        with open(heard) as ready:
            told = json.loads(ready.readline())
        with fl.Client(told["url"], token=told["token"], ca=str(trusted)) as made:
            yield made
    finally:
        serving.send_signal(signal.SIGTERM)
        serving.wait(PATIENCE)


def start(host: netlab.Host, command: str) -> subprocess.Popen[bytes]:
    log = (host.folder / "agent.log").open("ab")
    return subprocess.Popen(host.command("sh", "-c", f"cd {host.home} && {command}"), stdout=log, stderr=log)


def test_a_machine_joins_is_cut_off_is_killed_comes_back_and_loses_nothing(
    client: fl.Client, lab: netlab.Netlab, tmp_path: Path
) -> None:
    host = lab.host("pi")
    field = client.infrastructures.attach("field", fl.Agents())
    agent = start(host, field.join_command(uses=1) + ' --properties \'{"site": "roof"}\'')
    while not client.nodes():
        assert agent.poll() is None, (host.folder / "agent.log").read_text()
    assert [(node.name, node["site"]) for node in client.nodes()] == [("pi", "roof")]

    with fl.DAG("d") as dag:
        greet()
    run = client.submit(fl.Experiment("greetings").map(dag, client.nodes()))
    run.events.wait("here", timeout=PATIENCE)
    assert "flj_" not in host.run("ps", "ax", "-o", "args")  # the token is not in the list of processes
    host.cut()
    host.run("pkill", "-KILL", "-f", "fieldlab_executor.*agent")
    agent.wait(PATIENCE)
    run.events.send("go")
    host.mend()
    again = start(host, "exec python3 fieldlab.pyz agent")
    assert run.wait(timeout=PATIENCE) is fl.ExperimentState.SUCCEEDED, run.results
    assert run.results["pi"]["greet"].value == "pi"
    assert len(run.artifacts.download(tmp_path / "out")) == 1

    assert [one.state for one in field.agents()] == ["connected"]
    field.remove_agent("pi")
    assert again.wait(PATIENCE) == 5
    assert "Join again" in (host.folder / "agent.log").read_text()
    # It may be listed for a while yet, for the run that had it.
    assert not [node for node in client.nodes() if node.availability is not fl.Availability.OFFLINE]


def test_who_stands_between_is_found_when_a_machine_joins(client: fl.Client, lab: netlab.Netlab) -> None:
    host = lab.host("pi")
    field = client.infrastructures.attach("field", fl.Agents())
    command, _, pin = field.join_command().rpartition(".")
    agent = start(host, f"{command}.{pin[::-1]}")
    assert agent.wait(PATIENCE) == 1
    assert "has another certificate than the join command names" in (host.folder / "agent.log").read_text()
    assert len(client.nodes()) == 0

"""A director with TLS by a CA of its own, which its nodes reach through an HTTP proxy only: everything works."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import fieldlab as fl
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from .proxy import Tunnel

NAME = "director.test"  # what no resolver knows: only the proxy gets there


@contextmanager
def served(folder: Path, ca: Path, certificate: Path, key: Path, env: dict[str, str]) -> Iterator[tuple[str, str]]:
    """A director: where it listens, and the token of its admin."""
    ready, told = os.pipe()
    command = [sys.executable, "-m", "fieldlab_director", "serve", "--data", str(folder), "--port", "0"]
    command += ["--certificate", str(certificate), "--key", str(key), "--ca", str(ca)]
    command += ["--advertise", f"https://{NAME}:443", "--bootstrap", "me", "--ready-fd", str(told)]
    with subprocess.Popen(command, env={**os.environ, **env}, pass_fds=[told], stderr=subprocess.PIPE) as process:
        os.close(told)
        try:
            with os.fdopen(ready) as pipe:
                where = json.loads(pipe.readline())
            yield where["url"], where["token"]
        finally:
            process.terminate()


@pytest.fixture
def tunnel() -> Iterator[Tunnel]:
    made = Tunnel()
    yield made
    made.close()


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _private(folder: Path) -> tuple[Path, Path, Path]:
    """A CA, a certificate of the director that it signed, and that one's key: files of PEM."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    names = [x509.DNSName(NAME), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    use = {name: name == "key_cert_sign" for name in KEY_USES}
    ca = (
        _builder("an authority", ca_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**use), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    certificate = (
        _builder("a director", key)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(issuer, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    files = (ca.public_bytes(form[0]), certificate.public_bytes(form[0]), key.private_bytes(*form))
    paths = folder / "ca.pem", folder / "director.pem", folder / "director.key"
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    return paths


KEY_USES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def _builder(name: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name("an authority"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


@fl.task
def answer(*, ctx: fl.TaskContext) -> int:
    print("working")
    Path(ctx.artifact("trace")).write_text("x" * 100_000)
    return ctx.events.wait("go", timeout=60)[0].data


def test_executors_report_through_a_proxy_and_trust_the_directors_own_ca(tunnel: Tunnel, tmp_path: Path) -> None:
    ca, certificate, key = _private(tmp_path)
    env = {"https_proxy": f"http://127.0.0.1:{tunnel.port}", "no_proxy": "elsewhere.test"}
    with served(tmp_path / "director", ca, certificate, key, env) as (url, token):
        tunnel.target = urlsplit(url).port or 0
        with fl.Client(url, token=token, ca=str(ca)) as client:
            client.infrastructures.attach("here", fl.Local(nodes=["a"]))
            with fl.DAG("behind") as dag:
                answer()
            run = client.submit(fl.Experiment("behind").map(dag, client.nodes()))
            run.events.send("go", 42)
            assert run.wait(timeout=90) is fl.ExperimentState.SUCCEEDED, run.results
            assert run.results["a"]["answer"].value == 42
            assert len(run.artifacts.download(tmp_path / "out")) == 1
    assert set(tunnel.asked) == {f"CONNECT {NAME}:443 HTTP/1.0"} or set(tunnel.asked) == {
        f"CONNECT {NAME}:443 HTTP/1.1"
    }
    assert len(tunnel.asked) >= 3  # control, logs and the poll each have a connection of their own


def test_a_ca_that_cannot_be_read_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing of the kind")
    command = [sys.executable, "-m", "fieldlab_director", "serve", "--data", str(tmp_path / "d"), "--port", "0"]
    done = subprocess.run([*command, "--ca", str(tmp_path / "ca.pem")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ca.pem has no certificate" in done.stderr

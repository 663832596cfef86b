"""What lies between the client and a director: TLS with every kind of wrong certificate, proxies, threads and forks."""

from __future__ import annotations

import datetime as dt
import ipaddress
import multiprocessing
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fieldlab as fl
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fieldlab_common import protocol as p
from fieldlab_common import wire

HEALTH = wire.dumps(p.Health(version="9"))
NOW = dt.datetime.now(dt.UTC)


def good(x: Any) -> None:
    """What health answers."""
    x.answer(HEALTH)


class Authority:
    """A CA of the test's own: it writes certificates, and server contexts with them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._key = folder, ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a lab's own CA")])
        self.file = folder / "ca.pem"
        ca = self._sign(self._name, self._key, [], (-1, 1), authority=True)
        self.file.write_bytes(ca.public_bytes(serialization.Encoding.PEM))

    def serving(self, *names: str, days: tuple[int, int] = (-1, 1), signed: bool = True) -> ssl.SSLContext:
        """The context of a server with a certificate for those names, valid from day to day."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "director")])
        made = self._sign(subject, key, list(names), days, issuer_key=None if signed else key)
        pem = self._folder / "server.pem"
        pem.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + made.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        return context

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        names: list[str],
        days: tuple[int, int],
        *,
        authority: bool = False,
        issuer_key: ec.EllipticCurvePrivateKey | None = None,
    ) -> x509.Certificate:
        alternatives = [x509.IPAddress(ipaddress.ip_address(n)) if n[0].isdigit() else x509.DNSName(n) for n in names]
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if issuer_key else self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW + dt.timedelta(days=days[0]))
            .not_valid_after(NOW + dt.timedelta(days=days[1]))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return builder.sign(issuer_key or self._key, hashes.SHA256())


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


# --- TLS --------------------------------------------------------------------------------------------------------------


def test_a_director_with_a_certificate_of_the_labs_own_ca_is_believed(serve: Any, authority: Authority) -> None:
    server = serve(good, tls=authority.serving("127.0.0.1"))
    with fl.Client(server.url, "t", ca=str(authority.file)) as client:
        assert client.health().version == "9"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"names": ["127.0.0.1"], "days": (-9, -2)}, "has expired.*clock.*admin"),
        ({"names": ["127.0.0.1"], "days": (2, 9)}, "is not valid yet.*clock"),
        ({"names": ["127.0.0.1"], "signed": False}, r"signed by itself.*Client\(ca=\.\.\.\)"),
        ({"names": ["10.9.8.7"]}, "is for another address.*name that is in the certificate"),
        ({"names": ["elsewhere.test"]}, "is for another address"),
    ],
    ids=["expired", "not-yet", "self-signed", "other-address", "other-name"],
)
def test_a_wrong_certificate_is_refused_with_what_to_do(
    options: dict[str, Any], words: str, serve: Any, authority: Authority
) -> None:
    server = serve(good, tls=authority.serving(*options.pop("names"), **options))
    with fl.Client(server.url, "a-secret-token", ca=str(authority.file)) as client:
        with pytest.raises(fl.CertificateRefused, match=words) as caught:
            client.health()
        assert server.url in str(caught.value)
    assert not server.seen  # the token did not go there


def test_a_certificate_of_an_unknown_authority_says_how_to_make_it_known(serve: Any, authority: Authority) -> None:
    server = serve(good, tls=authority.serving("127.0.0.1"))
    with (
        fl.Client(server.url, "t") as client,
        pytest.raises(fl.CertificateRefused, match=r"authority that this machine does not know.*Client\(ca=\.\.\.\)"),
    ):
        client.health()


def test_a_name_that_is_not_in_the_certificate_is_said(serve: Any, authority: Authority) -> None:
    server = serve(good, tls=authority.serving("director.test"))
    endpoint = f"https://localhost:{server.port}"
    with (
        fl.Client(endpoint, "t", ca=str(authority.file)) as client,
        pytest.raises(fl.CertificateRefused, match="is for another name"),
    ):
        client.health()


def test_tls_with_what_does_not_speak_it_says_so(serve: Any) -> None:
    server = serve(good)
    with (
        fl.Client(server.url.replace("http:", "https:"), "t") as client,
        pytest.raises(fl.DirectorUnreachable, match="http"),
    ):
        client.health()


def test_a_ca_file_that_is_none_is_a_matter_of_configuration(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for name in ("ca.pem", "not-there.pem"):
        client = fl.Client("https://127.0.0.1:9", "t", ca=str(tmp_path / name))
        with pytest.raises(fl.ConfigurationError, match=r"CA file"):
            client.health()


# --- proxies ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch


def test_a_proxy_of_the_environment_is_asked(serve: Any, environment: pytest.MonkeyPatch) -> None:
    proxy = serve(good)
    environment.setenv("HTTP_PROXY", proxy.url)
    with fl.Client("http://director.test", "t") as client:
        assert client.health().version == "9"
    assert proxy.seen[0].target == "http://director.test/v1/health"


def test_who_is_reached_without_the_proxy_is_not_asked_for_there(serve: Any, environment: pytest.MonkeyPatch) -> None:
    proxy = serve(good)
    environment.setenv("HTTP_PROXY", proxy.url)
    environment.setenv("NO_PROXY", "director.invalid")
    with fl.Client("http://director.invalid", "t") as client, pytest.raises(fl.DirectorUnreachable):
        client.health()
    assert not proxy.seen


def tunnel(port: int) -> Any:
    """A proxy's answer to CONNECT: everything is carried to that port, both ways."""

    def play(x: Any) -> None:
        with socket.create_connection(("127.0.0.1", port)) as far:
            x.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_carry, args=(far, x.socket), daemon=True)
            back.start()
            _carry(x.socket, far)
            back.join(30)

    return play


def _carry(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return


def test_tls_goes_through_a_proxy_to_the_director_itself(
    serve: Any, authority: Authority, environment: pytest.MonkeyPatch
) -> None:
    director = serve(good, tls=authority.serving("director.test"))
    proxy = serve(tunnel(director.port))
    environment.setenv("HTTPS_PROXY", proxy.url)
    with fl.Client("https://director.test", "t", ca=str(authority.file)) as client:
        assert client.health().version == "9"
    assert (proxy.seen[0].method, proxy.seen[0].target) == ("CONNECT", "director.test:443")
    assert "authorization" not in proxy.seen[0].headers


@pytest.mark.parametrize("status", [407, 403, 502])
def test_a_proxy_that_refuses_is_named_as_the_one_who_does(
    status: int, serve: Any, environment: pytest.MonkeyPatch
) -> None:
    proxy = serve(lambda x: x.answer(b"", "", status))
    environment.setenv("HTTPS_PROXY", proxy.url)
    with (
        fl.Client("https://director.test", "t") as client,
        pytest.raises(fl.DirectorUnreachable, match=r"The proxy before https://director\.test refused.*HTTPS_PROXY"),
    ):
        client.health()


def test_a_proxy_where_nobody_listens_is_named(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HTTPS_PROXY", "http://user:password@127.0.0.1:9")
    with (
        fl.Client("https://director.test", "t") as client,
        pytest.raises(fl.DirectorUnreachable, match=r"through the proxy 127\.0\.0\.1:9") as caught,
    ):
        client.health()
    assert "password" not in str(caught.value)


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "gopher://127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used_is_a_matter_of_configuration(proxy: str, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("ALL_PROXY", proxy)
    client = fl.Client("https://director.test", "t")
    with pytest.raises(fl.ConfigurationError, match="ALL_PROXY"):
        client.health()


# --- threads and forks ------------------------------------------------------------------------------------------------


def echo(x: Any) -> None:
    """It answers with what was asked for, so that an answer that went to another is seen."""
    x.answer(wire.dumps(p.ExperimentInfo(id=x.target.rpartition("/")[2], name="e", state=fl.ExperimentState.RUNNING)))


def test_threads_share_a_client_and_each_gets_its_own_answer(serve: Any) -> None:
    server = serve(echo)
    with fl.Client(server.url, "t") as client, ThreadPoolExecutor(16) as pool:
        names = [f"e{n}" for n in range(200)]
        assert list(pool.map(lambda name: client.run(name).id, names)) == names


def test_a_client_that_was_closed_opens_again(serve: Any) -> None:
    client = fl.Client(serve(good).url, "t")
    client.health()
    client.close()
    assert client.health().version == "9"
    client.close()


def _in_child(client: fl.Client, names: list[str], found: Any) -> None:
    found.put([client.run(name).id for name in names])


def test_the_child_of_a_fork_has_connections_of_its_own(serve: Any) -> None:
    server = serve(echo)
    context = multiprocessing.get_context("fork")
    with fl.Client(server.url, "t") as client:
        client.run("before")  # a connection is open, and kept
        found: Any = context.Queue()
        children = [
            context.Process(target=_in_child, args=(client, [f"c{k}-{n}" for n in range(20)], found)) for k in (0, 1)
        ]
        for child in children:
            child.start()
        assert [client.run(f"p{n}").id for n in range(20)] == [f"p{n}" for n in range(20)]
        answers = sorted(found.get(timeout=60) for _ in children)
        for child in children:
            child.join(60)
    assert answers == [[f"c{k}-{n}" for n in range(20)] for k in (0, 1)]


def test_a_fork_while_a_thread_holds_the_clients_lock_does_not_lock_the_child(serve: Any) -> None:
    server = serve(echo)
    context = multiprocessing.get_context("fork")
    with fl.Client(server.url, "t") as client:
        found: Any = context.Queue()
        child = context.Process(target=_in_child, args=(client, ["x"], found))
        with client._session._transport._lock:  # type: ignore[attr-defined]
            child.start()
        assert found.get(timeout=60) == ["x"]
        child.join(60)

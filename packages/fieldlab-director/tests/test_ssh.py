"""What is particular to hosts behind SSH, with real OpenSSH servers in network namespaces."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import netlab
import pytest
from fieldlab_common.errors import ConnectorError
from fieldlab_common.node import Availability
from fieldlab_common.protocol import CheckLine, Launch
from fieldlab_director.addresses import AddressPolicy
from fieldlab_director.connectors import base as b
from fieldlab_director.connectors.host import ConnectorProcess

Ask = Callable[..., Awaitable[Any]]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[netlab.Netlab]:
    if why := netlab.missing():
        pytest.skip(why)
    with contextlib.closing(netlab.Netlab(tmp_path_factory.mktemp("netlab"))) as made:
        yield made


@pytest.fixture(scope="module")
def key(lab: netlab.Netlab) -> str:
    private, public = netlab.keypair(lab.folder)
    for name, settings in (("one", ""), ("two", ""), ("bare", "SetEnv PATH=/nowhere")):
        lab.host(name, settings=settings).authorize(public)
    return private


@pytest.fixture
def ask(lab: netlab.Netlab, key: str, tmp_path: Path, executable: Path) -> Callable[..., Any]:
    """The answer of a connector with some options to some calls."""

    def run(*calls: tuple[str, Any], **options: Any) -> list[Any]:
        names = options.pop("nodes", ["one"])
        hosts = [{"name": h.name, "host": h.address, "user": "root"} for h in lab.hosts if h.name in names]
        given = {"hosts": hosts, "key": key, "host_keys": [host.public_key for host in lab.hosts], **options}
        policy = AddressPolicy(guarded=True)
        opening = b.Opening(
            infrastructure="lab",
            folder=str(tmp_path / "i1"),
            executable=str(executable),
            options=given,
            addresses=policy,
        )

        async def main() -> list[Any]:
            process = ConnectorProcess("ssh", opening, notice=lambda _: None)
            try:
                return [await process.call(method, request) for method, request in calls]
            finally:
                await process.close()

        return asyncio.run(main())

    return run


def failed(checked: b.Checked) -> CheckLine:
    """Why no node can be used."""
    line = checked.hopeless()
    assert line is not None, checked
    return line


CHECK, NODES = ("check", b.Nothing()), ("nodes", b.Nothing())


def test_a_host_whose_key_was_not_given_is_refused_with_the_line_to_add(
    ask: Callable[..., Any], lab: netlab.Netlab
) -> None:
    line = failed(*ask(CHECK, host_keys=[]))
    assert line.what == "host key"
    assert "host key that was not given. It has SHA256:" in line.said
    assert lab.hosts[0].public_key in line.advice
    another = lab.hosts[1].public_key.replace(lab.hosts[1].address, lab.hosts[0].address)
    (checked,) = ask(CHECK, host_keys=[another], key=None)
    assert failed(checked).what == "host key"
    assert not checked.pending


def test_without_a_key_the_directors_own_is_to_be_let_in_and_stays_the_same(
    ask: Callable[..., Any], lab: netlab.Netlab, tmp_path: Path
) -> None:
    (checked,) = ask(CHECK, key=None)
    line = failed(checked)
    assert (line.what, checked.pending) == ("login", True)
    assert "did not let the director in" in line.said
    public = line.advice.split(": ", 1)[1]
    assert public.startswith("ssh-ed25519 ")
    assert (tmp_path / "i1" / "id_ed25519").stat().st_mode & 0o777 == 0o600
    lab.hosts[0].authorize(public)
    (checked,) = ask(CHECK, key=None)
    assert checked.hopeless() is None
    assert not checked.pending


def test_a_password_or_key_that_is_wrong_is_not_said_again(ask: Callable[..., Any]) -> None:
    (checked,) = ask(CHECK, key=None, password="correct horse")
    assert failed(checked).what == "login"
    assert not checked.pending
    assert "horse" not in str(checked)
    with pytest.raises(ConnectorError, match="key cannot be used") as caught:
        ask(CHECK, key="not a key at all")
    assert "not a key at all" not in str(caught.value)


def test_a_host_that_is_off_is_a_node_that_is_offline_and_the_other_one_works(
    ask: Callable[..., Any], lab: netlab.Netlab
) -> None:
    lab.hosts[1].switch_off()
    try:
        checked, listed = ask(CHECK, NODES, nodes=["one", "two"])
    finally:
        lab.hosts[1].switch_on()
    assert checked.hopeless() is None
    assert [(line.node, line.what) for line in checked.lines if not line.ok] == [("two", "reachable")]
    assert [node.availability for node in listed.nodes] == [Availability.AVAILABLE, Availability.OFFLINE]
    assert "cannot be reached" in listed.nodes[1].reason
    assert [node.properties.get("hostname") for node in listed.nodes] == ["one", None]


def test_a_host_is_dialled_by_the_address_of_its_name_and_known_by_its_name(
    ask: Callable[..., Any], lab: netlab.Netlab
) -> None:
    host = lab.hosts[0]
    name = str(int(IPv4Address(host.address)))  # a name for it that takes no name server
    hosts = [{"name": "one", "host": name, "user": "root"}]
    key = host.public_key.split(" ", 1)[1]
    (listed,) = ask(NODES, hosts=hosts, host_keys=[f"{name} {key}"])
    assert listed.nodes[0].properties["hostname"] == "one"
    assert failed(*ask(CHECK, hosts=hosts, host_keys=[f"another {key}"])).what == "host key"


def test_a_host_behind_another_is_reached_through_it(ask: Callable[..., Any], lab: netlab.Netlab) -> None:
    jump = {"host": lab.hosts[1].address, "user": "root"}
    listed, checked = ask(NODES, CHECK, jump=jump)
    assert listed.nodes[0].properties["hostname"] == "one"
    assert f"through root@{lab.hosts[1].address}" in checked.lines[0].said
    assert failed(*ask(CHECK, jump={**jump, "port": 9})).what == "jump host"


def test_the_executor_is_sent_once(ask: Callable[..., Any], lab: netlab.Netlab) -> None:
    ask(CHECK)
    sent = list((lab.hosts[0].home / ".cache" / "fieldlab" / "executables").glob("*.pyz"))
    before = [path.stat().st_mtime_ns for path in sent]
    ask(CHECK)
    assert [path.stat().st_mtime_ns for path in sent] == before
    assert len(sent) == 1


def test_a_host_without_a_python_that_will_do_says_which_were_tried(ask: Callable[..., Any]) -> None:
    line = failed(*ask(CHECK, nodes=["bare"], python="mine"))
    assert "no Python 3.11 or newer among mine, python3, " in line.said


def test_a_tunnel_keeps_its_port_for_who_was_told_of_it(ask: Callable[..., Any]) -> None:
    target = b.Target(deployment="d1", node="one", epoch=1)
    launch = Launch(director="http://127.0.0.1:9", token="t", experiment="e", deployment="d1", epoch=1)
    started, stopped, _ = ask(
        ("launch", b.LaunchRequest(target=target, launch=launch)), ("stop", target), ("clean_up", target), link="tunnel"
    )
    port, *there = started.handle["tunnel"]
    assert there == ["127.0.0.1", 9]
    assert stopped == b.Stopped(tail=stopped.tail)
    again, _, _ = ask(
        ("launch", b.LaunchRequest(target=target, launch=launch)), ("stop", target), ("clean_up", target), link="tunnel"
    )
    assert again.handle["tunnel"] == [port, *there]


def test_a_tunnel_to_a_director_with_tls_is_refused_with_what_to_do(ask: Callable[..., Any]) -> None:
    target = b.Target(deployment="d1", node="one", epoch=1)
    launch = Launch(director="https://director", token="t", experiment="e", deployment="d1", epoch=1)
    with pytest.raises(ConnectorError, match="A tunnel leads to a director at a plain address"):
        ask(("launch", b.LaunchRequest(target=target, launch=launch)), link="tunnel")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hosts": []}, "1 to 1000"),
        ({"hosts": [{"name": "a", "host": "h"}]}, "with a user"),
        ({"hosts": [{"name": "a", "host": "h", "user": "u", "port": 0}]}, "a host's port"),
        ({"hosts": [{"name": "a", "host": "h", "user": "u", "colour": 1}]}, "no option colour for a host"),
        ({"hosts": [{"name": "a", "host": "h", "user": "u"}] * 2}, "two nodes of one name"),
        ({"link": "carrier pigeon"}, "direct or tunnel"),
        ({"speed": 9}, "no option speed"),
        ({"host_keys": ["nonsense"]}, "known_hosts"),
    ],
)
def test_wrong_options_are_refused_with_what_is_wrong(
    ask: Callable[..., Any], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConnectorError, match=said) as caught:
        ask(CHECK, **options)
    assert not caught.value.transient

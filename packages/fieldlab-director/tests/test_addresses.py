"""Which addresses are dialled for users: none of the director's own machine, link or cloud, whatever their spelling."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from fieldlab_common.errors import ConfigurationError, ConnectorError
from fieldlab_director.addresses import AddressPolicy, networks, refusal, resolved
from fieldlab_director.connectors.fleet import ConnectorFleet

USERS = AddressPolicy(guarded=True)


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("127.0.0.1", "a loopback address"),
        ("127.9.9.9", "a loopback address"),
        ("::1", "a loopback address"),
        ("::ffff:127.0.0.1", "a loopback address"),
        ("64:ff9b::7f00:1", "a loopback address"),
        ("2002:7f00:1::", "a loopback address"),
        ("0.0.0.0", "an unspecified address"),
        ("0.1.2.3", "an unspecified address"),
        ("::", "an unspecified address"),
        ("169.254.1.1", "a link-local address"),
        ("fe80::1%eth0", "a link-local address"),
        ("224.0.0.1", "a multicast address"),
        ("255.255.255.255", "a multicast address"),
        ("ff02::1", "a multicast address"),
        ("169.254.169.254", "a metadata address"),
        ("::ffff:169.254.169.254", "a metadata address"),
        ("fd00:ec2::254", "a metadata address"),
    ],
)
def test_an_address_that_trusts_the_director_is_not_dialled_for_users(address: str, what: str) -> None:
    assert refusal(address, USERS) == what
    assert refusal(address, AddressPolicy()) == ""


@pytest.mark.parametrize("address", ["10.0.0.7", "192.168.1.1", "fd00::7", "2001:db8::1", "198.51.100.1", "172.17.0.2"])
def test_other_addresses_are_dialled_also_private_ones(address: str) -> None:
    assert refusal(address, USERS) == ""


def test_what_an_admin_allowed_is_dialled_for_everybody() -> None:
    policy = AddressPolicy(guarded=True, allowed=networks(["127.0.0.0/30", "fe80::/10"]))
    assert [refusal(one, policy) for one in ("127.0.0.2", "::ffff:127.0.0.2", "fe80::1%eth0")] == ["", "", ""]
    assert refusal("127.0.0.4", policy) == "a loopback address"
    assert refusal("::1", policy) == "a loopback address"
    with pytest.raises(ConfigurationError, match="--allow-address"):
        networks(["127.0.0.1/8"])


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f.1", "localhost", "::1"])
def test_a_host_is_what_its_name_means_when_it_is_dialled(host: str) -> None:
    with pytest.raises(ConnectorError, match=r"a loopback address: the director does not dial that") as caught:
        asyncio.run(resolved(host, 22, USERS))
    assert not caught.value.transient
    assert "--allow-address" in caught.value.advice


def test_a_name_is_dialled_by_the_address_that_was_checked() -> None:
    assert asyncio.run(resolved("3405803777", 22, USERS)) == ("203.0.113.1",)


@pytest.mark.parametrize(
    ("trusted", "allowed", "said"),
    [
        (False, (), "does not dial that for users"),
        (False, ("127.0.0.1/32",), "cannot be reached"),
        (True, (), "cannot be reached"),
    ],
)
def test_a_connector_dials_for_users_only_what_they_may(
    tmp_path: Path, trusted: bool, allowed: tuple[str, ...], said: str
) -> None:
    host = {"name": "a", "host": "127.0.0.1", "user": "root", "port": 1}  # where nothing listens
    jump = {"host": "127.0.0.1", "user": "root", "port": 1}

    async def survey(**options: object) -> str:
        fleet = ConnectorFleet(tmp_path, tmp_path / "none.pyz", allowed=allowed)
        try:
            with pytest.raises(ConnectorError) as caught:
                await fleet.survey("i1", "lab", "ssh", {"password": "x", **options}, trusted=trusted)
            return str(caught.value)
        finally:
            await fleet.close()

    assert said in asyncio.run(survey(hosts=[host]))
    assert said in asyncio.run(survey(hosts=[{**host, "host": "192.0.2.1"}], jump=jump))
